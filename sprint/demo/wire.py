"""A wire of the demo's own, as root: the node in a network namespace, behind a veth pair whose near end is captured.

The namespace has no name and lives as long as the node's process; the veth pair goes with it, however that ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass

from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types

from sprint.errors import HostError

_CLONE_NEWNET = 0x4000_0000
_SIOCETHTOOL, _ETHTOOL_SGRO = 0x8946, 0x2C
"""linux/sockios.h, linux/ethtool.h."""
_PREFIX_LENGTH = 30


@dataclass(frozen=True, slots=True)
class Wire:
    """Both ends: the near one here, the far one in the node's namespace."""

    near: str
    far: str
    near_address: str
    far_address: str


def wire_for(pid: int) -> Wire:
    """Names and addresses that no other demo on this host has: out of 198.18.0.0/15, for benchmarks (RFC 2544)."""
    third, fourth = (pid >> 6) & 0xFF, (pid & 0x3F) << 2
    base = f"198.18.{third}"
    return Wire(f"spd{pid}a", f"spd{pid}b", f"{base}.{fourth + 1}", f"{base}.{fourth + 2}")


def enter_namespace() -> None:
    """Put this process into a network namespace of its own. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, f"no network namespace: {os.strerror(code)}")


def lay(wire: Wire, node_pid: int) -> None:
    """Make the pair and put the far end into the node's namespace. Raises HostError."""
    try:
        with IPRoute() as route:
            route.link("add", ifname=wire.near, kind="veth", peer={"ifname": wire.far, "net_ns_pid": node_pid})
            _bring_up(route, wire.near, wire.near_address)
    except Exception as error:
        raise HostError(f"the demo's wire {wire.near}: {error}") from None


def join_namespace(pid: int) -> None:
    """Put this process into that process's network namespace. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net", "rb") as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            code = ctypes.get_errno()
            raise OSError(code, f"network namespace of process {pid}: {os.strerror(code)}")


def connect_far_end(wire: Wire) -> None:
    """In the node's process: give the far end its address, and have it take live frames, which GRO does on a veth."""
    with IPRoute() as route:
        _bring_up(route, wire.far, wire.far_address)
    value = ctypes.create_string_buffer(struct.pack("=II", _ETHTOOL_SGRO, 1), 8)
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:  # else it goes without them
        fcntl.ioctl(control, _SIOCETHTOOL, struct.pack("=16sQ16x", wire.far.encode(), ctypes.addressof(value)))


def _bring_up(route: IPRoute, name: str, address: str) -> None:
    index = route.link_lookup(ifname=name)[0]
    route.addr("add", index=index, address=address, prefixlen=_PREFIX_LENGTH)
    route.link("set", index=index, state="up")
