"""Where Sprint hears of blocks: each module turns one kind of input into sightings.

All offer the interface of Source, and none knows what drives it: asyncio in the standard engine, a loop of its own in
the memory-optimised one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from sprint.events import BlockRebuilt, HeaderRun, MessagesMissed, PeerGone, PeerReady, Sighting, Want

    Heard = Sighting | HeaderRun | PeerReady | PeerGone | MessagesMissed | BlockRebuilt


class Source(Protocol):
    """One input of the relay."""

    def fileno(self) -> int:
        """One descriptor, readable when poll() has something to do."""

    def poll(self, now_ns: int) -> list[Heard]:
        """Do what the sockets and the clock ask for, without blocking; returns what was heard, in order."""

    def deadline(self) -> int | None:
        """When poll() is to be called even if nothing is readable, CLOCK_MONOTONIC ns."""

    def want(self, want: Want, now_ns: int) -> None:
        """Put the relay's question to one of this source's peers; one that isn't its own is none of its business."""

    def account(self) -> None:
        """Bring this source's rows of the status block up to date."""

    def close(self) -> None:
        """Let go of all sockets."""
