"""The store's two bounds, and what a whole block has to be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprint.bitcoin.block import double_sha256, merkle_root
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


def test_inner_hashes_of_the_merkle_tree_don_t_pass_for_transactions() -> None:
    """64 bytes that read as a transaction and are two transactions' hashes: both lists have the same root."""
    transaction = bytes([1, 0, 0, 0, 1]) + b"\7" * 36 + bytes([4]) + bytes(4 + 4) + b"\1" + bytes(8 + 1) + bytes(4)
    assert len(transaction) == 64
    root = double_sha256(transaction)
    assert merkle_root([transaction[:32], transaction[32:]]) == (root, False), "of the two whose hashes these are"
    header = replace(ONE.header, merkle_root=root).encode()
    with pytest.raises(RemoteProtocolError, match="no coinbase"):
        checked(double_sha256(header), header + b"\1" + transaction)


@given(st.binary(max_size=400), st.integers(0, 300), st.integers(0, 255))
def test_any_other_bytes_are_refused(tail: bytes, at: int, byte: int) -> None:
    damaged = bytearray(ONE.payload)
    damaged[80 + at % (len(damaged) - 80)] = byte
    if damaged != ONE.payload:
        with pytest.raises(RemoteProtocolError):
            checked(ONE.hash, bytes(damaged))
    with pytest.raises(RemoteProtocolError):
        checked(ONE.hash, ONE.header.encode() + tail)


@pytest.mark.parametrize(
    ("block_hash", "payload", "reason"),
    [
        (TWO.hash, ONE.payload, "another block"),
        (ONE.hash, ONE.payload[:-1], "block"),
        (ONE.hash, ONE.payload + b"\0", "block"),
        (ONE.hash, b"", "another block"),
        (TWO.hash, TWO.header.encode() + b"\x01" + ONE.coinbase, "commits to other transactions"),
        (ONE.hash, ONE.header.encode() + b"\x02" + ONE.coinbase * 2, "commits to other transactions"),
        (ONE.hash, ONE.header.encode() + b"\x00", "no coinbase"),
    ],
)
def test_anything_else_is_refused_and_said_why(block_hash: bytes, payload: bytes, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        checked(block_hash, payload)
