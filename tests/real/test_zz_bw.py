"""The product with its capture, a real node, and between them a wire that loses, doubles and reorders."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.net.forwarder import Policy, bad_wire
from tests.net.netns import Namespace
from tests.real.bcoin import BcoinNode
from tests.real.captured import WAYS, captured, ingest, ways_to
from tests.real.subscribers import JsonStream
from xdp.loader import missing

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

NEAR, FAR = "10.83.0.1", "10.83.0.2"
HEIGHT, BLOCKS = 20, 40
PAUSE_S = 0.05
"""From block to block: some announcements share a window of TCP's with those that are lost before them."""


def test_through_loss_repetition_and_disorder_the_feed_is_whole_true_and_tells_each_block_once(
    bcoin_installed: None, tmp_path: Path
) -> None:
    policy = Policy(loss=0.05, duplicate=0.05, reorder=0.1, seed=5)
    with ExitStack() as stack:
        near, far = stack.enter_context(Namespace()), stack.enter_context(Namespace())
        stack.enter_context(near.entered())
        ends = (f"{NEAR}/24", f"{FAR}/24")
        wire = stack.enter_context(bad_wire(near, far, policy, addresses=ends, names=("nic", "far")))
        node = BcoinNode()
        node.host = FAR
        with far.entered():
            stack.enter_context(node)
            node.mine(HEIGHT)
        product = stack.enter_context(captured(tmp_path, "nic", node.p2p_address))
        product.wait_for_tip(HEIGHT)
        stream = stack.enter_context(JsonStream(product.stream))
        mined: list[str] = []
        for _ in range(BLOCKS):
            with far.entered():
                mined += node.mine(1)
            time.sleep(PAUSE_S)
        stream.wait_for_hashes("validated", mined)
        # What was repeated late has been heard as well by now.
        stream.wait_for_heartbeat()
        assert stream.hashes("proven") == mined
        assert stream.hashes("validated") == mined
        assert [one["height"] for one in stream.of("proven")] == list(range(HEIGHT + 1, HEIGHT + BLOCKS + 1))
        # REBUILT, where whole blocks are asked for, is the only other that there may be.
        assert [one["seq"] for one in stream.events] == list(range(1, len(stream.events) + 1))
        assert {one["event"] for one in stream.events} <= {"proven", "rebuilt", "validated"}
        assert len({(one["event"], one["hash"]) for one in stream.events}) == len(stream.events)
        by_whom = [ways_to(product, block_hash) for block_hash in mined]
        print("WAYS", sum(ways >= WAYS for ways in by_whom))
        assert sum(ways >= WAYS for ways in by_whom) > BLOCKS // 2
        assert ingest(product)["opaqueFlows"] == 0
        counts = wire.stop()
        print("COUNTS", counts)
        assert min(counts.lost, counts.duplicated, counts.held) >= 3
