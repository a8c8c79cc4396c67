"""Fixtures of the tests against a node by others; they skip with the reason where it isn't installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.real import bcoin as bcoin_harness
from tests.real import bitcoind as bitcoind_harness
from tests.real.bcoin import BcoinNode
from tests.real.bitcoind import Bitcoind

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def bcoin_installed() -> None:
    """Skips what asks for it when no bcoin can be started here."""
    reason = bcoin_harness.missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def bcoin(bcoin_installed: None) -> Iterator[BcoinNode]:
    """One regtest node at genesis, chain in memory."""
    with BcoinNode() as node:
        yield node


@pytest.fixture
def bcoin_pair(bcoin_installed: None) -> Iterator[tuple[BcoinNode, BcoinNode]]:
    """Two regtest nodes at genesis, chains in memory, not connected to each other."""
    with BcoinNode("alice") as alice, BcoinNode("bob") as bob:
        yield alice, bob


@pytest.fixture
def bitcoind() -> Iterator[Bitcoind]:
    """A node in C++ at genesis that publishes by ZMQ."""
    reason = bitcoind_harness.missing()
    if reason is not None:
        pytest.skip(reason)
    with Bitcoind() as node:
        yield node
