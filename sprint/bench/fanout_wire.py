"""The wire of `bench fanout` and `bench end-to-end`: a veth pair between two namespaces without names, gone with them.

We send at the near end. The far end is held by a process of its own; there is the sink (XDP) for what is measured on
the wire, or GRO for sockets: without one of the two a veth end takes nothing that is redirected to its peer. Both ends
have two queues, so that two CPUs need not share one.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types

from sprint.bench.detect_wire import FAR, FAR_ADDRESS, NEAR, NEAR_ADDRESS, enter_namespace
from sprint.errors import HostError
from xdp import kernel
from xdp.datagrams import NextHop

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from sprint.bench.apart import Helper

BEHIND = "100.64.0.0"
"""Subscribers' own addresses, for which the far end is the gateway: of the network for carriers (RFC 6598), /16."""
QUEUES = 2
PREFIX = 24
_CLONE_NEWNET = 0x4000_0000
_PERMANENT = 0x80  # NUD_PERMANENT
_SIOCETHTOOL, _ETHTOOL_SGRO = 0x8946, 0x2C  # linux/sockios.h, linux/ethtool.h


class Wire(NamedTuple):
    """As the near end sees it."""

    near_index: int
    near_mac: bytes
    far_mac: bytes

    @property
    def next_hop(self) -> NextHop:
        """To every subscriber."""
        return NextHop(self.near_index, self.near_mac, self.far_mac, socket.inet_aton(NEAR_ADDRESS))


def be_far_end(control: Connection) -> None:
    """The process that holds the far namespace; it obeys be_asked()."""
    link = -1
    while True:
        what, *arguments = control.recv()
        if what == "enter":
            enter_namespace()
            control.send(os.getpid())
        elif what == "up":
            (near_mac,) = arguments
            mac = _bring_up(FAR, FAR_ADDRESS, NEAR_ADDRESS, near_mac)
            _switch_gro_on(FAR)
            control.send(mac)
        elif what == "pid":
            control.send(os.getpid())
        elif what == "sink":
            (program_fd,) = arguments
            index = socket.if_nametoindex(FAR)
            link = kernel.link_create(program_fd, index, kernel.ATTACH_XDP, kernel.XDP_FLAGS_DRV_MODE)
            control.send(True)
        elif what == "sockets":
            os.close(link)
            control.send(True)


def lay(far: Helper) -> Wire:
    """Make the pair between this process's namespace, which must be its own, and the far one's. Raises HostError."""
    pid = far.ask("enter")
    try:
        with IPRoute() as route:
            queues = {"num_tx_queues": QUEUES, "num_rx_queues": QUEUES}
            route.link("add", ifname=NEAR, kind="veth", **queues, peer={"ifname": FAR, "net_ns_pid": pid, **queues})
        near_mac = _bring_up(NEAR, NEAR_ADDRESS)
        far_mac = far.ask("up", near_mac)
        _know(NEAR, FAR_ADDRESS, far_mac)
        with IPRoute() as route:
            route.route("add", dst=f"{BEHIND}/16", gateway=FAR_ADDRESS)
    except Exception as error:  # pyroute2 has errors of its own
        raise HostError(f"no veth pair: {error}") from None
    return Wire(socket.if_nametoindex(NEAR), near_mac, far_mac)


def address_of(number: int) -> bytes:
    """Of the subscriber of that number, below 65,535."""
    return socket.inet_aton(BEHIND)[:2] + (number + 1).to_bytes(2, "big")


def join_namespace(pid: int) -> None:
    """Move into the network namespace of that process. Raises HostError."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net", "rb") as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            raise HostError(f"no way into a network namespace: {os.strerror(ctypes.get_errno())}")


def _bring_up(name: str, address: str, peer_address: str = "", peer_mac: bytes = b"") -> bytes:
    """Give an end in this process's namespace its address; returns its MAC."""
    with IPRoute() as route:
        index = route.link_lookup(ifname=name)[0]
        route.addr("add", index=index, address=address, prefixlen=PREFIX)
        route.link("set", index=index, state="up")
        mac: str = route.get_links(index)[0].get_attr("IFLA_ADDRESS")
    if peer_mac:
        _know(name, peer_address, peer_mac)
    return bytes.fromhex(mac.replace(":", ""))


def _know(name: str, address: str, mac: bytes) -> None:
    """The neighbour is known for good: nothing is asked in the middle of a publication."""
    with IPRoute() as route:
        index = route.link_lookup(ifname=name)[0]
        route.neigh("replace", dst=address, lladdr=mac.hex(":"), ifindex=index, state=_PERMANENT)


def _switch_gro_on(name: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        value = ctypes.create_string_buffer(struct.pack("=II", _ETHTOOL_SGRO, 1))
        fcntl.ioctl(control, _SIOCETHTOOL, struct.pack("=16sQ8x", name.encode(), ctypes.addressof(value)))
