from __future__ import annotations

import tracemalloc
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprint.bitcoin.codec import MAX_PAYLOAD_SIZE
from sprint.bitcoin.framing import Counters, Frame, Framer, encode_frame
from sprint.bitcoin.messages import MAX_SMALL_SIZE
from sprint.errors import RemoteProtocolError

MAGIC = bytes.fromhex("f9beb4d9")
VERACK = bytes.fromhex("f9beb4d976657261636b000000000000000000005df6e0e2")
"""The one message without a payload, as every node sends it."""


def broken(frame: bytes) -> bytes:
    """The same with a wrong checksum."""
    return frame[:20] + bytes(4) + frame[24:]


def bare_header(command: bytes, length: int, magic: bytes = MAGIC) -> bytes:
    return magic + command.ljust(12, b"\0") + length.to_bytes(4, "little") + bytes(4)


sound = st.builds(
    lambda command, payload: encode_frame(MAGIC, command, payload),
    st.sampled_from(["inv", "headers", "cmpctblock", "ping", "verack", "block"]),
    st.binary(max_size=90),
)
skipped = st.one_of(
    st.binary(min_size=1, max_size=90).map(lambda payload: broken(encode_frame(MAGIC, "inv", payload))),
    st.binary(max_size=90).map(lambda payload: encode_frame(MAGIC, "alert", payload)),
    st.just(encode_frame(MAGIC, "ping", bytes(MAX_SMALL_SIZE + 1))),
)
streams = st.lists(st.one_of(sound, skipped), max_size=8).map(b"".join)


def run(data: bytes, cuts: list[int]) -> tuple[list[Frame], Counters, str]:
    """All frames and the violation, if any, of a stream cut at those places."""
    framer = Framer(MAGIC)
    frames: list[Frame] = []
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in pairwise(edges):
        with suppress(RemoteProtocolError):
            frames += framer.receive(data[start:end])
    return frames, framer.counters, str(framer.violation)


def test_a_verack_is_framed_as_on_the_real_network() -> None:
    assert encode_frame(MAGIC, "verack", b"") == VERACK
    assert Framer(MAGIC).receive(VERACK) == [("verack", b"", 0)]


@given(streams, st.lists(st.integers(0, 10_000), max_size=12), st.booleans())
def test_any_cut_of_the_stream_gives_the_same_messages(data: bytes, cuts: list[int], ends_badly: bool) -> None:
    if ends_badly:
        data += bare_header(b"inv", 5, b"XXXX") + bytes(100)
    assert run(data, cuts) == run(data, [])


@given(streams)
def test_byte_by_byte_gives_the_same_messages(data: bytes) -> None:
    assert run(data, list(range(len(data)))) == run(data, [])


@given(streams)
def test_a_memoryview_or_bytearray_gives_the_same_messages_and_is_not_kept(data: bytes) -> None:
    expected = Framer(MAGIC).receive(data)
    buffer = bytearray(data)
    frames = Framer(MAGIC).receive(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    assert frames == expected
    assert all(type(payload) is bytes for _, payload, _ in frames)


@given(streams, st.binary(max_size=200), st.lists(st.integers(0, 2_000), max_size=5))
def test_any_bytes_are_framed_or_refused_alike_however_they_are_cut(data: bytes, junk: bytes, cuts: list[int]) -> None:
    data += MAGIC + junk
    assert run(data, cuts) == run(data, [])


def test_each_frame_tells_where_in_the_stream_it_began() -> None:
    data = VERACK + encode_frame(MAGIC, "unheard", b"xyz") + encode_frame(MAGIC, "ping", bytes(8)) + VERACK
    expected = [0, 24 + 27, 24 + 27 + 32]
    assert [offset for _, _, offset in Framer(MAGIC).receive(data)] == expected
    assert [offset for _, _, offset in run(data, list(range(len(data))))[0]] == expected


def test_a_bad_checksum_is_counted_and_skipped() -> None:
    framer = Framer(MAGIC)
    assert [frame[0] for frame in framer.receive(broken(encode_frame(MAGIC, "inv", b"x")) + VERACK)] == ["verack"]
    assert (framer.counters.bad_checksum, framer.counters.messages, framer.counters.skipped) == (1, 1, 1)


@pytest.mark.parametrize("command", [b"tx", b"sendtxrcncl", b"verack\0x", b"VERACK", b"\xff\xfe", b""])
def test_an_unknown_type_is_counted_and_skipped_whatever_its_checksum(command: bytes) -> None:
    framer = Framer(MAGIC)
    assert framer.receive(bare_header(command, 7) + b"payload" + VERACK) == [("verack", b"", 31)]
    assert (framer.counters.unknown_type, framer.counters.skipped) == (1, 1)


def test_a_type_is_taken_up_to_its_own_bound_and_not_beyond() -> None:
    framer = Framer(MAGIC)
    edge, over = (encode_frame(MAGIC, "ping", bytes(MAX_SMALL_SIZE + extra)) for extra in (0, 1))
    assert [len(payload) for _, payload, _ in framer.receive(edge + over)] == [MAX_SMALL_SIZE]
    assert (framer.counters.over_bound, framer.counters.messages) == (1, 1)


def test_bad_magic_is_a_violation_that_says_what_and_where() -> None:
    framer = Framer(MAGIC)
    data = VERACK + bare_header(b"inv", 0, b"XXXX")
    for at in range(len(data) - 1):
        framer.receive(data[at : at + 1])
    with pytest.raises(RemoteProtocolError, match="magic 58585858 at byte 24 of the stream: f9beb4d9 was expected"):
        framer.receive(data[-1:])


def test_a_length_of_4000000_is_legal_and_one_more_is_a_violation() -> None:
    framer = Framer(MAGIC)
    payload = bytes(MAX_PAYLOAD_SIZE)
    assert framer.receive(encode_frame(MAGIC, "block", payload)) == [("block", payload, 0)]
    with pytest.raises(RemoteProtocolError, match="'block' of 4000001 bytes at byte 4000024 of the stream: at most"):
        framer.receive(bare_header(b"block", MAX_PAYLOAD_SIZE + 1))


def test_an_oversize_length_is_a_violation_for_an_unknown_type_too() -> None:
    with pytest.raises(RemoteProtocolError, match="'whatever' of 4294967295 bytes"):
        Framer(MAGIC).receive(bare_header(b"whatever", 0xFFFF_FFFF))


def test_messages_before_a_violation_are_not_lost_and_nothing_is_taken_after_it() -> None:
    framer = Framer(MAGIC)
    assert framer.receive(VERACK + bare_header(b"inv", 0, b"XXXX") + VERACK) == [("verack", b"", 0)]
    assert "at byte 24" in str(framer.violation)
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match="at byte 24"):
            framer.receive(VERACK)


def peak_memory(framer: Framer, chunks: list[bytes], times: int) -> int:
    tracemalloc.start()
    try:
        for _ in range(times):
            for chunk in chunks:
                framer.receive(chunk)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def in_chunks(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("command", [b"tx", b"ping"])
def test_80_times_4_mb_of_junk_run_through_without_being_kept(command: bytes) -> None:
    framer = Framer(MAGIC)
    chunks = in_chunks(bare_header(command, MAX_PAYLOAD_SIZE) + bytes(MAX_PAYLOAD_SIZE), 65_536)
    assert peak_memory(framer, chunks, 80) < 100_000
    assert framer.counters.skipped == 80
    assert framer.offset == 80 * (MAX_PAYLOAD_SIZE + 24)


def test_80_times_4_mb_of_junk_in_a_known_type_hold_one_message_at_most() -> None:
    framer = Framer(MAGIC)
    chunks = in_chunks(bare_header(b"block", MAX_PAYLOAD_SIZE) + bytes(MAX_PAYLOAD_SIZE), 65_536)
    # The growing buffer, one eighth of slack in it, and the payload cut from it.
    assert peak_memory(framer, chunks, 80) < 3 * MAX_PAYLOAD_SIZE
    assert framer.counters.bad_checksum == 80


def test_a_claimed_length_reserves_nothing_before_the_bytes_are_there() -> None:
    framers = [Framer(MAGIC) for _ in range(50)]
    tracemalloc.start()
    try:
        for framer in framers:
            framer.receive(bare_header(b"block", MAX_PAYLOAD_SIZE) + bytes(100))
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_the_buffer_of_a_large_message_is_given_back() -> None:
    framer = Framer(MAGIC)
    chunks = in_chunks(encode_frame(MAGIC, "block", bytes(MAX_PAYLOAD_SIZE)), 65_536)
    tracemalloc.start()
    try:
        for chunk in chunks[:-1]:
            assert framer.receive(chunk) == []
        assert tracemalloc.get_traced_memory()[0] > MAX_PAYLOAD_SIZE - 65_536
        assert len(framer.receive(chunks[-1])) == 1
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()


def test_a_large_message_byte_by_byte_moves_its_buffer_a_few_dozen_times_only() -> None:
    framer = Framer(MAGIC)
    size = 300_000
    frame = encode_frame(MAGIC, "block", bytes(size))
    allocations = 0
    before = 0
    frames: list[Frame] = []
    for at in range(len(frame)):
        frames += framer.receive(frame[at : at + 1])
        now = framer._body.__sizeof__()
        allocations += now != before
        before = now
    assert [len(payload) for _, payload, _ in frames] == [size]
    # A buffer that grew by the byte would move 300,000 times; one that grows by an eighth, about a hundred.
    assert allocations < 200
