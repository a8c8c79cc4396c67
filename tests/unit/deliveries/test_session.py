"""A session: where it begins, what it writes at a time, and that nothing is torn, told twice or counted twice."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sprint.deliveries.session import Session, Written
from sprint.events import Lapped, State
from sprint.frames import Format, Heartbeat, heartbeat_frame
from sprint.record import Record
from sprint.tiers import Tier
from tests.unit.deliveries.session_stage import DEADLINE, Bench, Pipe

FRAME = 197


def test_a_new_session_gets_what_is_published_after_it() -> None:
    bench = Bench()
    bench.put()
    pipe = Pipe()
    session = bench.session(pipe)
    assert session.idle
    assert bench.publish(session) == 2
    assert pipe.told() == [2]


def test_since_replays_from_the_ring_and_counts_as_replay_only() -> None:
    bench = Bench()
    for _ in range(5):
        bench.put()
    pipe = Pipe()
    bench.session(pipe, since=3)
    assert pipe.told() == [3, 4, 5]
    assert bench.accounts.replayed == 3
    assert bench.ended() == {"on_time": 0, "late": 0, "dropped": 0, "overwritten": 0}


def test_since_beyond_the_newest_means_from_the_next_on() -> None:
    bench = Bench()
    bench.put()
    pipe = Pipe()
    session = bench.session(pipe, since=900)
    bench.publish(session)
    assert pipe.told() == [2]


def test_since_before_the_oldest_is_told_as_lost_and_is_nobody_s_delivery() -> None:
    bench = Bench(slots=4)
    for _ in range(10):
        bench.put()
    pipe = Pipe()
    bench.session(pipe, since=2)
    assert pipe.told() == [(2, 5), 7, 8, 9, 10]
    assert bench.accounts.lost_notices == 1
    assert bench.ended()["dropped"] == 0


def test_one_write_sends_no_more_than_its_slice() -> None:
    bench = Bench()
    for _ in range(10):
        bench.put()
    pipe = Pipe()
    session = Session(bench.feed, bench.ledger, Format.BINARY, pipe, 1)
    assert session.write(4) is Written.SOME
    assert pipe.told() == [1, 2, 3, 4]
    assert session.write(4) is Written.SOME
    assert session.write(4) is Written.ALL
    assert pipe.told() == list(range(1, 11))


def test_a_deadline_doesn_t_run_while_a_replay_is_still_being_sent() -> None:
    bench = Bench(Tier.FREE)
    for _ in range(4):
        bench.put()
    pipe = Pipe(room=FRAME)
    session = bench.session(pipe, since=1)
    bench.publish(session)
    assert session.due_ns() == 0
    bench.pass_deadline(session)
    pipe.room = 1 << 20
    session.write(16)
    assert pipe.told() == [1, 2, 3, 4, 5]
    assert bench.ended() == {"on_time": 1, "late": 0, "dropped": 0, "overwritten": 0}
    assert bench.accounts.replayed == 4


def test_a_heartbeat_never_waits_behind_a_full_socket() -> None:
    bench = Bench()
    pipe = Pipe(room=0)
    session = bench.session(pipe)
    assert session.beat(heartbeat_frame(Heartbeat(7, 0, 0), Format.BINARY)) is Written.REFUSED
    assert session.stalled_ns == bench.now
    pipe.room = 1 << 20
    assert session.write(16) is Written.ALL
    assert pipe.taken == b""
    assert session.stalled_ns == 0


def test_a_begun_heartbeat_is_finished() -> None:
    bench = Bench()
    pipe = Pipe(room=5)
    session = bench.session(pipe)
    session.beat(heartbeat_frame(Heartbeat(7, 0, 5), Format.BINARY))
    pipe.room = 1 << 20
    session.write(16)
    assert pipe.items() == [Heartbeat(7, 0, 5)]


def test_stalled_counts_from_the_last_byte_that_was_taken() -> None:
    bench = Bench()
    pipe = Pipe(room=0)
    session = bench.session(pipe)
    bench.publish(session)
    first = bench.now
    bench.now += 50
    session.write(16)
    assert session.stalled_ns == first
    pipe.room = 3
    bench.now += 50
    session.write(16)
    assert session.stalled_ns == bench.now


def test_what_waits_when_the_connection_goes_is_dropped() -> None:
    bench = Bench(Tier.TURBO)
    pipe = Pipe(room=20)
    session = bench.session(pipe)
    for _ in range(3):
        bench.publish(session)
    assert session.backlog == 3
    session.abandon()
    assert bench.ended() == {"on_time": 0, "late": 0, "dropped": 3, "overwritten": 0}


def test_catch_up_records_count_as_deliveries_but_not_as_relay_latency() -> None:
    bench = Bench()
    pipe = Pipe(room=0)
    session = bench.session(pipe)
    bench.publish(session)
    bench.put(state=State.PROVEN | State.CATCHUP)
    pipe.room = 1 << 20
    session.write(16)
    assert bench.ended()["on_time"] == 2
    assert bench.accounts.write_time.count == 2
    assert bench.accounts.relay_latency.count == 1


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.booleans()),
        st.tuples(st.just("room"), st.integers(0, 700)),
        st.tuples(st.just("wait"), st.integers(1, 2 * DEADLINE)),
        st.tuples(st.just("beat"), st.none()),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(Tier), st.integers(2, 8), st.integers(0, 6), st.one_of(st.none(), st.integers(1, 8)), STEPS)
def test_whatever_happens_every_record_is_told_or_told_lost_once_in_order_and_counted_once(
    tier: Tier, slots: int, before: int, since: int | None, steps: list[tuple[str, int | bool | None]]
) -> None:
    bench = Bench(tier, slots)
    for _ in range(before):
        bench.put()
    pipe = Pipe(room=0)
    session = bench.session(pipe, since)
    start = before + 1 if since is None else min(since, before + 1)
    for step, value in steps:
        if step == "publish":
            bench.publish(session, best=bool(value))
        elif step == "room":
            pipe.room = int(value or 0)
            session.write(16)
        elif step == "wait":
            bench.now += int(value or 0)
            if 0 < session.due_ns() <= bench.now and session.write(16) is Written.REFUSED:
                session.expire(bench.now)
        elif session.idle:
            session.beat(heartbeat_frame(Heartbeat(7, session.cursor - 1, 0), Format.BINARY))
    published = bench.feed.sequence - before
    assert sum(bench.ended().values()) + session.backlog == published
    pipe.room = 1 << 30
    while session.write(16) is not Written.ALL:
        pass
    expected = start
    delivered = 0
    for item in pipe.items():
        if isinstance(item, Record):
            assert item.sequence == expected
            expected += 1
            delivered += item.sequence > before
        elif isinstance(item, Lapped):
            assert item.first == expected
            expected += item.lost
        elif isinstance(item, Heartbeat):
            assert item.sequence == expected - 1
    assert expected == bench.feed.sequence + 1
    ended = bench.ended()
    assert ended["on_time"] + ended["late"] == delivered
    assert sum(ended.values()) == published
    if tier >= Tier.TURBO and published:
        told = pipe.told()
        assert bench.feed.sequence in told
        best = bench.ring.latest_best
        assert best in told or best < max(start, bench.ring.oldest)
