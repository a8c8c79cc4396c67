"""The capture that hears itself: what it is told comes out as a real capture's segments would, by either backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

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


def test_the_ring_buffers_are_handed_over_first_and_never_keep_the_mirrors_waiting_for_more_than_a_poll(
    capture: RehearsedCapture,
) -> None:
    capture.say(b"mirrored", 1, Backend.AF_XDP)
    came = []
    for number in range(4):
        capture.say(bytes([number]), 1, Backend.RINGBUF)
        came.append([bytes(one.payload) for one in capture.poll()])
    assert came == [[b"\0"], [b"\1", b"mirrored"], [b"\2"], [b"\3"]]


def test_a_payload_cannot_be_read_after_the_next_poll(capture: RehearsedCapture) -> None:
    capture.say(b"payload", 1, Backend.RINGBUF)
    (one,) = capture.poll()
    assert isinstance(one.payload, memoryview)
    capture.poll()
    with pytest.raises(ValueError, match="released"):
        one.payload[0]
