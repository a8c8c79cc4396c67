"""The ladder on a virtio NIC, a real driver's: only in the throw-away machine of `./run vm`, where it leads nowhere."""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest
from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types

from tests.net.netns import Namespace, veth_pair
from tests.net.slowness import SLOWNESS
from xdp.attachment import attach
from xdp.capture import Capture
from xdp.interfaces import interface
from xdp.links import leftovers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xdp.attachment import Attachment, Mode
    from xdp.loader import Loaded

NIC = os.environ.get("SPRINT_TEST_NIC", "")
pytestmark = pytest.mark.skipif(not NIC, reason="needs a NIC that nobody else uses, in SPRINT_TEST_NIC: see ./run vm")

ETH_P_ARP = 0x0806
OURS, GATEWAY = socket.inet_aton("10.0.2.15"), socket.inet_aton("10.0.2.2")
"""Of qemu's user network, whose gateway answers ARP."""
TOO_LARGE_MTU = 9_000  # for a program without fragments on pages of 4 KiB
PATIENCE_S = 5 * SLOWNESS


def set_link(**attributes: object) -> None:
    with IPRoute(groups=0) as route:
        route.link("set", index=socket.if_nametoindex(NIC), **attributes)


@pytest.fixture
def nic() -> Iterator[str]:
    """Its name; up, and left with the MTU it had."""
    mtu = interface(NIC).mtu
    set_link(state="up")
    yield NIC
    set_link(mtu=mtu)


def ask_the_gateway() -> None:
    """One ARP request and its answer, which the driver hands to XDP before we see it."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ARP)) as raw:
        raw.bind((NIC, ETH_P_ARP))
        raw.settimeout(PATIENCE_S)
        mac = bytes.fromhex(interface(NIC).mac.replace(":", ""))
        head = struct.pack("!6s6sH", b"\xff" * 6, mac, ETH_P_ARP)
        request = struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, mac, OURS, bytes(6), GATEWAY)
        raw.send(head + request)
        while True:
            frame = raw.recv(2048)
            if frame[20:22] == b"\0\x02" and frame[28:32] == GATEWAY:
                return


def rung(attachment: Attachment) -> str:
    """For the table of `./run vm`."""
    return attachment.mode if attachment.reason is None else f"{attachment.mode} ({attachment.reason})"


def test_a_veth_pair_gets_native_xdp_too(loaded: Loaded, record_property: Callable[[str, object], None]) -> None:
    with Namespace() as near, Namespace() as far, near.entered():
        veth_pair(near, far)
        with attach(loaded, "near") as attachment:
            record_property("veth", rung(attachment))
            assert (attachment.mode, attachment.reason) == ("native", None)


def test_the_driver_is_virtio_s(nic: str) -> None:
    assert interface(nic).driver == "virtio_net"


def test_it_gets_native_xdp_proven_by_the_self_test_and_its_driver_calls_the_program(
    loaded: Loaded, nic: str, record_property: Callable[[str, object], None]
) -> None:
    with attach(loaded, nic) as attachment, Capture(attachment.handover()):
        record_property("virtio_net", rung(attachment))
        assert (attachment.mode, attachment.reason) == ("native", None)
        assert [attached.mode for attached in interface(nic).xdp] == ["native"]
        before = attachment.counters()["packets"]
        ask_the_gateway()
        assert attachment.counters()["packets"] > before
    assert not interface(nic).xdp
    assert not leftovers()


@pytest.mark.parametrize("mode", ["generic", "tc"])
def test_each_lower_rung_is_proven_too_and_sees_what_the_driver_receives(loaded: Loaded, nic: str, mode: Mode) -> None:
    with attach(loaded, nic, modes=(mode,)) as attachment:
        assert attachment.mode == mode
        before = attachment.counters()["packets"]
        ask_the_gateway()
        assert attachment.counters()["packets"] > before


def test_with_an_mtu_that_native_xdp_can_t_take_it_gets_generic_xdp_and_the_reason(
    loaded: Loaded, nic: str, record_property: Callable[[str, object], None]
) -> None:
    set_link(mtu=TOO_LARGE_MTU)
    with attach(loaded, nic) as attachment:
        record_property("too_large_mtu", rung(attachment))
        assert attachment.mode == "generic"
        assert attachment.reason is not None
        assert attachment.reason.startswith("native: ")
    assert not interface(nic).xdp
