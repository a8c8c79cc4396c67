"""Upstreams given by name: resolved off the loop, anew for each attempt, until one of the addresses works."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

from sprint.addresses import Address
from sprint.bitcoin.networks import REGTEST
from sprint.events import PeerGone, PeerReady
from tests.unit.chains import MS, SECOND
from tests.unit.peers import Listener, closed_port, rig_of

if TYPE_CHECKING:
    import pytest


def test_a_name_is_resolved_without_stopping_the_loop_and_connected() -> None:
    with rig_of(0) as rig:
        listener = Listener()
        rig.listeners.append(listener)
        rig.source.close()
        rig.source = type(rig.source)([Address("localhost", listener.address.port)], REGTEST, lambda: 0, rig.status)
        rig.connect()
        assert [ready.peer for ready in rig.of(PeerReady)] == [f"localhost:{listener.address.port}"]


def test_a_name_that_leads_nowhere_is_tried_again_ever_later(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo
    asked = []

    def unknown(host: str, port: int, *rest: int, **options: int) -> object:
        if host != "nowhere.invalid" or options.get("flags"):
            return real(host, port, *rest, **options)
        asked.append(threading.current_thread())
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with rig_of(0, addresses=[Address("nowhere.invalid", 18_444)]) as rig:
        pauses = []
        for attempt in range(1, 9):
            rig.until(lambda n=attempt: rig.account().failures == n)  # type: ignore[misc]  # a default binds now
            due = rig.source.deadline()
            assert due is not None
            pauses.append(due - rig.polled_ns)
            rig.forward(pauses[-1] / 1e9)
        assert pauses[0] <= 250 * MS
        assert pauses[-1] > 10 * SECOND
        assert b"nowhere.invalid can't be resolved" in rig.account().last_error
    assert threading.main_thread() not in asked


def test_a_name_is_resolved_anew_for_each_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = closed_port(), Listener()
    real = socket.getaddrinfo
    ports = [old, old]

    def moving(host: str, port: int, *rest: int, **options: int) -> object:
        if host != "moving.example" or options.get("flags"):
            return real(host, port, *rest, **options)
        at = ports.pop() if ports else new.address.port
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", at))]

    monkeypatch.setattr(socket, "getaddrinfo", moving)
    with rig_of(0, addresses=[Address("moving.example", 1)]) as rig:
        rig.listeners.append(new)
        for failures in (1, 2):
            rig.until(lambda n=failures: rig.account().failures == n)  # type: ignore[misc]  # a default binds now
            rig.forward(1)
        rig.connect()


def test_of_several_addresses_the_one_that_works_is_found_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    dead, alive = closed_port(), Listener()
    real = socket.getaddrinfo

    def both(host: str, port: int, *rest: int, **options: int) -> object:
        if host != "both.example" or options.get("flags"):
            return real(host, port, *rest, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", at)) for at in (dead, alive.address.port)]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with rig_of(0, addresses=[Address("both.example", 1)]) as rig:
        rig.listeners.append(alive)
        rig.until(lambda: rig.account().failures == 1)
        rig.forward(0.3)
        rig.connect()
        alive.peer.close()
        rig.until(lambda: rig.of(PeerGone))
        rig.forward(0.3)
        rig.connect()
        assert rig.account().failures == 2  # the dead one at first, and the loss
