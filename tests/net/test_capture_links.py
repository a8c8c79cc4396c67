"""Capture over IPv6, over VLANs on the captured interface, and over a wire that loses, doubles and reorders."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import random
import socket
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types
from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]  # likewise

from tests.net import tiny_bpf
from tests.net.announcer import Script, announce_all, cut, mine_chain, small_talk
from tests.net.conftest import REGTEST_PORT
from tests.net.forwarder import BUFFER_BYTES, SO_RCVBUFFORCE, Policy, bad_wire
from tests.net.netns import Namespace, Veth, veth_pair
from tests.net.overhearing import Overhearing, as_the_product_has_it, overhearing
from xdp import kernel
from xdp.attachment import Mode, attach
from xdp.segments import Backend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xdp.loader import Loaded

BLOCKS = 300
BURST = 20
VLAN = 7
SOL_PACKET, PACKET_AUXDATA = 263, 8


@pytest.fixture
def spaces(loaded: Loaded) -> Iterator[tuple[Namespace, Namespace]]:
    """That of the captured interface, which the test is in, and its peers'."""
    as_the_product_has_it(loaded)
    with Namespace() as near, Namespace() as far, near.entered():
        yield near, far


def script_of(ours: str, theirs: str, seed: int, *, finely: bool = True) -> Script:
    """Two peers, one that was connected to and one that connects."""
    chance = random.Random(seed)
    script = Script(1, 1, (theirs, REGTEST_PORT), (ours, REGTEST_PORT))
    blocks = mine_chain(BLOCKS)
    streams = [list(announce_all(blocks, chance)) for _ in range(2)]
    while any(streams):
        for number, messages in enumerate(streams):
            stream = b"".join(one + small_talk(chance) for one in messages[:BURST])
            streams[number] = messages[BURST:]
            script.bursts.append([(number, piece) for piece in cut(stream, chance, finely=finely)])
    return script


def hear_everything(
    loaded: Loaded, spaces: tuple[Namespace, Namespace], folder: Path, script: Script, mode: Mode = "native"
) -> Overhearing:
    """Play it, with the capture on `nic`; both backends have heard every announcement when this returns."""
    with (
        attach(loaded, "nic", modes=(mode,)) as attachment,
        overhearing(script, *spaces, folder) as ears,
        ears.capturing(attachment.handover()),
    ):
        for burst in range(len(script.bursts)):
            ears.play(burst)
        ears.overhear_all(Backend)
        told = ears.told()
        assert [len(said) for said in told] == [BLOCKS, BLOCKS]
        everything = Counter(told[0] + told[1])
        for backend in Backend:
            assert Counter(ears.heard(backend)) == everything, backend.name
    return ears


@pytest.mark.parametrize("mode", ["native", "generic", "tc"])
def test_announcements_over_ipv6_are_heard_by_both_backends(
    loaded: Loaded, spaces: tuple[Namespace, Namespace], tmp_path: Path, mode: Mode
) -> None:
    veth_pair(*spaces, ("nic", "wire"), addresses=("fd77::1/64", "fd77::2/64"))
    hear_everything(loaded, spaces, tmp_path, script_of("fd77::1", "fd77::2", 1), mode)


def add_vlan(parent: Veth, name: str, address: str) -> None:
    """A VLAN on a veth end, up, with that address. Raises NetlinkError where the kernel has no such links."""
    with parent.namespace.entered(), IPRoute(groups=0) as route:
        route.link("add", ifname=name, kind="vlan", link=parent.index, vlan_id=VLAN)
        index = socket.if_nametoindex(name)
        route.link("set", index=index, state="up")
        route.addr("add", index=index, address=address, prefixlen=_bits(address), **_usable_at_once(address))


def tag_instead(ends: tuple[Veth, Veth], addresses: tuple[str, str], stack: contextlib.ExitStack) -> None:
    """The same for the wire without VLAN links: the peers' end puts tags on, ours takes them off behind the capture.

    Stays until the stack ends. Raises OSError where the kernel has no TCX.
    """
    ethertype, go_on = int.from_bytes(struct.pack("!H", 0x8100), sys.byteorder), tiny_bpf.mov(0, -1)
    vlan_push, vlan_pop, tcx_ingress, tcx_egress = 18, 19, 46, 47
    push = (tiny_bpf.mov(2, ethertype), tiny_bpf.mov(3, VLAN), tiny_bpf.call(vlan_push), go_on, tiny_bpf.EXIT)
    pop = (tiny_bpf.call(vlan_pop), go_on, tiny_bpf.EXIT)
    for end, address, code, where in zip(ends, addresses, (pop, push), (tcx_ingress, tcx_egress), strict=True):
        program = stack.enter_context(tiny_bpf.load_program(tiny_bpf.SCHED_CLS, *code))
        with end.namespace.entered(), IPRoute(groups=0) as route:
            if ":" in address:
                Path(f"/proc/sys/net/ipv6/conf/{end.name}/disable_ipv6").write_text("0")
            route.addr("add", index=end.index, address=address, prefixlen=_bits(address), **_usable_at_once(address))
            stack.callback(os.close, kernel.link_create(program, end.index, where))


def _bits(address: str) -> int:
    return 64 if ":" in address else 24


def _usable_at_once(address: str) -> dict[str, int]:
    return {"flags": 0x02} if ":" in address else {}  # IFA_F_NODAD


def without_vlan_offload(end: Veth) -> None:
    """Have tags written into the frames, as a wire carries them; a veth hands them over beside, by default."""
    set_flags = 0x26  # ETHTOOL_SFLAGS (linux/ethtool.h); among the flags are TXVLAN and RXVLAN
    with end.namespace.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        value = ctypes.create_string_buffer(struct.pack("=II", set_flags, 0))
        request = struct.pack("=16sQ8x", end.name.encode(), ctypes.addressof(value))
        fcntl.ioctl(control, 0x8946, request)  # SIOCETHTOOL


@pytest.mark.parametrize("tag", ["in the frame", "beside it"])
@pytest.mark.parametrize("addresses", [("10.78.0.1", "10.78.0.2"), ("fd78::1", "fd78::2")])
@pytest.mark.parametrize("mode", ["native", "generic", "tc"])
def test_announcements_over_a_vlan_are_heard_on_its_parent_by_both_backends(
    loaded: Loaded,
    spaces: tuple[Namespace, Namespace],
    tmp_path: Path,
    mode: Mode,
    addresses: tuple[str, str],
    tag: str,
) -> None:
    ends = veth_pair(*spaces, ("nic", "wire"))
    if tag == "in the frame":
        for end in ends:
            without_vlan_offload(end)
    with contextlib.ExitStack() as stack:
        try:
            for end, address in zip(ends, addresses, strict=True):
                add_vlan(end, f"{end.name}.{VLAN}", address)
        except NetlinkError as error:
            if error.code != errno.EOPNOTSUPP:
                raise
            try:
                tag_instead(ends, addresses, stack)
            except OSError:
                pytest.skip("neither VLAN links nor TCX")
        seen = stack.enter_context(ends[0].namespace.raw_socket("nic"))
        seen.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        seen.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)  # nobody reads until all has passed
        hear_everything(loaded, spaces, tmp_path, script_of(*addresses, 2), mode)
        assert tagged(seen) > 2 * BLOCKS // BURST


def tagged(raw: socket.socket) -> int:
    """Frames so far that carry our tag: the kernel shows it beside, wherever it was (struct tpacket_auxdata)."""
    raw.setblocking(False)
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            _, ancillary, _, _ = raw.recvmsg(64, 128)
            count += any(
                (level, kind) == (SOL_PACKET, PACKET_AUXDATA) and struct.unpack_from("=H", data, 16)[0] == VLAN
                for level, kind, data in ancillary
            )
    return count


@pytest.mark.parametrize("crumbs", [False, True])
def test_through_loss_repetition_and_disorder_nothing_false_and_nothing_twice_is_told(
    loaded: Loaded, spaces: tuple[Namespace, Namespace], tmp_path: Path, *, crumbs: bool
) -> None:
    policy = Policy(loss=0.05, duplicate=0.05, reorder=0.1, seed=3)
    addresses = ("10.79.0.1", "10.79.0.2")
    script = script_of(*addresses, 3, finely=crumbs)
    ends = (f"{addresses[0]}/24", f"{addresses[1]}/24")
    with bad_wire(*spaces, policy, addresses=ends, names=("nic", "far")) as bad:
        with (
            attach(loaded, "nic") as attachment,
            overhearing(script, *spaces, tmp_path) as ears,
            ears.capturing(attachment.handover()),
        ):
            for burst in range(len(script.bursts)):
                ears.play(burst)
            ears.overhear_all(Backend, patience_s=0.5)
            told = ears.told()
        counts = bad.stop()
    assert [len(said) for said in told] == [BLOCKS, BLOCKS]
    assert min(counts.lost, counts.duplicated, counts.held) >= 5
    everything = Counter(told[0] + told[1])
    for backend in Backend:
        heard = Counter(ears.heard(backend))
        assert heard - everything == Counter(), "told twice, or never said"
        # Each segment came at last. Where all are crumbs, a window of reordering may be more than is kept of a flow.
        if not crumbs:
            assert heard == everything
        assert sum(heard.values()) > 0.97 * sum(everything.values())
