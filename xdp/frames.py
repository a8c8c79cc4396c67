"""A mirrored Ethernet frame as a TCP segment. Pure: bytes in, Segment out; whatever isn't TCP in one piece is None.

It reads what packet.h reads in the kernel: VLAN tags, IPv4 options, IPv6 extension headers. Any length field may lie:
nothing is read or handed out beyond the frame. Checksums are not looked at, being unfinished on virtual links.
"""

from __future__ import annotations

import struct

from xdp.segments import Backend, Flow, Segment, TcpFlags

FLAGS = tuple(TcpFlags(number & 7) for number in range(256))
"""By the byte of TCP's header: making one anew costs more than the rest of a segment."""
VLAN_TAGS, EXTENSION_HEADERS = 2, 6  # as many as packet.h follows
_ETHERTYPE = struct.Struct("!H")
_IPV4 = struct.Struct("!BxHxxHxBxx4s4s")
_IPV6 = struct.Struct("!BxxxHBx16s16s")
_TCP = struct.Struct("!HHI4xBB6x")
_USUAL = struct.Struct("!12xHBxHxxHxBxx4s4sHHI4xBB6x")
"""Ethernet without a tag, IPv4 without options, TCP, at one go."""
_make = tuple.__new__  # a named tuple's own constructor takes twice as long
_AF_XDP = Backend.AF_XDP
_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291, section 2.5.5.2
_TCP_PROTOCOL = 6


def parse_frame(frame: memoryview, arrival_ns: int = 0, skipped: int = 0) -> Segment | None:
    """The segment in a frame that starts at the Ethernet header; its payload is a view of the frame.

    The first `skipped` bytes of payload are left out, sequence and length counting from what follows.
    """
    size = len(frame)
    if size >= _USUAL.size:
        (
            protocol, first, total, fragment, inner, source, destination, source_port, destination_port, sequence,
            offset, flags,
        ) = _USUAL.unpack_from(frame)  # fmt: skip
        if protocol == 0x0800 and first == 0x45 and inner == _TCP_PROTOCOL and not fragment & 0x3FFF:
            flow = _make(Flow, (_MAPPED + source, _MAPPED + destination, source_port, destination_port))
            end = 14 + total if total else size
            return _segment(frame, arrival_ns, skipped, flow, 34, end, sequence, offset, flags)
    try:
        (protocol,) = _ETHERTYPE.unpack_from(frame, 12)
        at = 14
        for _ in range(VLAN_TAGS):
            if protocol not in {0x8100, 0x88A8}:
                break
            (protocol,) = _ETHERTYPE.unpack_from(frame, at + 2)
            at += 4
        if protocol == 0x0800:
            first, total, fragment, inner, source, destination = _IPV4.unpack_from(frame, at)
            if first < 0x45 or first > 0x4F or inner != _TCP_PROTOCOL or fragment & 0x3FFF:
                return None
            source, destination = _MAPPED + source, _MAPPED + destination
            # Segments joined to more than 64 KiB (BIG TCP) leave the length zero.
            end = at + total if total else size
            at += (first & 15) * 4
        elif protocol == 0x86DD:
            first, total, inner, source, destination = _IPV6.unpack_from(frame, at)
            if first >> 4 != 6:
                return None
            end = at + 40 + total if total else size
            at = _after_extension_headers(frame, at + 40, inner)
            if not at:
                return None
        else:
            return None
        source_port, destination_port, sequence, offset, flags = _TCP.unpack_from(frame, at)
    except struct.error:
        return None
    flow = _make(Flow, (source, destination, source_port, destination_port))
    return _segment(frame, arrival_ns, skipped, flow, at, end, sequence, offset, flags)


def _segment(
    frame: memoryview, arrival_ns: int, skipped: int, flow: Flow, at: int, end: int, sequence: int, offset: int,
    flags: int,
) -> Segment | None:  # fmt: skip
    """Of the TCP header at `at`, the packet ending at `end`."""
    start = at + (offset >> 4) * 4
    if offset < 0x50 or start > end or end > len(frame):
        return None
    if skipped > end - start:
        skipped = 0
    # SYN takes a number of its own, before the payload's.
    sequence = (sequence + skipped + (flags >> 1 & 1)) & 0xFFFFFFFF
    payload = frame[start + skipped : end]
    return _make(Segment, (_AF_XDP, arrival_ns, flow, sequence, FLAGS[flags], end - start - skipped, payload))


def _after_extension_headers(frame: memoryview, at: int, following: int) -> int:
    """Where TCP's header starts, 0 if this is no TCP. Raises struct.error at the frame's end."""
    for _ in range(EXTENSION_HEADERS + 1):
        if following == _TCP_PROTOCOL:
            return at
        inner, units, fragment = struct.unpack_from("!BBH", frame, at)
        if following in {0, 43, 60, 135}:  # hop-by-hop, routing, destination options, mobility
            size = 8 + units * 8
        elif following == 51:  # authentication (RFC 4302)
            size = 8 + units * 4
        elif following == 44 and fragment & 0xFFF9 == 0:  # a fragment that is the whole packet
            size = 8
        else:
            return 0
        following = inner
        at += size
    return 0
