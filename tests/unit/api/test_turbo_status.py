"""`/api/turbo-status`: the guide's document to the letter, and true for the other tiers and switches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sprint.api.app import create_app
from sprint.api.turbo_status import turbo_status
from sprint.status import StatusBlock
from sprint.tiers import Tier
from tests.unit.api.conftest import facts_of

VECTORS = Path(__file__).parents[2] / "vectors" / "turbo-status"

GUIDE = """{
  "tier": "turbo",
  "turboModeEnabled": true,
  "writeDeadline": "500µs",
  "useSharedMemory": true,
  "blockBufferSize": 2048,
  "features": [
    "Shared Memory",
    "Direct P2P",
    "Memory Channel",
    "System Optimizations"
  ],
  "performanceTargets": {
    "blockRelayLatency": "<10ms (Turbo)",
    "writeDeadline": "500µs",
    "bufferStrategy": "Overwrite old events (never miss)",
    "peerNotification": "Zero-copy shared memory"
  }"""
"""The guide's example without its closing brace."""

ACTIVE_BYPASS: dict[str, Any] = {
    "requested": True,
    "active": True,
    "mode": "native",
    "interfaces": ["eth1"],
    "reason": None,
    "ingest": {"packets": 9, "announcements": 3, "mirrored": 2, "express": 3, "dropped": 1, "opaqueFlows": 4},
    "egress": {"subscribers": 10, "sent": 20, "dropped": 0},
}


def answered(facts: dict[str, Any]) -> str:
    """The body that the API sends for these facts."""
    return create_app(StatusBlock.create(1, facts)).test_client().get("/api/turbo-status").get_data(as_text=True)


def test_there_is_a_vector_for_every_tier() -> None:
    assert {path.stem for path in VECTORS.glob("*.json")} == {tier.label for tier in Tier}


@pytest.mark.parametrize("tier", Tier)
def test_the_answer_is_the_whole_document_of_the_tier(tier: Tier) -> None:
    assert answered(facts_of(tier)) == (VECTORS / f"{tier.label}.json").read_text(encoding="utf-8")


def test_turbo_answers_with_the_guide_to_the_letter_and_the_bypass_behind_it() -> None:
    text = answered(facts_of(Tier.TURBO))
    assert text.startswith(GUIDE + ',\n  "kernelBypass": {')
    document = json.loads(text)
    del document["kernelBypass"]
    assert document == json.loads(GUIDE + "}")


def test_what_is_in_force_is_told_apart_from_the_tiers_targets() -> None:
    answer = turbo_status({**facts_of(Tier.TURBO), "writeDeadlineNs": 1_200_000, "blockBufferSize": 77})
    assert answer["writeDeadline"] == "1.2ms"
    assert answer["blockBufferSize"] == 77
    assert answer["performanceTargets"]["writeDeadline"] == "500µs"


def test_a_switch_turned_off_is_no_feature() -> None:
    answer = turbo_status({**facts_of(Tier.TURBO), "useMemoryChannel": False, "optimizeSystem": False})
    assert answer["features"] == ["Shared Memory", "Direct P2P"]


def test_without_shared_memory_nobody_is_told_of_zero_copy() -> None:
    answer = turbo_status({**facts_of(Tier.ENTERPRISE), "useSharedMemory": False})
    assert answer["useSharedMemory"] is False
    assert "Shared Memory" not in answer["features"]
    assert answer["performanceTargets"]["peerNotification"] == "Standard TCP relay"


def test_a_switch_turned_on_for_a_lower_tier_stands_behind_its_own_feature() -> None:
    answer = turbo_status({**facts_of(Tier.PRO), "useDirectP2P": True})
    assert answer["features"] == ["Enhanced relay", "Direct P2P"]


def test_an_active_bypass_is_a_feature_of_enterprise() -> None:
    answer = turbo_status({**facts_of(Tier.ENTERPRISE), "kernelBypass": ACTIVE_BYPASS})
    assert answer["features"][-1] == "Kernel Bypass"
    assert answer["performanceTargets"]["peerNotification"] == "Zero-copy shared memory and kernel bypass"
    assert answer["kernelBypass"] == ACTIVE_BYPASS


def test_a_bypass_requested_but_inactive_is_no_feature() -> None:
    inactive = {**ACTIVE_BYPASS, "active": False, "mode": None, "interfaces": [], "reason": "TIER is turbo"}
    answer = turbo_status({**facts_of(Tier.TURBO), "kernelBypass": inactive})
    assert "Kernel Bypass" not in answer["features"]
    assert answer["kernelBypass"]["reason"] == "TIER is turbo"


def test_kernel_bypass_has_exactly_the_contracts_keys() -> None:
    surplus = {**ACTIVE_BYPASS, "debug": 1, "egress": {**ACTIVE_BYPASS["egress"], "debug": 1}}
    answer = turbo_status({**facts_of(Tier.ENTERPRISE), "kernelBypass": surplus})
    assert answer["kernelBypass"] == ACTIVE_BYPASS


def test_a_missing_fact_is_an_error_and_not_a_guess() -> None:
    facts = facts_of(Tier.FREE)
    del facts["useSharedMemory"]
    with pytest.raises(KeyError, match="useSharedMemory"):
        turbo_status(facts)
