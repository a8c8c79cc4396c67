"""UDP datagrams as Ethernet frames: where to, the headers made ahead of time, the checksums. Pure.

The headers of a subscriber never change from record to record but for lengths and checksums; both are sums, so what is
known ahead goes into the table, and the rest is added when the payload is known (RFC 1071, RFC 1624). Sums here are of
16-bit words as they stand in memory: the Internet checksum doesn't mind the byte order, as long as it is one.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from typing import NamedTuple

IPV4_HEADERS, IPV6_HEADERS = 42, 62
"""Ethernet, IP and UDP: bytes in front of the payload."""
TTL = 64  # RFC 1700's recommended default; also the hop limit
_DONT_FRAGMENT = 0x4000
_UDP = 17
_WORD = struct.Struct("=H")


class NextHop(NamedTuple):
    """How a destination is reached, its addresses as bytes in network order."""

    ifindex: int
    source_mac: bytes
    destination_mac: bytes
    source_address: bytes
    """4 or 16 bytes."""


class Headers(NamedTuple):
    """What the kernel's half needs of a subscriber."""

    frame: bytes
    """IPV4_HEADERS or IPV6_HEADERS bytes; lengths and checksums zero."""
    ip_sum: int
    """Of IPv4's header without its length; 0 with IPv6."""
    udp_sum: int
    """Of the pseudo-header and UDP's header, without both lengths."""


def packed(address: str) -> bytes:
    """An IPv4 or IPv6 address as bytes, one that is mapped into IPv6 as IPv4. Raises ValueError."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.scope_id:
            raise ValueError(f"address {address}: link-local addresses with a zone are not supported")
        return parsed.ipv4_mapped.packed if parsed.ipv4_mapped else parsed.packed
    return parsed.packed


def word_sum(data: bytes | memoryview) -> int:
    """The one's complement sum of 16-bit words in memory order, below 65,535; odd data as if a zero byte followed."""
    # 2**16 is 1 modulo 65,535, so the number that the bytes make is the sum of its words: one division for all.
    if sys.byteorder == "big" and len(data) & 1:
        data = bytes(data) + b"\0"
    return int.from_bytes(data, sys.byteorder) % 0xFFFF


def checksum(total: int) -> int:
    """The checksum of a sum, to be stored in memory order; of what isn't all zero."""
    return ~(total % 0xFFFF or 0xFFFF) & 0xFFFF


def udp_headers(next_hop: NextHop, address: bytes, port: int, source_port: int) -> Headers:
    """Of a datagram to that address and port. Raises ValueError where families or sizes don't fit."""
    source = next_hop.source_address
    if len(address) != len(source) or len(address) not in {4, 16}:
        raise ValueError(
            f"a destination of {len(address)} bytes from a source of {len(source)}: one family is expected"
        )
    if len(next_hop.source_mac) != 6 or len(next_hop.destination_mac) != 6:
        raise ValueError(f"next hop {next_hop}: MAC addresses of 6 bytes are expected")
    if not 0 < port < 1 << 16 or not 0 < source_port < 1 << 16:
        raise ValueError(f"port {port} from {source_port}: expected 1 to 65535")
    ethernet = next_hop.destination_mac + next_hop.source_mac
    ports = struct.pack("!HH", source_port, port)
    covered = word_sum(source + address + struct.pack("!H", _UDP) + ports)
    if len(address) == 4:
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, _DONT_FRAGMENT, TTL, _UDP, 0) + source + address
        return Headers(ethernet + b"\x08\x00" + ip + ports + bytes(4), word_sum(ip), covered or 0xFFFF)
    ip = struct.pack("!IHBB", 6 << 28, 0, _UDP, TTL) + source + address
    return Headers(ethernet + b"\x86\xdd" + ip + ports + bytes(4), 0, covered or 0xFFFF)


def finish(headers: Headers, frame: bytearray | memoryview, payload_size: int, payload_sum: int) -> None:
    """Lengths and checksums into headers that stand in `frame`, as fanout.c does it in the kernel."""
    udp_length = socket.htons(8 + payload_size)
    udp = checksum(headers.udp_sum + payload_sum + 2 * udp_length) or 0xFFFF  # RFC 768: zero means that there is none
    if len(headers.frame) == IPV4_HEADERS:
        total = socket.htons(28 + payload_size)
        _WORD.pack_into(frame, 16, total)
        _WORD.pack_into(frame, 24, checksum(headers.ip_sum + total))
        _WORD.pack_into(frame, 38, udp_length)
        _WORD.pack_into(frame, 40, udp)
    else:
        _WORD.pack_into(frame, 18, udp_length)
        _WORD.pack_into(frame, 58, udp_length)
        _WORD.pack_into(frame, 60, udp)
