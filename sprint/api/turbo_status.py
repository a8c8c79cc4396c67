"""The answer of `/api/turbo-status`: the guide's keys in the guide's order, then `kernelBypass`. Pure.

Top-level values are what is in force on this instance; `performanceTargets` are the tier's own figures, except that no
mechanism is named which is switched off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sprint.durations import format_duration
from sprint.tiers import PROFILES, SlowReader, Tier, TierProfile

if TYPE_CHECKING:
    from collections.abc import Mapping

SWITCHES = {
    "useSharedMemory": "Shared Memory",
    "useDirectP2P": "Direct P2P",
    "useMemoryChannel": "Memory Channel",
    "optimizeSystem": "System Optimizations",
}
"""A switch's key in the facts → the guide's word for it among the features."""

BYPASS_KEYS = ("requested", "active", "mode", "interfaces", "reason", "ingest", "egress")
INGEST_KEYS = ("packets", "announcements", "mirrored", "express", "dropped", "opaqueFlows")
EGRESS_KEYS = ("subscribers", "sent", "dropped")


def turbo_status(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The answer for an instance with these facts (StatusBlock.facts).

    Raises KeyError when a fact is missing or names a tier that doesn't exist.
    """
    profile = PROFILES[Tier.from_label(facts["tier"])]
    kernel_bypass = _kernel_bypass(facts["kernelBypass"])
    bypassing = profile.tier is Tier.ENTERPRISE and bool(kernel_bypass["active"])
    return {
        "tier": profile.tier.label,
        "turboModeEnabled": profile.memory_engine,
        "writeDeadline": format_duration(facts["writeDeadlineNs"]),
        "useSharedMemory": facts["useSharedMemory"],
        "blockBufferSize": facts["blockBufferSize"],
        "features": _features(profile, facts, bypassing=bypassing),
        "performanceTargets": {
            "blockRelayLatency": f"<{format_duration(profile.relay_target_ns)} ({profile.tier.label.capitalize()})",
            "writeDeadline": format_duration(profile.write_deadline_ns),
            "bufferStrategy": _buffer_strategy(profile),
            "peerNotification": _peer_notification(profile, facts, bypassing=bypassing),
        },
        "kernelBypass": kernel_bypass,
    }


def _features(profile: TierProfile, facts: Mapping[str, Any], *, bypassing: bool) -> list[str]:
    features = [] if profile.memory_engine else [profile.feature]
    features += [name for switch, name in SWITCHES.items() if facts[switch]]
    return [*features, "Kernel Bypass"] if bypassing else features


def _buffer_strategy(profile: TierProfile) -> str:
    if profile.slow_reader is SlowReader.OVERWRITE:
        return "Overwrite old events (never miss)"
    return "Best effort delivery" + (", priority processing" if profile.tier is Tier.BUSINESS else "")


def _peer_notification(profile: TierProfile, facts: Mapping[str, Any], *, bypassing: bool) -> str:
    if not (profile.memory_engine and facts["useSharedMemory"]):
        return "Standard TCP relay"
    return "Zero-copy shared memory" + (" and kernel bypass" if bypassing else "")


def _kernel_bypass(facts: Mapping[str, Any]) -> dict[str, Any]:
    # `attached`, each interface by itself, is what only the process that holds the bypass can tell.
    answer = {key: facts[key] for key in (*BYPASS_KEYS, "attached") if key in facts or key in BYPASS_KEYS}
    answer["ingest"] = {key: facts["ingest"][key] for key in INGEST_KEYS}
    answer["egress"] = {key: facts["egress"][key] for key in EGRESS_KEYS}
    return answer
