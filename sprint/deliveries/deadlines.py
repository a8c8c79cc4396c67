"""The stream's two clocks on the event loop: one timer for all sessions' deadlines, one round for all heartbeats.

Neither costs a timer a session, and neither does more than a small slice of work in one turn of the loop, so that a
publication never waits behind thousands of them.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

DEADLINES_A_TURN: Final = 64
BEATS_A_TURN: Final = 32
"""About 300 µs of sends."""


class Timed(Protocol):
    """A session, as its clocks see it."""

    closed: bool
    timer_ns: int
    """Its one valid entry among the deadlines; 0: none."""
    beat_ns: int
    """When its next heartbeat is due."""


T = TypeVar("T", bound=Timed)


class Deadlines(Generic[T]):
    """Calls `reached(session, now)` when a session's earliest deadline is there; sessions then set the next."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, clock: Callable[[], int], reached: Callable[[T, int], None]
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._reached = reached
        self._heap: list[tuple[int, int, T]] = []
        self._timer: asyncio.TimerHandle | None = None

    def set(self, session: T, due_ns: int) -> None:
        """Have the session called at `due_ns` unless it is called earlier anyway."""
        if session.timer_ns and session.timer_ns <= due_ns:
            return
        session.timer_ns = due_ns
        heappush(self._heap, (due_ns, id(session), session))
        if self._heap[0][0] == due_ns:
            self._set_timer()

    def close(self) -> None:
        """Call nobody any more."""
        self._heap.clear()
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._heap:
            delay_ns = max(0, self._heap[0][0] - self._clock())
            self._timer = self._loop.call_later(delay_ns / 1e9, self._call)

    def _call(self) -> None:
        now = self._clock()
        for _ in range(DEADLINES_A_TURN):
            if not self._heap or self._heap[0][0] > now:
                break
            due, _, session = heappop(self._heap)
            if session.timer_ns == due and not session.closed:
                session.timer_ns = 0
                self._reached(session, now)
        self._set_timer()


class Heartbeats(Generic[T]):
    """Calls `beat(session, now)` once a period for each session; the calls spread over the period by themselves."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, clock: Callable[[], int], period_ns: int, beat: Callable[[T, int], None]
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._period_ns = period_ns
        self._beat = beat
        self._sessions: deque[T] = deque()  # in the order of their next beats
        self._timer: asyncio.TimerHandle | None = None

    def add(self, session: T) -> None:
        """From one period on from now; a session that is closed falls out by itself."""
        session.beat_ns = self._clock() + self._period_ns
        self._sessions.append(session)
        if self._timer is None:
            self._timer = self._loop.call_later(self._period_ns / 1e9, self._round)

    def close(self) -> None:
        """Call nobody any more."""
        self._sessions.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _round(self) -> None:
        now = self._clock()
        sessions = self._sessions
        for _ in range(BEATS_A_TURN):
            if not sessions or sessions[0].beat_ns > now:
                break
            session = sessions.popleft()
            if not session.closed:
                session.beat_ns = now + self._period_ns
                sessions.append(session)
                self._beat(session, now)
        self._timer = None
        if sessions:
            # Rounds at twice the pace that is needed, so that late ones are made up for; the few sessions of a small
            # server beat together instead of waking it one by one.
            pace_ns = min(self._period_ns, self._period_ns * BEATS_A_TURN // (2 * len(sessions)))
            self._timer = self._loop.call_later(max(sessions[0].beat_ns - now, pace_ns) / 1e9, self._round)
