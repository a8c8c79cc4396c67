"""Upstreams that race, die, come back and change their mind: the feed has no gap, no double and no false best tip."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.real.bcoin import BcoinNode
from tests.real.product import Product
from tests.real.subscribers import JsonStream

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOAD_PAUSE_S = 0.01
"""Between blocks under load: some sixty a second."""


class Load:
    """A node that mines on and on, in a thread; `mined` grows."""

    def __init__(self, node: BcoinNode) -> None:
        self.mined: list[str] = []
        self.error: Exception | None = None
        self._node = node
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._mine, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._enough.set()
        self._thread.join(30)
        if self.error is not None:
            raise self.error

    def _mine(self) -> None:
        try:
            while not self._enough.wait(LOAD_PAUSE_S):
                self.mined += self._node.mine(1)
        except Exception as error:
            self.error = error


@contextmanager
def mining(node: BcoinNode) -> Iterator[Load]:
    """The node mines as long as this lasts."""
    load = Load(node)
    load.start()
    try:
        yield load
    finally:
        load.stop()


@contextmanager
def two_nodes() -> Iterator[tuple[BcoinNode, BcoinNode]]:
    """Two nodes with their chains on disk, twelve blocks in common, connected to each other."""
    with BcoinNode("alice", on_disk=True) as alice, BcoinNode("bob", on_disk=True) as bob:
        common = alice.mine(12)
        bob.connect_to(alice)
        bob.wait_for_tip(common[-1])
        yield alice, bob


def all_connected(answer: dict[str, Any]) -> bool:
    return all(source["connected"] for source in answer["sources"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_two_raced_nodes_are_both_counted_and_each_block_is_proven_once(bcoin_installed: None, tmp_path: Path) -> None:
    with two_nodes() as (alice, bob), Product(tmp_path, alice.p2p_address, bob.p2p_address) as product:
        product.wait_until_healthy()
        product.wait_for("sources", all_connected, "both upstreams connected")
        with JsonStream(product.stream) as raw:
            mined = []
            for number in range(20):
                miner, other = (alice, bob) if number % 2 else (bob, alice)
                mined += miner.mine(1)
                other.wait_for_tip(mined[-1])
            raw.wait_for_hashes("validated", mined)
            assert raw.hashes("proven") == mined

        def both_saw_all(answer: dict[str, Any]) -> bool:
            return all(source["sightings"] == len(mined) for source in answer["sources"])

        told = product.wait_for("sources", both_saw_all, "each source's sighting of each block")["sources"]
        path, both = "blocks?limit=64", {alice.p2p_address, bob.p2p_address}
        blocks = product.wait_for(
            path,
            lambda one: all({mark["peer"] for mark in block["timeline"]} == both for block in one["blocks"]),
            "both peers in each block's timeline",
        )["blocks"]
        assert [block["hash"] for block in reversed(blocks)] == mined
        assert {source["name"] for source in told} == {alice.p2p_address, bob.p2p_address}
        assert sum(source["first"] for source in told) == len(mined)

        leads: dict[str, list[float]] = {source["name"]: [] for source in told}
        for block in blocks:
            first = block["timeline"][0]
            assert first["after_first_us"] == 0
            second = next(mark for mark in block["timeline"] if mark["peer"] != first["peer"])
            assert second["after_first_us"] >= 0
            leads[first["peer"]].append(second["after_first_us"])
        for source in told:
            own, others = (
                leads[source["name"]],
                [lead for name in leads if name != source["name"] for lead in leads[name]],
            )
            assert source["first"] == len(own)
            assert source["mean_lead_us"] == (pytest.approx(sum(own) / len(own), abs=0.01) if own else None)
            assert source["mean_behind_us"] == (pytest.approx(sum(others) / len(others), abs=0.01) if others else None)


def test_one_of_two_nodes_killed_and_restarted_under_load_leaves_no_gap(bcoin_installed: None, tmp_path: Path) -> None:
    with two_nodes() as (alice, bob), Product(tmp_path, alice.p2p_address, bob.p2p_address) as product:
        product.wait_until_healthy()
        product.wait_for("sources", all_connected, "both upstreams connected")
        with JsonStream(product.stream) as raw:
            with mining(bob) as load:
                raw.wait_until(lambda told: len(told) > 40, "blocks before the kill")
                alice.kill()
                product.wait_for("sources", lambda answer: not all_connected(answer), "the killed node's absence")
                begun = len(load.mined)
                raw.wait_until(lambda _: len(load.mined) > begun + 20, "blocks without it")
                alice.start()
                alice.connect_to(bob)
                product.wait_for("sources", all_connected, "the restarted node's return")
                begun = len(load.mined)
                raw.wait_until(lambda _: len(load.mined) > begun + 20, "blocks after the return")
            alice.wait_for_tip(load.mined[-1])
            raw.wait_for_hashes("validated", load.mined)

            assert raw.hashes("proven") == load.mined
            heights = [one["height"] for one in raw.of("proven")]
            assert heights == list(range(13, 13 + len(load.mined)))
            assert [one["seq"] for one in raw.events] == list(range(1, len(raw.events) + 1))
            assert {one["event"] for one in raw.events} <= {"proven", "rebuilt", "validated"}
        sources = product.sources()
        assert sources[alice.p2p_address]["connects"] == 2
        assert sources[bob.p2p_address]["connects"] == 1
        assert product.ask("health")["status"] == "ok"


def test_what_the_only_upstream_gained_while_it_was_away_comes_as_catchup(
    bcoin_installed: None, tmp_path: Path
) -> None:
    with BcoinNode(on_disk=True) as node, Product(tmp_path, node.p2p_address) as product:
        node.mine(12)
        product.wait_until_healthy()
        product.wait_for_tip(12)
        with JsonStream(product.stream) as raw:
            before = node.mine(2)
            raw.wait_for_hashes("validated", before)
            node.kill()
            product.wait_for("health", lambda answer: answer["status"] == "unhealthy", "the upstream's absence")
            port, node.p2p_port = node.p2p_port, free_port()
            node.start()  # where Sprint can't see it
            missed = node.mine(3)
            node.stop()
            node.p2p_port = port
            node.start()
            product.wait_until_healthy()
            raw.wait_for_hashes("validated", missed)
            after = node.mine(2)
            raw.wait_for_hashes("validated", after)

            assert raw.hashes("proven") == before + missed + after
            late = {one["hash"] for one in raw.of("proven") if "catchup" in one["state"]}
            assert late == set(missed)
            assert [one["seq"] for one in raw.events] == list(range(raw.events[0]["seq"], raw.events[-1]["seq"] + 1))
        assert product.sources()[node.p2p_address]["connects"] == 2


@pytest.mark.parametrize(("raced", "tier"), [(False, "turbo"), (True, "business")])
def test_a_reorganisation_of_two_blocks_is_told_with_its_losers_and_its_fork(
    bcoin_installed: None, tmp_path: Path, raced: bool, tier: str
) -> None:
    with two_nodes() as (alice, bob):
        bob.disconnect_from(alice)
        nodes = [alice, bob] if raced else [alice]
        with Product(tmp_path, *(node.p2p_address for node in nodes), tier=tier) as product:
            product.wait_until_healthy()
            product.wait_for("sources", all_connected, "all upstreams connected")
            with JsonStream(product.stream) as raw:
                losers, winners = alice.reorganise(bob, depth=2)
                (later,) = alice.mine(1)
                raw.wait_for_hashes("validated", [winners[-1], later])
                raw.wait_for_hashes("stale", losers)

                assert Counter(raw.hashes("proven")) == dict.fromkeys([*losers, *winners, later], 1)
                assert sorted(raw.hashes("stale")) == sorted(losers)
                assert [one["seq"] for one in raw.events] == list(range(1, len(raw.events) + 1))
                proven = {one["hash"]: one for one in raw.of("proven")}
                changes = [one for one in raw.events if one["event"] == "proven" and "reorg" in one["state"]]
                assert [one["fork_height"] for one in changes] == [12]
                # The winner that overtook: the third of three, which alone has more work than two.
                assert changes[0]["hash"] == winners[2]
                assert changes[0]["height"] == 15
                assert "best" in changes[0]["state"]
                assert proven[later]["fork_height"] is None
                assert "reorg" not in proven[later]["state"]
                for one in raw.of("stale"):
                    assert "best" not in one["state"]
                    assert one["seq"] > changes[0]["seq"]
                product.wait_for_tip(16)
                assert alice.tip() == (16, later)


def test_an_upstream_that_is_not_there_yet_is_found_when_it_comes(bcoin_installed: None, tmp_path: Path) -> None:
    with BcoinNode(on_disk=True) as node:
        node.mine(5)
        node.kill()
        with Product(tmp_path, node.p2p_address) as product:
            answer = product.wait_for("health", lambda one: "upstreams" in " ".join(one["problems"]), "the refusal")
            assert answer["status"] == "unhealthy"
            assert node.p2p_address in " ".join(answer["problems"])
            node.start()
            began = time.monotonic()
            assert product.wait_until_healthy()["tip_height"] == 5
            assert time.monotonic() - began < 30
            with JsonStream(product.stream) as raw:
                (mined,) = node.mine(1)
                raw.wait_for_hashes("validated", [mined])
                assert raw.hashes("proven") == [mined]
