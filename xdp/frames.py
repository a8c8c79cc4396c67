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
_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291, section 2.5.5.2
_TCP_PROTOCOL = 6


def parse_frame(frame: memoryview, arrival_ns: int = 0, skipped: int = 0) -> Segment | None:
    """The segment in a frame that starts at the Ethernet header; its payload is a view of the frame.

    The first `skipped` bytes of payload are left out, sequence and length counting from what follows.
    """
    size = len(frame)
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
    start = at + (offset >> 4) * 4
    if offset < 0x50 or start > end or end > size:
        return None
    if skipped > end - start:
        skipped = 0
    # SYN takes a number of its own, before the payload's.
    sequence += skipped + (flags >> 1 & 1)
    return Segment(
        Backend.AF_XDP,
        arrival_ns,
        Flow(source, destination, source_port, destination_port),
        sequence & 0xFFFFFFFF,
        FLAGS[flags],
        end - start - skipped,
        frame[start + skipped : end],
    )


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
