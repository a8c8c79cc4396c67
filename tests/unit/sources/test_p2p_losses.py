"""Upstreams that refuse, break the protocol or hang up: what source p2p says of it, and when it tries again."""

from __future__ import annotations

import socket

import pytest

from sprint.addresses import Address
from sprint.bitcoin.networks import REGTEST
from sprint.events import PeerGone, PeerReady, Sighting, Source, Want
from tests.descriptors import open_descriptors
from tests.unit.chains import MS, SECOND
from tests.unit.peers import FIRST, closed_port, rig_of


def test_a_refused_connection_is_tried_again_within_250_ms_and_then_ever_later() -> None:
    with rig_of(0, addresses=[Address("127.0.0.1", closed_port())]) as rig:
        pauses = []
        for attempt in range(1, 10):
            rig.until(lambda n=attempt: rig.account().failures == n)  # type: ignore[misc]  # a default binds now
            due = rig.source.deadline()
            assert due is not None
            pauses.append(due - rig.polled_ns)
            rig.forward(pauses[-1] / 1e9)
        assert 0 < pauses[0] <= 250 * MS
        assert all(pause <= limit * MS for pause, limit in zip(pauses, (250, 500, 1_000, 2_000), strict=False))
        assert 15 * SECOND - SECOND < pauses[-1] <= 30 * SECOND
        assert b"refused" in rig.account().last_error


def test_a_completed_handshake_starts_the_pauses_afresh() -> None:
    with rig_of() as rig:
        listener = rig.listeners[0]
        listener.silent = True
        for attempt in range(1, 5):
            rig.until(lambda n=attempt: len(listener.peers) == n)  # type: ignore[misc]  # a default binds now
            listener.peer.close()
            rig.until(lambda n=attempt: rig.account().failures == n)  # type: ignore[misc]  # a default binds now
            rig.forward(5)
        listener.silent = False
        rig.connect()
        listener.peer.close()
        rig.until(lambda: rig.of(PeerGone))
        due = rig.source.deadline()
        assert due is not None
        assert due - rig.now_ns <= 250 * MS


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"\x00" * 24, b"magic"),
        (REGTEST.magic + b"block".ljust(12, b"\0") + (4_000_001).to_bytes(4, "little") + bytes(4), b"4000001"),
        (REGTEST.magic + b"verack".ljust(12, b"\0") + (0xFFFFFFFF).to_bytes(4, "little") + bytes(4), b"4294967295"),
    ],
)
def test_a_peer_that_breaks_the_protocol_is_dropped_heard_of_and_connected_again(raw: bytes, reason: bytes) -> None:
    with rig_of() as rig:
        (peer,) = rig.connect()
        peer.connection.send(FIRST.compact(1))
        peer.raw(peer.connection.data_to_send() + raw)  # the sound message before it still counts
        rig.until(lambda: rig.of(PeerGone))
        assert [seen.hash for seen in rig.of(Sighting)] == [FIRST.hash]
        assert reason in rig.account().last_error
        assert isinstance(rig.heard[-1], PeerGone)
        rig.forward(0.3)
        rig.connect()
        assert len(rig.of(PeerReady)) == 2
        assert rig.account().connects == 2


def test_a_peer_that_breaks_the_protocol_before_it_was_ready_was_never_there() -> None:
    with rig_of(silent=True) as rig:
        rig.until(lambda: rig.listeners[0].peers)
        rig.listeners[0].peer.raw(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        rig.until(lambda: rig.account().failures == 1)
        rig.step()
        assert rig.heard == []


def test_a_lost_connection_is_found_again_and_again_on_the_same_descriptors() -> None:
    with rig_of(3) as rig:
        rig.connect()
        before = len(open_descriptors())
        for turn in range(12):
            listener = rig.listeners[turn % 3]
            gone = len(rig.of(PeerGone))
            listener.peer.close()
            rig.until(lambda n=gone: len(rig.of(PeerGone)) == n + 1)  # type: ignore[misc]  # a default binds now
            rig.forward(0.3)
            rig.connect()
            listener.peer.inv(FIRST)
            seen = len(rig.of(Sighting))
            rig.until(lambda n=seen: len(rig.of(Sighting)) == n + 1)  # type: ignore[misc]  # a default binds now
            assert rig.of(Sighting)[-1].peer == str(listener.address)
        assert len(open_descriptors()) <= before + 3
        assert len(rig.source._watched) == len(rig.source._registered) == 3


def test_a_connection_lost_while_a_question_is_put_is_heard_of() -> None:
    with rig_of() as rig:
        (peer,) = rig.connect()
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        peer.close()
        want = Want(Source.P2P, str(rig.listeners[0].address), (REGTEST.genesis_hash,))
        rig.source.want(want, rig.now_ns)
        rig.source.want(want, rig.now_ns)
        due = rig.source.deadline()
        assert due is not None  # either it waits to be said, or the socket is readable
        rig.until(lambda: rig.of(PeerGone))
        assert len(rig.of(PeerGone)) == 1


def test_no_descriptor_left_is_a_reason_to_try_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(24, "Too many open files")

    with rig_of() as rig:
        now_ns = rig.now_ns
        with monkeypatch.context() as patch:
            patch.setattr("sprint.sources.upstream.socket.socket", refuse)
            assert rig.source.poll(now_ns) == []
        assert b"Too many open files" in rig.account().last_error
        due = rig.source.deadline()
        assert due is not None
        assert 0 < due - now_ns <= 250 * MS
        rig.forward(0.3)
        rig.connect()
