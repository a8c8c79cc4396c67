"""The UDP feed's heartbeats: the same 28 bytes to everybody, once a period, by whichever way records go.

Whom live frames reach gets it by one run of this process's own; those on the second rung by the frames that stand
ready; everybody else by sendmmsg, one batch in each turn of the loop, so that a record never waits for more than that.
A record that is published meanwhile ends the run: it tells whom the heartbeat hasn't reached all that it would have
said, and two that send by the same queue would cost it frames.
"""

from __future__ import annotations

import os
import time
from itertools import chain
from typing import TYPE_CHECKING

from sprint.datagrams import Beat

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Sequence

    from sprint.deliveries.udp_sender import Batches, Run
    from sprint.ring import Ring


class Beats:
    """Sends heartbeats, from one period after its making on until close()."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        period_ns: int,
        ring: Ring,
        *,
        by_frames: Callable[[bytes, Callable[[], bool]], int | None],
        framed: Batches,
        others: Sequence[Batches],
        sent: Callable[[int, int], None],
    ) -> None:
        """`by_frames` sends to all whom frames reach, asking whether to go on, and says how many took it; None: those
        in `framed` have to be sent to by the socket too, as those in `others` always are. `sent` is told of how many
        heartbeats there were, and how long each was."""
        self._loop = loop
        self._period_s = period_ns / 1e9
        self._ring = ring
        self._by_frames = by_frames
        self._framed = framed
        self._others = tuple(others)
        self._sent = sent
        self._size = 0
        self._left: Iterator[Run] = iter(())
        self._next: asyncio.Handle | None = None
        self._timer = loop.call_later(self._period_s, self._round)

    def close(self) -> None:
        """Send no more."""
        self._timer.cancel()
        if self._next is not None:
            self._next.cancel()

    def _round(self) -> None:
        self._timer = self._loop.call_later(self._period_s, self._round)
        newest = self._ring.tail
        beat = Beat(self._ring.session, newest, time.time_ns()).encode()
        self._size = len(beat)

        def go_on() -> bool:
            os.sched_yield()  # whoever of this CPU's real-time processes has a record to send goes first
            return self._ring.tail == newest

        taken = self._by_frames(beat, go_on)
        if taken:
            self._sent(taken, self._size)
        late = self._others if taken is not None else (self._framed, *self._others)
        self._left = chain.from_iterable(batches.parts(beat) for batches in late)
        if self._next is None:
            self._step()

    def _step(self) -> None:
        """One batch."""
        self._next = None
        for run in self._left:
            if run.sent:
                self._sent(run.sent, self._size)
            self._next = self._loop.call_soon(self._step)
            return
