"""The process that holds the kernel bypass: who asks for what gets that, then and whenever it has changed."""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from sprint import app_bypass
from sprint.app_bypass import BypassProcess
from sprint.bypass_line import CAPTURE, EGRESS, AskingEnd
from sprint.config import load as load_config
from sprint.status import StatusBlock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xdp.interfaces import LinkChange


class _Holding:
    """Hands over the number it has, and a pipe's reading end."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.number: int | None = None
        self.told: int | None = None
        self.closed = False
        self.reading, self.writing = os.pipe()

    def descriptors(self) -> list[int]:
        return []

    def hear(self, news: Sequence[LinkChange], now_ns: int) -> None:
        pass

    def tend(self, _now_ns: int) -> bool:
        changed, self.told = self.number != self.told, self.number
        return changed

    def handover(self) -> tuple[dict[str, Any], list[int]] | None:
        return None if self.number is None else ({"number": self.number}, [self.reading])

    def said(self) -> dict[str, Any]:
        return {self.kind: self.number}

    def close(self) -> None:
        self.closed = True


class _Scene:
    """The process with two holdings and two socket pairs, run a step at a time."""

    def __init__(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        self.relay, self.worker = (stack.enter_context(pair[0]) for pair in pairs)
        self.relay.settimeout(5)
        self.worker.settimeout(5)
        self.status = StatusBlock.create(1, {})
        config = load_config({"TIER": "enterprise", "ENABLE_KERNEL_BYPASS": "true", "INTERFACE": "nosuch0"})
        controls = [stack.enter_context(pair[1]) for pair in pairs]
        self.process = BypassProcess(config, self.status, controls, None)
        self.capture, self.egress = _Holding(CAPTURE), _Holding(EGRESS)
        for control in (self.relay, self.worker):
            assert control.recv(64) == b'{"started": true}'
        monkeypatch.setattr(self.process, "_holdings", [self.capture, self.egress])
        for holding in (self.capture, self.egress):
            stack.callback(os.close, holding.reading)
            stack.callback(os.close, holding.writing)

    def step(self) -> None:
        """What the loop does, without waiting."""
        self.process._tend()
        self.process._tell()
        for line in self.process._lines:
            self.process._answer(line)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Scene]:
    with ExitStack() as stack:
        yield _Scene(stack, monkeypatch)


def receive(control: socket.socket) -> tuple[dict[str, Any], int]:
    """A message, and how many descriptors came with it."""
    message, descriptors, _, _ = socket.recv_fds(control, 4096, 8)
    for descriptor in descriptors:
        os.close(descriptor)
    return json.loads(message), len(descriptors)


def has_nothing(control: socket.socket) -> bool:
    control.setblocking(False)
    try:
        return not control.recv(1)
    except BlockingIOError:
        return True
    finally:
        control.settimeout(5)


def test_each_gets_what_it_asked_for_at_once_if_there_is_any(scene: _Scene) -> None:
    scene.capture.number, scene.egress.number = 1, 2
    scene.step()
    scene.relay.send(b"capture?")
    scene.worker.send(b"egress?")
    scene.step()
    assert receive(scene.relay) == ({"kind": "capture", "number": 1}, 1)
    assert receive(scene.worker) == ({"kind": "egress", "number": 2}, 1)
    scene.step()
    assert has_nothing(scene.relay)
    assert has_nothing(scene.worker)


def test_who_asked_too_early_gets_it_as_soon_as_there_is_any_and_again_whenever_it_has_changed(scene: _Scene) -> None:
    scene.relay.send(b"capture?")
    scene.step()
    assert has_nothing(scene.relay)
    for number in (1, 2):
        scene.capture.number = number
        scene.step()
        assert receive(scene.relay) == ({"kind": CAPTURE, "number": number}, 1)
    scene.capture.number = None
    scene.step()
    assert receive(scene.relay) == ({"kind": CAPTURE, "ended": True}, 0)


def test_a_successor_asks_again_and_gets_it_again(scene: _Scene) -> None:
    scene.capture.number = 1
    for _ in range(2):
        scene.relay.send(b"capture?")
        scene.step()
        assert receive(scene.relay)[0]["number"] == 1


def test_one_process_may_ask_for_both(scene: _Scene) -> None:
    scene.capture.number, scene.egress.number = 1, 2
    scene.relay.send(b"capture?")
    scene.relay.send(b"egress?")
    scene.step()
    assert {receive(scene.relay)[0]["kind"] for _ in range(2)} == {"capture", "egress"}


@pytest.mark.parametrize("asked", [b"", b"?", b"\xff" * 64, b"nothing of ours?"])
def test_what_is_no_question_is_answered_by_nothing(scene: _Scene, asked: bytes) -> None:
    scene.capture.number = 1
    scene.relay.send(asked)
    scene.step()
    assert has_nothing(scene.relay)


def test_one_that_never_reads_keeps_nobody_waiting(scene: _Scene) -> None:
    scene.relay.send(b"capture?")
    scene.worker.send(b"capture?")
    for number in range(2_000):
        scene.capture.number = number
        scene.step()
        assert receive(scene.worker)[0]["number"] == number


def test_the_other_end_s_newest_is_what_counts_and_a_successor_s_word_that_it_ended(scene: _Scene) -> None:
    line = AskingEnd(scene.worker, EGRESS)
    scene.capture.number = 9
    assert line.take() is None
    for number in range(3):
        scene.egress.number = number
        scene.step()
    taken = line.take()
    assert taken is not None
    assert taken.facts == {"number": 2}
    (descriptor,) = taken.descriptors
    os.close(descriptor)
    scene.egress.number = None
    scene.step()
    assert line.take() == (None, [])
    assert line.take() is None


def test_the_status_has_what_each_of_its_holdings_says(scene: _Scene) -> None:
    scene.capture.number = 1
    scene.step()
    said = scene.status.bypass or {}
    assert (said["requested"], said["capture"], said["egress"]) == (True, 1, None)


def test_it_ends_by_sigterm_and_takes_everything_off(scene: _Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_bypass, "clean", list)
    before = signal.getsignal(signal.SIGTERM)
    try:
        monkeypatch.setattr(scene.process, "_tell", lambda: os.kill(os.getpid(), signal.SIGTERM))
        scene.process.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert scene.capture.closed
    assert scene.egress.closed
