"""The broadcaster: a block event becomes one record in the ring, before any delivery hears of it."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprint.broadcaster import Broadcaster
from sprint.events import Block, Event, Source, State
from sprint.record import Record, decode
from sprint.ring import Ring, RingReader, RingWriter, size_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sprint.broadcaster import Publishes

MAGIC = bytes.fromhex("fabfb5da")
SESSION = 0x0123_4567_89AB_CDEF
BLOCK = Block(
    event=Event.PROVEN,
    state=State.PROVEN | State.BEST | State.REORG,
    source=Source.P2P,
    peer="127.0.0.1:18444",
    hash=bytes(range(32)),
    header=bytes(range(80)),
    height=840_000,
    fork_height=839_998,
    next_bits=0x1703_4219,
    median_time_past=1_713_570_000,
    transactions=3_050,
    size=2_325_617,
    wall_ns=1_713_571_767_000_000_001,
    seen_ns=5_000_000_001,
)


class Clock:
    """Goes on by one nanosecond at each look."""

    def __init__(self) -> None:
        self.now_ns = 6_000_000_000

    def __call__(self) -> int:
        self.now_ns += 1
        return self.now_ns


def broadcaster_over(slots: int = 4, deliveries: Sequence[Publishes] = ()) -> tuple[Broadcaster, Ring]:
    ring = Ring.create(bytearray(size_for(slots)), slots, SESSION)
    return Broadcaster(RingWriter(ring), MAGIC, deliveries, Clock()), ring


def record_at(ring: Ring, sequence: int) -> Record:
    encoded = ring.copy(sequence)
    assert encoded is not None
    return decode(encoded)


def record_of(block: Block, sequence: int, published_ns: int) -> Record:
    return Record(
        network=MAGIC,
        session=SESSION,
        sequence=sequence,
        event=block.event,
        source=block.source,
        state=block.state,
        height=block.height,
        fork_height=block.fork_height,
        next_bits=block.next_bits,
        median_time_past=block.median_time_past,
        transactions=block.transactions,
        size=block.size,
        wall_ns=block.wall_ns,
        hash=block.hash,
        header=block.header,
        seen_ns=block.seen_ns,
        published_ns=published_ns,
    )


U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


@given(
    st.builds(
        Block,
        event=st.sampled_from(Event),
        state=st.integers(0, sum(State)).map(State),
        source=st.sampled_from(Source),
        peer=st.just("a:1"),
        hash=st.binary(min_size=32, max_size=32),
        header=st.binary(min_size=80, max_size=80),
        height=U32,
        fork_height=U32,
        next_bits=U32,
        median_time_past=U32,
        transactions=U32,
        size=U32,
        wall_ns=U64,
        seen_ns=U64,
    )
)
def test_every_field_of_a_block_stands_in_its_record(block: Block) -> None:
    broadcaster, ring = broadcaster_over()
    assert broadcaster.write(block) == 1
    record = record_of(block, 1, 6_000_000_001)
    assert ring.copy(1) == record.encode()
    assert record_at(ring, 1) == record
    assert ring.latest_best == bool(block.state & State.BEST)


def test_sequences_are_gapless_and_each_record_has_its_own_time() -> None:
    broadcaster, ring = broadcaster_over()
    reader = RingReader(ring)
    assert [broadcaster.write(replace(BLOCK, height=height)) for height in range(3)] == [1, 2, 3]
    for number in range(3):
        encoded = reader.read()
        assert isinstance(encoded, bytes)
        record = decode(encoded)
        assert (record.sequence, record.height, record.published_ns) == (number + 1, number, 6_000_000_001 + number)


def test_only_a_block_that_is_best_becomes_the_latest_best() -> None:
    broadcaster, ring = broadcaster_over()
    seen = []
    for state in (State.PROVEN, State.PROVEN | State.BEST, State.PROVEN | State.STALE, State.PROVEN | State.BEST):
        broadcaster.write(replace(BLOCK, state=state))
        seen.append((ring.tail, ring.latest_best))
    assert seen == [(1, 0), (2, 2), (3, 2), (4, 4)]


def test_a_successor_s_broadcaster_goes_on_where_a_dead_one_stopped() -> None:
    broadcaster, ring = broadcaster_over()
    broadcaster.write(BLOCK)
    RingWriter(ring).claim()[:100] = b"\xff" * 100  # and dies
    successor = Broadcaster(RingWriter(ring), MAGIC, [], Clock())
    assert successor.write(replace(BLOCK, height=7)) == 2
    assert [record_at(ring, sequence).height for sequence in (1, 2)] == [BLOCK.height, 7]


@pytest.mark.parametrize("wrong", [{"height": -1}, {"size": 2**32}, {"seen_ns": -1}])
def test_a_block_that_fits_no_record_is_not_published_and_the_next_one_takes_its_place(wrong: dict[str, int]) -> None:
    broadcaster, ring = broadcaster_over()
    broadcaster.write(BLOCK)
    with pytest.raises(struct.error):
        broadcaster.write(replace(BLOCK, **wrong))  # type: ignore[arg-type]  # the fields named are integers
    assert (ring.tail, ring.copy(2)) == (1, None)
    assert broadcaster.write(replace(BLOCK, height=7)) == 2
    assert record_at(ring, 2) == record_of(replace(BLOCK, height=7), 2, record_at(ring, 2).published_ns)


def test_writing_wakes_nobody_and_waking_goes_in_order_to_each_delivery_once() -> None:
    woken: list[tuple[str, int]] = []

    class Delivery:
        def __init__(self, name: str) -> None:
            self.name = name

        def publish(self) -> None:
            woken.append((self.name, ring.tail))

    broadcaster, ring = broadcaster_over(deliveries=[Delivery("udp"), Delivery("stream"), Delivery("shm")])
    broadcaster.write(BLOCK)
    broadcaster.write(BLOCK)
    assert woken == []
    broadcaster.wake()
    assert woken == [("udp", 2), ("stream", 2), ("shm", 2)]
