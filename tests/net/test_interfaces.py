"""Facts of interfaces that the test made, and news of them."""

from __future__ import annotations

import os
import select
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types

from tests.net.netns import Namespace, Veth, veth_pair
from tests.net.tiny_bpf import (
    EXIT,
    XDP,
    XDP_PASS,
    attach_xdp,
    load_program,
    mov,
)
from xdp.interfaces import (
    Holder,
    LinkChange,
    LinkMonitor,
    LinkState,
    interface,
    interface_towards,
    interfaces,
    link_changes,
    program_holders,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces and links")
PATIENCE_MS = 5000
GENERIC = 2


@pytest.fixture
def space() -> Iterator[Namespace]:
    """A namespace that the test is in."""
    with Namespace() as made, made.entered():
        yield made


@pytest.fixture
def pair(space: Namespace) -> tuple[Veth, Veth]:
    """A "NIC" in the test's namespace, and what it is plugged into."""
    return veth_pair(space, space, ("nic", "wire"))


@needs_root
def test_facts_of_an_interface_are_those_it_was_made_with(space: Namespace) -> None:
    nic, wire = veth_pair(space, space, ("nic", "wire"), mtu=1400, queues=2)
    facts = interface("nic")
    assert facts == next(found for found in interfaces() if found.name == "nic")
    assert (facts.index, facts.kind, facts.driver, facts.mtu) == (nic.index, "veth", "veth", 1400)
    assert bytes.fromhex(facts.mac.replace(":", "")) == nic.mac
    assert (facts.up, facts.carrier, facts.loopback, facts.xdp) == (True, True, False, ())
    assert (facts.rx_queues, facts.tx_queues) == (2, 2)
    assert (facts.lro, facts.gro_hw) == (False, False)
    assert interface("lo").loopback
    wire.namespace.set_link("wire", state="down")
    assert interface("wire").up is False
    assert interface("nic").carrier is False


@needs_root
@pytest.mark.parametrize(("flag", "mode"), [(4, "native"), (GENERIC, "generic")])
def test_an_xdp_program_on_an_interface_is_told_with_its_mode_name_and_holder(
    pair: tuple[Veth, Veth], flag: int, mode: str
) -> None:
    with load_program(XDP, mov(0, XDP_PASS), EXIT) as fd, attach_xdp(fd, pair[0].index, flag) as link:
        (attached,) = interface("nic").xdp
        holder = Holder(os.getpid(), Path("/proc/self/comm").read_text().strip())
        assert (attached.mode, attached.program, attached.holders) == (mode, "tiny", (holder,))
        assert f"XDP program tiny (id {attached.program_id}, {mode}), held by " in str(attached)
        assert f"(pid {os.getpid()})" in str(attached)
        os.close(os.dup(link))
        assert program_holders(attached.program_id + 1_000_000) == ()
    assert interface("nic").xdp == ()


@needs_root
def test_the_interface_that_leads_to_an_address_is_found(space: Namespace) -> None:
    veth_pair(space, space, ("four", "x4"), addresses=("10.9.0.1/24", "10.8.0.1/24"))
    veth_pair(space, space, ("six", "x6"), addresses=("fd00:9::1/64", "fd00:8::1/64"))
    assert interface_towards("10.9.0.77") == "four"
    assert interface_towards("fd00:9::77") == "six"
    assert interface_towards("127.0.0.1") == "lo"
    with pytest.raises(OSError, match=r"route to 192\.0\.2\.1"):
        interface_towards("192.0.2.1")


def test_an_interface_that_is_not_there_is_an_error_that_names_it() -> None:
    with pytest.raises(OSError, match="interface nonesuch0: No such device"):
        interface("nonesuch0")


# ── news ──


def await_news(monitor: LinkMonitor, wanted: LinkChange) -> None:
    poll = select.poll()
    poll.register(monitor, select.POLLIN)
    while poll.poll(PATIENCE_MS):
        if wanted in monitor.poll():
            return
    raise AssertionError(f"no {wanted}")


@needs_root
def test_news_tells_of_going_down_coming_up_and_being_deleted(pair: tuple[Veth, Veth]) -> None:
    nic, wire = pair
    with LinkMonitor() as monitor:
        assert monitor.poll() == []
        for state, wanted in (("down", LinkState.DOWN), ("up", LinkState.UP)):
            wire.namespace.set_link("wire", state=state)
            await_news(monitor, LinkChange(wanted, nic.index, "nic"))
        nic.namespace.delete_link("nic")
        await_news(monitor, LinkChange(LinkState.GONE, nic.index, "nic"))


@needs_root
def test_a_port_that_leaves_a_bridge_is_not_gone(pair: tuple[Veth, Veth]) -> None:
    nic, _ = pair
    with IPRoute(groups=0) as route:
        route.link("add", ifname="br", kind="bridge")
        route.link("set", index=nic.index, master=socket.if_nametoindex("br"))
        with LinkMonitor() as monitor:
            route.link("set", index=nic.index, master=0)
            nic.namespace.set_link("nic", mtu=1300)
            changes = monitor.poll()
            assert {change.state for change in changes if change.index == nic.index} == {LinkState.UP}


@needs_root
def test_lost_news_is_told(pair: tuple[Veth, Veth]) -> None:
    with LinkMonitor() as monitor:
        monitor._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        with IPRoute(groups=0) as route:
            for n in range(100):
                route.link("set", index=pair[0].index, mtu=1300 + n)
        changes = []
        while news := monitor.poll():
            changes += news
        assert LinkChange(LinkState.MISSED) in changes


@given(st.binary(max_size=200))
def test_random_bytes_are_no_news_and_no_error(raw: bytes) -> None:
    list(link_changes(raw))


@given(st.data())
def test_a_datagram_that_is_cut_short_gives_what_is_whole(data: st.DataObject) -> None:
    def message(name: str, index: int) -> bytes:
        attribute = struct.pack("=HH", 4 + len(name) + 1, 3) + name.encode() + b"\0"
        attribute += bytes(-len(attribute) % 4)
        return (
            struct.pack("=IHHII", 32 + len(attribute), 16, 0, 0, 0)
            + struct.pack("=BxHiII", 0, 1, index, 1, 0)
            + attribute
        )

    first, second = message("eth0", 2), message("wlan12", 3)
    cut = data.draw(st.integers(0, len(first + second)))
    whole = [LinkChange(LinkState.DOWN, 2, "eth0"), LinkChange(LinkState.DOWN, 3, "wlan12")]
    complete = (cut >= len(first)) + (cut == len(first + second))
    assert list(link_changes((first + second)[:cut])) == whole[:complete]
