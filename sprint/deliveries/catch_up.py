"""Whoever is not caught up gets its slices here: in turns of the loop, the highest tier first.

A turn is short, and between two turns the loop looks for new blocks: a thousand replays delay a publication by one
turn.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from sprint.tiers import NS_PER_US, Tier

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from sprint.deliveries.subscriber import Subscriber

TURN_NS: Final = 200 * NS_PER_US
"""How long one turn lasts, plus the one slice in which it ends."""
TOP_FIRST: Final = tuple(sorted(Tier, reverse=True))


class CatchUp:
    """Those who wait for a slice; `write(subscriber)` gives one, and adds the subscriber again if more is waiting."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, clock: Callable[[], int], write: Callable[[Subscriber], object]
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._write = write
        self._queues: tuple[deque[Subscriber], ...] = tuple(deque() for _ in Tier)
        self._scheduled = False

    def add(self, subscriber: Subscriber) -> None:
        """Give it a slice in its turn; one whose socket takes nothing waits for that first."""
        if subscriber.queued or subscriber.blocked:
            return
        subscriber.queued = True
        self._queues[subscriber.tier].append(subscriber)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        until = self._clock() + TURN_NS
        for tier in TOP_FIRST:
            queue = self._queues[tier]
            while queue:
                if self._clock() > until:
                    self._loop.call_soon(self._turn)
                    return
                subscriber = queue.popleft()
                subscriber.queued = False
                if not subscriber.closed and not subscriber.blocked:
                    self._write(subscriber)
        self._scheduled = False
