"""Links, filters and interfaces: what is made is marked, what is orphaned is removed, and nothing else is touched."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import socket
import struct
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types

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
from xdp.links import (
    GROUP,
    MIRROR_MTU,
    Owner,
    OwnerState,
    add_ingress_filter,
    clean,
    create_mirror,
    ingress_filter,
    leftovers,
    mirror_link,
    ours,
)
from xdp.xsk import Xsk

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces and links")
PATIENCE_MS = 5000
GENERIC = 2
UNSPEC = -1
CLONE_REDIRECT = 13
ROOT = Path(__file__).resolve().parents[2]


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


def dead_owner() -> Owner:
    """A process that has been, in this pid namespace."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return Owner(child, 1, Owner.this_process().pid_namespace)


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
    descriptors = sorted(os.listdir("/proc/self/fd"))
    with mirror_link(), ingress_filter(pair[0].index, program):
        interfaces()
        clean()
        assert threading.active_count() == 1
        assert len(os.listdir("/proc/self/task")) == 1
    assert sorted(os.listdir("/proc/self/fd")) == descriptors


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


# ── what a killed run left ──

KILLED = """
import os, sys
from xdp.links import create_mirror, add_ingress_filter
from tests.net.tiny_bpf import EXIT, SCHED_CLS, load_program, mov
mirror = create_mirror()
with load_program(SCHED_CLS, mov(0, -1), EXIT) as program:
    add_ingress_filter(int(sys.argv[1]), program)
print(mirror.near, flush=True)
sys.stdin.read()
"""


@needs_root
def test_what_a_killed_process_left_is_found_and_removed_and_nothing_while_it_lived(pair: tuple[Veth, Veth]) -> None:
    nic = pair[0]
    options = {"stdin": -1, "stdout": -1, "cwd": ROOT, "text": True}
    process = nic.namespace.start([sys.executable, "-c", KILLED, str(nic.index)], **options)
    with process, mirror_link() as living:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert leftovers() == []
        assert clean() == []
        assert {entry.name for entry in ours()} == {"nic", name, living.near}
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = leftovers()
        assert {(entry.name, entry.filter is not None) for entry in found} == {("nic", True), (name, False)}
        assert all(f"pid={process.pid}" in str(entry) for entry in found)
        assert clean() == found
        assert clean() == []
        assert names() == {"lo", "nic", "wire", living.near, living.far}
        assert "clsact" not in qdiscs(nic.index)


@needs_root
def test_a_zombie_counts_as_dead(space: Namespace) -> None:
    child = os.fork()
    if child == 0:
        create_mirror()
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    try:
        assert len(clean()) == 1
    finally:
        os.waitpid(child, 0)


def like_ours(space: Namespace, name: str, peer: str, **attributes: object) -> None:
    with IPRoute(groups=0) as route:
        alias = attributes.pop("ifalias", None)
        both = {"kind": "veth", **attributes}
        route.link("add", ifname=name, peer={"ifname": peer, **attributes}, **both)
        if alias:
            route.link("set", ifname=name, index=socket.if_nametoindex(name), ifalias=alias)


@needs_root
@pytest.mark.parametrize(
    ("name", "peer", "group", "alias"),
    [
        ("spr1a-0a", "spr1a-0b", 0, True),
        ("sprite0", "sprite1", GROUP, True),
        ("spr1a-0", "eth7", GROUP, True),
        ("sprzz-0a", "sprzz-0b", GROUP, True),
        ("veth1", "veth2", GROUP, True),
    ],
)
def test_what_only_looks_like_ours_is_never_touched(
    space: Namespace, name: str, peer: str, group: int, alias: bool
) -> None:
    like_ours(space, name, peer, group=group, ifalias=str(dead_owner()) if alias else None)
    assert ours() == []
    assert clean() == []
    assert names() == {"lo", name, peer}


@needs_root
def test_a_bridge_with_our_name_and_mark_is_never_touched(space: Namespace) -> None:
    with IPRoute(groups=0) as route:
        route.link("add", ifname="spr1a-0a", kind="bridge", group=GROUP)
    assert clean() == []
    assert names() == {"lo", "spr1a-0a"}


@needs_root
def test_an_owner_of_another_pid_namespace_is_not_judged(space: Namespace) -> None:
    dead = dead_owner()
    with mirror_link(owner=Owner(dead.pid, dead.started, dead.pid_namespace + 1)):
        (entry_,) = ours()
        assert entry_.state is OwnerState.UNKNOWN
        assert clean() == []
        assert len(names()) == 3


@needs_root
def test_a_later_process_of_the_same_pid_is_another_owner(space: Namespace) -> None:
    this = Owner.this_process()
    assert this.state is OwnerState.ALIVE
    with mirror_link(owner=Owner(this.pid, this.started - 1, this.pid_namespace)) as mirror:
        assert [entry_.name for entry_ in clean()] == [mirror.near]


@needs_root
def test_a_pair_whose_maker_was_killed_before_it_could_be_marked_is_removed(space: Namespace) -> None:
    like_ours(space, f"spr{os.getpid():x}-0a", f"spr{os.getpid():x}-0b", group=GROUP)
    dead = dead_owner().pid
    like_ours(space, f"spr{dead:x}-0a", f"spr{dead:x}-0b", group=GROUP)
    assert [entry_.state for entry_ in ours()] == [OwnerState.UNKNOWN, OwnerState.DEAD]
    assert [entry_.name for entry_ in clean()] == [f"spr{dead:x}-0a"]


# ── facts ──


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
