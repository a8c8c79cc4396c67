from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprint.bitcoin.codec import MalformedError, Reader, decode_compact_size, encode_bytes, encode_compact_size

U64_MAX = (1 << 64) - 1


@given(st.integers(0, U64_MAX))
def test_a_compact_size_survives_the_round_trip(value: int) -> None:
    encoded = encode_compact_size(value)
    assert decode_compact_size(encoded, 0, U64_MAX) == (value, len(encoded))


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (0xFC, "fc"),
        (0xFD, "fdfd00"),
        (0xFFFF, "fdffff"),
        (0x1_0000, "fe00000100"),
        (0xFFFF_FFFF, "feffffffff"),
        (0x1_0000_0000, "ff0000000001000000"),
    ],
)
def test_a_compact_size_grows_at_the_known_borders(value: int, encoded: str) -> None:
    assert encode_compact_size(value).hex() == encoded


@pytest.mark.parametrize("encoded", ["fdfc00", "fd0000", "feffff0000", "ffffffffff00000000"])
def test_a_compact_size_in_a_longer_form_than_needed_is_malformed(encoded: str) -> None:
    with pytest.raises(MalformedError, match="shortest"):
        decode_compact_size(bytes.fromhex(encoded), 0, U64_MAX)


@pytest.mark.parametrize("whole", ["fdfd00", "fe00000100", "ff0000000001000000"])
def test_a_compact_size_cut_anywhere_is_malformed(whole: str) -> None:
    for length in range(len(whole) // 2):
        with pytest.raises(MalformedError, match="cut short"):
            decode_compact_size(bytes.fromhex(whole)[:length], 0, U64_MAX)


def test_a_compact_size_over_32_mib_is_malformed_unless_allowed() -> None:
    assert decode_compact_size(encode_compact_size(0x0200_0000))[0] == 0x0200_0000
    with pytest.raises(MalformedError, match="over"):
        decode_compact_size(encode_compact_size(0x0200_0001))


@given(st.binary(max_size=100), st.integers(0, 120))
def test_a_reader_never_reads_past_its_payload(data: bytes, size: int) -> None:
    reader = Reader(data)
    if size <= len(data):
        assert reader.take(size) == data[:size]
        assert reader.left == len(data) - size
    else:
        with pytest.raises(MalformedError, match="wanted"):
            reader.take(size)
        assert reader.at == 0


def test_a_forged_count_is_refused_before_anything_is_read() -> None:
    with pytest.raises(MalformedError, match="announced"):
        Reader(encode_compact_size(1_000_000) + bytes(100)).count(36)


def test_left_over_bytes_are_told() -> None:
    reader = Reader(encode_bytes(b"abc") + b"!")
    assert reader.compact_bytes() == b"abc"
    with pytest.raises(MalformedError, match="1 bytes left over"):
        reader.finish()


def test_integers_are_little_endian_and_signed_where_named_so() -> None:
    reader = Reader(bytes.fromhex("010200030000000400000000000000fffffffffeffffffffffffff"))
    assert (reader.u8(), reader.u16(), reader.u32(), reader.u64()) == (1, 2, 3, 4)
    assert (reader.i32(), reader.i64()) == (-1, -2)
    reader.finish()
