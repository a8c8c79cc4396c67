"""Network namespaces and veth pairs of a test's own, and a forwarder between them that loses, doubles and reorders.

A namespace here has no name and no mount: it lives as long as a descriptor or a process of the test holds it, so a
test that fails, or a pytest that is killed, leaves nothing behind. Links are made inside namespaces only, never in the
one that the machine uses. Processes started inside die with their parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types

from tests.net.slowness import SLOWNESS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
ETH_P_ALL = 3
SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


@final
class Namespace:
    """A network namespace with its loopback up; a context manager that lets go of it (not one that enters it)."""

    def __init__(self) -> None:
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(_libc.unshare(CLONE_NEWNET), "unshare")
            try:
                self.descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                with IPRoute(groups=0) as route:
                    route.link("set", index=1, state="up")
            finally:
                _check(_libc.setns(before, CLONE_NEWNET), "setns back")
        finally:
            os.close(before)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread, and what it starts or opens meanwhile, is in this namespace."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(_libc.setns(self.descriptor, CLONE_NEWNET), "setns")
            try:
                yield
            finally:
                _check(_libc.setns(before, CLONE_NEWNET), "setns back")
        finally:
            os.close(before)

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """A process inside, which is killed when the calling thread ends."""
        with self.entered():
            # The child only calls prctl before it becomes the command: no lock of another thread can be needed.
            return subprocess.Popen(command, preexec_fn=die_with_parent, **options)  # noqa: PLW1509

    def open_socket(self, *arguments: int) -> socket.socket:
        """A socket of this namespace, usable from anywhere."""
        with self.entered():
            return socket.socket(*arguments)

    def raw_socket(self, name: str) -> socket.socket:
        """An AF_PACKET socket on that interface: whole Ethernet frames, not its own outgoing ones; 5 s timeout."""
        with self.entered():
            # Protocol 0 receives nothing until bound, so no other interface's frames slip in.
            raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            try:
                raw.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
                raw.bind((name, ETH_P_ALL))
                raw.settimeout(5 * SLOWNESS)
            except OSError:
                raw.close()
                raise
        return raw

    def index(self, name: str) -> int:
        """The interface's index in this namespace."""
        with self.entered():
            return socket.if_nametoindex(name)

    def names(self) -> set[str]:
        """Every interface inside."""
        with self.entered():
            return {name for _, name in socket.if_nameindex()}

    def set_link(self, name: str, **attributes: Any) -> None:
        """Change a link: state="down", mtu=1400, … as pyroute2 names it."""
        with self.entered(), IPRoute(groups=0) as route:
            route.link("set", index=socket.if_nametoindex(name), **attributes)

    def delete_link(self, name: str) -> None:
        """Delete a link, and with it a veth's peer; no error when it is gone."""
        with self.entered(), contextlib.suppress(OSError), IPRoute(groups=0) as route:
            route.link("del", index=socket.if_nametoindex(name))

    def close(self) -> None:
        """Let go. The kernel removes it, and every link in it, when its last process has ended."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def die_with_parent() -> None:
    """For preexec_fn: SIGKILL when the thread that forked ends, however it ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Veth:
    """One end of a pair."""

    namespace: Namespace
    name: str
    index: int
    mac: bytes
    address: str | None = None

    def wait_until_running(self) -> None:
        """Until the kernel's link watch has noticed the carrier: before that an end silently drops what it sends."""
        deadline = time.monotonic() + 5 * SLOWNESS
        with self.namespace.entered(), IPRoute(groups=0) as route:
            # Not IFF_RUNNING, which is set in the unknown state too.
            while next(iter(route.get_links(self.index))).get("operstate") != "UP":
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.name} has no carrier")
                os.sched_yield()


def veth_pair(
    near: Namespace,
    far: Namespace,
    names: tuple[str, str] = ("near", "far"),
    *,
    addresses: tuple[str | None, str | None] | None = None,
    mtu: int = 1500,
    queues: int = 1,
) -> tuple[Veth, Veth]:
    """A veth pair between two namespaces, up, silent (no IPv6 of its own), and with addresses like "10.1.0.1/24"."""
    peer = {"ifname": names[1], "net_ns_fd": far.descriptor, "mtu": mtu}
    extra = {"num_tx_queues": queues, "num_rx_queues": queues}
    with near.entered(), IPRoute(groups=0) as route:
        route.link("add", ifname=names[0], kind="veth", mtu=mtu, peer={**peer, **extra}, **extra)
    ends = []
    for space, name, address in zip((near, far), names, addresses or (None, None), strict=True):
        with space.entered(), IPRoute(groups=0) as route:
            index = socket.if_nametoindex(name)
            if address is None or ":" not in address:
                Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
            else:
                Path(f"/proc/sys/net/ipv6/conf/{name}/accept_dad").write_text("0")
            if address is not None:
                bare, _, bits = address.partition("/")
                route.addr("add", index=index, address=bare, prefixlen=int(bits))
            route.link("set", index=index, state="up")
            mac = bytes.fromhex(next(iter(route.get_links(index))).get("address").replace(":", ""))
        ends.append(Veth(space, name, index, mac, address))
    for end in ends:
        end.wait_until_running()
    return ends[0], ends[1]


def without_offloads(end: Veth) -> None:
    """Make a veth end send what a wire would carry: finished checksums, no segments larger than its MTU."""
    with end.namespace.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        # ethtool's "set value" commands (linux/ethtool.h): STXCSUM, STSO, SGSO, SGRO
        for command in (0x17, 0x1F, 0x24, 0x2C):
            value = ctypes.create_string_buffer(struct.pack("=II", command, 0))
            request = struct.pack("=16sQ8x", end.name.encode(), ctypes.addressof(value))
            try:
                fcntl.ioctl(control, 0x8946, request)  # SIOCETHTOOL
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
