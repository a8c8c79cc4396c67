"""The far side of the fan-out's tests: everything that arrives on a veth end, and what a frame must be.

Frames are collected by an AF_PACKET socket with a large buffer; GRO is switched on at that end, so that it takes what
is redirected to its peer. They are judged by code of the tests' own, which sums bytes as RFC 1071 says.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, NamedTuple, final

from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from tests.net.slowness import SLOWNESS
from xdp.datagrams import NextHop
from xdp.fanout_maps import Rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.net.netns import Veth
    from xdp.fanout_table import FanoutTable

SO_RCVBUFFORCE, SIOCETHTOOL, SET_GRO = 33, 0x8946, 0x2C
BUFFER = 256 << 20
US, US6 = bytes((10, 88, 0, 0)), bytes((0xFD, 88)) + bytes(14)
SOURCE_PORT = 8436
PATIENCE_S = 5.0 * SLOWNESS


class Cable(NamedTuple):
    """A veth pair: we send at `near`."""

    near: Veth
    far: Veth

    def hop(self, *, ipv6: bool = False) -> NextHop:
        return NextHop(self.near.index, self.near.mac, self.far.mac, US6 if ipv6 else US)


class Datagram(NamedTuple):
    """What a frame says."""

    destination_mac: bytes
    source_mac: bytes
    source: bytes
    destination: bytes
    source_port: int
    port: int
    payload: bytes


def sums_up(data: bytes) -> bool:
    """Whether the checksum in it is right (RFC 1071): its big-endian words add up to 0xFFFF, or a multiple."""
    return int.from_bytes(data + b"\0" * (len(data) & 1), "big") % 0xFFFF == 0


def read(frame: bytes) -> Datagram:
    """The datagram in a frame; AssertionError for any byte of the headers that isn't what it must be."""
    kind = frame[12:14]
    if kind == b"\x08\x00":
        ip, udp = frame[14:34], frame[34:]
        versioned, tos, total, identity, fragment, ttl, protocol = struct.unpack_from("!BBHHHBB", ip)
        assert (versioned, tos, identity, fragment, ttl, protocol) == (0x45, 0, 0, 0x4000, 64, 17)
        assert total == len(frame) - 14
        assert sums_up(ip)
        source, destination = ip[12:16], ip[16:20]
        pseudo = source + destination + struct.pack("!HH", 17, len(udp))
    else:
        assert kind == b"\x86\xdd"
        ip, udp = frame[14:54], frame[54:]
        first, length, protocol, hops = struct.unpack_from("!IHBB", ip)
        assert (first, length, protocol, hops) == (6 << 28, len(udp), 17, 64)
        source, destination = ip[8:24], ip[24:40]
        pseudo = source + destination + struct.pack("!II", len(udp), 17)
    source_port, port, length, check = struct.unpack_from("!HHHH", udp)
    assert length == len(udp)
    assert check != 0
    assert sums_up(pseudo + udp)
    return Datagram(frame[:6], frame[6:12], source, destination, source_port, port, udp[8:])


@final
class Collector:
    """Everything that arrives at a veth end; a context manager."""

    def __init__(self, end: Veth) -> None:
        self._socket = end.namespace.raw_socket(end.name)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)

    def frames(self, count: int) -> list[bytes]:
        """The next `count`, fewer if no more come; then none may follow."""
        found: list[bytes] = []
        self._socket.settimeout(PATIENCE_S)
        with contextlib.suppress(TimeoutError):
            while len(found) < count:
                found.append(self._socket.recv(2048))
        return found + self.rest()

    def rest(self) -> list[bytes]:
        """What has arrived by now: frames arrive within the call that sends them."""
        found: list[bytes] = []
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self._socket.recv(2048))
        return found

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def switch_gro(end: Veth, *, on: bool) -> None:
    """Whether this veth end polls: without GRO and XDP it takes nothing that is redirected to its peer."""
    with end.namespace.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        value = ctypes.create_string_buffer(struct.pack("=II", SET_GRO, int(on)))
        fcntl.ioctl(control, SIOCETHTOOL, struct.pack("=16sQ8x", end.name.encode(), ctypes.addressof(value)))


def addresses(count: int, *, ipv6: bool = False, network: int = 88) -> Iterator[tuple[bytes, int]]:
    """So many different addresses, and a port that belongs to each."""
    for number in range(1, count + 1):
        port = 1024 + number * 7 % 60000
        if ipv6:
            yield bytes((0xFD, network)) + bytes(6) + number.to_bytes(8, "big"), port
        else:
            yield bytes((10, network)) + number.to_bytes(2, "big"), port


def until(what: str, condition: Callable[[], object]) -> None:
    """Wait for a condition, for PATIENCE_S at most."""
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(0.002)


def join(
    table: FanoutTable, cable: Cable, count: int, *, first: int = 0, ipv6: bool = False, network: int = 88
) -> None:
    """So many subscribers behind a cable, the first ones of the first rank."""
    with table.batch():
        for number, (address, port) in enumerate(addresses(count, ipv6=ipv6, network=network)):
            table.add(cable.hop(ipv6=ipv6), address, port, Rank.FIRST if number < first else Rank.SECOND)


def expected(cable: Cable, payload: bytes, address: bytes, port: int) -> Datagram:
    source = US6 if len(address) == 16 else US
    return Datagram(cable.far.mac, cable.near.mac, source, address, SOURCE_PORT, port, payload)


def scapy_agrees(frame: bytes) -> None:
    """An oracle of its own: built anew from its fields, the frame has the same bytes, checksums included."""
    packet: Any = Ether(frame)
    layer = IPv6 if IPv6 in packet else IP
    payload = bytes(packet[UDP].payload)
    again = packet.copy()
    del again[UDP].chksum, again[UDP].len
    if layer is IP:
        del again[IP].chksum, again[IP].len
    else:
        del again[IPv6].plen
    again[UDP].remove_payload()
    assert bytes(again / Raw(payload)) == frame
