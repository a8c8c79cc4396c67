"""What network interfaces are and how they change: facts for the ladder and the doctor, and a descriptor for news.

Reads only, in the network namespace of the calling thread. Facts come from rtnetlink (pyroute2), from ethtool's ioctl
where netlink has no answer, and from /proc for who holds a BPF program; news from a netlink socket of our own.

pyroute2 runs an asyncio loop inside each synchronous call: no thread, but it can't be called while another loop runs in
this thread. `rtnetlink()` opens it for one piece of work and closes it again, so that a fork never shares it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import socket
import struct
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types
from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]  # likewise

from xdp.kernel import program_by_id

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

IFF_UP, IFF_LOOPBACK, IFF_LOWER_UP = 0x1, 0x8, 0x10000
_ARPHRD_ETHER, _ARPHRD_LOOPBACK = 1, 772
_SIOCETHTOOL = 0x8946
_GDRVINFO, _GSTRINGS, _GSTATS, _GSSET_INFO, _GFEATURES, _GCHANNELS = 0x03, 0x1B, 0x1D, 0x37, 0x3A, 0x3C
_STATS_SET, _FEATURES_SET = 1, 4  # ETH_SS_…
_XDP_MODES = {"IFLA_XDP_DRV_PROG_ID": "native", "IFLA_XDP_SKB_PROG_ID": "generic", "IFLA_XDP_HW_PROG_ID": "offloaded"}


@contextlib.contextmanager
def rtnetlink(what: str) -> Iterator[Any]:
    """An IPRoute for one piece of work; the kernel's refusal becomes an OSError that starts with `what`."""
    # pyroute2 would notice only after it has opened what it then doesn't close.
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise RuntimeError(f"{what}: rtnetlink can't be used inside a running event loop")
    try:
        with IPRoute(groups=0) as route:
            yield route
    except NetlinkError as error:
        raise OSError(error.code, f"{what}: {os.strerror(error.code)}") from None


class Holder(NamedTuple):
    """A process that has a descriptor of a program, or of a link that attaches it."""

    pid: int
    command: str


@dataclass(frozen=True, slots=True)
class AttachedXdp:
    """An XDP program on an interface, and whose it is."""

    mode: str
    """native, generic or offloaded."""
    program_id: int
    program: str
    """Its name; empty when it has none, or when we may not ask."""
    holders: tuple[Holder, ...]
    """None when it is pinned or was attached by netlink, which outlives its process."""

    def __str__(self) -> str:
        held = ", ".join(f"{holder.command} (pid {holder.pid})" for holder in self.holders) or "no process"
        return f"XDP program {self.program or 'without a name'} (id {self.program_id}, {self.mode}), held by {held}"


@dataclass(frozen=True, slots=True)
class Interface:
    """Facts of an interface; None is what its driver doesn't tell."""

    index: int
    name: str
    kind: str | None
    """veth, vlan, bond, …; None for hardware, and for what a virtual machine takes for hardware."""
    driver: str | None
    mtu: int
    mac: str
    up: bool
    """Switched on by the administrator."""
    carrier: bool
    loopback: bool
    rx_queues: int | None
    """In use, not what the driver could have."""
    tx_queues: int | None
    lro: bool | None
    """Large receive offload, which native XDP can't live with."""
    gro_hw: bool | None
    """The hardware merges packets: likewise."""
    xdp: tuple[AttachedXdp, ...]
    most_queues: int | None = None
    """How many receive queues the driver could have."""
    peer_index: int | None = None
    """veth: its other end's, if that is in this namespace."""
    ethernet: bool = True
    """Its packets begin with an Ethernet header; those of tun, WireGuard or PPP don't."""


def interface(name: str) -> Interface:
    """Facts of one interface. Raises OSError (ENODEV) when there is none of that name."""
    with rtnetlink(f"interface {name}") as route:
        for link in route.get_links(ifname=name):
            return _interface(link)
    raise OSError(errno.ENODEV, f"interface {name}: {os.strerror(errno.ENODEV)}")


def interfaces() -> list[Interface]:
    """Facts of all, by index."""
    with rtnetlink("interfaces") as route:
        return [_interface(link) for link in route.get_links()]


def interface_towards(address: str) -> str:
    """The name of the interface that leads to an IPv4 or IPv6 address. Raises OSError when nothing does."""
    address, _, scope = address.partition("%")
    if scope:  # a link-local address is one of that interface alone (RFC 4007)
        return socket.if_indextoname(int(scope)) if scope.isdigit() else scope
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with rtnetlink(f"route to {address}") as route:
        (found,) = route.route("get", dst=address, family=family)
        return socket.if_indextoname(found.get("oif"))


def _interface(link: Any) -> Interface:
    name, flags, kind = link.get("ifname"), link["flags"], link.get(("linkinfo", "kind"))
    features = _features(name)
    channels = _ethtool(name, struct.pack("=I32x", _GCHANNELS))
    _, most_rx, _, _, most, rx, tx, _, combined = struct.unpack("=9I", channels) if channels else (0,) * 9
    driver = _ethtool(name, struct.pack("=I192x", _GDRVINFO))
    attached = link.get("xdp")
    return Interface(
        index=link["index"],
        name=name,
        kind=kind,
        driver=driver[4:36].split(b"\0", 1)[0].decode("ascii", "replace") if driver else None,
        mtu=link.get("mtu"),
        mac=link.get("address") or "",
        up=bool(flags & IFF_UP),
        carrier=bool(flags & IFF_LOWER_UP),
        loopback=bool(flags & IFF_LOOPBACK),
        rx_queues=rx + combined if channels else None,
        tx_queues=tx + combined if channels else None,
        lro=features.get("rx-lro"),
        gro_hw=features.get("rx-gro-hw"),
        xdp=tuple(
            _attached(mode, number)
            for attribute, mode in _XDP_MODES.items()
            if attached is not None and (number := attached.get_attr(attribute))
        ),
        most_queues=most_rx + most if channels else None,
        peer_index=link.get("link") if kind == "veth" and link.get("link_netnsid") is None else None,
        ethernet=link["ifi_type"] in {_ARPHRD_ETHER, _ARPHRD_LOOPBACK},
    )


def _attached(mode: str, number: int) -> AttachedXdp:
    try:
        name = program_by_id(number).name
    except OSError:
        name = ""  # gone meanwhile, or we lack CAP_SYS_ADMIN
    return AttachedXdp(mode, number, name, program_holders(number))


def program_holders(number: int) -> tuple[Holder, ...]:
    """The processes, of those we may look into, that hold a BPF program of that id, or a link to it."""
    holders = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if _holds(process, number):
                holders.append(Holder(int(process.name), (process / "comm").read_text().strip()))
    return tuple(sorted(holders))


def _holds(process: Path, number: int) -> bool:
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if descriptor.readlink().name.strip("[]").startswith(("anon_inode:bpf", "anon_inode:[bpf")):
                facts = (process / "fdinfo" / descriptor.name).read_text().split()
                if ("prog_id:", str(number)) in itertools.pairwise(facts):
                    return True
    return False


def _ethtool(name: str, command: bytes) -> bytes | None:
    """One ethtool ioctl (linux/ethtool.h): the structure as the driver filled it, None where it has no answer."""
    buffer = ctypes.create_string_buffer(command, len(command))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            fcntl.ioctl(control, _SIOCETHTOOL, struct.pack("=16sQ16x", name.encode(), ctypes.addressof(buffer)))
        except OSError as error:
            if error.errno in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV}:
                return None
            raise
    return buffer.raw


def _names(name: str, which: int) -> list[str]:
    """One of the driver's sets of strings; [] where it has none."""
    counted = _ethtool(name, struct.pack("=IIQI", _GSSET_INFO, 0, 1 << which, 0))
    count = struct.unpack_from("=I", counted, 16)[0] if counted else 0
    strings = _ethtool(name, struct.pack("=III", _GSTRINGS, which, count) + bytes(32 * count))
    if not strings:
        return []
    return [strings[12 + 32 * n : 44 + 32 * n].split(b"\0", 1)[0].decode("ascii", "replace") for n in range(count)]


def _features(name: str) -> dict[str, bool]:
    """Each feature's name → whether it is on."""
    names = _names(name, _FEATURES_SET)
    blocks = (len(names) + 31) // 32
    state = _ethtool(name, struct.pack("=II", _GFEATURES, blocks) + bytes(16 * blocks))
    if not state:
        return {}
    active = [struct.unpack_from("=I", state, 8 + 16 * block + 8)[0] for block in range(blocks)]
    return {feature: bool(active[n // 32] >> n % 32 & 1) for n, feature in enumerate(names)}


def driver_counters(name: str) -> dict[str, int]:
    """What the driver has counted, by its own names (`ethtool -S`); {} where it counts nothing. Raises OSError."""
    names = _names(name, _STATS_SET)
    # It writes as many as it has, asked for or not: with room for more, should queues be added in between.
    counted = _ethtool(name, struct.pack("=II", _GSTATS, len(names)) + bytes(32 * len(names)))
    if not counted or struct.unpack_from("=I", counted, 4)[0] != len(names):
        return {}
    return dict(zip(names, struct.unpack_from(f"={len(names)}Q", counted, 8), strict=True))


# ── news ──


class LinkState(Enum):
    """What became of an interface."""

    UP = "up"
    """Switched on, with a carrier."""
    DOWN = "down"
    GONE = "gone"
    """Deleted, or moved to another namespace."""
    MISSED = "missed"
    """Not of one: news was lost, ask for the facts again."""


@dataclass(frozen=True, slots=True)
class LinkChange:
    """One piece of news; repeats are possible."""

    state: LinkState
    index: int = 0
    name: str = ""


_HEADER, _IFINFO, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BxHiII"), struct.Struct("=HH")
_RTM_NEWLINK, _RTM_DELLINK, _RTMGRP_LINK, _IFLA_IFNAME = 16, 17, 1, 3
_NEWS_BYTES = 1 << 16
_MAX_DATAGRAMS = 256
"""Of one poll(): a storm must not keep the caller from its other work."""


@final
class LinkMonitor:
    """News of all interfaces of the namespace in which it was made; a context manager. Needs no privilege."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        try:
            self._socket.bind((0, _RTMGRP_LINK))
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Readable when there is news."""
        return self._socket.fileno()

    def poll(self) -> list[LinkChange]:
        """What happened since the last time, in order, never blocking."""
        changes: list[LinkChange] = []
        for _ in range(_MAX_DATAGRAMS):
            news = self._read()
            if news is None:
                break
            changes += news
        return changes

    def _read(self) -> list[LinkChange] | None:
        try:
            datagram, (sender, _) = self._socket.recvfrom(_NEWS_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            return [LinkChange(LinkState.MISSED)]
        # The kernel, and nobody who only found our port.
        return list(link_changes(datagram)) if sender == 0 else []

    def close(self) -> None:
        """Harmless if repeated."""
        self._socket.close()

    def __enter__(self) -> LinkMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def link_changes(datagram: bytes) -> Iterator[LinkChange]:
    """The news in one rtnetlink datagram; what is cut short or of another kind is passed over."""
    at = 0
    while at + _HEADER.size + _IFINFO.size <= len(datagram):
        length, kind, *_ = _HEADER.unpack_from(datagram, at)
        end = at + length
        if length < _HEADER.size or end > len(datagram):
            return
        if kind in {_RTM_NEWLINK, _RTM_DELLINK} and length >= _HEADER.size + _IFINFO.size:
            family, _, index, flags, _ = _IFINFO.unpack_from(datagram, at + _HEADER.size)
            # A bridge says that a port left it in the same words as that an interface is gone, in its own family.
            if family == socket.AF_UNSPEC:
                up = flags & IFF_UP and flags & IFF_LOWER_UP
                state = LinkState.GONE if kind == _RTM_DELLINK else LinkState.UP if up else LinkState.DOWN
                yield LinkChange(state, index, _name(datagram, at + _HEADER.size + _IFINFO.size, end))
        at += (length + 3) & -4


def _name(datagram: bytes, at: int, end: int) -> str:
    while at + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(datagram, at)
        if length < _ATTRIBUTE.size or at + length > end:
            break
        if kind == _IFLA_IFNAME:
            return datagram[at + _ATTRIBUTE.size : at + length].split(b"\0", 1)[0].decode("utf-8", "replace")
        at += (length + 3) & -4
    return ""
