"""Headers made ahead of time, and the sums that finish them: against sums by the letter of RFC 1071."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdp.datagrams import IPV4_HEADERS, IPV6_HEADERS, NextHop, checksum, finish, packed, udp_headers, word_sum

ports = st.integers(1, 65535)
macs = st.binary(min_size=6, max_size=6)
payloads = st.binary(min_size=1, max_size=256)


def ones_complement(data: bytes) -> int:
    """RFC 1071, word by word; 0xFFFF over data with its right checksum in it."""
    data += b"\0" * (len(data) & 1)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@given(st.sampled_from([4, 16]).flatmap(lambda n: st.tuples(*[st.binary(min_size=n, max_size=n)] * 2)), ports, ports,
       macs, macs, payloads)  # fmt: skip
def test_a_finished_frame_has_right_lengths_and_checksums(
    addresses: tuple[bytes, bytes], port: int, source_port: int, here: bytes, there: bytes, payload: bytes
) -> None:
    source, destination = addresses
    headers = udp_headers(NextHop(1, here, there, source), destination, port, source_port)
    frame = bytearray(headers.frame)
    finish(headers, frame, len(payload), word_sum(payload))
    whole = bytes(frame) + payload
    assert whole[:12] == there + here
    udp = whole[34:] if len(source) == 4 else whole[54:]
    assert struct.unpack_from("!HHH", udp) == (source_port, port, 8 + len(payload))
    assert udp[6:8] != b"\0\0"
    assert ones_complement(source + destination + struct.pack("!HH", 17, len(udp)) + udp) == 0xFFFF
    if len(source) == 4:
        assert len(frame) == IPV4_HEADERS
        assert ones_complement(whole[14:34]) == 0xFFFF
        assert struct.unpack_from("!H", whole, 16) == (28 + len(payload),)
    else:
        assert len(frame) == IPV6_HEADERS
        assert struct.unpack_from("!H", whole, 18) == (8 + len(payload),)


@given(st.binary(max_size=300))
def test_a_word_sum_is_the_sum_of_words_modulo_65535(data: bytes) -> None:
    even = data + b"\0" * (len(data) & 1)
    assert word_sum(data) == sum(struct.unpack(f"={len(even) // 2}H", even)) % 0xFFFF


@given(st.integers(1, 1 << 32))
def test_a_checksum_is_what_fills_a_sum_up(total: int) -> None:
    assert (total + checksum(total)) % 0xFFFF == 0


@pytest.mark.parametrize(
    ("address", "expected"),
    [("10.1.2.3", "0a010203"), ("::ffff:10.1.2.3", "0a010203"), ("fd00::1", "fd" + "00" * 14 + "01")],
)
def test_an_address_is_packed_and_what_is_mapped_is_ipv4(address: str, expected: str) -> None:
    assert packed(address).hex() == expected


@pytest.mark.parametrize(
    ("address", "port", "source", "complaint"),
    [
        (bytes(4), 9, bytes(16), "one family is expected"),
        (bytes(5), 9, bytes(5), "one family is expected"),
        (bytes(4), 0, bytes(4), "port 0 from 9"),
        (bytes(4), 65536, bytes(4), "port 65536 from 9"),
    ],
)
def test_what_makes_no_datagram_is_refused(address: bytes, port: int, source: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        udp_headers(NextHop(1, bytes(6), bytes(6), source), address, port, 9)
