"""The relay's fan-out when it comes late, goes, or can't be used: who waits for records by it gets them."""

from __future__ import annotations

import json
import os
import socket
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from sprint.addresses import Address
from sprint.deliveries import udp_fanout
from sprint.deliveries.udp_fanout import LOOK_NS, MISSED, MISSED_NS, RETRY_NS, RelayFanout, WorkerFanout
from sprint.deliveries.udp_sender import Rung
from sprint.record import decode
from sprint.ring import Ring, RingWriter, size_for
from sprint.status import StatusBlock
from sprint.tiers import NS_PER_S, PROFILES, Tier
from tests.unit.test_client import SESSION, record
from xdp.fanout_maps import Step
from xdp.fanout_run import RunReport

if TYPE_CHECKING:
    from collections.abc import Iterator

NOW = 100 * NS_PER_S


class _Log:
    def __init__(self) -> None:
        self.events: list[str] = []

    def info(self, event: str, **_values: Any) -> None:
        self.events.append(event)

    warning = info


class _Run:
    """In the place of a FanoutRun: one subscriber, whom everything reaches."""

    sent: list[int]
    broken = False

    def __init__(self, *_arguments: object) -> None:
        if _Run.broken:
            raise OSError("Cannot allocate memory")
        self.step = Step.LIVE_FRAMES

    def send(self, payload: bytes) -> RunReport:
        _Run.sent.append(decode(payload).sequence)
        return RunReport(1, 1, 0, NOW, NOW, 0, NOW, 0)

    def close(self) -> None:
        """There is nothing."""


class _Relay:
    """The relay's half, the ring, and the bypass's end of the line."""

    def __init__(self) -> None:
        self.bypass, self.ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.bypass.setblocking(False)
        ring = Ring.create(bytearray(size_for(64)), 64, SESSION)
        self._writer = RingWriter(ring)
        status = StatusBlock.create(SESSION, {})
        deadlines = {tier: PROFILES[tier].write_deadline_ns for tier in Tier}
        self.log = _Log()
        self.publish(3)  # by a predecessor
        self.fanout = RelayFanout(ring, status.delivery(2, "fanout"), status, self.ours, deadlines, self.log)

    def publish(self, count: int = 1, published_ns: int = NOW) -> None:
        for _ in range(count):
            made = replace(record(self._writer.next_sequence), published_ns=published_ns)
            self._writer.claim()[:] = made.encode()
            self._writer.commit(best=True)

    def asked(self) -> list[bytes]:
        questions = []
        with suppress(BlockingIOError):
            while True:
                questions.append(self.bypass.recv(64))
        return questions

    def hand_over(self, **facts: Any) -> None:
        fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(0 if facts.get("ended") else 7)]
        socket.send_fds(self.bypass, [json.dumps({"kind": "egress", "contexts": [1], **facts}).encode()], fds)
        for fd in fds:
            os.close(fd)

    def poll(self, now_ns: int = NOW) -> None:
        self.fanout.poll(now_ns)

    def close(self) -> None:
        self.fanout.close()
        self.bypass.close()
        self.ours.close()


@pytest.fixture
def relay(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Relay]:
    monkeypatch.setattr(udp_fanout, "FanoutRun", _Run)
    monkeypatch.setattr(_Run, "sent", [], raising=False)
    monkeypatch.setattr(_Run, "broken", False)
    made = _Relay()
    yield made
    made.close()


def test_what_a_new_relay_published_before_it_had_the_fan_out_is_sent_once_it_has_it(relay: _Relay) -> None:
    relay.publish()
    relay.fanout.publish()
    relay.publish()
    relay.fanout.publish()
    assert _Run.sent == []
    relay.hand_over()
    relay.poll()
    assert _Run.sent == [4, 5]  # and none of its predecessor's
    relay.publish()
    relay.fanout.publish()
    assert _Run.sent == [4, 5, 6]


def test_of_what_was_missed_only_the_newest_and_nothing_that_is_old_is_sent(relay: _Relay) -> None:
    relay.publish(3, published_ns=NOW - MISSED_NS)
    relay.publish()
    relay.hand_over()
    relay.poll()
    assert _Run.sent == [7]
    relay.hand_over(ended=True)
    relay.poll(NOW + LOOK_NS)
    relay.publish(MISSED + 5)
    relay.hand_over()
    relay.poll(NOW + 2 * LOOK_NS)
    assert _Run.sent == [7, *range(13, 13 + MISSED)]


class _Egress:
    """In the place of an Egress, which can't be had of a hand-over for now."""

    broken = True

    def __init__(self, handover: object, *_arguments: object) -> None:
        if handover is not None and _Egress.broken:
            raise OSError("Cannot allocate memory")
        self.step = Step.SENDMMSG if handover is None else Step.LIVE_FRAMES
        self.reason = None
        self._end, self._other = socket.socketpair()

    def fileno(self) -> int:
        return self._end.fileno()

    def batch(self) -> AbstractContextManager[None]:
        return nullcontext()

    def join(self, *_arguments: object) -> Step:
        return self.step

    def poll(self) -> list[object]:
        return []

    def tick(self, _now_ns: int) -> list[object]:
        return []

    def close(self) -> None:
        self._end.close()
        self._other.close()


def test_a_worker_that_cannot_use_it_asks_again_and_serves_by_its_socket_meanwhile(
    relay: _Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(udp_fanout, "Egress", _Egress)
    monkeypatch.setattr(_Egress, "broken", True)
    worker = WorkerFanout(relay.ours, 8436, relay.log)
    try:
        assert worker.join(b"one", Address("192.0.2.1", 9), Tier.TURBO) is Rung.SENDMMSG
        relay.asked()
        relay.hand_over()
        assert worker.look(NOW) == [(b"one", Rung.SENDMMSG)]
        worker.look(NOW + RETRY_NS - 1)
        assert relay.asked() == []
        worker.look(NOW + RETRY_NS)
        assert relay.asked() == [b"egress?"]
        monkeypatch.setattr(_Egress, "broken", False)
        relay.hand_over()
        assert worker.look(NOW + RETRY_NS + 1) == [(b"one", Rung.LIVE_FRAMES)]
    finally:
        worker.close()


def test_one_that_cannot_be_used_is_asked_for_again(relay: _Relay) -> None:
    _Run.broken = True
    relay.asked()
    relay.hand_over()
    relay.poll()
    assert relay.log.events == ["Fan-out can't be used"]
    assert relay.fanout.deadline() == NOW + RETRY_NS
    relay.poll(NOW + RETRY_NS - 1)
    assert relay.asked() == []
    relay.poll(NOW + RETRY_NS)
    assert relay.asked() == [b"egress?"]
    _Run.broken = False
    relay.hand_over()
    relay.poll(NOW + RETRY_NS + LOOK_NS)
    assert relay.log.events[-1] == "Fan-out at work"
    assert relay.fanout.deadline() is None
