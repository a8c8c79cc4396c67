"""The desk that publishes by ZMQ: where its blocks come from, and what becomes of those that are wrong."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from sprint.addresses import Address
from sprint.app_zmq import ZmqDesk
from sprint.broadcaster import Broadcaster
from sprint.config import load
from sprint.deliveries.zmq import ZmqDelivery
from sprint.events import Block, BlockRebuilt, Event, Source, State
from sprint.regtest import RegtestChain
from sprint.ring import Ring, RingWriter, size_for
from sprint.status import StatusBlock
from tests.unit.sources.test_rebuild import Serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sprint.regtest import MinedBlock

WAIT_S = 20.0
ONE, TWO = RegtestChain().extend(2, 1_700_000_000)


class Desk:
    """A desk on a loop of its own, with what it reports and logs."""

    def __init__(self, folder: Path, *, reports: bool = True, **settings: str) -> None:
        config = load({"TIER": "turbo", "NETWORK": "regtest", "DATA_DIR": str(folder), **settings}, folder)
        self.loop = asyncio.new_event_loop()
        self.reported: list[BlockRebuilt] = []
        self.refused: list[dict[str, Any]] = []
        self.ring = Ring.create(bytearray(size_for(64)), 64, 7)
        status = StatusBlock.create(7, {})
        report = self.reported.append if reports else None
        self.desk = ZmqDesk(config, self.ring, status, status.delivery(0, "zmq"), self, report=report)
        self.broadcaster = Broadcaster(RingWriter(self.ring), b"regt", [self.desk], time.monotonic_ns)
        self.listener = ZmqDelivery.listen(Address("127.0.0.1", 0))
        self.desk.start(self.loop, self.listener)

    def warning(self, _event: str, **values: Any) -> None:
        self.refused.append(values)

    def tell(self, event: Event, block: MinedBlock, height: int) -> None:
        header = block.header.encode()
        state = State.PROVEN | State.BEST
        self.broadcaster.write(Block(event, state, Source.P2P, "", block.hash, header, height, 0, 0, 0, 0, 0, 0, 0))
        self.broadcaster.wake()

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        async def until() -> None:
            deadline = time.monotonic() + WAIT_S
            while not condition():
                assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
                await asyncio.sleep(0.002)

        self.loop.run_until_complete(until())

    def close(self) -> None:
        self.desk.close()
        self.listener.close()
        self.loop.close()


@contextmanager
def desk(folder: Path, **settings: Any) -> Iterator[Desk]:
    one = Desk(folder, **settings)
    try:
        yield one
    finally:
        one.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as one:
        yield one


def whole(block: MinedBlock) -> BlockRebuilt:
    return BlockRebuilt(block.hash, 1, len(block.payload))


def test_a_proven_block_is_fetched_checked_and_reported_once(tmp_path: Path, stack: ExitStack) -> None:
    peer = stack.enter_context(Serving((ONE.hash, ONE.payload), (TWO.hash, TWO.payload)))
    peer.open()
    one = stack.enter_context(desk(tmp_path, BITCOIN_NODE=peer.address))
    for height, block in enumerate((ONE, TWO), 1):
        one.tell(Event.PROVEN, block, height)
        one.tell(Event.VALIDATED, block, height)
    one.wait(lambda: len(one.reported) == 2, "both blocks")
    assert sorted(one.reported, key=str) == sorted([whole(ONE), whole(TWO)], key=str)
    assert not one.refused
    assert [name for _, name in peer.asked] == [ONE.hash, TWO.hash]


def test_a_peer_that_gives_a_block_with_other_transactions_is_passed_over(tmp_path: Path, stack: ExitStack) -> None:
    forged = ONE.header.encode() + b"\x01" + TWO.coinbase
    liar, honest = Serving((ONE.hash, forged)), Serving((ONE.hash, ONE.payload))
    for peer in (liar, honest):
        stack.enter_context(peer)
    liar.open()
    one = stack.enter_context(desk(tmp_path, BITCOIN_NODE=f"{liar.address},{honest.address}"))
    one.tell(Event.PROVEN, ONE, 1)
    one.wait(lambda: bool(one.refused), "the forged block")
    assert one.reported == []
    assert one.refused[0]["peer"] == liar.address
    assert "commits to other transactions" in one.refused[0]["reason"]
    honest.open()
    one.wait(lambda: one.reported == [whole(ONE)], "the true one")


def publisher(context: zmq.Context[zmq.Socket[bytes]]) -> tuple[zmq.Socket[bytes], str]:
    socket = context.socket(zmq.XPUB)
    return socket, f"127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"


@pytest.mark.parametrize("reports", [True, False])
def test_a_block_that_the_node_publishes_is_taken_from_there(reports: bool, tmp_path: Path, stack: ExitStack) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stack.callback(context.term)
    node, address = publisher(context)
    stack.callback(node.close, 0)
    one = stack.enter_context(desk(tmp_path, reports=reports, BITCOIN_NODE="127.0.0.1:9", ZMQ_NODE=address))
    one.wait(lambda: bool(node.poll(0)), "the desk's subscription")
    reader = context.socket(zmq.SUB)
    stack.callback(reader.close, 0)
    reader.setsockopt(zmq.SUBSCRIBE, b"rawblock")
    reader.connect(f"tcp://127.0.0.1:{one.listener.getsockname()[1]}")
    one.wait(lambda: b"rawblock" in one.desk._delivery._prefixes, "the reader's subscription")
    # The publisher is quicker than the header: the block is known before it is proven.
    node.send_multipart([b"rawblock", ONE.payload, bytes(4)])
    if reports:
        one.wait(lambda: one.reported == [whole(ONE)], "a first report, which the relay can't use yet")

    def read() -> bool:
        one.tell(Event.PROVEN, ONE, 1)
        one.tell(Event.VALIDATED, ONE, 1)
        return bool(reader.poll(20))

    one.wait(read, "the rawblock")
    assert reader.recv_multipart()[1] == ONE.payload
    assert set(one.reported) == ({whole(ONE)} if reports else set())
    if reports:
        assert len(one.reported) > 1, "and again once it is proven"
