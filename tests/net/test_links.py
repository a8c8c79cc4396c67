"""Links and filters: what is made is ready, marked, and gone when it is removed."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types

from tests.descriptors import open_descriptors
from tests.net.netns import Namespace, Veth, veth_pair
from tests.net.tiny_bpf import (
    ARRAY,
    EXIT,
    LOOKUP,
    SCHED_CLS,
    XDP,
    XDP_PASS,
    XSKMAP,
    Insn,
    add,
    attach_xdp,
    call,
    create_map,
    entry,
    jump_if_zero,
    load,
    load_map,
    load_program,
    mov,
    mov_reg,
    redirect_to_xsk,
    set_entry,
    store,
)
from xdp import links
from xdp.interfaces import (
    interface,
    interfaces,
)
from xdp.links import (
    GROUP,
    MIRROR_MTU,
    Owner,
    add_ingress_filter,
    clean,
    create_mirror,
    ingress_filter,
    mirror_link,
)
from xdp.xsk import Xsk

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces and links")
PATIENCE_MS = 5000
UNSPEC = -1
CLONE_REDIRECT = 13


@pytest.fixture
def space() -> Iterator[Namespace]:
    """A namespace that the test is in."""
    with Namespace() as made, made.entered():
        yield made


@pytest.fixture
def pair(space: Namespace) -> tuple[Veth, Veth]:
    """A "NIC" in the test's namespace, and what it is plugged into."""
    return veth_pair(space, space, ("nic", "wire"))


@pytest.fixture
def program() -> Iterator[int]:
    with load_program(SCHED_CLS, mov(0, UNSPEC), EXIT) as fd:
        yield fd


def link_of(name: str) -> dict[str, object]:
    with IPRoute(groups=0) as route:
        (link,) = route.get_links(ifname=name)
        fields = ("mtu", "group", "ifalias", "operstate", "num_rx_queues", "num_tx_queues")
        return {field: link.get(field) for field in fields}


def names() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def qdiscs(index: int) -> list[str]:
    with IPRoute(groups=0) as route:
        return [qdisc.get("kind") for qdisc in route.get_qdiscs(index=index)]


# ── the veth pair ──


@needs_root
def test_a_mirror_is_up_marked_silent_and_has_one_queue(space: Namespace) -> None:
    mirror = create_mirror()
    for name, index in ((mirror.near, mirror.near_index), (mirror.far, mirror.far_index)):
        assert len(name) <= 15
        assert socket.if_nametoindex(name) == index
        assert link_of(name) == {
            "mtu": MIRROR_MTU,
            "group": GROUP,
            "ifalias": str(Owner.this_process()),
            "operstate": "UP",
            "num_rx_queues": 1,
            "num_tx_queues": 1,
        }
        assert Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").read_text() == "1\n"
        with IPRoute(groups=0) as route:
            assert list(route.get_addr(index=index)) == []
    mirror.delete()
    mirror.delete()
    assert names() == {"lo"}


@needs_root
def test_a_mirror_carries_the_first_frame_that_is_sent_and_no_other(space: Namespace) -> None:
    for number in range(10):
        with mirror_link() as mirror, space.raw_socket(mirror.far) as far, space.raw_socket(mirror.near) as near:
            frame = b"\2\0\0\0\0\1\2\0\0\0\0\2\x88\xb5" + bytes([number]) * MIRROR_MTU
            near.send(frame)
            assert far.recv(65536) == frame
            far.setblocking(False)
            with pytest.raises(BlockingIOError):
                far.recv(65536)
    assert names() == {"lo"}


@needs_root
def test_native_xdp_takes_the_mirror_at_its_mtu_and_not_a_little_more(space: Namespace) -> None:
    with load_program(XDP, mov(0, XDP_PASS), EXIT) as fd:
        with mirror_link() as mirror, attach_xdp(fd, mirror.far_index):
            assert [attached.mode for attached in interface(mirror.far).xdp] == ["native"]
        with (
            mirror_link(MIRROR_MTU + 16) as mirror,
            pytest.raises(OSError, match=os.strerror(errno.ERANGE)),
            attach_xdp(fd, mirror.far_index),
        ):
            pass


@needs_root
def test_a_process_can_have_several_mirrors(space: Namespace) -> None:
    with mirror_link() as first, mirror_link() as second:
        assert names() == {"lo", first.near, first.far, second.near, second.far}


@needs_root
def test_a_mirror_that_does_not_come_up_is_taken_back(space: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "RUNNING_TIMEOUT_S", 0.05)
    monkeypatch.setattr(links, "_operstate", lambda *_: "DOWN")
    with pytest.raises(TimeoutError, match="no carrier"):
        create_mirror()
    assert names() == {"lo"}


@needs_root
def test_links_are_made_and_removed_without_a_thread_or_a_descriptor_left(
    pair: tuple[Veth, Veth], program: int
) -> None:
    descriptors, threads = open_descriptors(), threading.active_count()
    tasks = len(os.listdir("/proc/self/task"))  # those of libraries too: another test's ZMQ has some
    with mirror_link(), ingress_filter(pair[0].index, program):
        interfaces()
        clean()
        assert threading.active_count() <= threads
        assert len(os.listdir("/proc/self/task")) <= tasks
    assert open_descriptors() == descriptors


@needs_root
def test_inside_a_running_event_loop_links_are_refused_not_stuck(space: Namespace) -> None:
    async def inside() -> None:
        interfaces()

    with pytest.raises(RuntimeError, match="loop"):
        asyncio.run(inside())


# ── the filter ──


def counting(counters: int, verdict: int = UNSPEC) -> list[Insn]:
    return [
        Insn(0x62, 10, 0, -4, 0),
        mov_reg(2, 10),
        add(2, -4),
        *load_map(1, counters),
        call(LOOKUP),
        jump_if_zero(0, 3),
        load(8, 1, 0, 0),
        add(1, 1),
        store(8, 0, 0, 1),
        mov(0, verdict),
        EXIT,
    ]


def send_and_receive(pair: tuple[Veth, Veth], count: int = 5) -> None:
    """Frames from the wire to the NIC, all of which must arrive."""
    nic, wire = pair
    with nic.namespace.raw_socket(nic.name) as inside, wire.namespace.raw_socket(wire.name) as outside:
        for number in range(count):
            frame = nic.mac + wire.mac + b"\x88\xb5" + bytes([number]) * 46
            outside.send(frame)
            assert inside.recv(2048) == frame


@needs_root
def test_a_filter_sees_what_comes_in_until_it_is_removed_and_takes_its_qdisc_along(pair: tuple[Veth, Veth]) -> None:
    nic = pair[0]
    with create_map(ARRAY, 4, 8, 1) as counters, load_program(SCHED_CLS, counting(counters)) as fd:
        with ingress_filter(nic.index, fd) as added:
            assert "clsact" in qdiscs(nic.index)
            send_and_receive(pair)
            assert entry(counters, 0, 8) == 5
        send_and_receive(pair)
        assert entry(counters, 0, 8) == 5
        assert "clsact" not in qdiscs(nic.index)
        added.remove()


@needs_root
@pytest.mark.parametrize("priority", [1, 2, 49152])
def test_other_peoples_filters_and_qdisc_stay_and_work_beside_ours(pair: tuple[Veth, Veth], priority: int) -> None:
    nic = pair[0]
    with (
        create_map(ARRAY, 4, 8, 1) as theirs,
        create_map(ARRAY, 4, 8, 1) as mine,
        load_program(SCHED_CLS, counting(theirs)) as their_program,
        load_program(SCHED_CLS, counting(mine)) as my_program,
    ):
        with IPRoute(groups=0) as route:
            route.tc("add", "clsact", index=nic.index)
            where = {"index": nic.index, "parent": 0xFFFFFFF2, "prio": priority, "direct_action": True}
            route.tc("add-filter", "bpf", fd=their_program, name="theirs", **where)
        with ingress_filter(nic.index, my_program):
            send_and_receive(pair)
            assert (entry(theirs, 0, 8), entry(mine, 0, 8)) == (5, 5)
        send_and_receive(pair)
        assert (entry(theirs, 0, 8), entry(mine, 0, 8)) == (10, 5)
        assert "clsact" in qdiscs(nic.index)


@needs_root
def test_a_qdisc_that_somebody_else_uses_by_now_stays(pair: tuple[Veth, Veth], program: int) -> None:
    nic = pair[0]
    with ingress_filter(nic.index, program), IPRoute(groups=0) as route:
        route.tc("add-filter", "bpf", index=nic.index, fd=program, name="egress", parent=0xFFFFFFF3, direct_action=True)
    assert "clsact" in qdiscs(nic.index)


@needs_root
def test_a_filter_whose_interface_is_gone_is_removed_without_an_error(pair: tuple[Veth, Veth], program: int) -> None:
    added = add_ingress_filter(pair[0].index, program)
    pair[0].namespace.delete_link("nic")
    added.remove()


@needs_root
def test_a_refused_filter_leaves_no_qdisc(pair: tuple[Veth, Veth]) -> None:
    with open("/dev/null") as file, pytest.raises(OSError, match="tc ingress of interface"):
        add_ingress_filter(pair[0].index, file.fileno())
    assert "clsact" not in qdiscs(pair[0].index)


@needs_root
def test_a_packet_is_cloned_across_the_mirror_into_an_af_xdp_socket_and_passes_untouched(
    pair: tuple[Veth, Veth],
) -> None:
    nic, wire = pair
    with mirror_link() as mirror, create_map(XSKMAP, 4, 4, 1) as xsks:
        clone = [mov(2, mirror.near_index), mov(3, 0), call(CLONE_REDIRECT), mov(0, UNSPEC), EXIT]
        with (
            load_program(XDP, redirect_to_xsk(xsks)) as to_xsk,
            attach_xdp(to_xsk, mirror.far_index),
            Xsk(mirror.far_index) as xsk,
            load_program(SCHED_CLS, clone) as cloner,
            ingress_filter(nic.index, cloner),
            nic.namespace.raw_socket(nic.name) as inside,
            wire.namespace.raw_socket(wire.name) as outside,
        ):
            set_entry(xsks, 0, xsk.fileno())
            poll = select.poll()
            poll.register(xsk, select.POLLIN)
            for number in range(200):
                frame = nic.mac + wire.mac + b"\x88\xb5" + bytes([number]) * (46 + number * 7)
                outside.send(frame)
                assert inside.recv(2048) == frame
                assert poll.poll(PATIENCE_MS)
                assert [bytes(view) for view in xsk.peek()] == [frame]
                xsk.release()
