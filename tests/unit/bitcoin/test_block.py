from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprint.bitcoin.block import (
    WITNESS_COMMITMENT_PREFIX,
    Header,
    Transaction,
    decode_compact_target,
    double_sha256,
    encode_compact_target,
    header_hashes,
    meets_target,
    merkle_root,
    merkle_root_matches,
    parse_block,
    parse_transaction,
    target_of,
    witness_commitment_matches,
    work_of,
)
from sprint.bitcoin.codec import MalformedError

VECTORS = Path(__file__).parents[2] / "vectors" / "bitcoin"
BLOCKS: list[dict[str, Any]] = json.loads((VECTORS / "blocks.json").read_text())["blocks"]
TARGETS: list[dict[str, Any]] = json.loads((VECTORS / "compact_targets.json").read_text())["cases"]
SEGWIT_BLOCK = bytes.fromhex(json.loads((VECTORS / "compact_blocks.json").read_text())["cases"][0]["block"])

EVERY_BLOCK = pytest.mark.parametrize("vector", BLOCKS, ids=lambda vector: vector["name"])


@EVERY_BLOCK
def test_a_block_of_the_main_chain_has_the_known_hash_and_merkle_root(vector: dict[str, Any]) -> None:
    header, transactions = parse_block(bytes.fromhex(vector["raw"]))
    assert header.hash[::-1].hex() == vector["hash"]
    assert header.merkle_root[::-1].hex() == vector["merkle_root"]
    assert len(transactions) == vector["transactions"]
    assert merkle_root_matches(header, transactions)
    assert witness_commitment_matches(transactions)
    assert meets_target(header.hash, header.bits)


@EVERY_BLOCK
def test_a_block_cut_at_any_length_or_with_a_byte_too_much_is_malformed(vector: dict[str, Any]) -> None:
    raw = bytes.fromhex(vector["raw"])
    for length in range(len(raw)):
        with pytest.raises(MalformedError):
            parse_block(raw[:length])
    with pytest.raises(MalformedError, match="left over"):
        parse_block(raw + b"\0")


@EVERY_BLOCK
def test_python_bitcoinlib_finds_the_same_transactions(vector: dict[str, Any]) -> None:
    core = pytest.importorskip("bitcoin.core")
    raw = bytes.fromhex(vector["raw"])
    theirs = core.CBlock.deserialize(raw)
    _, transactions = parse_block(raw)
    assert [t.txid for t in transactions] == [t.GetTxid() for t in theirs.vtx]
    assert [t.raw for t in transactions] == [t.serialize() for t in theirs.vtx]
    assert merkle_root([t.txid for t in transactions])[0] == theirs.calc_merkle_root()


def test_a_segwit_block_commits_to_its_transactions_and_their_witnesses() -> None:
    header, transactions = parse_block(SEGWIT_BLOCK)
    assert [transaction.has_witness for transaction in transactions] == [True, True]
    assert all(transaction.txid != transaction.wtxid for transaction in transactions)
    assert merkle_root_matches(header, transactions)
    assert witness_commitment_matches(transactions)


def test_python_bitcoinlib_agrees_on_txid_and_wtxid_of_a_segwit_transaction() -> None:
    core = pytest.importorskip("bitcoin.core")
    _, transactions = parse_block(SEGWIT_BLOCK)
    for transaction in transactions:
        theirs = core.CTransaction.deserialize(transaction.raw)
        assert (transaction.txid, transaction.wtxid) == (theirs.GetTxid(), theirs.GetHash())


def test_one_changed_witness_byte_breaks_the_commitment_and_not_the_merkle_root() -> None:
    header, (coinbase, spend) = parse_block(SEGWIT_BLOCK)
    raw = bytearray(spend.raw)
    raw[-6] ^= 1
    changed = parse_transaction(bytes(raw))
    assert merkle_root_matches(header, [coinbase, changed])
    assert not witness_commitment_matches([coinbase, changed])


def test_witnesses_without_a_commitment_are_refused() -> None:
    legacy = parse_block(bytes.fromhex(BLOCKS[0]["raw"]))[1][0]
    spend = parse_block(SEGWIT_BLOCK)[1][1]
    assert witness_commitment_matches([legacy])
    assert not witness_commitment_matches([legacy, spend])


def test_a_coinbase_that_commits_but_has_no_reserved_value_is_refused() -> None:
    coinbase = parse_block(SEGWIT_BLOCK)[1][0]
    stripped = parse_transaction(coinbase.raw[:4] + coinbase.raw[6 : coinbase.body_end] + coinbase.raw[-4:])
    assert stripped.txid == coinbase.txid
    assert not witness_commitment_matches([stripped])


def committing_coinbase(commitments: list[bytes], reserved: list[bytes]) -> Transaction:
    """A coinbase with one output for each commitment, and that witness."""
    outputs = b"".join(bytes(8) + b"\x26" + WITNESS_COMMITMENT_PREFIX + commitment for commitment in commitments)
    stack = b"".join(bytes((len(item),)) + item for item in reserved)
    return parse_transaction(
        bytes.fromhex("02000000000101" + "00" * 32 + "ffffffff025151ffffffff")
        + bytes((len(commitments),)) + outputs + bytes((len(reserved),)) + stack + bytes(4)
    )  # fmt: skip


def test_of_several_commitments_the_last_counts() -> None:
    spend = parse_block(SEGWIT_BLOCK)[1][1]
    right = double_sha256(merkle_root([bytes(32), spend.wtxid])[0] + bytes(32))
    assert witness_commitment_matches([committing_coinbase([bytes(32), right], [bytes(32)]), spend])
    assert not witness_commitment_matches([committing_coinbase([right, bytes(32)], [bytes(32)]), spend])


@pytest.mark.parametrize("reserved", [[bytes(31)], [bytes(33)], [bytes(32), b""], [b""]])
def test_the_reserved_value_must_be_one_item_of_32_bytes(reserved: list[bytes]) -> None:
    spend = parse_block(SEGWIT_BLOCK)[1][1]
    right = double_sha256(merkle_root([bytes(32), spend.wtxid])[0] + reserved[0])
    assert not witness_commitment_matches([committing_coinbase([right], reserved), spend])


def test_a_block_without_transactions_commits_to_nothing() -> None:
    header, _ = parse_block(SEGWIT_BLOCK)
    assert not merkle_root_matches(header, [])
    assert not witness_commitment_matches([])


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("01000000000000000000", "no inputs, flags 0"),
        ("01000000000200000000", "flags 2"),
        ("010000000001000000000000", "no inputs"),
        ("01000000000101" + "00" * 36 + "00ffffffff000000000000", "without a single item"),
        ("01000000fd0100", "shortest"),
        ("01000000feffffff00", "announced"),
    ],
)
def test_a_transaction_of_broken_structure_is_malformed(raw: str, reason: str) -> None:
    with pytest.raises(MalformedError, match=reason):
        parse_transaction(bytes.fromhex(raw))


@given(st.binary(max_size=300))
def test_any_bytes_are_a_transaction_or_malformed(raw: bytes) -> None:
    try:
        transaction = parse_transaction(raw)
    except MalformedError:
        return
    assert transaction.raw == raw


@pytest.mark.parametrize("case", TARGETS, ids=lambda case: case["bits"])
def test_compact_targets_decode_and_encode_as_in_core(case: dict[str, Any]) -> None:
    bits = int(case["bits"], 16)
    magnitude, negative, overflow = decode_compact_target(bits)
    assert (negative, overflow) == (case["negative"], case["overflow"])
    if case["magnitude"] is not None:
        assert magnitude == int(case["magnitude"], 16)
    if case["encoded"] is not None:
        assert encode_compact_target(magnitude) == int(case["encoded"], 16)
    if negative or overflow:
        assert target_of(bits) == 0
        assert work_of(bits) == 0
        assert not meets_target(bytes(32), bits)


def test_an_encoded_target_never_carries_the_sign_bit() -> None:
    assert encode_compact_target(0x80) == 0x02008000
    assert encode_compact_target(0x800000) == 0x04008000


@given(st.integers(4, 40), st.integers(0, 0x7F_FFFF))
def test_a_target_overflows_exactly_when_it_needs_more_than_256_bits(size: int, mantissa: int) -> None:
    whole = mantissa << 8 * (size - 3)
    magnitude, negative, overflow = decode_compact_target(size << 24 | mantissa)
    assert not negative
    assert overflow is (whole >= 1 << 256)
    assert magnitude == whole % (1 << 256)


@given(st.integers(1, (1 << 256) - 1))
def test_encoding_a_target_only_ever_rounds_it_down(target: int) -> None:
    rounded = target_of(encode_compact_target(target))
    assert rounded <= target
    # 23 bits of mantissa at worst less the byte given up to the sign: 15 bits are kept.
    assert rounded >= target - (target >> 15)
    assert encode_compact_target(rounded) == encode_compact_target(target)


def test_work_is_the_expected_number_of_hashes() -> None:
    assert work_of(0x1D00FFFF) == 0x1_0001_0001
    assert work_of(0x207FFFFF) == 2
    assert work_of(0) == 0


@given(st.integers(0, (1 << 32) - 1))
def test_python_bitcoinlib_agrees_on_every_positive_target(bits: int) -> None:
    serialize = pytest.importorskip("bitcoin.core.serialize")
    magnitude, negative, overflow = decode_compact_target(bits)
    # Its function knows neither sign nor overflow.
    if not negative and not overflow and not bits & 0x0080_0000:
        assert magnitude == serialize.uint256_from_compact(bits)


def test_a_hash_equal_to_the_target_meets_it_and_one_more_does_not() -> None:
    target = target_of(0x1D00FFFF)
    assert meets_target(target.to_bytes(32, "little"), 0x1D00FFFF)
    assert not meets_target((target + 1).to_bytes(32, "little"), 0x1D00FFFF)


def test_header_fields_survive_the_round_trip() -> None:
    raw = bytes.fromhex(BLOCKS[0]["raw"])[:80]
    header = Header.parse(raw)
    assert (header.version, header.time, header.bits, header.nonce) == (1, 1231006505, 0x1D00FFFF, 2083236893)
    assert header.encode() == raw
    assert header_hashes(raw + raw) == [double_sha256(raw)] * 2
    with pytest.raises(MalformedError, match="79 bytes"):
        Header.parse(raw[:79])


@given(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=40, unique=True))
def test_repeating_the_tail_of_the_leaves_keeps_the_root_and_is_detected(leaves: list[bytes]) -> None:
    root, mutated = merkle_root(leaves)
    assert not mutated
    # CVE-2012-2459: a level of odd length is completed by its last node, so the leaves under it may be repeated.
    under_last = len(leaves) & -len(leaves)
    if under_last < len(leaves):
        assert merkle_root(leaves + leaves[-under_last:]) == (root, True)


def test_the_merkle_root_of_no_leaves_is_an_error_and_of_one_is_the_leaf() -> None:
    with pytest.raises(ValueError, match="no hashes"):
        merkle_root([])
    assert merkle_root([b"x" * 32]) == (b"x" * 32, False)


def test_a_header_with_a_doubled_transaction_list_is_refused_though_its_root_matches() -> None:
    vector = next(vector for vector in BLOCKS if vector["transactions"] == 3)
    header, transactions = parse_block(bytes.fromhex(vector["raw"]))
    doubled: list[Transaction] = [*transactions, transactions[-1]]
    assert merkle_root([t.txid for t in doubled])[0] == header.merkle_root
    assert not merkle_root_matches(header, doubled)
