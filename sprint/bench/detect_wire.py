"""The wire of `bench detect`: a veth pair between the namespaces of its two processes, and gone with them."""

from __future__ import annotations

import ctypes
import os

from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types

from sprint.errors import HostError

NEAR, FAR = "near", "far"
NEAR_ADDRESS, FAR_ADDRESS, LOSSY_ADDRESS = "198.18.0.1", "198.18.0.2", "198.18.1.2"
"""Of the network for benchmarks (RFC 2544). Names and addresses are nobody else's business in namespaces of our own."""
_CLONE_NEWNET = 0x4000_0000


def enter_namespace() -> None:
    """Put this process into a network namespace of its own, its loopback up. Raises HostError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        raise HostError(f"no network namespace: {os.strerror(ctypes.get_errno())}")
    with IPRoute() as route:
        route.link("set", index=1, state="up")


def lay(far_pid: int) -> bytes:
    """Make the pair, its far end in that process's namespace; returns the near end's MAC. Raises HostError."""
    try:
        with IPRoute() as route:
            route.link("add", ifname=NEAR, kind="veth", peer={"ifname": FAR, "net_ns_pid": far_pid})
        bring_up(NEAR, NEAR_ADDRESS)
        with IPRoute() as route:
            index = route.link_lookup(ifname=NEAR)[0]
            route.route("add", dst=f"{LOSSY_ADDRESS}/32", gateway=FAR_ADDRESS, oif=index)
            mac: str = route.get_links(index)[0].get_attr("IFLA_ADDRESS")
            return bytes.fromhex(mac.replace(":", ""))
    except Exception as error:  # pyroute2 has errors of its own
        raise HostError(f"no veth pair: {error}") from None


def bring_up(name: str, address: str) -> None:
    """Give an end in this process's namespace its address."""
    with IPRoute() as route:
        index = route.link_lookup(ifname=name)[0]
        route.addr("add", index=index, address=address, prefixlen=30)
        route.link("set", index=index, state="up")
