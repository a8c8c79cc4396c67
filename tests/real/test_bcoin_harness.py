"""The harness itself: what other tests take for granted of a bcoin node."""

from __future__ import annotations

import hashlib
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.real.bcoin import BcoinNode, RpcError, address_for, wait_until
from tests.real.node_process import NodeError

ROOT = Path(__file__).parents[2]


def test_mined_blocks_are_what_rpc_says_lowest_first(bcoin: BcoinNode) -> None:
    assert bcoin.tip()[0] == 0
    hashes = bcoin.mine(5)
    assert bcoin.tip() == (5, hashes[-1])
    assert [bcoin.block_hash(height) for height in range(1, 6)] == hashes


def test_a_hash_is_the_double_sha256_of_the_header_in_display_order(bcoin: BcoinNode) -> None:
    (block_hash,) = bcoin.mine(1, address_for("somebody"))
    header = bcoin.header(block_hash)
    assert len(header) == 80
    assert hashlib.sha256(hashlib.sha256(header).digest()).digest()[::-1].hex() == block_hash
    assert bcoin.raw_block(block_hash)[:80] == header


def test_a_refused_call_raises_with_the_nodes_words(bcoin: BcoinNode) -> None:
    with pytest.raises(RpcError, match="getblockhash"):
        bcoin.block_hash(7)


@pytest.mark.parametrize("gracefully", [True, False])
def test_a_restart_keeps_the_chain_on_disk_and_the_ports(bcoin_installed: None, gracefully: bool) -> None:
    with BcoinNode(on_disk=True) as node:
        hashes = node.mine(5)
        address, pid = node.p2p_address, node.pid
        node.restart(gracefully=gracefully)
        assert node.pid != pid
        assert (node.p2p_address, node.tip()) == (address, (5, hashes[-1]))
        assert node.mine(1)[0] not in hashes


def test_a_restart_that_forgets_starts_at_genesis(bcoin_installed: None) -> None:
    with BcoinNode(on_disk=True) as node:
        node.mine(3)
        node.restart(keep_chain=False, gracefully=False)
        assert node.tip()[0] == 0


def test_a_chain_in_memory_is_not_claimed_to_be_kept(bcoin: BcoinNode) -> None:
    with pytest.raises(NodeError, match="on_disk"):
        bcoin.restart()
    assert bcoin.running


def test_a_killed_node_is_gone_and_comes_back_on_its_ports(bcoin: BcoinNode) -> None:
    address = bcoin.p2p_address
    bcoin.kill()
    assert not bcoin.running
    with pytest.raises(ConnectionRefusedError):
        bcoin.tip()
    bcoin.start()
    assert (bcoin.p2p_address, bcoin.tip()[0]) == (address, 0)


def test_a_connected_node_fetches_the_chain_and_follows_it(bcoin_pair: tuple[BcoinNode, BcoinNode]) -> None:
    alice, bob = bcoin_pair
    alice.mine(10)
    bob.connect_to(alice)
    bob.wait_for_tip(alice.tip()[1])
    (new,) = alice.mine(1)
    bob.wait_for_tip(new)
    bob.disconnect_from(alice)
    alice.mine(1)
    assert bob.tip() == (11, new)


def test_two_blocks_are_reorganised_away_by_three(bcoin_pair: tuple[BcoinNode, BcoinNode]) -> None:
    alice, bob = bcoin_pair
    common = alice.mine(5)
    bob.connect_to(alice)
    bob.wait_for_tip(common[-1])
    bob.disconnect_from(alice)

    losers, winners = alice.reorganise(bob, depth=2)

    assert (len(losers), len(winners)) == (2, 3)
    assert alice.tip() == (8, winners[-1])
    assert [alice.block_hash(height) for height in range(1, 9)] == common + winners
    assert not set(losers) & set(winners)


def test_a_reorganisation_also_comes_over_p2p(bcoin_pair: tuple[BcoinNode, BcoinNode]) -> None:
    alice, bob = bcoin_pair
    alice.mine(2)
    winners = bob.mine(3)
    alice.connect_to(bob)
    alice.wait_for_tip(winners[-1])
    assert alice.tip()[0] == 3


def test_a_frozen_node_accepts_connections_and_answers_after_the_thaw(bcoin: BcoinNode) -> None:
    with bcoin.frozen(), socket.create_connection((bcoin.host, bcoin.rpc_port), timeout=5) as connection:
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(1)
    assert bcoin.tip()[0] == 0


def test_a_node_whose_port_is_taken_says_so_with_its_log(bcoin: BcoinNode) -> None:
    second = BcoinNode("second")
    second.p2p_port, second.rpc_port = bcoin.p2p_port, bcoin.rpc_port
    with pytest.raises(NodeError, match="EADDRINUSE"), second:
        pass
    assert not second.running
    assert bcoin.running


def test_no_node_outlives_a_test_process_that_was_killed(bcoin_installed: None) -> None:
    program = (
        "import signal\n"
        "from tests.real.bcoin import BcoinNode\n"
        "with BcoinNode() as node:\n"
        "    print(node.pid, flush=True)\n"
        "    signal.pause()\n"
    )
    tests = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert tests.stdout is not None
        node_pid = int(tests.stdout.readline())
        watch = os.pidfd_open(node_pid)
        try:
            os.kill(tests.pid, signal.SIGKILL)
            assert select.select([watch], [], [], 30)[0], f"node {node_pid} is still running"
        finally:
            os.close(watch)
    finally:
        tests.kill()
        tests.communicate()


def test_waiting_in_vain_names_what_was_awaited() -> None:
    with pytest.raises(NodeError, match="the moon"):
        wait_until(lambda: False, "the moon", timeout_s=0.05)
