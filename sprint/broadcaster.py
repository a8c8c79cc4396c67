"""Turns a block event into a record in the ring, and wakes the deliveries in their order.

This is the hot path: the record is packed into its ring slot in place, and nothing is logged, locked or allocated
beyond what struct needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from sprint.events import State
from sprint.record import LAYOUT, MAGIC

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sprint.events import Block
    from sprint.ring import RingWriter


class Publishes(Protocol):
    """A delivery, as the broadcaster sees it."""

    def publish(self) -> None:
        """The ring has grown: send what is new."""


class Broadcaster:
    """The ring's one writer."""

    def __init__(
        self, writer: RingWriter, network_magic: bytes, deliveries: Sequence[Publishes], clock: Callable[[], int]
    ) -> None:
        """`clock` gives CLOCK_MONOTONIC ns; `deliveries` are woken in this order, the quickest first."""
        self._writer = writer
        self._magic = network_magic
        self._session = writer.ring.session
        self._deliveries = tuple(deliveries)
        self._clock = clock

    def write(self, block: Block) -> int:
        """Put the block's record into the ring; returns its sequence. Deliveries are not woken yet."""
        writer = self._writer
        sequence = writer.next_sequence
        slot = writer.claim()
        LAYOUT.pack_into(
            slot, 0, MAGIC, self._magic, self._session, sequence, block.event, block.source, block.state,
            block.height, block.fork_height, block.next_bits, block.median_time_past, block.transactions, block.size,
            0, block.wall_ns, block.hash, block.header, block.seen_ns, self._clock(),
        )  # fmt: skip
        writer.commit(best=bool(block.state & State.BEST))
        return sequence

    def wake(self) -> None:
        """Tell every delivery that the ring has grown."""
        for delivery in self._deliveries:
            delivery.publish()
