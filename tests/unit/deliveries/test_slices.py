"""No turn of the loop does more than a slice of work: catching up, heartbeats and deadlines, on a loop of paper."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from sprint.deliveries.catch_up import TURN_NS, CatchUp
from sprint.deliveries.deadlines import BEATS_A_TURN, DEADLINES_A_TURN, Deadlines, Heartbeats
from sprint.tiers import Tier

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from sprint.deliveries.subscriber import Subscriber

SECOND = 1_000_000_000


@dataclass
class Call:
    at_ns: int
    call: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class PaperLoop:
    """Time passes only where the test says so."""

    def __init__(self) -> None:
        self.now = 1_000 * SECOND
        self.calls: list[Call] = []

    def call_soon(self, call: Callable[[], None]) -> Call:
        return self.call_later(0, call)

    def call_later(self, delay: float, call: Callable[[], None]) -> Call:
        self.calls.append(Call(self.now + round(delay * 1e9), call))
        return self.calls[-1]

    def turn(self) -> bool:
        """Move on to the next call and make it; False when there is none."""
        waiting = sorted((call for call in self.calls if not call.cancelled), key=lambda call: call.at_ns)
        if not waiting:
            return False
        self.calls.remove(waiting[0])
        self.now = max(self.now, waiting[0].at_ns)
        waiting[0].call()
        return True

    @property
    def as_loop(self) -> asyncio.AbstractEventLoop:
        return cast("asyncio.AbstractEventLoop", self)


@dataclass(eq=False)
class Paper:
    tier: Tier = Tier.FREE
    closed: bool = False
    blocked: bool = False
    queued: bool = False
    timer_ns: int = 0
    beat_ns: int = 0


def catching_up(loop: PaperLoop, write: Callable[[Any], object]) -> tuple[CatchUp, Callable[[Paper], None]]:
    catch_up = CatchUp(loop.as_loop, lambda: loop.now, write)
    return catch_up, lambda paper: catch_up.add(cast("Subscriber", paper))


def test_a_turn_of_catching_up_ends_when_its_time_is_over() -> None:
    loop = PaperLoop()
    written: list[Any] = []

    def write(subscriber: object) -> None:
        loop.now += TURN_NS // 2
        written.append(subscriber)

    _, add = catching_up(loop, write)
    for _ in range(10):
        add(Paper())
    turns = []
    while loop.turn():
        turns.append(len(written))
    assert turns == [3, 6, 9, 10]
    assert len(set(map(id, written))) == 10


def test_the_highest_tier_catches_up_first_however_often_it_comes_again() -> None:
    loop = PaperLoop()
    written: list[Tier] = []

    def write(subscriber: Any) -> None:
        written.append(subscriber.tier)
        if written.count(Tier.ENTERPRISE) < 3:
            add(subscriber)

    _, add = catching_up(loop, write)
    add(Paper(Tier.FREE))
    add(Paper(Tier.ENTERPRISE))
    while loop.turn():
        pass
    assert written == [Tier.ENTERPRISE] * 3 + [Tier.FREE]


def test_nobody_is_written_to_who_closed_or_was_refused_meanwhile() -> None:
    loop = PaperLoop()
    written: list[Any] = []
    _, add = catching_up(loop, written.append)
    gone, refused, waiting = Paper(), Paper(), Paper()
    for paper in (gone, refused, waiting, waiting):
        add(paper)
    gone.closed = refused.blocked = True
    while loop.turn():
        pass
    assert written == [waiting]


def test_thousands_of_heartbeats_come_in_slices_and_each_once_a_period() -> None:
    loop = PaperLoop()
    beaten: list[tuple[int, int]] = []
    beats: Heartbeats[Paper] = Heartbeats(
        loop.as_loop, lambda: loop.now, SECOND, lambda paper, now: beaten.append((id(paper), now))
    )
    papers = [Paper() for _ in range(5000)]
    for paper in papers:
        beats.add(paper)
    start = loop.now
    while loop.now < start + 4 * SECOND:
        before = len(beaten)
        loop.turn()
        assert len(beaten) - before <= BEATS_A_TURN
    times: dict[int, list[int]] = {id(paper): [] for paper in papers}
    for name, now in beaten:
        times[name].append(now)
    gaps = [later - earlier for beat in times.values() for earlier, later in itertools.pairwise(beat)]
    assert min(gaps) >= SECOND
    assert max(gaps) < 1.1 * SECOND
    assert min(len(beat) for beat in times.values()) >= 2


def test_a_closed_session_gets_no_heartbeat_and_the_last_one_stops_the_rounds() -> None:
    loop = PaperLoop()
    beaten: list[Paper] = []
    beats: Heartbeats[Paper] = Heartbeats(loop.as_loop, lambda: loop.now, SECOND, lambda paper, _: beaten.append(paper))
    paper = Paper()
    beats.add(paper)
    loop.turn()
    assert beaten == [paper]
    paper.closed = True
    while loop.turn():
        pass
    assert beaten == [paper]


def test_deadlines_come_in_their_order_in_slices_from_one_timer() -> None:
    loop = PaperLoop()
    reached: list[int] = []
    deadlines: Deadlines[Paper] = Deadlines(loop.as_loop, lambda: loop.now, lambda _, now: reached.append(now))
    for number in range(200):
        deadlines.set(Paper(), loop.now + 1_000 + (number * 37) % 200)
    assert sum(not call.cancelled for call in loop.calls) == 1
    loop.now += SECOND
    while loop.turn():
        assert len(reached) % DEADLINES_A_TURN == 0 or len(reached) == 200
    assert len(reached) == 200


def test_a_session_is_called_at_its_earliest_deadline_and_once() -> None:
    loop = PaperLoop()
    start = loop.now
    reached: list[int] = []
    deadlines: Deadlines[Paper] = Deadlines(loop.as_loop, lambda: loop.now, lambda _, now: reached.append(now - start))
    paper = Paper()
    for due in (500, 300, 900):
        deadlines.set(paper, start + due)
    while loop.turn():
        pass
    assert reached == [300]


def test_nobody_is_called_who_closed_before_the_deadline() -> None:
    loop = PaperLoop()
    reached: list[int] = []
    deadlines: Deadlines[Paper] = Deadlines(loop.as_loop, lambda: loop.now, lambda _, now: reached.append(now))
    paper = Paper()
    deadlines.set(paper, loop.now + 5)
    paper.closed = True
    while loop.turn():
        pass
    assert reached == []
