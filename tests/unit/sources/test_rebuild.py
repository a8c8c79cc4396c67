"""Whole blocks: whom they are asked of, how they come, and the line on which the relay hears of them."""

from __future__ import annotations

import select
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest

from sprint.addresses import Address
from sprint.bitcoin.messages import MSG_WITNESS_BLOCK
from sprint.bitcoin.networks import REGTEST
from sprint.chain import HeaderChain
from sprint.events import Announcement, BlockRebuilt, Event, MessagesMissed, PeerReady, Sighting, Source, State
from sprint.regtest import RegtestChain
from sprint.relay import Relay
from sprint.sources.rebuild import RebuildLine, RebuildSource
from sprint.sources.rebuild_fetch import ANSWER_NS, GIVE_UP_NS, MAX_WANTED, BlockFetcher, BlockRequests, FetchedBlock
from tests.real.scripted_peer import ScriptedPeer, compact_size, message

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

WAIT_S = 20.0
ONE, TWO = RegtestChain().extend(2, 1_700_000_000)
X, Y = b"x" * 32, b"y" * 32


# Whom to ask


def test_the_announcing_peer_is_asked_first_and_the_others_when_it_fails() -> None:
    requests = BlockRequests()
    requests.want(X, "b", 0)
    assert requests.questions(["a", "b", "c"], 0) == [("b", X)]
    assert requests.questions(["a", "b", "c"], 0) == [], "one question at a time"
    requests.failed(X, "a")
    assert requests.questions(["a", "b", "c"], 0) == [], "a was not asked"
    requests.failed(X, "b")
    assert requests.questions(["a", "b", "c"], 0) == [("a", X)]
    requests.gone("a")
    assert requests.questions(["b", "c"], 0) == [("c", X)]


def test_a_peer_that_does_not_answer_is_passed_over_after_a_while() -> None:
    requests = BlockRequests()
    requests.want(X, "a", 0)
    requests.questions(["a", "b"], 0)
    assert requests.deadline() == ANSWER_NS
    assert requests.questions(["a", "b"], ANSWER_NS - 1) == []
    assert requests.questions(["a", "b"], ANSWER_NS) == [("b", X)]


def test_when_all_have_failed_they_are_asked_again_after_a_pause() -> None:
    requests = BlockRequests()
    requests.want(X, "a", 0)
    for peer in ("a", "b"):
        assert requests.questions(["a", "b"], 0) == [(peer, X)]
        requests.failed(X, peer)
    assert requests.questions(["a", "b"], 0) == []
    assert requests.questions(["a", "b"], ANSWER_NS) == [("a", X)]


def test_a_block_that_nobody_has_is_given_up() -> None:
    requests = BlockRequests()
    requests.want(X, "", 0)
    assert requests.questions([], GIVE_UP_NS - 1) == []
    assert requests.questions(["a"], GIVE_UP_NS) == []
    assert X not in requests


def test_of_many_blocks_the_newest_are_fetched() -> None:
    requests = BlockRequests()
    for number in range(MAX_WANTED + 3):
        requests.want(bytes([number]) * 32, "", 0)
    asked = [block_hash[0] for _, block_hash in requests.questions(["a"], 0)]
    assert asked == list(range(3, MAX_WANTED + 3))


def test_a_block_that_is_here_is_asked_for_no_more() -> None:
    requests = BlockRequests()
    requests.want(X, "", 0)
    requests.want(Y, "", 0)
    requests.settle(X)
    assert requests.questions(["a"], 0) == [("a", Y)]


# How they come


class Serving(ScriptedPeer):
    """A peer that has some blocks."""

    aside = None

    def __init__(self, *blocks: tuple[bytes, bytes], answers: bool = True) -> None:
        super().__init__()
        self.blocks = dict(blocks)
        self.answers = answers
        self.asked: list[tuple[int, bytes]] = []

    def _answer(self, connection: socket.socket, command: str, payload: bytes) -> None:
        super()._answer(connection, command, payload)
        if command == "getdata":
            kind, block_hash = struct.unpack("<I32s", payload[1:])
            self.asked.append((kind, block_hash))
            if block_hash in self.blocks:
                connection.sendall(message("block", self.blocks[block_hash]))
            elif self.answers:
                connection.sendall(message("notfound", compact_size(1) + payload[1:]))


def address_of(peer: ScriptedPeer) -> Address:
    host, port = peer.address.split(":")
    return Address(host, int(port))


def fetched(fetcher: BlockFetcher, until: int = 1) -> list[FetchedBlock]:
    blocks: list[FetchedBlock] = []
    deadline = time.monotonic() + WAIT_S
    while len(blocks) < until:
        assert time.monotonic() < deadline, f"{until} blocks awaited, {len(blocks)} came"
        select.select([fetcher.fileno()], [], [], 0.05)
        blocks += fetcher.poll()
    return blocks


def test_a_block_is_fetched_with_its_witnesses_from_a_peer_that_has_it() -> None:
    with Serving() as without, Serving((ONE.hash, ONE.payload)) as having:
        fetcher = BlockFetcher([address_of(without), address_of(having)], REGTEST)
        for peer in (without, having):
            peer.open()
        fetcher.want(ONE.hash, without.address)
        assert fetched(fetcher) == [FetchedBlock(having.address, ONE.hash, ONE.payload)]
        assert having.asked == [(MSG_WITNESS_BLOCK, ONE.hash)]
        fetcher.close()


def test_a_block_that_was_not_asked_for_is_dropped() -> None:
    with Serving((ONE.hash, ONE.payload)) as peer:
        fetcher = BlockFetcher([address_of(peer)], REGTEST)
        peer.open()

        def push() -> None:
            peer.wait_for_handshakes(1)
            peer.send("block", TWO.payload)

        pushed = threading.Thread(target=push)
        pushed.start()
        while pushed.is_alive():
            assert fetcher.poll() == []
        pushed.join()
        fetcher.want(ONE.hash, "")
        assert [block.hash for block in fetched(fetcher)] == [ONE.hash]
        fetcher.close()


# What the relay makes of it


@pytest.fixture
def line() -> Iterator[RebuildLine]:
    one = RebuildLine()
    yield one
    one.close()


def test_what_the_worker_reports_the_relay_hears(line: RebuildLine) -> None:
    source = RebuildSource(line)
    assert source.poll(0) == []
    told = [BlockRebuilt(X, 3, 1000), BlockRebuilt(Y, 1, 4_000_000)]
    for one in told:
        line.report(one)
    assert select.select([source.fileno()], [], [], 1)[0]
    assert source.poll(0) == told
    assert source.poll(0) == []
    source.close()


def test_a_relay_that_does_not_listen_stops_nobody(line: RebuildLine) -> None:
    for _ in range(10_000):
        line.report(BlockRebuilt(X, 1, 1))


def sighting(number: int = 0) -> Sighting:
    block = (ONE, TWO)[number]
    header = block.header.encode()
    return Sighting(Source.P2P, "a", Announcement.CMPCTBLOCK, block.hash, header, 5, transactions=7)


def relay_at_genesis() -> Relay:
    relay = Relay(HeaderChain(REGTEST))
    relay.peer_ready(PeerReady(Source.P2P, "a", 0), 0)
    relay.take_wants()
    assert relay.caught_up
    return relay


WALL_NS = 1_700_000_100 * 10**9


def test_a_whole_block_is_rebuilt_once_with_its_true_size_and_count() -> None:
    relay = relay_at_genesis()
    assert relay.rebuilt(BlockRebuilt(ONE.hash, 1, 200), WALL_NS) == (), "not proven yet"
    relay.offer(sighting(), 10, WALL_NS)
    (block,) = relay.rebuilt(BlockRebuilt(ONE.hash, 1, 200), WALL_NS)
    assert (block.event, block.hash, block.transactions, block.size) == (Event.REBUILT, ONE.hash, 1, 200)
    assert block.state == State.PROVEN | State.BEST | State.REBUILT
    assert relay.rebuilt(BlockRebuilt(ONE.hash, 1, 200), WALL_NS) == ()
    validated = relay.offer(sighting()._replace(peer="b", validated=True), 20, WALL_NS)[0]
    assert (validated.transactions, validated.size) == (1, 200)
    assert validated.state & State.REBUILT


def test_lost_messages_make_the_relay_ask_everybody() -> None:
    relay = relay_at_genesis()
    relay.peer_ready(PeerReady(Source.P2P, "b", 0), 0)
    relay.take_wants()
    relay.missed(MessagesMissed(Source.ZMQ, "z"), 10_000_000_000)
    assert {want.peer for want in relay.take_wants()} == {"a", "b"}
