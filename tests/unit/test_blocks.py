"""The store's two bounds, and what a whole block has to be."""

from __future__ import annotations

import pytest

from sprint.blocks import BlockStore, WholeBlock, checked
from sprint.errors import RemoteProtocolError
from sprint.regtest import RegtestChain

ONE, TWO = RegtestChain().extend(2, 1_700_000_000)


def block_of(size: int) -> WholeBlock:
    return WholeBlock(bytes(size), 1)


def test_the_oldest_make_room_when_there_are_too_many() -> None:
    store = BlockStore(max_blocks=2, max_bytes=1000)
    for number in range(3):
        store.add(bytes([number]), block_of(10))
    assert bytes([0]) not in store
    assert len(store) == 2
    assert store.size == 20


def test_the_oldest_make_room_when_they_are_too_large() -> None:
    store = BlockStore(max_blocks=9, max_bytes=100)
    for number in range(3):
        store.add(bytes([number]), block_of(40))
    assert [bytes([number]) in store for number in range(3)] == [False, True, True]
    assert store.size == 80


def test_what_is_larger_than_the_store_displaces_nothing() -> None:
    store = BlockStore(max_blocks=9, max_bytes=100)
    store.add(b"a", block_of(40))
    store.add(b"b", block_of(101))
    assert b"a" in store
    assert store.get(b"b") is None


def test_a_block_is_kept_once() -> None:
    store = BlockStore()
    store.add(b"a", block_of(40))
    store.add(b"a", block_of(40))
    assert store.size == 40


def test_a_whole_block_is_counted() -> None:
    assert checked(ONE.hash, ONE.payload) == 1


@pytest.mark.parametrize(
    ("block_hash", "payload", "reason"),
    [
        (TWO.hash, ONE.payload, "another block"),
        (ONE.hash, ONE.payload[:-1], "block"),
        (ONE.hash, ONE.payload + b"\0", "block"),
        (ONE.hash, b"", "another block"),
        (TWO.hash, TWO.header.encode() + b"\x01" + ONE.coinbase, "commits to other transactions"),
        (ONE.hash, ONE.header.encode() + b"\x02" + ONE.coinbase * 2, "commits to other transactions"),
    ],
)
def test_anything_else_is_refused_and_said_why(block_hash: bytes, payload: bytes, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        checked(block_hash, payload)
