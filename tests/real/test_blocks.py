"""From a real node's block to a subscriber: what bcoin mines is what comes out, whole, in order, and nothing else."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.real.product import COMMAND, Product
from tests.real.scripted_peer import ScriptedPeer, double_sha256, headers_payload, make_branch
from tests.real.subscribers import JSON_HELLO, ClientStream, CommandStream, EventLog, JsonStream

if TYPE_CHECKING:
    from pathlib import Path

    from tests.real.bcoin import BcoinNode
    from tests.real.product import Event


def assert_same_block(told: Event, node: BcoinNode) -> None:
    """What was told of a block is what the node's RPC says of it."""
    assert told["hash"] == node.block_hash(told["height"])
    header = node.header(told["hash"])
    assert told["header"] == header.hex()
    assert double_sha256(header)[::-1].hex() == told["hash"]
    assert told["prev"] == node.block_hash(told["height"] - 1)


def assert_gapless(log: EventLog) -> None:
    sequences = [one["seq"] for one in log.events]
    assert sequences == list(range(sequences[0], sequences[0] + len(sequences)))


@pytest.mark.parametrize("tier", ["enterprise", "free"])
def test_each_block_that_the_node_mines_comes_out_of_every_kind_of_subscription(
    bcoin: BcoinNode, tmp_path: Path, tier: str
) -> None:
    bcoin.mine(15)
    with Product(tmp_path, bcoin.p2p_address, tier=tier) as product:
        product.wait_until_healthy()
        with (
            CommandStream(*COMMAND, "watch", product.stream, "--json", "--key", product.key) as watch,
            JsonStream(product.stream, product.hello) as raw,
            JsonStream(product.stream, half_close=True) as half_closed,
        ):
            client = ClientStream(product.stream)
            product.wait_for_subscribers(4)
            mined = [block_hash for _ in range(3) for block_hash in bcoin.mine(1)] + bcoin.mine(4)
            for log in (watch, raw, half_closed, client):
                log.wait_for_hashes("proven", mined)
                log.wait_for_hashes("validated", mined)

                assert log.hashes("proven") == mined
                assert log.hashes("validated") == mined
                assert [one["height"] for one in log.of("proven")] == list(range(16, 23))
                assert_gapless(log)
                for one in log.events:
                    assert_same_block(one, bcoin)
                    assert "catchup" not in one["state"]
                places = {(one["hash"], one["event"]): one["seq"] for one in log.events}
                assert all(places[block, "proven"] < places[block, "validated"] for block in mined)
            assert raw.events == watch.events == half_closed.events == client.events
            assert raw.answer["tier"] == tier
            assert raw.answer["network"] == "regtest"


def test_a_shell_with_netcat_is_a_client(bcoin: BcoinNode, tmp_path: Path) -> None:
    netcat = shutil.which("nc") or shutil.which("ncat")
    if netcat is None:
        pytest.skip("nc is not installed")
    with Product(tmp_path, bcoin.p2p_address) as product:
        product.wait_until_healthy()
        with CommandStream(netcat, *product.stream.split(":"), stdin=JSON_HELLO) as shell:
            product.wait_for_subscribers(1)
            mined = bcoin.mine(3)
            shell.wait_for_hashes("validated", mined)
            assert shell.hashes("proven") == mined


def test_the_first_block_of_a_node_without_any_is_published(bcoin: BcoinNode, tmp_path: Path) -> None:
    assert bcoin.tip()[0] == 0
    with Product(tmp_path, bcoin.p2p_address) as product:
        assert product.wait_until_healthy()["tip_height"] == 0
        with JsonStream(product.stream) as raw:
            (first,) = bcoin.mine(1)
            raw.wait_for_hashes("validated", [first])
            assert raw.hashes("proven") == [first]
            assert raw.events[0]["height"] == 1
            assert_same_block(raw.events[0], bcoin)
            assert "catchup" not in raw.events[0]["state"]


def test_a_node_that_has_a_thousand_blocks_yields_no_record_of_them_and_a_fork_far_below_none_either(
    bcoin: BcoinNode, tmp_path: Path
) -> None:
    bcoin.mine(1_000)
    headers = [bcoin.header(bcoin.block_hash(height)) for height in (799, 800)]
    with ScriptedPeer(1_000) as peer, Product(tmp_path, bcoin.p2p_address, peer.address) as product:
        assert product.wait_until_healthy()["tip_height"] == 1_000
        with JsonStream(product.stream) as raw, JsonStream(product.stream, b'{"format":"json","since":1}\n') as since:
            assert raw.answer["next"] == 1, "a record of what the node already had"
            peer.open()
            peer.wait_for_handshakes(1)
            forks = make_branch(headers[1], 5, "five"), make_branch(headers[1], 50, "fifty")
            single = make_branch(headers[0], 2, "single")
            peer.announce(single[0], "cmpctblock")
            peer.announce(single[1], "cmpctblock")
            peer.announce(single[0], "headers")
            for fork in forks:
                peer.send("headers", headers_payload(fork))
            peer.wait_for_answer()

            (mined,) = bcoin.mine(1)
            for log in (raw, since):
                log.wait_for_hashes("validated", [mined])
                assert {one["hash"] for one in log.events} == {mined}
                assert [one["seq"] for one in log.events][:2] == [1, 2]
            product.wait_for_tip(1_001)


def test_proven_comes_once_per_hash_however_often_and_by_whatever_message_it_is_told(
    bcoin: BcoinNode, tmp_path: Path
) -> None:
    bcoin.mine(12)
    with ScriptedPeer(12) as peer, Product(tmp_path, bcoin.p2p_address, peer.address) as product:
        product.wait_until_healthy()
        peer.open()
        peer.wait_for_handshakes(1)
        with JsonStream(product.stream) as raw:
            mined = bcoin.mine(2)
            raw.wait_for_hashes("validated", mined)
            for block_hash in mined:
                header = bcoin.header(block_hash)
                for how in ("cmpctblock", "headers", "cmpctblock"):
                    peer.announce(header, how)
                peer.send("inv", b"\x01\x02\x00\x00\x00" + bytes.fromhex(block_hash)[::-1])
                peer.send("block", bcoin.raw_block(block_hash))
            peer.wait_for_answer()
            mined += bcoin.mine(1)
            raw.wait_for_hashes("validated", mined)
            assert Counter(raw.hashes("proven")) == dict.fromkeys(mined, 1)
            assert Counter(raw.hashes("validated")) == dict.fromkeys(mined, 1)
            told = product.wait_for(
                "sources", lambda all_: all(one["sightings"] >= 2 for one in all_["sources"]), "both sources' sightings"
            )
            assert sum(one["first"] for one in told["sources"]) == len(mined)
