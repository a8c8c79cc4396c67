"""What a session loses when its socket stays full: by deadline in the lower tiers, by the newest in the top ones."""

from __future__ import annotations

import pytest

from sprint.deliveries.session import Written
from sprint.tiers import Tier
from tests.unit.deliveries.session_stage import DEADLINE, Bench, Pipe


@pytest.mark.parametrize("tier", Tier)
def test_a_begun_frame_is_finished_late_and_never_torn(tier: Tier) -> None:
    bench = Bench(tier)
    pipe = Pipe(room=100)
    session = bench.session(pipe)
    bench.publish(session)
    for _ in range(3):
        bench.pass_deadline(session)
    assert session.backlog == 1
    pipe.room = 1 << 20
    assert session.write(16) is Written.ALL
    assert pipe.told() == [1]
    assert bench.ended() == {"on_time": 0, "late": 1, "dropped": 0, "overwritten": 0}


@pytest.mark.parametrize("tier", Tier)
def test_a_socket_that_is_writable_again_before_the_deadline_is_on_time(tier: Tier) -> None:
    bench = Bench(tier)
    pipe = Pipe(room=0)
    session = bench.session(pipe)
    bench.publish(session)
    bench.now += DEADLINE
    pipe.room = 1 << 20
    session.write(16)
    assert bench.ended() == {"on_time": 1, "late": 0, "dropped": 0, "overwritten": 0}


@pytest.mark.parametrize("tier", Tier)
def test_a_socket_found_writable_at_a_passed_deadline_loses_nothing(tier: Tier) -> None:
    bench = Bench(tier)
    pipe = Pipe(room=0)
    session = bench.session(pipe)
    for _ in range(3):
        bench.publish(session)
    pipe.room = 1 << 20
    bench.now += 1
    bench.pass_deadline(session)
    assert pipe.told() == [1, 2, 3]
    assert bench.ended() == {"on_time": 0, "late": 3, "dropped": 0, "overwritten": 0}


@pytest.mark.parametrize("tier", [Tier.FREE, Tier.PRO, Tier.BUSINESS])
def test_a_lower_tier_drops_what_is_still_unsent_at_its_deadline_and_tells(tier: Tier) -> None:
    bench = Bench(tier)
    pipe = Pipe(room=0)
    session = bench.session(pipe)
    bench.publish(session)
    bench.publish(session)
    bench.pass_deadline(session)
    bench.publish(session)
    assert bench.ended() == {"on_time": 0, "late": 0, "dropped": 2, "overwritten": 0}
    pipe.room = 1 << 20
    session.write(16)
    assert pipe.told() == [(1, 2), 3]
    assert bench.ended() == {"on_time": 1, "late": 0, "dropped": 2, "overwritten": 0}


def test_a_lower_tier_drops_each_record_at_its_own_deadline() -> None:
    bench = Bench(Tier.FREE)
    pipe = Pipe(room=0)
    session = bench.session(pipe)
    bench.publish(session)
    bench.now += DEADLINE // 2
    bench.publish(session)
    bench.now += DEADLINE // 2
    session.expire(bench.now)
    assert bench.ended()["dropped"] == 1
    assert session.due_ns() == bench.now + DEADLINE // 2


@pytest.mark.parametrize("tier", [Tier.TURBO, Tier.ENTERPRISE])
def test_a_top_tier_gets_the_newest_in_place_of_the_oldest(tier: Tier) -> None:
    bench = Bench(tier)
    pipe = Pipe(room=0)
    session = bench.session(pipe)
    for _ in range(4):
        bench.publish(session)
    bench.pass_deadline(session)
    pipe.room = 1 << 20
    bench.now += 1
    session.write(16)
    assert pipe.told() == [(1, 3), 4]
    assert bench.ended() == {"on_time": 0, "late": 1, "dropped": 0, "overwritten": 3}


def test_a_top_tier_gets_the_newest_best_tip_beside_the_newest_record() -> None:
    bench = Bench(Tier.TURBO)
    pipe = Pipe(room=0)
    session = bench.session(pipe)
    for best in (True, True, False, False):
        bench.publish(session, best=best)
    bench.pass_deadline(session)
    pipe.room = 1 << 20
    session.write(16)
    assert pipe.told() == [(1, 1), 2, (3, 1), 4]
    assert bench.ended()["overwritten"] == 2


def test_only_expired_records_of_a_top_tier_are_overwritten() -> None:
    bench = Bench(Tier.TURBO)
    pipe = Pipe(room=0)
    session = bench.session(pipe)
    bench.publish(session)
    bench.publish(session)
    bench.now += DEADLINE - 1
    bench.publish(session)
    bench.publish(session)
    bench.now += 1
    session.expire(bench.now)
    pipe.room = 1 << 20
    session.write(16)
    assert pipe.told() == [(1, 2), 3, 4]
    assert bench.ended() == {"on_time": 2, "late": 0, "dropped": 0, "overwritten": 2}


def test_a_top_tier_that_waits_for_one_record_keeps_it() -> None:
    bench = Bench(Tier.ENTERPRISE)
    pipe = Pipe(room=0)
    session = bench.session(pipe)
    bench.publish(session)
    bench.pass_deadline(session)
    bench.pass_deadline(session)
    assert session.backlog == 1
    pipe.room = 1 << 20
    session.write(16)
    assert pipe.told() == [1]
    assert bench.ended() == {"on_time": 0, "late": 1, "dropped": 0, "overwritten": 0}


@pytest.mark.parametrize(
    ("tier", "told", "ends"),
    [(Tier.FREE, [(1, 6), 7, 8, 9, 10], "dropped"), (Tier.TURBO, [(1, 9), 10], "overwritten")],
)
def test_a_lapped_session_is_told_and_continues_as_its_tier_says(tier: Tier, told: list[object], ends: str) -> None:
    bench = Bench(tier, slots=4)
    pipe = Pipe(room=0)
    session = bench.session(pipe)
    for _ in range(10):
        bench.publish(session)
    pipe.room = 1 << 20
    session.write(16)
    assert pipe.told() == told
    assert bench.ended()[ends] == 10 - (len(told) - 1)
    assert sum(bench.ended().values()) == 10
