"""What a Sprint that runs here with this configuration says of its kernel bypass: its API's words, if it answers."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sprint.addresses import Address

TIMEOUT_S = 1.0
MAX_ANSWER = 1 << 16
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where one that listens everywhere is reached."""


@dataclass(frozen=True, slots=True)
class RunningBypass:
    """`kernelBypass` of /api/turbo-status, as far as the doctor reads it."""

    active: bool
    mode: str
    interfaces: tuple[str, ...]
    packets: int
    opaque_flows: int
    reason: str


def ask(api: Address) -> RunningBypass | None:
    """None when nobody answers there, or somebody else."""
    connection = http.client.HTTPConnection(_ANY.get(api.host, api.host), api.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/api/turbo-status")
        answer = connection.getresponse()
        body = answer.read(MAX_ANSWER)
    except (OSError, http.client.HTTPException, UnicodeError):
        return None
    finally:
        connection.close()
    return understand(body) if answer.status == 200 else None


def understand(body: bytes) -> RunningBypass | None:
    """The answer's body; None if it isn't Sprint's."""
    try:
        told = json.loads(body)["kernelBypass"]
        ingest = told["ingest"]
        return RunningBypass(
            active=told["active"] is True,
            mode=str(told["mode"]),
            interfaces=tuple(map(str, told["interfaces"])),
            packets=int(ingest["packets"]),
            opaque_flows=int(ingest["opaqueFlows"]),
            reason=str(told["reason"] or ""),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
