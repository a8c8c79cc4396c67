from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprint.deliveries.accounts import TierLedger
from sprint.deliveries.session import Feed, Session, Written
from sprint.events import Event, Lapped, Source, State
from sprint.frames import Format, FrameDecoder, Heartbeat, heartbeat_frame, record_frame
from sprint.record import Record
from sprint.ring import Ring, RingWriter, size_for
from sprint.status import StatusBlock
from sprint.tiers import PROFILES, Tier

if TYPE_CHECKING:
    from sprint.frames import Item
    from sprint.status import TierAccounts

DEADLINE = 1_000
FRAME = 197


class Pipe:
    """A non-blocking socket that takes `room` bytes and then no more."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.room = room
        self.taken = b""

    def send(self, data: bytes, /) -> int:
        if not self.room:
            raise BlockingIOError
        sent = min(self.room, len(data))
        self.room -= sent
        self.taken += data[:sent]
        return sent

    def items(self) -> list[Item]:
        decoder = FrameDecoder()
        items = decoder.receive(self.taken)
        assert decoder.unfinished == 0
        return items

    def told(self) -> list[int | tuple[int, int]]:
        """Records as their sequences, losses as (first, count), in the order told."""
        told: list[int | tuple[int, int]] = []
        for item in self.items():
            if isinstance(item, Record):
                told.append(item.sequence)
            elif isinstance(item, Lapped):
                told.append((item.first, item.lost))
        return told


class Bench:
    """One ring, one tier, a clock in the test's hand."""

    def __init__(self, tier: Tier = Tier.FREE, slots: int = 16) -> None:
        self.now = 1_000_000
        self.ring = Ring.create(bytearray(size_for(slots)), slots, session=7)
        self.writer = RingWriter(self.ring)
        self.feed = Feed(self.ring, lambda: self.now)
        status = StatusBlock.create(7, {})
        self.accounts: TierAccounts = status.delivery(0, "stream").tiers[tier]
        self.ledger = TierLedger(self.accounts, PROFILES[tier], DEADLINE)

    def session(self, pipe: Pipe, since: int | None = None) -> Session[Pipe]:
        session = Session(self.feed, self.ledger, Format.BINARY, pipe, since)
        session.write(16)
        return session

    def put(self, *, best: bool = True, state: State = State.PROVEN) -> bytes:
        sequence = self.writer.next_sequence
        if best:
            state |= State.BEST
        record = Record(
            b"\xfa\xbf\xb5\xda", 7, sequence, Event.PROVEN, Source.P2P, state, sequence, 0, 0, 0, 0, 0, 0,
            bytes(32), bytes(80), self.now - 10, self.now,
        ).encode()  # fmt: skip
        self.writer.claim()[:] = record
        self.writer.commit(best=best)
        self.feed.publish(sequence, self.now)
        return record

    def publish(self, session: Session[Pipe], *, best: bool = True) -> int:
        """As the delivery does: straight to an idle session, else it waits."""
        record = self.put(best=best)
        sequence = self.feed.sequence
        if session.idle and session.cursor == sequence:
            frame = record_frame(record, Format.BINARY)
            try:
                sent = session.sock.send(frame)
            except BlockingIOError:
                sent = 0
            if sent == len(frame):
                session.cursor = sequence + 1
                self.ledger.delivered(self.now, self.now, self.now)
            else:
                session.interrupted(sequence, frame, sent, self.now, self.now)
        return sequence

    def pass_deadline(self, session: Session[Pipe]) -> None:
        """The timer's work: ask the socket once more, then give up what is due."""
        self.now += DEADLINE
        if session.write(16) is Written.REFUSED:
            session.expire(self.now)

    def ended(self) -> dict[str, int]:
        return {name: getattr(self.accounts, name) for name in ("on_time", "late", "dropped", "overwritten")}


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
