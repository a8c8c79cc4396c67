"""One upstream: what its connection's events mean to the relay, when it tries again, what its account shows."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

import pytest

from sprint.addresses import Address
from sprint.bitcoin.connection import Connection
from sprint.bitcoin.messages import MAX_HEADERS, Version
from sprint.bitcoin.networks import REGTEST
from sprint.bitcoin.peer_events import (
    BlockReceived,
    ConnectionEvent,
    HandshakeCompleted,
    HeadersReceived,
    LatencyMeasured,
    NotFound,
)
from sprint.events import Announcement, HeaderRun, PeerReady, Sighting, Source
from sprint.regtest import RegtestChain
from sprint.sources.upstream import FIRST_PAUSE_NS, LAST_PAUSE_NS, MAX_ANNOUNCED_HEADERS, Upstream
from tests.unit.chains import WALL_S, headers_of
from tests.unit.peers import Listener

if TYPE_CHECKING:
    from sprint.regtest import MinedBlock
    from sprint.sources import Heard

CHAIN = RegtestChain()
BLOCKS: list[MinedBlock] = CHAIN.extend(20, WALL_S)


def _upstream(port: int = 18_444) -> Upstream:
    return Upstream(Address("127.0.0.1", port), REGTEST, 1, lambda: 0)


def _heard(upstream: Upstream, *events: ConnectionEvent) -> list[Heard]:
    heard: list[Heard] = []
    for event in events:
        upstream._translate(event, 5, heard)
    return heard


def _headers(*blocks: MinedBlock) -> HeadersReceived:
    return HeadersReceived(headers_of(blocks), len(blocks))


def _synced() -> Upstream:
    upstream = _upstream()
    _heard(upstream, HeadersReceived(b"", 0))
    return upstream


def _version(agent: bytes = b"/Node:1/", height: int = 5) -> Version:
    return Version(70_016, 0, 0, 2, agent, height, True)


# Announcement or answer


@pytest.mark.parametrize("count", [0, 1, 20])
def test_the_first_headers_of_a_connection_are_an_answer(count: int) -> None:
    (run,) = _heard(_upstream(), _headers(*BLOCKS[:count]))
    assert run == HeaderRun(Source.P2P, "127.0.0.1:18444", headers_of(BLOCKS[:count]), 5, complete=True)


def test_while_full_answers_come_the_next_is_one_too() -> None:
    upstream = _upstream()
    full = HeadersReceived(bytes(80 * MAX_HEADERS), MAX_HEADERS)
    first, second, last, *rest = _heard(upstream, full, full, _headers(BLOCKS[0]), _headers(BLOCKS[1]))
    assert [run.complete for run in (first, second, last) if isinstance(run, HeaderRun)] == [False, False, True]
    assert [type(each) for each in rest] == [Sighting]


def test_up_to_eight_headers_unasked_are_announcements_in_order() -> None:
    heard = _heard(_synced(), _headers(*BLOCKS[:MAX_ANNOUNCED_HEADERS]))
    assert [each.hash for each in heard if isinstance(each, Sighting)] == [block.hash for block in BLOCKS[:8]]
    assert all(isinstance(each, Sighting) and each.validated and each.seen_ns == 5 for each in heard)
    assert [each.announcement for each in heard if isinstance(each, Sighting)] == [Announcement.HEADERS] * 8


def test_more_headers_than_a_node_announces_are_an_answer_even_unasked() -> None:
    (run,) = _heard(_synced(), _headers(*BLOCKS[:9]))
    assert isinstance(run, HeaderRun)


def test_few_headers_while_a_question_is_open_are_taken_as_both() -> None:
    upstream = _synced()
    upstream._asked = 1
    heard = _heard(upstream, _headers(BLOCKS[0]), _headers(BLOCKS[1]))
    assert [type(each) for each in heard] == [Sighting, HeaderRun, Sighting]


def test_an_empty_answer_is_a_run_and_unasked_it_is_nothing() -> None:
    upstream = _synced()
    upstream._asked = 1
    assert [type(each) for each in _heard(upstream, HeadersReceived(b"", 0))] == [HeaderRun]
    assert _heard(upstream, HeadersReceived(b"", 0)) == []


def test_a_block_is_a_sighting_with_its_size() -> None:
    block = BLOCKS[0]
    received = BlockReceived(block.hash, block.header.encode(), 1, block.payload)
    (seen,) = _heard(_upstream(), received)
    assert isinstance(seen, Sighting)
    assert (seen.announcement, seen.transactions, seen.size) == (Announcement.BLOCK, 1, len(block.payload))
    assert not seen.validated


def test_what_says_nothing_of_blocks_is_kept_from_the_relay() -> None:
    upstream = _upstream()
    assert _heard(upstream, LatencyMeasured(700), NotFound(())) == []
    assert upstream.account.rtt_ns == 700


# The account


def test_a_peers_own_words_are_harmless_in_the_account() -> None:
    upstream = _upstream()
    (ready,) = _heard(upstream, HandshakeCompleted(_version(b"/a\x1b[2J\x00\xff\nb/", -7)))
    assert upstream.account.agent == "/a?[2J???b/"
    assert upstream.account.height == 0
    assert ready == PeerReady(Source.P2P, "127.0.0.1:18444", 0)


# Trying again


def test_pauses_grow_to_their_limit_and_start_afresh_after_a_handshake() -> None:
    upstream = _upstream()
    pauses = []
    for _ in range(40):
        upstream.postpone(0, "no")
        assert upstream.retry_ns is not None
        pauses.append(upstream.retry_ns)
    assert 0 < pauses[0] <= FIRST_PAUSE_NS
    assert pauses[1] > FIRST_PAUSE_NS // 2
    for number, pause in enumerate(pauses):
        limit = min(FIRST_PAUSE_NS * 2**number, LAST_PAUSE_NS)
        assert limit // 2 <= pause <= limit
    _heard(upstream, HandshakeCompleted(_version()))
    upstream.postpone(0, "lost")
    assert upstream.retry_ns is not None
    assert upstream.retry_ns <= FIRST_PAUSE_NS
    assert upstream.account.failures == 41
    assert upstream.account.last_error == "lost"


def test_pauses_differ_so_that_upstreams_are_not_all_tried_at_once() -> None:
    pauses = set()
    for _ in range(20):
        upstream = _upstream()
        upstream.postpone(0, "no")
        pauses.add(upstream.retry_ns)
    assert len(pauses) > 10


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EAFNOSUPPORT, None])
def test_a_machine_that_gives_no_socket_is_a_failed_attempt(
    monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(number, "no")

    monkeypatch.setattr(socket, "socket", refuse)
    upstream = _upstream()
    upstream.candidates = [(socket.AF_INET6, ("::1", 1, 0, 0))]
    upstream.connect(0, high_bandwidth=True)
    assert upstream.retry_ns is not None
    assert upstream.account.last_error.startswith("can't connect: ")
    assert not upstream.account.high_bandwidth
    assert upstream.deadline() == upstream.retry_ns


def test_an_address_that_no_route_leads_to_is_a_failed_attempt() -> None:
    upstream = _upstream()
    upstream.candidates = [(socket.AF_INET, ("255.255.255.255", 1))]
    upstream.connect(0, high_bandwidth=False)
    assert upstream.socket is None
    assert upstream.retry_ns is not None
    assert not upstream.wants_to_write


def test_a_connection_that_is_not_there_in_five_seconds_is_given_up() -> None:
    listener = Listener()
    upstream = _upstream(listener.address.port)
    try:
        upstream.candidates = [(socket.AF_INET, tuple(listener.address))]
        upstream.connect(1_000, high_bandwidth=False)
        due = upstream.deadline()
        assert due == 5_000_001_000
        assert upstream.on_timer(due - 1) == []
        assert upstream.socket is not None
        assert upstream.on_timer(due) == []
        assert upstream.socket is None
        assert upstream.account.last_error == "no connection within 5 s"
        assert upstream.retry_ns is not None
        assert due < upstream.retry_ns <= due + FIRST_PAUSE_NS
    finally:
        upstream.close()
        listener.close()


def test_without_a_connection_there_is_nothing_to_ask_or_read() -> None:
    upstream = _upstream()
    assert upstream.ask_headers((bytes(32),), 0) == []
    assert upstream.request_high_bandwidth() == []
    assert upstream.on_readable(memoryview(bytearray(10))) == []
    assert upstream.on_timer(0) == []
    assert upstream.deadline() == 0  # connect at once
    upstream.refresh_account()
    assert not upstream.ready


def test_our_connections_claim_no_services_and_speak_first() -> None:
    listener = Listener()
    upstream = _upstream(listener.address.port)
    try:
        upstream.candidates = [(socket.AF_INET, tuple(listener.address))]
        upstream.connect(0, high_bandwidth=True)
        assert upstream.wants_to_write
        upstream.on_writable(0)
        connection = upstream._connection
        assert isinstance(connection, Connection)
        assert connection.config.services == 0
        assert connection.config.compact_high_bandwidth
        assert upstream.account.connects == 1
    finally:
        upstream.close()
        listener.close()
