"""Blocks mined for regtest are valid by every rule that can be checked without a full node."""

from __future__ import annotations

import pytest

from sprint.bitcoin.block import (
    meets_target,
    merkle_root_matches,
    parse_block,
    parse_transaction,
    witness_commitment_matches,
)
from sprint.bitcoin.compact import CmpctBlock
from sprint.bitcoin.networks import REGTEST
from sprint.chain import HeaderChain
from sprint.regtest import RegtestChain, coinbase_transaction, mine
from tests.unit.chains import WALL_S, headers_of


def test_a_mined_block_is_whole_and_proves_its_work() -> None:
    chain = RegtestChain()
    for block in chain.extend(30, WALL_S):
        header, transactions = parse_block(block.payload)
        assert header == block.header
        assert header.hash == block.hash
        assert meets_target(block.hash, header.bits)
        assert merkle_root_matches(header, transactions)
        assert witness_commitment_matches(transactions)
        assert len(transactions) == 1
        assert chain.blocks[block.hash] is block


def test_each_block_has_a_coinbase_of_its_own() -> None:
    blocks = RegtestChain().extend(300, WALL_S)
    assert len({parse_transaction(block.coinbase).txid for block in blocks}) == 300


@pytest.mark.parametrize(
    ("height", "script"),
    [(17, "0111"), (127, "017f"), (128, "028000"), (255, "02ff00"), (256, "020001"), (32_768, "03008000")],
)
def test_a_coinbase_begins_with_its_height(height: int, script: str) -> None:
    coinbase = coinbase_transaction(height, b"")
    assert bytes.fromhex(script) == coinbase[42 : 42 + len(script) // 2]


def test_a_compact_block_says_the_same_block() -> None:
    (block,) = RegtestChain().extend(1, WALL_S)
    compact = CmpctBlock.parse(block.compact(5).encode())
    assert compact.header == block.header.encode()
    assert compact.transactions == 1
    assert compact.nonce == 5


def test_a_chain_grows_on_its_tip_and_in_time_however_many_blocks_a_second_has() -> None:
    chain = RegtestChain()
    blocks = chain.extend(500, WALL_S)
    assert chain.headers.tip_height == 500
    assert chain.headers.tip_hash == blocks[-1].hash
    fresh = HeaderChain(REGTEST)
    assert fresh.extend(headers_of(blocks), WALL_S).accepted == 500


def test_a_fork_overtakes_when_it_has_more_work() -> None:
    chain = RegtestChain()
    blocks = chain.extend(10, WALL_S)
    fork = chain.extend(2, WALL_S, parent=blocks[7].hash, extra=b"fork")
    assert chain.headers.tip_hash == blocks[-1].hash
    assert not {block.hash for block in fork} & {block.hash for block in blocks}
    chain.extend(1, WALL_S, parent=fork[-1].hash)
    assert chain.headers.fork_height(blocks[-1].hash) == 8


def test_a_fork_too_far_down_is_refused_by_name() -> None:
    chain = RegtestChain()
    chain.extend(300, WALL_S)
    with pytest.raises(RuntimeError, match="height 11 is refused: low_work"):
        chain.extend(1, WALL_S, parent=chain.headers.hash_at(10), extra=b"fork")


def test_an_answer_holds_what_follows_the_locator() -> None:
    chain = RegtestChain()
    blocks = chain.extend(10, WALL_S)
    assert chain.headers_after([blocks[6].hash], bytes(32)) == headers_of(blocks[7:])
    assert chain.headers_after([b"\x01" * 32], blocks[1].hash) == headers_of(blocks[:2])


def test_the_same_words_give_the_same_block() -> None:
    once = mine(bytes(32), 5, WALL_S, REGTEST.pow_limit_bits)
    assert once == mine(bytes(32), 5, WALL_S, REGTEST.pow_limit_bits)
    assert once.hash != mine(bytes(32), 5, WALL_S, REGTEST.pow_limit_bits, b"other").hash
