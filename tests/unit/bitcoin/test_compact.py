from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprint.bitcoin.block import parse_block, parse_transaction
from sprint.bitcoin.codec import U64, MalformedError, encode_compact_size
from sprint.bitcoin.compact import (
    BlockTxn,
    CmpctBlock,
    GetBlockTxn,
    PrefilledTransaction,
    ShortIdKey,
    decode_differential,
    encode_differential,
    siphash_2_4,
)
from sprint.errors import LocalProtocolError

VECTORS = Path(__file__).parents[2] / "vectors" / "bitcoin"


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((VECTORS / name).read_text())
    return content


COMPACT = load("compact_blocks.json")["cases"]
DIFFERENTIAL = load("differential_indexes.json")
BLOCK = bytes.fromhex(COMPACT[0]["block"])
TRANSACTION = parse_block(BLOCK)[1][0]


@pytest.mark.parametrize("case", load("siphash.json")["cases"], ids=lambda case: f"{case['length']} bytes")
def test_siphash_gives_the_reference_values(case: dict[str, Any]) -> None:
    k0, k1 = U64.unpack(bytes(range(8)))[0], U64.unpack(bytes(range(8, 16)))[0]
    assert siphash_2_4(k0, k1, bytes(range(case["length"]))) == int(case["hash"], 16)


@pytest.mark.parametrize("case", COMPACT, ids=lambda case: case["name"])
def test_a_block_becomes_the_known_compact_block_and_back(case: dict[str, Any]) -> None:
    header, transactions = parse_block(bytes.fromhex(case["block"]))
    compact = CmpctBlock.of_block(header, transactions, case["nonce"])
    assert compact.encode().hex() == case["cmpctblock"]
    assert CmpctBlock.parse(compact.encode()) == compact
    assert compact.transactions == len(transactions)
    assert compact.short_ids == tuple(compact.key.short_id(t.wtxid) for t in transactions[1:])
    assert compact.key == ShortIdKey.of(header.encode(), case["nonce"])


def test_a_compact_block_cut_at_any_length_is_malformed_and_trailing_bytes_are_ignored() -> None:
    raw = bytes.fromhex(COMPACT[0]["cmpctblock"])
    for length in range(len(raw)):
        with pytest.raises(MalformedError):
            CmpctBlock.parse(raw[:length])
    assert CmpctBlock.parse(raw + b"later") == CmpctBlock.parse(raw)


@given(
    st.lists(st.integers(0, (1 << 48) - 1), max_size=20),
    st.sets(st.integers(0, 24), min_size=1, max_size=5),
    st.integers(0, (1 << 64) - 1),
)
def test_prefilled_transactions_keep_their_places(short_ids: list[int], places: set[int], nonce: int) -> None:
    prefilled = tuple(PrefilledTransaction(place, TRANSACTION) for place in sorted(places))
    compact = CmpctBlock(BLOCK[:80], nonce, tuple(short_ids), prefilled)
    if max(places) < compact.transactions:
        assert CmpctBlock.parse(compact.encode()) == compact
    else:
        with pytest.raises(MalformedError, match="prefilled transaction"):
            CmpctBlock.parse(compact.encode())


def test_a_compact_block_without_transactions_is_malformed() -> None:
    with pytest.raises(MalformedError, match="0 transactions"):
        CmpctBlock.parse(BLOCK[:80] + bytes(8) + b"\0\0")


def test_a_compact_block_holds_65535_transactions_and_no_more() -> None:
    def payload(short_ids: int) -> bytes:
        prefilled = b"\x01\x00" + TRANSACTION.raw
        return BLOCK[:80] + bytes(8) + encode_compact_size(short_ids) + bytes(6 * short_ids) + prefilled

    assert CmpctBlock.parse(payload(65_534)).transactions == 65_535
    with pytest.raises(MalformedError, match="65536 transactions"):
        CmpctBlock.parse(payload(65_535))
    with pytest.raises(MalformedError, match="over 65535"):
        CmpctBlock.parse(payload(65_536))


@pytest.mark.parametrize("case", DIFFERENTIAL["cases"], ids=lambda case: case["encoded"])
def test_differential_indexes_are_encoded_as_bip152_says(case: dict[str, Any]) -> None:
    request = GetBlockTxn(bytes(32), tuple(case["indexes"]))
    assert request.encode() == bytes(32) + bytes.fromhex(case["encoded"])
    assert GetBlockTxn.parse(request.encode()) == request


@pytest.mark.parametrize("encoded", DIFFERENTIAL["malformed"])
def test_differential_indexes_that_leave_the_block_are_malformed(encoded: str) -> None:
    with pytest.raises(MalformedError):
        GetBlockTxn.parse(bytes(32) + bytes.fromhex(encoded))


@given(st.sets(st.integers(0, 65_534), max_size=200))
def test_differential_indexes_survive_the_round_trip(indexes: set[int]) -> None:
    ordered = tuple(sorted(indexes))
    assert decode_differential(encode_differential(ordered)) == ordered


@given(st.lists(st.integers(0, 70_000), max_size=50))
def test_decoded_indexes_always_ascend_within_the_bound(distances: list[int]) -> None:
    last = max(accumulate(distance + 1 for distance in distances), default=0) - 1
    if last > 65_534:
        with pytest.raises(MalformedError, match="not below 65535"):
            decode_differential(distances)
        return
    indexes = decode_differential(distances)
    assert list(indexes) == sorted(set(indexes))
    assert encode_differential(indexes) == distances


@pytest.mark.parametrize("indexes", [(1, 1), (2, 1), (-1,), (65_535,)])
def test_indexes_that_do_not_ascend_are_our_own_mistake(indexes: tuple[int, ...]) -> None:
    with pytest.raises(LocalProtocolError, match="expected"):
        encode_differential(indexes)


def test_a_blocktxn_survives_the_round_trip_and_is_malformed_when_cut() -> None:
    _, transactions = parse_block(BLOCK)
    message = BlockTxn(b"h" * 32, tuple(transactions))
    payload = message.encode()
    assert BlockTxn.parse(payload) == message
    assert BlockTxn.parse(payload + b"x") == message
    for length in range(len(payload)):
        with pytest.raises(MalformedError):
            BlockTxn.parse(payload[:length])
    assert parse_transaction(message.transactions[1].raw) == transactions[1]
