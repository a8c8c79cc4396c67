"""What the doctor says: findings, what of them a configuration needs, and the verdict. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from sprint.composition import bypass_reason, bypass_wanted
from sprint.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from sprint.config import Config

MAX_TEXT = 600
"""Letters of a detail or remedy: an error message of the machine's may be any length."""


class State(Enum):
    """How well a thing serves Sprint, whether or not the configuration needs it."""

    OK = "ok"
    DEGRADED = "degraded"
    """Sprint runs with it, but later, or with less."""
    MISSING = "missing"
    """What it is for can't be had."""
    UNKNOWN = "unknown"
    """It could not be looked at."""


class Need(Enum):
    """What a configuration asks of the host."""

    FEED = "a node to hear from"
    MEMORY = "the memory-optimised engine"
    BYPASS = "the kernel bypass"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line."""

    check: str
    subject: str
    """What was looked at: an interface, a node, a capability; empty where the check has only one."""
    state: State
    detail: str
    """The fact, then why it matters."""
    remedy: str = ""
    """A command or a setting; empty where there is nothing to be done."""
    need: Need | None = None
    """What can't be had if this is missing; None: nothing that anybody was promised."""

    @property
    def name(self) -> str:
        """Check and subject."""
        return f"{self.check} {self.subject}".rstrip()


def printable(text: str) -> str:
    """One line, at most MAX_TEXT letters, without control characters: a peer or a driver may have written it."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[: MAX_TEXT + 1])
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 1] + "…"


def as_dicts(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """For JSON: `check`, `subject`, `state` (ok, degraded, missing, unknown), `detail`, `remedy`."""
    return [
        {
            "check": each.check,
            "subject": each.subject,
            "state": each.state.value,
            "detail": printable(each.detail),
            "remedy": printable(each.remedy),
        }
        for each in findings
    ]


def needs_of(config: Config) -> frozenset[Need]:
    """What the configuration asks of the host."""
    needs = {Need.FEED}
    if config.use_shared_memory:
        needs.add(Need.MEMORY)
        if bypass_wanted(config):
            needs.add(Need.BYPASS)
    return frozenset(needs)


def verdict(findings: Sequence[Finding], config: Config) -> Finding:
    """Whether the host can do what the configured tier promises; MISSING is the exit code 1."""
    needs = needs_of(config)
    promised = ", ".join(need.value for need in Need if need in needs)
    lacking = _names(findings, {State.MISSING}, needs)
    check, subject, can = "tier", config.tier.label, f"this host can do what the configuration promises ({promised})"
    if lacking:
        detail = f"{can.replace('can', 'cannot', 1)}; missing: {', '.join(lacking)}"
        return Finding(check, subject, State.MISSING, detail, "the remedies of what is missing")
    worse = _names(findings, {State.DEGRADED, State.UNKNOWN}, needs)
    if worse:
        detail = f"this host can do what the configuration promises ({promised}); to be looked at: {', '.join(worse)}"
        return Finding("tier", config.tier.label, State.DEGRADED, detail, "the remedies of what is to be looked at")
    return Finding(
        "tier", config.tier.label, State.OK, f"this host can do what the configuration promises ({promised})"
    )


def _names(findings: Sequence[Finding], states: Collection[State], needs: Collection[Need]) -> list[str]:
    return list(dict.fromkeys(each.name for each in findings if each.state in states and each.need in needs))


def exit_code(findings: Sequence[Finding]) -> int:
    """0 when the verdict among them is that the host will do, else 1."""
    return int(any(each.check == "tier" and each.state is State.MISSING for each in findings))


def bypass_request(config: Config) -> Finding:
    """What the configuration says about the kernel bypass."""
    check, subject = "kernel bypass", "configuration"
    reason = bypass_reason(config)
    if Need.BYPASS in needs_of(config):
        return Finding(check, subject, State.OK, f"asked for, by {' and '.join(config.capture)}")
    if config.enable_kernel_bypass:
        remedy = "TIER=enterprise and USE_SHARED_MEMORY=true, or ENABLE_KERNEL_BYPASS=false"
        return Finding(check, subject, State.DEGRADED, f"asked for in vain: {reason}", remedy)
    if config.tier is Tier.ENTERPRISE:
        detail = f"{reason}: plain sockets are all that enterprise hears by"
        return Finding(check, subject, State.DEGRADED, detail, "ENABLE_KERNEL_BYPASS=true")
    return Finding(check, subject, State.OK, f"not asked for ({reason}): what it needs is told below all the same")
