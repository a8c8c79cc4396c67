"""Packets of peer-to-peer flows as scapy builds them, and the messages in them.

A Wire has its headers built by scapy once; a segment is a copy of them with sequence, flags and lengths patched, so
that a test can afford a hundred thousand. Checksums are left wrong: nothing that captures looks at them.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from tests.net.conftest import REGTEST_MAGIC, REGTEST_PORT

if TYPE_CHECKING:
    from scapy.packet import Packet

US, PEER = "10.77.0.1", "10.77.0.2"
US6, PEER6 = "fd77::1", "fd77::2"
SYN, ACK, PSH_ACK, SYN_ACK = 0x02, 0x10, 0x18, 0x12
MSG_TX, MSG_BLOCK, MSG_WITNESS_TX, MSG_WITNESS_BLOCK = 1, 2, 0x40000001, 0x40000002


def from_peer(**fields: Any) -> Packet:
    """TCP of a segment from a peer that we connected to."""
    values: dict[str, Any] = {"sport": REGTEST_PORT, "dport": 40000, "seq": 1000, "flags": "PA", **fields}
    return TCP(**values)


def ethernet() -> Packet:
    """The link's header, to be continued."""
    return Ether(src="02:00:00:00:00:02", dst="02:00:00:00:00:01")


def ipv4(**fields: Any) -> Packet:
    """Link and IPv4 header, to be continued."""
    return ethernet() / IP(src=PEER, dst=US, **fields)


def ipv6(**fields: Any) -> Packet:
    """Link and IPv6 header, to be continued."""
    return ethernet() / IPv6(src=PEER6, dst=US6, **fields)


def raw(packet: Packet, payload: bytes = b"") -> bytes:
    """The bytes of a packet with this payload."""
    return bytes(packet / Raw(payload) if payload else packet)


class Wire:
    """One direction of a connection, whose segments have these headers."""

    def __init__(self, headers: Packet | None = None, sequence: int = 1000) -> None:
        headers = ipv4() / from_peer() if headers is None else headers
        self._bytes = bytes(headers)
        self._tcp = len(self._bytes) - len(bytes(headers[TCP]))
        self._is_ipv6 = headers.haslayer(IPv6)
        layer = headers[IPv6] if self._is_ipv6 else headers[IP]
        self._ip = len(self._bytes) - len(bytes(layer))
        self.sequence = sequence
        """Of the next byte to be sent."""

    def at(self, sequence: int, payload: bytes, flags: int = PSH_ACK) -> bytes:
        """A segment anywhere in the flow."""
        packet = bytearray(self._bytes)
        struct.pack_into("!I", packet, self._tcp + 4, sequence & 0xFFFFFFFF)
        packet[self._tcp + 13] = flags
        whole = len(packet) + len(payload) - self._ip
        if self._is_ipv6:
            struct.pack_into("!H", packet, self._ip + 4, whole - 40)
        else:
            struct.pack_into("!H", packet, self._ip + 2, whole)
        return bytes(packet) + payload

    def send(self, payload: bytes) -> bytes:
        """The next segment."""
        packet = self.at(self.sequence, payload)
        self.sequence = (self.sequence + len(payload)) & 0xFFFFFFFF
        return packet

    def syn(self) -> bytes:
        """The segment that begins the flow, its payload being due at the sequence set already."""
        return self.at(self.sequence - 1, b"", SYN_ACK)

    def cut(self, stream: bytes, size: int) -> list[bytes]:
        """The stream in segments of this size."""
        return [self.send(stream[at : at + size]) for at in range(0, len(stream), size)]


# ── messages ──


def message(command: str, body: bytes = b"", *, magic: bytes = REGTEST_MAGIC, length: int | None = None) -> bytes:
    """A message of the v1 transport; `length` says something else than the body's."""
    checksum = hashlib.sha256(hashlib.sha256(body).digest()).digest()[:4]
    size = len(body) if length is None else length
    return magic + command.encode().ljust(12, b"\0") + struct.pack("<I", size) + checksum + body


def compact_size(number: int) -> bytes:
    """Bitcoin's variable-length number."""
    if number < 0xFD:
        return bytes([number])
    return b"\xfd" + struct.pack("<H", number) if number < 1 << 16 else b"\xfe" + struct.pack("<I", number)


def filler(size: int) -> bytes:
    """Bytes that hold no message start."""
    return bytes(number * 7 % 251 for number in range(size))


def inv(*types: int) -> bytes:
    """An inventory of these types."""
    entries = b"".join(struct.pack("<I", kind) + filler(32) for kind in types)
    return message("inv", compact_size(len(types)) + entries)


def headers(count: int = 1) -> bytes:
    """So many headers."""
    return message("headers", compact_size(count) + b"".join(filler(80) + b"\0" for _ in range(count)))


def cmpctblock(size: int = 700) -> bytes:
    """A compact block whose body has this size."""
    return message("cmpctblock", filler(size))


def block(size: int = 900) -> bytes:
    """A block whose body has this size."""
    return message("block", filler(size))


class Announcement(NamedTuple):
    """A message that must be captured, and how much of it."""

    name: str
    bytes: bytes
    needed: int
    """Bytes from its start, header included."""


PREFIX = 24 + 128
ANNOUNCEMENTS = (
    Announcement("inv", inv(MSG_BLOCK), 24 + 37),
    Announcement("witness inv", inv(MSG_WITNESS_BLOCK, MSG_WITNESS_TX), 24 + 73),
    Announcement("headers", headers(), 24 + 82),
    Announcement("cmpctblock", cmpctblock(), PREFIX),
    Announcement("block", block(), PREFIX),
    Announcement("a block of its header alone", block(81), 24 + 81),
)
OTHERS = (
    message("verack"),
    message("ping", bytes(8)),
    message("tx", filler(250)),
    inv(MSG_WITNESS_TX, MSG_TX),
    message("getheaders", filler(69)),
    message("getblocktxn", filler(40)),
    message("blocktxn", filler(300)),
    message("headers2", filler(81)),
    message("blocks", filler(90)),
    message("sendheaders"),
)
