"""What a Sprint that runs here with this configuration says of its kernel bypass: its API's words, if it answers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sprint.addresses import Address
from sprint.inquiry import NoAnswerError, fetch

if TYPE_CHECKING:
    from collections.abc import Mapping

TIMEOUT_S = 1.0
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where one that listens everywhere is reached."""


@dataclass(frozen=True, slots=True)
class RunningBypass:
    """`kernelBypass` of /api/turbo-status, as far as the doctor reads it."""

    active: bool
    mode: str
    """The worst among the interfaces."""
    interfaces: tuple[str, ...]
    packets: int
    opaque_flows: int
    reason: str
    rungs: Mapping[str, str] = field(default_factory=dict)
    """Each one's own mode, as far as it is told,"""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """and why it is no better one, or none."""


def ask(api: Address) -> RunningBypass | None:
    """None when nobody answers there, or somebody else."""
    try:
        status, body = fetch(Address(_ANY.get(api.host, api.host), api.port), "turbo-status", TIMEOUT_S)
    except NoAnswerError:
        return None
    return understand(body) if status == 200 else None


def understand(body: bytes) -> RunningBypass | None:
    """The answer's body; None if it isn't Sprint's."""
    try:
        told = json.loads(body)["kernelBypass"]
        ingest, each = told["ingest"], told.get("attached", [])
        return RunningBypass(
            active=told["active"] is True,
            mode=str(told["mode"]),
            interfaces=tuple(map(str, told["interfaces"])),
            packets=int(ingest["packets"]),
            opaque_flows=int(ingest["opaqueFlows"]),
            reason=str(told["reason"] or ""),
            rungs={str(one["interface"]): str(one["mode"]) for one in each if one["mode"]},
            reasons={str(one["interface"]): str(one["reason"]) for one in each if one["reason"]},
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
