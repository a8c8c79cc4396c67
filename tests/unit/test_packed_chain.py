from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprint.bench.synthetic import mine
from sprint.bitcoin.block import work_of
from sprint.bitcoin.difficulty import header_bits, header_time
from sprint.bitcoin.networks import REGTEST
from sprint.packed_chain import WORK_STRIDE, PackedChain

BITS = (0x207FFFFF, 0x203FFFFF, 0x201FFFFF)


def _append(chain: PackedChain, salt: int, bits: int) -> tuple[bytes, bytes]:
    header, block_hash = mine(chain.tip_hash, salt.to_bytes(32, "little"), chain.tip_height * 600, bits)
    chain.headers += header
    chain.commit([int.from_bytes(block_hash, "little")], block_hash, bits)
    return header, block_hash


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.tuples(st.integers(0, 130), st.integers(0, 100)), max_size=6))
def test_a_chain_cut_back_and_grown_anew_answers_like_a_plain_list(cuts: list[tuple[int, int]]) -> None:
    chain = PackedChain(REGTEST.genesis_header, REGTEST.genesis_hash)
    plain = [(REGTEST.genesis_header, REGTEST.genesis_hash)]
    gone: list[bytes] = []
    salt = 0
    for grow, cut in [(130, 0), *cuts]:
        for _ in range(grow):
            salt += 1
            plain.append(_append(chain, salt, BITS[salt % 3]))
        height = max(0, chain.tip_height - cut)
        chain.truncate(height)
        gone += [block_hash for _, block_hash in plain[height + 1 :]]
        del plain[height + 1 :]
    assert (chain.tip_height, chain.tip_hash) == (len(plain) - 1, plain[-1][1])
    work = 0
    for height, (header, block_hash) in enumerate(plain):
        work += work_of(header_bits(header))
        assert (chain.header_at(height), chain.hash_at(height)) == (header, block_hash)
        assert (chain.height_of(block_hash), chain.work_at(height)) == (height, work)
    assert chain.tip_work == work
    assert [chain.height_of(block_hash) for block_hash in gone] == [None] * len(gone)
    assert chain.times_up_to(chain.tip_height) == [header_time(header) for header, _ in plain[-11:]]


def test_the_index_stays_small_however_often_the_tip_is_replaced() -> None:
    chain = PackedChain(REGTEST.genesis_header, REGTEST.genesis_hash)
    for salt in range(60):
        _append(chain, salt, BITS[0])
    slots = len(chain._slots)
    for salt in range(3 * slots):
        chain.truncate(chain.tip_height - 1)
        _, block_hash = _append(chain, 1000 + salt, BITS[0])
        assert chain.height_of(block_hash) == 60
    assert len(chain._slots) == slots
    assert [chain.height_of(chain.hash_at(height)) for height in range(61)] == list(range(61))


@pytest.mark.parametrize("height", [-1, 1])
def test_a_height_that_is_not_there_is_an_index_error(height: int) -> None:
    chain = PackedChain(REGTEST.genesis_header, REGTEST.genesis_hash)
    for question in (chain.header_at, chain.hash_at, chain.work_at, chain.truncate):
        with pytest.raises(IndexError, match="from 0 to 0"):
            question(height)


def test_works_are_kept_at_heights_that_no_retarget_lies_between() -> None:
    assert 2016 % WORK_STRIDE == 0
    assert REGTEST.interval % WORK_STRIDE == 0
