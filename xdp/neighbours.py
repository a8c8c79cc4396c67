"""Next hops: which interface and MAC addresses lead to a subscriber, and the news when that changes.

resolve() asks the kernel's routing and neighbour tables, and has the kernel find a neighbour out that it doesn't know
yet (ARP, neighbour discovery); until then, and where frames can't lead there at all, the answer is None: those are
served by a plain socket. Not led to by frames: this very host, anything that isn't Ethernet, several next hops at once
only by the one that the kernel picks, IPv6 link-local destinations, IPv4 by an IPv6 gateway.

Frames that we make ourselves don't tell the kernel that a neighbour is in use: keep_alive() does, or it would never be
checked, and forgotten in the end. Bounded by LIMIT addresses. Needs no privilege but for finding neighbours out
(CAP_NET_ADMIN). Of the network namespace of the thread that made it; never blocks for more than a netlink answer.
"""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, final

from xdp.datagrams import NextHop
from xdp.fanout_maps import SUBSCRIBERS
from xdp.routing import (
    IFA_ADDRESS,
    IFA_FLAGS,
    IFA_LOCAL,
    LINK,
    NDA_DST,
    NEIGHBOUR,
    OWN_ADDRESS,
    ROUTE,
    RTA_DST,
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELNEIGH,
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    Link,
    Routing,
    attributes,
    mac_of,
    messages,
)

if TYPE_CHECKING:
    from types import TracebackType

LIMIT = SUBSCRIBERS
_GROUPS = 0x1 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 0x40000
"""RTMGRP_LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE."""
_NEWS_BYTES = 1 << 16
_NEWS_BUFFER = 4 << 20
"""A change of address behind thousands of neighbours is told by as many messages."""
_MAX_DATAGRAMS = 1024
_MAX_OWN = 4096
"""Addresses of this host whose flags are remembered; with more, all are forgotten."""
_SO_RCVBUFFORCE = 33

_Neighbour = tuple[int, bytes]
"""Interface and address."""


@final
class NextHops:
    """Of the addresses that were asked for; a context manager."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._routing = Routing()
        self._news = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        try:
            try:
                self._news.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _NEWS_BUFFER)
            except PermissionError:
                self._news.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _NEWS_BUFFER)
            self._news.bind((0, _GROUPS))
        except BaseException:
            self.close()
            raise
        self._links: dict[int, Link | None] = {}
        self._by: dict[bytes, _Neighbour | None] = {}
        """By which neighbour each address is reached; None: by none, for the time being."""
        self._behind: dict[_Neighbour, set[bytes]] = {}
        self._macs: dict[_Neighbour, bytes | None] = {}
        """As they were told last."""
        self._own: dict[tuple[int, int, bytes, bytes], bytes] = {}
        """This host's addresses, with their flags, as they were told last."""
        self.link_news = 0
        """How often there was news of an interface that leads to somebody, whatever had changed of it."""

    def resolve(self, address: bytes, source: bytes | None = None) -> NextHop | None:
        """How to reach it now, from `source` if named; its changes are told by poll() from now on.

        None: a plain socket has to serve it, for now; poll() tells when that may be otherwise. Raises ValueError
        beyond LIMIT addresses, OSError when netlink gives no answer.
        """
        if address not in self._by and len(self._by) >= LIMIT:
            raise ValueError(f"{LIMIT} addresses are followed already")
        route = None if _is_link_local(address) else self._routing.route_to(address, source)
        link = self._link(route.ifindex) if route else None
        if route is None or link is None or not link.up:
            self._lead(address, None)
            return None
        by = (route.ifindex, route.via)
        self._lead(address, by)
        mac = self._macs.get(by)
        if mac is None:
            mac = self._macs[by] = self._routing.neighbour(*by)
        if mac is None:
            self._routing.use_neighbour(*by)
            return None
        return NextHop(route.ifindex, link.mac, mac, route.source)

    def forget(self, address: bytes) -> None:
        """No news of it any more. No error if it isn't known."""
        self._lead(address, None)
        self._by.pop(address, None)

    def keep_alive(self) -> None:
        """Have the kernel check each neighbour that it isn't sure of; to be called some times a minute."""
        for by in self._behind:
            self._routing.use_neighbour(*by)

    def fileno(self) -> int:
        """Readable when poll() has something."""
        return self._news.fileno()

    def poll(self) -> set[bytes]:
        """Addresses that may be reached another way than resolve() said: to be resolved anew. Never blocks."""
        changed: set[bytes] = set()
        for _ in range(_MAX_DATAGRAMS):
            try:
                datagram, (sender, _) = self._news.recvfrom(_NEWS_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._links.clear()  # news was lost: nothing is certain
                self._macs.clear()
                changed.update(self._by)
                continue
            if sender == 0:  # the kernel, and nobody who only found our port
                for kind, at, end in messages(datagram):
                    self._hear(kind, datagram[at:end], changed)
        return changed

    def _hear(self, kind: int, body: bytes, changed: set[bytes]) -> None:
        if kind in {RTM_NEWNEIGH, RTM_DELNEIGH} and len(body) >= NEIGHBOUR.size:
            _, ifindex, *_ = NEIGHBOUR.unpack_from(body)
            by = (ifindex, dict(attributes(body, NEIGHBOUR.size, len(body))).get(NDA_DST, b""))
            if by in self._behind:
                mac = mac_of(body) if kind == RTM_NEWNEIGH else None
                if mac != self._macs.get(by):
                    self._macs[by] = mac
                    changed |= self._behind[by]
        elif kind in {RTM_NEWLINK, RTM_DELLINK} and len(body) >= LINK.size:
            _, _, ifindex, _, _ = LINK.unpack_from(body)
            before = self._links.pop(ifindex, None)
            now = self._link(ifindex) if kind == RTM_NEWLINK else None
            self.link_news += before != now or any(index == ifindex for index, _ in self._behind)
            if before != now:
                changed.update(address for address, by in self._by.items() if by is None or by[0] == ifindex)
        elif kind in {RTM_NEWROUTE, RTM_DELROUTE} and len(body) >= ROUTE.size:
            bits, size = body[1], 4 if body[0] == socket.AF_INET else 16
            prefix = dict(attributes(body, ROUTE.size, len(body))).get(RTA_DST, bytes(size))
            # One to somewhere else is none of ours: a router's table may change all the time.
            changed.update(address for address in self._by if _is_within(address, prefix, bits))
        elif kind in {RTM_NEWADDR, RTM_DELADDR}:
            if self._has_changed(kind, body):
                changed.update(self._by)
        elif kind in {RTM_NEWRULE, RTM_DELRULE}:
            changed.update(self._by)

    def _has_changed(self, kind: int, body: bytes) -> bool:
        """Whether an address of this host isn't what it was: IPv6's are confirmed all the time, and stay the same."""
        if len(body) < OWN_ADDRESS.size:
            return False
        _, bits, flags, ifindex = OWN_ADDRESS.unpack_from(body)
        told = dict(attributes(body, OWN_ADDRESS.size, len(body)))
        own = (ifindex, bits, told.get(IFA_ADDRESS, b""), told.get(IFA_LOCAL, b""))
        if kind == RTM_DELADDR:
            self._own.pop(own, None)
            return True
        if len(self._own) >= _MAX_OWN:
            self._own.clear()
        now = told.get(IFA_FLAGS, bytes([flags]))
        before, self._own[own] = self._own.get(own), now
        return before != now

    def _link(self, ifindex: int) -> Link | None:
        if ifindex not in self._links:
            self._links[ifindex] = self._routing.link(ifindex)
        return self._links[ifindex]

    def _lead(self, address: bytes, by: _Neighbour | None) -> None:
        before = self._by.get(address)
        if before is not None and before != by:
            behind = self._behind[before]
            behind.discard(address)
            if not behind:
                del self._behind[before]
                self._macs.pop(before, None)
        self._by[address] = by
        if by is not None:
            self._behind.setdefault(by, set()).add(address)

    def close(self) -> None:
        """Harmless if repeated."""
        self._routing.close()
        self._news.close()

    def __enter__(self) -> NextHops:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_within(address: bytes, prefix: bytes, bits: int) -> bool:
    shift = len(address) * 8 - bits
    return (
        len(address) == len(prefix)
        and int.from_bytes(address, "big") >> shift == int.from_bytes(prefix, "big") >> shift
    )


def _is_link_local(address: bytes) -> bool:
    return len(address) == 16 and address[0] == 0xFE and address[1] & 0xC0 == 0x80
