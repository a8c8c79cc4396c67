"""The bypass source: a capture that is handed over, replaced, taken away and refused."""

from __future__ import annotations

import json
import os
import select
import socket
from typing import TYPE_CHECKING, Any, cast

import pytest

from sprint.events import PeerGone, Source
from sprint.sources.bypass import LOOK_NS, RETRY_NS, BypassSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sprint.sources import Heard
    from sprint.sources.capture import CaptureSource

WORD = PeerGone(Source.CAPTURE, "anybody")


class _Capture:
    """A capture made of what was handed over, which says a word when told to."""

    def __init__(self, facts: dict[str, Any], descriptors: list[int]) -> None:
        self.facts = facts
        self.descriptors = descriptors
        self.ears, self.mouth = os.pipe()
        self.closed = False
        self.accounts = 0

    def fileno(self) -> int:
        return self.ears

    def poll(self, _now_ns: int) -> list[Heard]:
        readable, _, _ = select.select([self.ears], [], [], 0)
        return [WORD for _ in os.read(self.ears, 16)] if readable else []

    def deadline(self) -> int | None:
        return 7

    def account(self) -> None:
        self.accounts += 1

    def close(self) -> None:
        self.closed = True
        for descriptor in (self.ears, self.mouth, *self.descriptors):
            os.close(descriptor)


class _Scene:
    """The source, and the other end of its control socket."""

    def __init__(self) -> None:
        self.theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours = ours
        self.captures: list[_Capture] = []
        self.refusal: OSError | None = None
        self.warnings: list[dict[str, Any]] = []
        self.now_ns = 0
        self.source = BypassSource(ours, self._open, self)

    def _open(self, facts: dict[str, Any], descriptors: list[int]) -> CaptureSource:
        if self.refusal is not None:
            raise self.refusal
        self.captures.append(_Capture(facts, descriptors))
        return cast("CaptureSource", self.captures[-1])

    def info(self, _event: str, **_values: Any) -> None:
        pass

    def warning(self, _event: str, **values: Any) -> None:
        self.warnings.append(values)

    def hand_over(self, **facts: Any) -> int:
        """Send a handover with one descriptor; returns the reading end that sees it closed."""
        reading, writing = os.pipe()
        socket.send_fds(self.theirs, [json.dumps({"kind": "capture", **facts}).encode()], [writing])
        os.close(writing)
        return reading

    def poll(self) -> list[Heard]:
        self.now_ns += LOOK_NS
        return self.source.poll(self.now_ns)


@pytest.fixture
def scene() -> Iterator[_Scene]:
    made = _Scene()
    made.theirs.settimeout(5.0)
    yield made
    made.source.close()
    made.ours.close()
    made.theirs.close()


def is_closed(reading: int) -> bool:
    """Whether nobody holds the other end of that pipe any more."""
    readable, _, _ = select.select([reading], [], [], 0)
    return bool(readable) and os.read(reading, 1) == b""


def test_it_asks_at_once_and_says_nothing_until_something_is_handed_over(scene: _Scene) -> None:
    assert scene.theirs.recv(16) == b"capture?"
    assert scene.poll() == []
    assert scene.source.deadline() is None


def test_what_the_capture_hears_comes_through_and_wakes_the_loop(scene: _Scene) -> None:
    reading = scene.hand_over(interface="x0", mode="native")
    scene.poll()
    (capture,) = scene.captures
    assert capture.facts == {"interface": "x0", "mode": "native"}
    os.write(capture.mouth, b".")
    readable, _, _ = select.select([scene.source.fileno()], [], [], 0)
    assert readable
    assert scene.source.poll(scene.now_ns) == [WORD]
    assert scene.source.deadline() == 7
    scene.source.account()
    assert capture.accounts == 1
    os.close(reading)


def test_a_new_handover_takes_the_place_of_the_old_capture(scene: _Scene) -> None:
    first = scene.hand_over(interface="x0")
    scene.poll()
    second = scene.hand_over(interface="x0")
    scene.poll()
    assert [capture.closed for capture in scene.captures] == [True, False]
    assert is_closed(first)
    assert not is_closed(second)
    os.close(first)
    os.close(second)


def test_of_several_handovers_only_the_newest_is_opened_and_the_others_are_closed(scene: _Scene) -> None:
    old = [scene.hand_over(interface=f"x{number}") for number in range(3)]
    newest = scene.hand_over(interface="x3")
    scene.poll()
    assert [capture.facts["interface"] for capture in scene.captures] == ["x3"]
    assert all(is_closed(reading) for reading in old)
    for reading in (*old, newest):
        os.close(reading)


def test_what_is_of_another_kind_is_closed_and_left_alone(scene: _Scene) -> None:
    first = scene.hand_over(interface="x0")
    other = scene.hand_over(kind="egress")
    scene.poll()
    assert [capture.closed for capture in scene.captures] == [False]
    assert is_closed(other)
    assert not is_closed(first)
    os.close(first)
    os.close(other)


def test_the_bypass_s_end_ends_the_capture(scene: _Scene) -> None:
    reading = scene.hand_over(interface="x0")
    scene.poll()
    scene.theirs.send(b'{"kind": "capture", "ended": true}')
    scene.poll()
    assert scene.captures[0].closed
    assert is_closed(reading)
    assert scene.source.deadline() is None
    os.close(reading)


def test_a_new_holder_of_the_programs_ends_the_capture_and_is_asked_again(scene: _Scene) -> None:
    assert scene.theirs.recv(16) == b"capture?"
    reading = scene.hand_over(interface="x0")
    scene.poll()
    scene.theirs.send(b'{"started": true}')
    scene.poll()
    assert scene.captures[0].closed
    assert is_closed(reading)
    assert scene.theirs.recv(16) == b"capture?"
    os.close(reading)


def test_a_capture_that_can_t_be_opened_is_told_and_its_descriptors_are_closed(scene: _Scene) -> None:
    scene.refusal = OSError("somebody else holds the socket's place")
    reading = scene.hand_over(interface="x0")
    scene.poll()
    assert scene.warnings == [{"reason": "somebody else holds the socket's place"}]
    assert is_closed(reading)
    scene.refusal = None
    again = scene.hand_over(interface="x0")
    scene.poll()
    assert len(scene.captures) == 1
    os.close(reading)
    os.close(again)


def test_a_capture_that_can_t_be_opened_is_asked_for_again_after_a_pause(scene: _Scene) -> None:
    """As when the socket of a killed relay still holds the queue: nothing else would bring another hand-over."""
    assert scene.theirs.recv(16) == b"capture?"
    scene.refusal = OSError("another socket holds this queue")
    reading = scene.hand_over(interface="x0")
    scene.poll()
    refused_ns = scene.now_ns
    assert scene.source.deadline() == refused_ns + RETRY_NS
    scene.source.poll(refused_ns + RETRY_NS - 1)
    assert not select.select([scene.theirs], [], [], 0)[0]
    scene.source.poll(refused_ns + RETRY_NS)
    assert scene.theirs.recv(16) == b"capture?"
    assert scene.source.deadline() is None
    scene.refusal = None
    again = scene.hand_over(interface="x0")
    scene.now_ns = refused_ns + RETRY_NS
    scene.poll()
    assert len(scene.captures) == 1
    scene.source.poll(scene.now_ns + 2 * RETRY_NS)
    assert not select.select([scene.theirs], [], [], 0)[0]
    os.close(reading)
    os.close(again)


def test_a_polling_loop_looks_for_a_handover_ten_times_a_second_and_no_more(scene: _Scene) -> None:
    scene.poll()
    reading = scene.hand_over(interface="x0")
    scene.source.poll(scene.now_ns + LOOK_NS - 1)
    assert scene.captures == []
    scene.source.poll(scene.now_ns + LOOK_NS)
    assert len(scene.captures) == 1
    os.close(reading)
