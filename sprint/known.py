"""What the relay knows of a block that has been proven, and how it is told. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sprint.events import Block

if TYPE_CHECKING:
    from sprint.events import Event, Source, State


@dataclass(slots=True)
class Known:
    """One block; `state` is cumulative, and the rest stays but for what a whole block says better."""

    hash: bytes
    header: bytes
    height: int
    next_bits: int
    median_time_past: int
    state: State
    source: Source
    peer: str
    transactions: int
    size: int
    seen_ns: int

    def told(self, event: Event, wall_ns: int, fork_height: int = 0) -> Block:
        """The event, with all that is known by now: from here, not from the chain, which may have given up a side
        header since."""
        return Block(
            event, self.state, self.source, self.peer, self.hash, self.header, self.height, fork_height,
            self.next_bits, self.median_time_past, self.transactions, self.size, wall_ns, self.seen_ns,
        )  # fmt: skip
