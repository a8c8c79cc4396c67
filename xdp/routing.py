"""Questions to the kernel's routing: which way to an address, which MAC address a neighbour has, what a link is.

One netlink socket, one question and its answer at a time, some ten microseconds each; in the network namespace of the
thread that made it. No pyroute2: the one who asks may be inside a running event loop, and may ask ten thousand times.
Numbers are those of linux/rtnetlink.h, linux/neighbour.h and linux/if_link.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple, final

if TYPE_CHECKING:
    from collections.abc import Iterator

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR = 20, 21
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWRULE, RTM_DELRULE = 32, 33
HEADER, ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=HH")
OWN_ADDRESS = struct.Struct("=BBBxI")
"""Family, bits, flags and interface of RTM_NEWADDR."""
ROUTE, NEIGHBOUR, LINK = struct.Struct("=8BI"), struct.Struct("=B3xiHBB"), struct.Struct("=BxHiII")
IFF_UP, IFF_LOOPBACK, IFF_RUNNING = 0x1, 0x8, 0x40
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_REPLACE, _NLM_F_CREATE = 1, 4, 0x100, 0x400
_NLMSG_ERROR = 2
RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC, _RTA_VIA = 1, 2, 4, 5, 7, 18
NDA_DST, NDA_LLADDR = 1, 2
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
_IFLA_ADDRESS = 1
_UNICAST = 1  # RTN_UNICAST: not to ourselves, nor to many
_ETHERNET = 1  # ARPHRD_ETHER
_NTF_USE = 1
USABLE_STATES = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80
"""NUD_REACHABLE, STALE, DELAY, PROBE, NOARP, PERMANENT: what the kernel itself sends by."""
_TYPE_MASK = 0x3FFF  # NLA_TYPE_MASK: two flags stand above the type
_ANSWER_BYTES = 1 << 15
_TIMEOUT_S = 1.0
_MAX_STRAYS = 16


class Route(NamedTuple):
    """The way to an address, bytes in network order."""

    ifindex: int
    via: bytes
    """The neighbour that frames go to: the gateway, or the destination itself."""
    source: bytes


class Link(NamedTuple):
    """An interface that frames can leave by, if `up`."""

    mac: bytes
    up: bool


def attributes(datagram: bytes, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Type and value of each attribute; what is cut short ends it."""
    while at + ATTRIBUTE.size <= end:
        length, kind = ATTRIBUTE.unpack_from(datagram, at)
        if length < ATTRIBUTE.size or at + length > end:
            return
        yield kind & _TYPE_MASK, datagram[at + ATTRIBUTE.size : at + length]
        at += (length + 3) & -4


def messages(datagram: bytes) -> Iterator[tuple[int, int, int]]:
    """Kind, beginning behind the header, and end of each message; what is cut short ends it."""
    at = 0
    while at + HEADER.size <= len(datagram):
        length, kind, *_ = HEADER.unpack_from(datagram, at)
        if length < HEADER.size or at + length > len(datagram):
            return
        yield kind, at + HEADER.size, at + length
        at += (length + 3) & -4


def _family(address: bytes) -> int:
    return socket.AF_INET if len(address) == 4 else socket.AF_INET6


def _attribute(kind: int, value: bytes) -> bytes:
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


@final
class Routing:
    """The socket that asks; close it after use."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.settimeout(_TIMEOUT_S)
        self._socket.bind((0, 0))
        self._sequence = 0

    def route_to(self, address: bytes, source: bytes | None = None) -> Route | None:
        """Where the kernel would send it; None where it can't, or where it isn't one Ethernet neighbour."""
        bits = len(address) * 8
        body = ROUTE.pack(_family(address), bits, bits if source else 0, 0, 0, 0, 0, 0, 0)
        body += _attribute(RTA_DST, address) + (_attribute(_RTA_SRC, source) if source else b"")
        answer = self._ask(RTM_GETROUTE, body, RTM_NEWROUTE)
        if answer is None or len(answer) < ROUTE.size or answer[7] != _UNICAST:
            return None
        told = dict(attributes(answer, ROUTE.size, len(answer)))
        found = source or told.get(_RTA_PREFSRC, b"")
        # A gateway of the other family (RFC 5549) would need its neighbour's address of that family: not supported.
        if len(told.get(_RTA_OIF, b"")) != 4 or len(found) != len(address) or _RTA_VIA in told:
            return None
        return Route(struct.unpack("=I", told[_RTA_OIF])[0], told.get(_RTA_GATEWAY, address), found)

    def neighbour(self, ifindex: int, address: bytes) -> bytes | None:
        """Its MAC address, None while it is not known."""
        body = NEIGHBOUR.pack(_family(address), ifindex, 0, 0, 0) + _attribute(NDA_DST, address)
        answer = self._ask(RTM_GETNEIGH, body, RTM_NEWNEIGH)
        if answer is None or len(answer) < NEIGHBOUR.size:
            return None
        return mac_of(answer)

    def use_neighbour(self, ifindex: int, address: bytes) -> None:
        """Have the kernel find out, or check, the MAC address, as if it had a packet to send; no error if it can't."""
        body = NEIGHBOUR.pack(_family(address), ifindex, 0, _NTF_USE, 0) + _attribute(NDA_DST, address)
        self._ask(RTM_NEWNEIGH, body, RTM_NEWNEIGH, _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_REPLACE)

    def link(self, ifindex: int) -> Link | None:
        """None where there is none, or where it isn't Ethernet."""
        answer = self._ask(RTM_GETLINK, LINK.pack(0, 0, ifindex, 0, 0), RTM_NEWLINK)
        if answer is None or len(answer) < LINK.size:
            return None
        _, kind, _, flags, _ = LINK.unpack_from(answer)
        mac = dict(attributes(answer, LINK.size, len(answer))).get(_IFLA_ADDRESS, b"")
        if kind != _ETHERNET or flags & IFF_LOOPBACK or len(mac) != 6:
            return None
        return Link(mac, bool(flags & IFF_UP and flags & IFF_RUNNING))

    def _ask(self, kind: int, body: bytes, expected: int, flags: int = 0) -> bytes | None:
        """The answer's body, None where it is an error. Raises OSError (ETIMEDOUT) where none comes."""
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self._socket.send(HEADER.pack(HEADER.size + len(body), kind, _NLM_F_REQUEST | flags, self._sequence, 0) + body)
        for _ in range(_MAX_STRAYS):
            try:
                datagram = self._socket.recv(_ANSWER_BYTES)
            except TimeoutError:
                break
            if len(datagram) < HEADER.size:
                continue
            length, answered, _, sequence, _ = HEADER.unpack_from(datagram)
            if sequence == self._sequence:
                return datagram[HEADER.size : length] if answered == expected else None
        raise OSError(errno.ETIMEDOUT, f"rtnetlink: {os.strerror(errno.ETIMEDOUT)}")

    def close(self) -> None:
        """Harmless if repeated."""
        self._socket.close()


def mac_of(neighbour: bytes) -> bytes | None:
    """The MAC address in the body of a neighbour's message, None while the kernel wouldn't send by it."""
    _, _, state, _, _ = NEIGHBOUR.unpack_from(neighbour)
    mac = dict(attributes(neighbour, NEIGHBOUR.size, len(neighbour))).get(NDA_LLADDR, b"")
    return mac if state & USABLE_STATES and len(mac) == 6 and any(mac) else None
