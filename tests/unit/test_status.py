"""The status block: histograms that are right to an eighth, rows that are read whole, bounds that hold."""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprint.histograms import (
    HISTOGRAM_BUCKETS,
    Histogram,
    HistogramData,
    bucket_of,
    bucket_upper_ns,
    quantile_ns,
)
from sprint.status import BLOCKS, DELIVERIES, FACTS_SIZE, PEERS, SIZE, Layout, StatusBlock, consistent, writing

if TYPE_CHECKING:
    from collections.abc import Iterator

FINE_FROM_NS = 4_096
"""Below this a bucket is 512 ns wide, from here on an eighth of its value at most."""
LAST = HISTOGRAM_BUCKETS - 1
RANGE_END_NS = bucket_upper_ns(LAST)

LATENCIES = st.one_of(st.integers(-1_000, 10_000), st.integers(0, 10**9), st.integers(0, 2 * RANGE_END_NS))


@pytest.fixture
def status() -> StatusBlock:
    return StatusBlock.create(0x1234, {"tier": "turbo"})


# Histograms


def test_the_buckets_follow_each_other_without_gap_or_overlap() -> None:
    for bucket in range(LAST):
        end = bucket_upper_ns(bucket)
        assert (bucket_of(end - 1), bucket_of(end)) == (bucket, bucket + 1)
    assert bucket_of(0) == 0
    assert RANGE_END_NS == 2**35


def test_no_bucket_is_wider_than_an_eighth_of_its_least_value_from_4_microseconds_up() -> None:
    for bucket in range(1, HISTOGRAM_BUCKETS):
        start, end = bucket_upper_ns(bucket - 1), bucket_upper_ns(bucket)
        assert end - start <= max(512, start / 8)
        assert start < FINE_FROM_NS or end - start <= start / 8


def test_what_is_beyond_the_last_bucket_is_counted_in_it() -> None:
    assert {bucket_of(ns) for ns in (RANGE_END_NS - 1, RANGE_END_NS, 2**63)} == {LAST}


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_longer_latency_is_never_in_an_earlier_bucket(one: int, other: int) -> None:
    assert bucket_of(min(one, other)) <= bucket_of(max(one, other))


@given(st.lists(LATENCIES, min_size=1, max_size=60), st.floats(0, 1))
def test_a_quantile_is_never_below_the_true_one_and_at_most_an_eighth_above(taken: list[int], share: float) -> None:
    data = HistogramData()
    histogram = Histogram(data)
    for ns in taken:
        histogram.record(ns)
    counted = sorted(max(0, ns) for ns in taken)
    rank = next(rank for rank in range(1, len(counted) + 1) if rank >= share * len(counted))
    true_ns, found_ns = counted[rank - 1], quantile_ns(data, share)
    assert found_ns is not None
    if true_ns >= bucket_upper_ns(LAST - 1):  # the last bucket knows no more than its longest
        assert found_ns == counted[-1]
    else:
        assert true_ns <= found_ns <= true_ns + max(512, true_ns / 8)
    assert data.count == sum(data.buckets) == len(taken)
    assert data.sum_ns == sum(counted)
    assert data.max_ns == counted[-1]


def test_a_quantile_is_never_above_the_longest_latency() -> None:
    data = HistogramData()
    Histogram(data).record(1_000_001)
    assert [quantile_ns(data, share) for share in (0.0, 0.5, 1.0)] == [1_000_001] * 3


def test_of_nothing_there_is_no_quantile() -> None:
    assert quantile_ns(HistogramData(), 0.5) is None


# Rows that are read while they are written


FIELDS = ("height", "sightings", "first", "lead_ns", "rtt_ns", "bytes_received")


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Threads take turns so often that a writer is interrupted in the middle of a row."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_switching")
def test_a_copy_never_mixes_two_writes_of_a_concurrent_writer(status: StatusBlock) -> None:
    row = status.layout.peers[0]
    stop = threading.Event()
    unguarded_mixtures = 0

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            with writing(row):
                for field in FIELDS:
                    setattr(row, field, number)
            time.sleep(0)  # a row is at rest most of its life

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen: list[int] = []
        deadline = time.monotonic() + 20
        while (len(set(seen)) < 200 or not unguarded_mixtures) and time.monotonic() < deadline:
            unguarded_mixtures += len({getattr(row, field) for field in FIELDS}) > 1
            copy = consistent(row)
            if copy.version & 1:
                continue  # it says itself that it could not be had whole in 10 ms
            values = {int(getattr(copy, field)) for field in FIELDS}
            assert len(values) == 1
            seen += values
    finally:
        stop.set()
        writer.join()
    assert seen == sorted(seen)
    assert len(set(seen)) >= 200
    assert unguarded_mixtures, "the writer was never caught in the middle: this test proves nothing"


def test_a_row_whose_writer_died_in_the_middle_is_given_up_soon_and_marked(status: StatusBlock) -> None:
    row = status.layout.peers[0]
    row.version = 7
    row.height = 5
    copy = consistent(row)
    assert (copy.version & 1, copy.height) == (1, 5)


def test_the_next_write_mends_a_row_whose_writer_died(status: StatusBlock) -> None:
    row = status.layout.peers[0]
    row.version = 7
    with writing(row):
        assert row.version & 1
        row.height = 6
    assert (row.version, consistent(row).height) == (8, 6)


def test_a_write_that_fails_leaves_the_row_readable(status: StatusBlock) -> None:
    row = status.layout.peers[0]
    with pytest.raises(ValueError, match="bytes too long"), writing(row):
        row.agent = b"a" * 65
    assert row.version == 2


# Peers


def test_a_peer_keeps_its_row_and_a_new_one_takes_the_next(status: StatusBlock) -> None:
    names = [f"node-{number}:8333" for number in range(PEERS)]
    assert [status.peer_index(name) for name in names] == list(range(PEERS))
    assert [status.peer_index(name) for name in reversed(names)] == list(reversed(range(PEERS)))
    assert [peer.name.decode() for peer in status.peers()] == names


def test_when_all_rows_are_taken_a_new_peer_gets_none_and_the_others_keep_theirs(status: StatusBlock) -> None:
    for number in range(PEERS):
        status.peer_index(f"node-{number}:8333")
    assert status.peer_index("one-too-many:8333") is None
    assert status.peer_index("node-0:8333") == 0
    assert len(status.peers()) == PEERS


def test_long_names_that_differ_only_at_their_end_are_different_peers(status: StatusBlock) -> None:
    host = "turbo-node." + "very-" * 20 + "long.internal"
    names = [f"{host}:8333", f"{host}:8334", "ä" * 40 + ":1", "ä" * 40 + ":2"]
    assert [status.peer_index(name) for name in names * 2] == [0, 1, 2, 3] * 2
    assert all(peer.name.startswith(host[:50].encode()) for peer in status.peers()[:2])


# Blocks


def test_block_rows_come_newest_first(status: StatusBlock) -> None:
    for number in range(5):
        with writing(row := status.next_block_row()):
            row.first_seen_ns = number
    assert [row.first_seen_ns for row in status.blocks()] == [4, 3, 2, 1, 0]
    assert [row.first_seen_ns for row in status.blocks(2)] == [4, 3]
    assert status.blocks(0) == []


def test_a_full_table_recycles_the_oldest_row_cleared(status: StatusBlock) -> None:
    for number in range(BLOCKS + 3):
        row = status.next_block_row()
        behind_version = ctypes.sizeof(ctypes.c_uint64)
        assert not any(bytes(row)[behind_version:])
        with writing(row):
            row.first_seen_ns = number + 1
            ctypes.memset(row.record, 0xA5, ctypes.sizeof(row.record))
            row.marks[len(row.marks) - 1].seen_ns = 9
    newest = list(range(BLOCKS + 3, 3, -1))
    assert [row.first_seen_ns for row in status.blocks()] == newest
    assert [row.first_seen_ns for row in status.blocks(10 * BLOCKS)] == newest


# The whole block


def test_what_one_writes_another_who_attached_reads() -> None:
    memory = bytearray(SIZE)
    status = StatusBlock.create(7, {"tier": "pro"}, memory)
    status.relay.tip_height = 800_000
    status.delivery(3, "stream").accepted = 2
    other = StatusBlock.attach(memory)
    assert (other.layout.session, other.facts, other.relay.tip_height) == (7, {"tier": "pro"}, 800_000)
    assert [(each.name, each.accepted) for each in other.deliveries()] == [(b"stream", 2)]


def test_a_block_laid_out_over_an_old_one_is_empty() -> None:
    memory = bytearray(b"\xa5" * SIZE)
    status = StatusBlock.create(7, {}, memory)
    assert (status.peers(), status.deliveries(), status.blocks(), status.relay.proven) == ([], [], [], 0)


@pytest.mark.parametrize("memory", [b"", bytes(SIZE - 1), bytes(SIZE), b"\xff" * SIZE], ids=len)
def test_memory_that_holds_no_status_block_is_refused(memory: bytes) -> None:
    with pytest.raises(ValueError, match=r"no status block|too small"):
        StatusBlock.attach(bytearray(memory))


def test_a_status_block_of_another_layout_is_refused(status: StatusBlock) -> None:
    status.layout.size += 8
    with pytest.raises(ValueError, match="no status block"):
        StatusBlock.attach(status.memory)


def test_facts_that_are_too_long_are_refused_and_the_old_ones_stay(status: StatusBlock) -> None:
    frame = len(json.dumps({"names": ""}, separators=(",", ":")))
    fitting = {"names": "n" * (FACTS_SIZE - frame)}
    status.facts = fitting
    assert status.facts == fitting
    with pytest.raises(ValueError, match=f"facts of {FACTS_SIZE + 1} bytes: at most {FACTS_SIZE} fit"):
        status.facts = {"names": "n" * (FACTS_SIZE - frame + 1)}
    assert status.facts == fitting


def test_shorter_facts_leave_nothing_of_longer_ones(status: StatusBlock) -> None:
    status.facts = {"writeDeadline": "500µs", "bitcoinNodes": ["a:1"] * 50}
    status.facts = {"writeDeadline": "2s"}
    assert status.facts == {"writeDeadline": "2s"}


def test_a_delivery_s_name_that_does_not_fit_is_refused(status: StatusBlock) -> None:
    with pytest.raises(ValueError, match="bytes too long"):
        status.delivery(0, "n" * 17)
    with pytest.raises(IndexError):
        status.delivery(DELIVERIES, "stream")


def test_every_field_of_eight_bytes_lies_on_eight_bytes() -> None:
    """What one aligned store writes, one aligned load reads whole; anything else could be seen half written."""

    def check(kind: type[ctypes.Structure], base: int) -> int:
        assert ctypes.sizeof(kind) % 8 == 0, f"{kind.__name__} is not as long as an array of it needs"
        checked = 0
        for name, field, *_ in kind._fields_:
            offset = base + getattr(kind, name).offset
            element = getattr(field, "_type_", None)
            if isinstance(field, type) and issubclass(field, ctypes.Structure):
                checked += check(field, offset)
            elif isinstance(element, type) and issubclass(element, ctypes.Structure):
                checked += check(element, offset)
            elif ctypes.sizeof(element if isinstance(element, type) else field) == 8:
                assert offset % 8 == 0, f"{kind.__name__}.{name} at {offset}"
                checked += 1
        return checked

    assert check(Layout, 0) > 50
