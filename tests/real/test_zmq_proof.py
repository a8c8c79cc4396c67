"""ZMQ_PROOF=node, where several nodes are heard: a hashblock means that the operator's own has the block."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from sprint.regtest import RegtestChain
from tests.real.children import QUIET
from tests.real.product import Product
from tests.real.scripted_peer import ScriptedPeer
from tests.real.subscribers import JsonStream
from tests.real.test_zmq import wait_until_connected, zmq_of
from tests.real.zmq_readers import ZmqReader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.real.bitcoind import Bitcoind


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as one:
        yield one


@pytest.mark.parametrize("tier", ["business", "turbo"])
def test_the_operator_s_node_has_the_block_when_the_message_comes_though_another_had_it_first(
    bitcoind: Bitcoind, tier: str, tmp_path: Path, stack: ExitStack
) -> None:
    """As a pool has it: its own node, and others that are quicker."""
    quick = stack.enter_context(ScriptedPeer())
    quick.open()
    product = stack.enter_context(Product(tmp_path, quick.address, tier=tier, **QUIET, ZMQ_NODE=bitcoind.zmq_address))
    product.wait_until_healthy()
    reader = stack.enter_context(ZmqReader(zmq_of(product), "hashblock"))
    stream = stack.enter_context(JsonStream(product.stream))
    wait_until_connected(product, reader)
    first, *blocks = RegtestChain().extend(5, int(time.time()))
    bitcoind.submit(first.payload)
    quick.announce(first.header.encode(), "headers")  # a connection's first headers are an answer, not news
    reader.wait_for_tip(first.hash[::-1].hex())
    for block in blocks:
        shown = block.hash[::-1].hex()
        quick.announce(block.header.encode(), "headers")  # which says that it has connected it
        stream.wait_for_hashes("validated", [shown])
        assert reader.read(0.2) is None, "the operator's node knows nothing of it yet"
        bitcoind.submit(block.payload)
        reader.wait_for_tip(shown)
        assert bitcoind.best() == shown
