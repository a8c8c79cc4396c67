"""The far end of `bench fanout`, frame by frame through BPF_PROG_TEST_RUN: whose time it reads, and what it lets be."""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING

import pytest

from sprint.bench.fanout_sink import FIRST_PORT, SOURCE_PORT, Sink
from sprint.record import SIZE
from tests.net.slowness import SLOWNESS
from xdp import kernel
from xdp.datagrams import NextHop, udp_headers
from xdp.loader import TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Iterator

XDP_DROP, XDP_PASS = 1, 2
PROVEN, VALIDATED = 1, 3
CLOCK_EACH = 4
EXACT = 16
HOP = NextHop(2, bytes([2] * 6), bytes([4] * 6), bytes((198, 18, 0, 1)))


@pytest.fixture(scope="module", params=[1, CLOCK_EACH])
def sink(request: pytest.FixtureRequest, bpf_loadable: None) -> Iterator[Sink]:
    with Sink(request.param, TIMEOUT_S * SLOWNESS) as loaded:
        yield loaded


def frame(port: int, sequence: int = 1, event: int = PROVEN, source_port: int = SOURCE_PORT) -> bytes:
    record = bytearray(SIZE)
    struct.pack_into("<QBB", record, 16, sequence, event, 2)
    struct.pack_into("<Q", record, 176, 77)
    return udp_headers(HOP, bytes((100, 64, 0, 1)), port, source_port).frame + bytes(record)


def come(sink: Sink, *frames: bytes) -> set[int]:
    return {kernel.run_program(sink.program_fd, one).verdict for one in frames}


def test_each_subscriber_has_a_time_of_his_own_frame_or_of_one_shortly_before_it(sink: Sink) -> None:
    count = 100
    for sequence in (8, 9):
        sink.clear(count)
        begun, between = time.monotonic_ns(), []
        for number in range(count):
            assert come(sink, frame(FIRST_PORT + number, sequence)) == {XDP_DROP}
            between.append(time.monotonic_ns())
        found = sink.read(count)
        assert (found.sequences, found.sources, set(found.seen_ns), found.surplus) == ({sequence}, {2}, {77}, 0)
        before = [begun, *between]
        for number, at in enumerate(found.at_ns):
            assert before[max(0, number - CLOCK_EACH + 1)] <= at <= between[number]
        exact = count - EXACT
        for number in range(exact, count):
            assert before[number] <= found.at_ns[number]


def test_the_clock_is_read_as_often_as_asked_for_and_for_each_new_record(sink: Sink) -> None:
    count = 100
    sink.clear(count)
    come(sink, *(frame(FIRST_PORT + number, 20) for number in range(count - EXACT)))
    readings = len(set(sink.read(count - EXACT).at_ns))
    assert readings in {count - EXACT, (count - EXACT) // CLOCK_EACH, (count - EXACT) // CLOCK_EACH + 1}
    sink.clear(count)
    come(sink, frame(FIRST_PORT, 21), frame(FIRST_PORT + 1, 22))
    first, second = sink.read(2).at_ns
    assert first < second


def test_later_records_are_dropped_and_strangers_frames_passed_without_a_time(sink: Sink) -> None:
    sink.clear(20)
    assert come(sink, frame(FIRST_PORT, event=VALIDATED)) == {XDP_DROP}
    strange = frame(FIRST_PORT, source_port=SOURCE_PORT + 1), frame(FIRST_PORT)[:-1], frame(FIRST_PORT)[:41]
    assert come(sink, *strange) == {XDP_PASS}
    assert set(sink.read(20).at_ns) == {0}
    assert not sink.wait(1, 0)


def test_a_second_frame_counts_as_surplus_and_keeps_the_first_ones_time(sink: Sink) -> None:
    sink.clear(20)
    come(sink, frame(FIRST_PORT, 30))
    (at,) = sink.read(1).at_ns
    come(sink, frame(FIRST_PORT, 30))
    found = sink.read(1)
    assert (found.at_ns, found.surplus) == ([at], 1)
