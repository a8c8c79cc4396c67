"""The capture that hears itself: what it is told comes out as a real capture's segments would, by either backend."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from xdp.capture import COPIES, COPY_DUE_NS, COPY_NS
from xdp.rehearsed import RehearsedCapture
from xdp.segments import Backend

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def capture() -> Iterator[RehearsedCapture]:
    made = RehearsedCapture()
    yield made
    made.close()


@pytest.mark.parametrize("backend", Backend)
def test_what_is_said_comes_out_whole_in_order_and_as_one_flow(capture: RehearsedCapture, backend: Backend) -> None:
    expected, flows = 0, set()
    for number in range(500):
        payload = bytes([number % 251]) * (1 + number * 37 % 1_400)  # some seven times around the ring
        capture.say(payload, 1_000 + number, backend)
        (one,) = capture.poll()
        assert (one.backend, one.arrival_ns, one.sequence) == (backend, 1_000 + number, expected)
        assert (bytes(one.payload), one.length) == (payload, len(payload))
        expected = (expected + len(payload)) & 0xFFFF_FFFF
        flows.add(one.flow)
        assert capture.poll() == []
    assert len(flows) == 1


def test_both_backends_tell_of_the_same_flow(capture: RehearsedCapture) -> None:
    flows = set()
    for backend in Backend:
        capture.say(b"payload", 1, backend)
        flows |= {one.flow for one in capture.poll()}
    assert len(flows) == 1


def polled_without_a_pause(capture: RehearsedCapture, apart_ns: int, count: int) -> list[int]:
    """The polls that the mirror's was among, of so many, each with one of the ring buffer's first."""
    capture.say(b"mirrored", 1, Backend.AF_XDP)
    found = []
    for number in range(count):
        capture.say(b"express", 1 + number * apart_ns, Backend.RINGBUF)
        first, *others = [bytes(one.payload) for one in capture.poll()]
        assert first == b"express"
        assert others in ([], [b"mirrored"])
        found += [number] * len(others)
    return found


def test_the_mirrors_wait_behind_no_more_than_so_many_of_the_ring_buffers(capture: RehearsedCapture) -> None:
    assert polled_without_a_pause(capture, 1, 3 * COPIES) == [COPIES]


def test_the_mirrors_wait_no_longer_than_so_long_while_the_ring_buffer_has_something(capture: RehearsedCapture) -> None:
    assert polled_without_a_pause(capture, COPY_NS // 2, 9) == [3]


def test_the_mirrors_come_as_soon_as_the_ring_buffer_has_had_nothing_twice(capture: RehearsedCapture) -> None:
    capture.say(b"express", 1, Backend.RINGBUF)
    capture.say(b"mirrored", 1, Backend.AF_XDP)
    assert [[bytes(one.payload) for one in capture.poll()] for _ in range(4)] == [[b"express"], [], [b"mirrored"], []]


def test_a_turn_is_wanted_for_a_copy_until_it_has_come_or_must_be_lost(capture: RehearsedCapture) -> None:
    assert capture.deadline() is None
    now_ns = time.monotonic_ns()
    capture.say(b"express", now_ns, Backend.RINGBUF)
    assert len(capture.poll()) == 1
    assert capture.deadline() in {now_ns + due_ns for due_ns in COPY_DUE_NS}
    capture.say(b"mirrored", now_ns, Backend.AF_XDP)
    while not capture.poll():
        assert capture.deadline() is not None
    assert capture.deadline() is None
    long_ago_ns = now_ns - COPY_DUE_NS[-1]
    capture.say(b"express", long_ago_ns, Backend.RINGBUF)
    assert len(capture.poll()) == 1
    assert capture.deadline() is None


def test_a_payload_cannot_be_read_after_the_next_poll(capture: RehearsedCapture) -> None:
    capture.say(b"payload", 1, Backend.RINGBUF)
    (one,) = capture.poll()
    assert isinstance(one.payload, memoryview)
    capture.poll()
    with pytest.raises(ValueError, match="released"):
        one.payload[0]
