"""The desk that publishes by ZMQ: forged blocks beside true ones, long catch-ups, and whose word is waited for."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
import zmq

from sprint.events import Event
from sprint.regtest import RegtestChain
from sprint.sources.rebuild_fetch import MAX_WANTED, FetchedBlock
from tests.unit.sources.test_rebuild import Serving
from tests.unit.test_app_zmq import ONE, TWO, Desk, desk, publisher

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

THREE = RegtestChain().extend(3, 1_700_000_000)[2]
FORGED = FetchedBlock("liar", ONE.hash, ONE.header.encode() + b"\x01" + TWO.coinbase)
TRUE = FetchedBlock("honest", ONE.hash, ONE.payload)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as one:
        yield one


class Reader:
    """A plain subscriber of the desk's."""

    def __init__(self, stack: ExitStack, one: Desk, *topics: str) -> None:
        self._desk = one
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(context.term)
        self.socket = context.socket(zmq.SUB)
        stack.callback(self.socket.close, 0)
        for topic in topics:
            self.socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        self.socket.connect(f"tcp://127.0.0.1:{one.listener.getsockname()[1]}")
        one.wait(lambda: {topic.encode() for topic in topics} <= one.desk._delivery._prefixes, "its subscriptions")

    def bodies(self, count: int) -> list[bytes]:
        found: list[bytes] = []

        def come() -> bool:
            while self.socket.poll(0):
                found.append(self.socket.recv_multipart()[1])
            return len(found) >= count

        self._desk.wait(come, f"{count} messages")
        return found


def test_a_block_that_comes_while_a_forged_one_is_checked_is_not_lost(tmp_path: Path, stack: ExitStack) -> None:
    one = stack.enter_context(desk(tmp_path, BITCOIN_NODE="127.0.0.1:9"))
    for block in (FORGED, TRUE):
        one.desk._check(block)
    one.wait(lambda: one.reported == [] and bool(one.refused), "the forged one's end")
    one.wait(lambda: len(one.desk._store) == 1, "the true one")
    assert one.desk._store.get(ONE.hash) is not None
    assert [entry["peer"] for entry in one.refused] == ["liar"]


def test_of_many_forged_blocks_a_bounded_number_waits_for_the_check(tmp_path: Path, stack: ExitStack) -> None:
    one = stack.enter_context(desk(tmp_path, BITCOIN_NODE="127.0.0.1:9"))
    for number in range(100):
        one.desk._check(FORGED._replace(peer=f"liar {number % 50}"))
    assert 1 < sum(map(len, one.desk._unchecked.values())) <= 8
    one.wait(lambda: not one.desk._unchecked, "all checked")
    one.desk._check(TRUE)
    one.wait(lambda: len(one.desk._store) == 1, "the true one")


def test_in_a_long_catch_up_the_newest_blocks_come_without_delay(tmp_path: Path, stack: ExitStack) -> None:
    blocks = RegtestChain().extend(MAX_WANTED + 4, int(time.time()))
    peer = stack.enter_context(Serving(*((block.hash, block.payload) for block in blocks)))
    one = stack.enter_context(desk(tmp_path, BITCOIN_NODE=peer.address))
    reader = Reader(stack, one, "rawblock")
    for event in (Event.PROVEN, Event.VALIDATED):
        for height, block in enumerate(blocks, 1):
            one.tell(event, block, height)
    peer.open()
    assert reader.bodies(MAX_WANTED) == [block.payload for block in blocks[4:]]


@pytest.mark.parametrize("reports", [True, False])
def test_a_hashblock_waits_for_the_operator_s_node_where_another_has_validated_the_block(
    reports: bool, tmp_path: Path, stack: ExitStack
) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stack.callback(context.term)
    node, address = publisher(context)
    stack.callback(node.close, 0)
    one = stack.enter_context(desk(tmp_path, reports=reports, BITCOIN_NODE="127.0.0.1:9", ZMQ_NODE=address))
    for topic in (b"hashblock", b"rawblock"):
        one.wait(lambda: bool(node.poll(0)), "the desk's subscriptions")
        assert node.recv() in (b"\1hashblock", b"\1rawblock"), topic
    reader = Reader(stack, one, "hashblock")
    one.tell(Event.PROVEN, ONE, 1)
    one.tell(Event.VALIDATED, ONE, 1)  # by somebody else
    for _ in range(10):  # turns of its loop, in which it would have said so
        one.wait(lambda: True, "a turn")
        assert not reader.socket.poll(20)
    node.send_multipart([b"hashblock", ONE.hash[::-1], bytes(4)])
    assert reader.bodies(1) == [ONE.hash[::-1]]
    node.send_multipart([b"rawblock", TWO.payload, bytes(4)])
    one.wait(lambda: TWO.hash in one.desk._delivery._word._named, "the node's word")
    one.tell(Event.PROVEN, TWO, 2)
    assert reader.bodies(1) == [TWO.hash[::-1]], "and no more than the node's word"
    one.tell(Event.PROVEN, THREE, 3)
    one.tell(Event.VALIDATED, THREE, 3)
    node.close(0)
    assert reader.bodies(1) == [THREE.hash[::-1]], "with the node gone, the others' word has to do"
