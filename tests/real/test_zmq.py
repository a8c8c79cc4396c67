"""ZMQ in and out, among real nodes: a C++ bitcoind that publishes, bcoin that speaks P2P, and plain readers."""

from __future__ import annotations

import json
import select
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from sprint import zmq_sockets
from sprint.addresses import parse_address
from sprint.events import MessagesMissed, Source
from sprint.regtest import RegtestChain
from sprint.sources.zmq import ZmqSource
from sprint.status import StatusBlock
from tests.real.children import QUIET, kill_and_await
from tests.real.product import Product, run_sprint
from tests.real.scripted_peer import ScriptedPeer
from tests.real.subscribers import JsonStream
from tests.real.zmq_readers import BLOCK_TOPICS, LossyProxy, Message, ZmqReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.real.bcoin import BcoinNode
    from tests.real.bitcoind import Bitcoind
    from tests.real.product import Event

CORE_TOPICS = (*BLOCK_TOPICS, "hashtx", "rawtx")


@pytest.fixture
def peer() -> Iterator[ScriptedPeer]:
    """An upstream at genesis that announces nothing, and answers getheaders with what the test gives it."""
    with ScriptedPeer() as one:
        one.open()
        yield one


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as one:
        yield one


def zmq_of(product: Product) -> str:
    """Where it publishes."""
    address: str = json.loads(product.wait_for_log('"Listening"'))["zmq"]
    return address


def wait_until_connected(product: Product, reader: ZmqReader) -> None:
    """Wait until all sources stand and one reader has come: what is said now reaches it."""
    product.wait_for("sources", lambda answer: all(one["connected"] for one in answer["sources"]), "all sources")

    def has_come(answer: Event) -> bool:
        return any(row["name"] == "zmq" and row["accepted"] for row in answer["deliveries"])

    product.wait_for("deliveries", has_come, "the reader")
    # The subscription is a packet behind the connection, and only a socket that is read from sends it again.
    while reader.read(0.3) is not None:
        pass


def serve_chain(peer: ScriptedPeer, node: Bitcoind) -> None:
    """From now on the peer answers getheaders with the node's chain: what was lost on the way can be asked for."""
    hashes = [node.rpc("getblockhash", number + 1) for number in range(node.rpc("getblockcount"))]
    peer.served = [node.raw_block(block_hash)[:80] for block_hash in hashes]


def wait_until_heard(node: Bitcoind, peer: ScriptedPeer, *readers: ZmqReader) -> list[str]:
    """Mine until each reader has heard of the same block, for a subscription takes its time; returns what was mined."""
    mined: list[str] = []
    for _ in range(20):
        mined += node.mine()
        serve_chain(peer, node)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            for reader in readers:
                reader.read(0.01)
            if all(mined[-1] in reader.hashes() for reader in readers):
                return mined
    raise TimeoutError("the readers hear nothing")


# Sprint's publisher beside the node's own


@pytest.mark.parametrize("tier", ["free", "turbo"])
def test_a_program_that_reads_core_s_publisher_reads_the_same_of_ours(
    bitcoind: Bitcoind, peer: ScriptedPeer, tier: str, tmp_path: Path, stack: ExitStack
) -> None:
    product = stack.enter_context(Product(tmp_path, peer.address, tier=tier, **QUIET, ZMQ_NODE=bitcoind.zmq_address))
    product.wait_until_healthy()
    theirs = stack.enter_context(ZmqReader(bitcoind.zmq_address, *CORE_TOPICS))
    ours = stack.enter_context(ZmqReader(zmq_of(product), *CORE_TOPICS))
    wait_until_connected(product, ours)
    first = wait_until_heard(bitcoind, peer, theirs, ours)[-1]
    mined = [bitcoind.mine()[0] for _ in range(3)] + bitcoind.mine(5)
    serve_chain(peer, bitcoind)
    raw = bitcoind.raw_block(mined[-1])
    for reader in (theirs, ours):
        reader.wait_for("rawblock", raw)
        reader.wait_for("rawtx", raw[81:])

    def since(reader: ZmqReader, topic: str) -> list[Message]:
        """From the first block that both have heard of; transactions from the first that both have."""
        if topic not in BLOCK_TOPICS:
            return reader.of(topic)[-len(mined) :]
        start = reader.hashes().index(first)
        return reader.of(topic)[start:] if topic == "hashblock" else reader.of(topic)[-len(mined) :]

    for topic in CORE_TOPICS:
        assert [one.body for one in since(ours, topic)] == [one.body for one in since(theirs, topic)]
        numbers = [one.number for one in since(ours, topic)]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    for topic in BLOCK_TOPICS:
        assert [one.number for one in since(ours, topic)] == [one.number for one in since(theirs, topic)]


def test_a_branch_that_wins_is_told_as_the_node_tells_it(
    bitcoind: Bitcoind, peer: ScriptedPeer, tmp_path: Path, stack: ExitStack
) -> None:
    product = stack.enter_context(Product(tmp_path, peer.address, **QUIET, ZMQ_NODE=bitcoind.zmq_address))
    product.wait_until_healthy()
    ours = stack.enter_context(ZmqReader(zmq_of(product), *BLOCK_TOPICS, "sequence"))
    wait_until_connected(product, ours)
    chain, now_s = RegtestChain(), int(time.time())
    losers = chain.extend(2, now_s)
    winners = chain.extend(3, now_s, parent=chain.headers.hash_at(0), extra=b"/other/")
    for block in losers:
        bitcoind.submit(block.payload)
    peer.served = [block.header.encode() for block in losers]
    ours.wait_for_tip(losers[-1].hash[::-1].hex())
    peer.served = [block.header.encode() for block in winners]
    for block in winners:
        bitcoind.submit(block.payload)
    assert bitcoind.best() == winners[-1].hash[::-1].hex()
    ours.wait_for("rawblock", winners[-1].payload)
    told = [one.body for one in ours.of("sequence")]
    assert told == [
        *(block.hash[::-1] + b"C" for block in losers),
        *(block.hash[::-1] + b"D" for block in reversed(losers)),
        *(block.hash[::-1] + b"C" for block in winners),
    ]
    assert ours.hashes() == [block.hash[::-1].hex() for block in (*losers, winners[-1])]
    assert [one.number for one in ours.of("hashblock")] == [0, 1, 2]


# When a hashblock goes out


def test_with_proof_by_a_node_the_node_builds_on_the_block_when_the_message_comes(
    bitcoind: Bitcoind, peer: ScriptedPeer, tmp_path: Path, stack: ExitStack
) -> None:
    product = stack.enter_context(Product(tmp_path, peer.address, **QUIET, ZMQ_NODE=bitcoind.zmq_address))
    product.wait_until_healthy()
    reader = stack.enter_context(ZmqReader(zmq_of(product), "hashblock", "sprint"))
    stream = stack.enter_context(JsonStream(product.stream))
    wait_until_connected(product, reader)
    for block in RegtestChain().extend(5, int(time.time())):
        shown = block.hash[::-1].hex()
        peer.announce(block.header.encode(), "cmpctblock")
        stream.wait_for_hashes("proven", [shown])
        reader.wait_until(lambda: bool(reader.of("sprint")), "the record")
        assert reader.read(0.1) is None, "the node knows nothing of it yet"
        assert shown not in reader.hashes()
        bitcoind.submit(block.payload)
        reader.wait_for_tip(shown)
        assert bitcoind.best() == shown
        for event in ("validated", "rebuilt"):
            stream.wait_for_hashes(event, [shown])
        reader.wait_until(lambda: len(reader.of("sprint")) == len(stream.events), "all records")
        reader.messages[:] = []
        stream.events.clear()


def test_with_proof_by_header_the_message_comes_before_any_node_has_the_block(
    peer: ScriptedPeer, tmp_path: Path, stack: ExitStack
) -> None:
    product = stack.enter_context(Product(tmp_path, peer.address, **QUIET, ZMQ_PROOF="header"))
    product.wait_until_healthy()
    reader = stack.enter_context(ZmqReader(zmq_of(product), "hashblock"))
    wait_until_connected(product, reader)
    for block in RegtestChain().extend(3, int(time.time())):
        peer.announce(block.header.encode(), "cmpctblock")
        product.wait_for_log(block.hash[::-1].hex())
    last = block.hash[::-1].hex()
    reader.wait_for_tip(last)


# What is lost on the way


def test_messages_that_are_dropped_on_the_way_are_counted_and_no_block_is_missed(
    bitcoind: Bitcoind, peer: ScriptedPeer, tmp_path: Path, stack: ExitStack
) -> None:
    proxy = stack.enter_context(LossyProxy(bitcoind.zmq_address))
    product = stack.enter_context(Product(tmp_path, peer.address, **QUIET, ZMQ_NODE=proxy.address))
    product.wait_until_healthy()
    stream = stack.enter_context(JsonStream(product.stream))
    through = stack.enter_context(ZmqReader(proxy.address, "hashblock"))
    mined = wait_until_heard(bitcoind, peer, through)
    proxy.drops = lambda message: message.number % 2 == 1 and message.topic in BLOCK_TOPICS
    for _ in range(9):
        mined += bitcoind.mine()
        serve_chain(peer, bitcoind)
    proxy.drops = lambda _message: False
    mined += bitcoind.mine()
    serve_chain(peer, bitcoind)
    stream.wait_for_hashes("proven", mined)
    stream.wait_for_hashes("validated", mined)
    assert sorted(stream.hashes("proven")) == sorted(mined), "each once"
    lost = {one.body for one in proxy.dropped if one.topic == "hashblock"}
    assert len(lost) >= 4
    product.wait_for(
        "sources", lambda _: product.sources()[proxy.address]["lost_messages"] == len(proxy.dropped), "the losses"
    )


def test_a_publisher_killed_and_started_again_is_heard_again_and_no_block_is_missed(
    bitcoind: Bitcoind, peer: ScriptedPeer, tmp_path: Path, stack: ExitStack
) -> None:
    product = stack.enter_context(Product(tmp_path, peer.address, **QUIET, ZMQ_NODE=bitcoind.zmq_address))
    product.wait_until_healthy()
    stream = stack.enter_context(JsonStream(product.stream))
    ours = stack.enter_context(ZmqReader(zmq_of(product), "hashblock"))
    name = bitcoind.zmq_address
    wait_until_connected(product, ours)
    mined = wait_until_heard(bitcoind, peer, ours)
    bitcoind.rpc("gettxoutsetinfo")  # which writes the chain to the disk: the block must survive
    bitcoind.kill()
    warning = product.wait_for("health", lambda answer: bool(answer["warnings"]), "a warning")["warnings"][0]
    assert warning.startswith(f"zmq {name}: not connected")
    assert product.ask("health")["status"] == "ok", "blocks are still heard by p2p"
    bitcoind.start()
    mined += bitcoind.mine(3)  # before the connection is back: nobody hears of them
    serve_chain(peer, bitcoind)
    stream.wait_for_hashes("proven", mined)
    product.wait_for("health", lambda answer: not answer["warnings"], "no warning")
    mined += bitcoind.mine()
    serve_chain(peer, bitcoind)
    ours.wait_for_tip(mined[-1])
    stream.wait_for_hashes("validated", mined)
    assert [one for one in ours.hashes() if one in mined] == mined


def test_a_publisher_whose_host_falls_silent_is_given_up_and_found_again(
    bitcoind: Bitcoind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zmq_sockets, "HEARTBEAT_MS", 100)
    monkeypatch.setattr(zmq_sockets, "HEARTBEAT_TIMEOUT_MS", 400)
    status = StatusBlock.create(1, {})
    source = ZmqSource([parse_address(bitcoind.zmq_address)], lambda: b"", status)
    heard: list[object] = []

    def wait_until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            select.select([source.fileno()], [], [], 0.05)
            heard.extend(source.poll(time.monotonic_ns()))
            source.account()

    wait_until(lambda: bool(status.peers()[0].connected))
    with bitcoind.frozen():
        wait_until(lambda: not status.peers()[0].connected)
        assert status.peers()[0].last_error == b"connection lost"
    wait_until(lambda: bool(status.peers()[0].connected))
    assert heard == [MessagesMissed(Source.ZMQ, bitcoind.zmq_address)]
    source.close()


# Everything together


def test_bcoin_to_sprint_to_a_plain_zmq_reader_and_a_keyed_turbo_stream(
    bcoin: BcoinNode, tmp_path: Path, stack: ExitStack
) -> None:
    made = run_sprint("keys", "create", "--tier", "turbo", "--name", "acme", "--json", DATA_DIR=str(tmp_path / "data"))
    assert made.returncode == 0, made.stderr
    key = json.loads(made.stdout)["key"]
    product = stack.enter_context(Product(tmp_path, bcoin.p2p_address, **QUIET))
    product.wait_until_healthy()
    stream = stack.enter_context(
        JsonStream(product.stream, json.dumps({"key": key, "format": "json"}).encode() + b"\n")
    )
    assert stream.answer["tier"] == "turbo"
    reader = stack.enter_context(ZmqReader(zmq_of(product), "hashblock", "rawblock"))
    wait_until_connected(product, reader)
    mined = bcoin.mine(1) + bcoin.mine(3)
    reader.wait_for_tip(mined[-1])
    template = bcoin.rpc("getblocktemplate", {"rules": ["segwit"]})
    assert template["previousblockhash"] == mined[-1]
    reader.wait_for("rawblock", bcoin.raw_block(mined[-1]))
    assert reader.hashes() == mined
    assert [one.body for one in reader.of("rawblock")] == [bcoin.raw_block(one) for one in mined]
    for topic in BLOCK_TOPICS:
        assert [one.number for one in reader.of(topic)] == list(range(len(mined)))
    for event in ("proven", "validated", "rebuilt"):
        stream.wait_for_hashes(event, mined)
    assert all(
        (one["transactions"], one["size"]) == (1, len(bcoin.raw_block(one["hash"]))) for one in stream.of("rebuilt")
    )


def test_a_publishing_process_that_is_killed_is_back_and_its_readers_with_it(
    bcoin: BcoinNode, tmp_path: Path, stack: ExitStack
) -> None:
    product = stack.enter_context(Product(tmp_path, bcoin.p2p_address, **QUIET))
    product.wait_until_healthy()
    reader = stack.enter_context(ZmqReader(zmq_of(product), "hashblock", "rawblock"))
    wait_until_connected(product, reader)
    first = bcoin.mine(1)
    reader.wait_for_tip(first[0])
    kill_and_await(product, "zmq")
    second = bcoin.mine(1)
    reader.wait_for_tip(second[0])
    reader.wait_for("rawblock", bcoin.raw_block(second[0]))
