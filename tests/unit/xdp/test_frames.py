"""Frames of the mirror as segments: every header shape, and nothing that a hostile frame could break."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP, IPOption
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, PadN
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from xdp.frames import parse_frame
from xdp.segments import Backend, Flow, Segment, TcpFlags

MAPPED = bytes(10) + b"\xff\xff"
FLOW4 = Flow(MAPPED + bytes((10, 0, 0, 2)), MAPPED + bytes((10, 0, 0, 1)), 8333, 40000)
FLOW6 = Flow(bytes.fromhex("fd" + "00" * 14 + "02"), bytes.fromhex("fd" + "00" * 14 + "01"), 8333, 40000)
TEXT = b"a payload of some length"


def ethernet(**fields: Any) -> Packet:
    # Addresses given, or scapy would look for them on the network.
    return Ether(src="02:00:00:00:00:02", dst="02:00:00:00:00:01", **fields)


def tcp(**fields: Any) -> Packet:
    values: dict[str, Any] = {"sport": 8333, "dport": 40000, "seq": 1000, "flags": "PA", **fields}
    return TCP(**values)


def four(**fields: Any) -> Packet:
    return IP(src="10.0.0.2", dst="10.0.0.1", **fields)


def six() -> Packet:
    return IPv6(src="fd00::2", dst="fd00::1")


def parse(packet: Packet, payload: bytes = TEXT, skipped: int = 0) -> Segment | None:
    return parse_frame(memoryview(bytes(packet / Raw(payload) if payload else packet)), 7, skipped)


@pytest.mark.parametrize(
    ("headers", "flow"),
    [
        (ethernet() / four() / tcp(), FLOW4),
        (ethernet() / four(options=[IPOption(b"\x07\x07\x04" + bytes(4))]) / tcp(), FLOW4),
        (ethernet() / four() / tcp(options=[("Timestamp", (1, 2))]), FLOW4),
        (ethernet() / Dot1Q(vlan=5) / four() / tcp(), FLOW4),
        (ethernet() / Dot1AD(vlan=6) / Dot1Q(vlan=5) / four() / tcp(), FLOW4),
        (ethernet() / six() / tcp(), FLOW6),
        (ethernet() / six() / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt(options=PadN(optdata=bytes(4))) / tcp(), FLOW6),
        (ethernet() / six() / IPv6ExtHdrFragment(offset=0, m=0) / tcp(), FLOW6),
    ],
)
def test_every_header_shape_gives_the_flow_and_exactly_the_payload(headers: Packet, flow: Flow) -> None:
    assert parse(headers) == Segment(Backend.AF_XDP, 7, flow, 1000, TcpFlags(0), len(TEXT), memoryview(TEXT))


def test_what_pads_a_short_frame_is_no_payload() -> None:
    segment = parse_frame(memoryview(bytes(ethernet() / four() / tcp()) + bytes(6)))
    assert segment is not None
    assert (segment.length, bytes(segment.payload)) == (0, b"")


@pytest.mark.parametrize(
    ("flags", "sequence", "seen"), [("S", 1001, TcpFlags.SYN), ("FA", 1000, TcpFlags.FIN), ("R", 1000, TcpFlags.RST)]
)
def test_flags_are_kept_and_syn_takes_a_sequence_number(flags: str, sequence: int, seen: TcpFlags) -> None:
    segment = parse(ethernet() / four() / tcp(flags=flags))
    assert segment is not None
    assert (segment.sequence, segment.flags) == (sequence, seen)


@given(st.integers(0, 40))
def test_what_is_skipped_counts_for_sequence_and_length(skipped: int) -> None:
    segment = parse(ethernet() / four() / tcp(seq=0xFFFFFFFE), skipped=skipped)
    at = skipped if skipped <= len(TEXT) else 0
    assert segment is not None
    assert segment.sequence == (0xFFFFFFFE + at) % (1 << 32)
    assert segment.length == len(TEXT) - at
    assert segment.payload == TEXT[at:]


@pytest.mark.parametrize(
    "packet",
    [
        ethernet() / four() / UDP(),
        ethernet() / four(frag=1) / tcp(),
        ethernet() / four(flags="MF") / tcp(),
        ethernet() / four(len=4000) / tcp(),
        ethernet() / four(len=30) / tcp(),
        ethernet() / four(ihl=4) / tcp(),
        ethernet() / four(version=6) / tcp(),
        ethernet() / four() / tcp(dataofs=4),
        ethernet() / six() / IPv6ExtHdrFragment(offset=3) / tcp(),
        ethernet() / six() / UDP(),
        ethernet(type=0x88CC),
    ],
)
def test_what_is_no_whole_tcp_segment_is_none(packet: Packet) -> None:
    assert parse(packet) is None


SHAPES = [bytes(ethernet() / four() / tcp() / Raw(TEXT)), bytes(ethernet() / Dot1Q() / six() / tcp() / Raw(TEXT))]


@pytest.mark.parametrize("whole", SHAPES)
def test_a_frame_cut_short_anywhere_is_none(whole: bytes) -> None:
    assert all(parse_frame(memoryview(whole)[:size]) is None for size in range(len(whole)))


@given(
    st.sampled_from(SHAPES),
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 255)), max_size=8),
    st.integers(0, 1 << 32),
)
def test_a_forged_frame_never_raises_nor_reaches_beyond_itself(
    whole: bytes, forged: list[tuple[int, int]], skipped: int
) -> None:
    frame = bytearray(whole)
    for at, value in forged:
        frame[at % len(frame)] = value
    segment = parse_frame(memoryview(bytes(frame)), 0, skipped)
    assert segment is None or len(segment.payload) == segment.length <= len(frame)


@given(st.binary(max_size=200))
def test_random_bytes_never_raise(frame: bytes) -> None:
    parse_frame(memoryview(frame))
