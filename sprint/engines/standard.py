"""StandardSprint: one process, one asyncio loop, the ring in private memory.

Each source hangs on the loop by its descriptor and its deadline; what a turn does is in turns.py. An exception in a
turn ends run(): asyncio would log it and go on, with a relay that may be deaf.
"""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING

from sprint.tiers import NS_PER_S

if TYPE_CHECKING:
    from sprint.engines.turns import Turns
    from sprint.sources import Source


class StandardSprint:
    """Drives Turns on asyncio's loop, beside the deliveries."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._timer: asyncio.TimerHandle | None = None
        self._stop = asyncio.Event()
        self._error: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> None:
        """Run until stop(), SIGINT or SIGTERM. Raises whatever went wrong in a turn: nothing was meant to."""
        loop = self._loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
        for source in self._turns.sources:
            loop.add_reader(source.fileno(), self._turn, source)
        try:
            self._turn(None)
            await self._stop.wait()
            if self._error is not None:
                raise self._error
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for source in self._turns.sources:
                loop.remove_reader(source.fileno())
            self._turns.close()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """End run() in good order."""
        self._stop.set()

    def _turn(self, source: Source | None) -> None:
        """One source has something to say; None: the time has come to look at all of them."""
        if self._stop.is_set():
            return
        try:
            self._take_turn(source)
        except Exception as error:
            self._error = self._error or error
            self._stop.set()

    def _take_turn(self, source: Source | None) -> None:
        turns, now_ns = self._turns, time.monotonic_ns()
        if source is None:
            for one in turns.sources:
                turns.hear(one, now_ns)
            turns.on_timer(now_ns)
        else:
            turns.hear(source, now_ns)
        turns.settle(now_ns)
        self._schedule()

    def _schedule(self) -> None:
        assert self._loop is not None
        if self._timer is not None:
            self._timer.cancel()
        wait_s = max(0, self._turns.deadline() - time.monotonic_ns()) / NS_PER_S
        self._timer = self._loop.call_later(wait_s, self._turn, None)
