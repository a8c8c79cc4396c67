"""Core's ZMQ messages, read and made: sizes, byte order, counters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprint.bitcoin.codec import MAX_PAYLOAD_SIZE, MalformedError
from sprint.regtest import RegtestChain
from sprint.zmq_wire import (
    CONNECTED,
    HASHBLOCK,
    HASHTX,
    PASSED_THROUGH,
    RAWBLOCK,
    RAWTX,
    SEQUENCE,
    GapCounter,
    TopicCounters,
    is_sound,
    read_block,
    sequence_body,
    wanted_topics,
)

BLOCK = RegtestChain().extend(1, 1_700_000_000)[0]
ZERO = bytes(4)


def test_a_hashblock_is_the_hash_in_display_order() -> None:
    said = read_block(HASHBLOCK, BLOCK.hash[::-1], b"\x05\x01\x00\x00")
    assert (said.hash, said.header, said.transactions, said.size, said.counter) == (BLOCK.hash, None, 0, 0, 261)


def test_a_rawblock_brings_header_count_and_size() -> None:
    said = read_block(RAWBLOCK, memoryview(BLOCK.payload), ZERO)
    assert (said.hash, said.header, said.transactions) == (BLOCK.hash, BLOCK.header.encode(), 1)
    assert said.size == len(BLOCK.payload)


@pytest.mark.parametrize(
    ("topic", "body", "counter"),
    [
        (HASHBLOCK, bytes(31), ZERO),
        (HASHBLOCK, bytes(33), ZERO),
        (HASHBLOCK, bytes(32), bytes(3)),
        (HASHBLOCK, bytes(32), b""),
        (b"hashblock2", bytes(32), ZERO),
        (RAWBLOCK, b"", ZERO),
        (RAWBLOCK, bytes(80), ZERO),
        (RAWBLOCK, BLOCK.payload[:80] + b"\x00" + BLOCK.coinbase, ZERO),
        (RAWBLOCK, BLOCK.payload[:80] + b"\x05" + BLOCK.coinbase, ZERO),
        (RAWBLOCK, BLOCK.payload + bytes(MAX_PAYLOAD_SIZE), ZERO),
    ],
)
def test_what_core_never_sends_is_refused(topic: bytes, body: bytes, counter: bytes) -> None:
    with pytest.raises(MalformedError):
        read_block(topic, body, counter)


@given(st.sampled_from([HASHBLOCK, RAWBLOCK, b""]), st.binary(max_size=300), st.binary(max_size=6))
def test_any_bytes_are_read_or_refused(topic: bytes, body: bytes, counter: bytes) -> None:
    try:
        said = read_block(topic, body, counter)
    except MalformedError:
        return
    assert len(said.hash) == 32


def test_a_gap_in_the_counter_is_the_number_of_messages_lost() -> None:
    gaps = GapCounter()
    assert [gaps.lost(HASHBLOCK, number) for number in (7, 8, 11, 12)] == [0, 0, 2, 0]
    assert gaps.lost(RAWBLOCK, 100) == 0, "each topic has its own"
    assert gaps.lost(HASHBLOCK, 13) == 0


def test_a_publisher_that_starts_anew_is_no_gap_of_four_thousand_millions() -> None:
    gaps = GapCounter()
    assert [gaps.lost(HASHBLOCK, number) for number in (900, 0, 1)] == [0, 0, 0]
    assert gaps.lost(HASHBLOCK, 900) == 898
    assert gaps.lost(HASHBLOCK, 3) == 3, "what it has said since its start"


def test_a_counter_wraps_around_without_a_loss() -> None:
    gaps = GapCounter()
    assert [gaps.lost(HASHBLOCK, number) for number in (0xFFFF_FFFE, 0xFFFF_FFFF, 0, 2)] == [0, 0, 0, 1]


def test_our_counters_begin_at_zero_and_leave_out_what_was_lost() -> None:
    counters = TopicCounters()
    assert [counters.take(HASHBLOCK), counters.take(HASHBLOCK), counters.take(RAWBLOCK)] == [ZERO, b"\1\0\0\0", ZERO]
    counters.leave_out(HASHBLOCK, 3)
    assert counters.take(HASHBLOCK) == b"\5\0\0\0"


@given(st.lists(st.integers(0, 5), max_size=50))
def test_what_our_counters_leave_out_a_gap_counter_finds(losses: list[int]) -> None:
    counters, gaps = TopicCounters(), GapCounter()
    gaps.lost(HASHBLOCK, int.from_bytes(counters.take(HASHBLOCK), "little"))
    for lost in losses:
        counters.leave_out(HASHBLOCK, lost)
        assert gaps.lost(HASHBLOCK, int.from_bytes(counters.take(HASHBLOCK), "little")) == lost


def test_only_sound_messages_of_a_node_are_passed_through() -> None:
    assert is_sound(HASHTX, bytes(32))
    assert not is_sound(HASHTX, bytes(31))
    assert is_sound(RAWTX, BLOCK.coinbase)
    assert not is_sound(RAWTX, b"")
    assert is_sound(SEQUENCE, bytes(32) + b"A" + bytes(8))
    assert is_sound(SEQUENCE, bytes(32) + b"R" + bytes(8))
    assert not is_sound(SEQUENCE, sequence_body(bytes(32), CONNECTED)), "blocks are ours to tell"
    assert not is_sound(b"hashwallettx", bytes(32))


def test_a_subscription_is_a_prefix() -> None:
    assert wanted_topics([b""], PASSED_THROUGH) == set(PASSED_THROUGH)
    assert wanted_topics([b"hash", b"x"], PASSED_THROUGH) == {HASHTX}
    assert wanted_topics([b"hashtx2"], PASSED_THROUGH) == set()
