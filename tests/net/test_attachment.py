"""Several interfaces on one outlet: each by itself, and none disturbed by what becomes of another."""

from __future__ import annotations

import os
import platform
import struct
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import pytest

from tests.net import packets, tiny_bpf
from tests.net.netns import Namespace, Veth, veth_pair
from tests.net.test_capture import BOTH, PATIENCE_S, collect, drain, forked, saw
from xdp import kernel, links
from xdp.attachment import AttachError, climb
from xdp.capture import Capture
from xdp.interfaces import interface, rtnetlink
from xdp.outlet import Outlet
from xdp.ringbuf import RingBuffer
from xdp.rings import RingCorruptError
from xdp.segments import Backend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xdp.loader import Loaded

LINK_DETACH = 34  # a bpf() command: what `bpftool link detach` does


@pytest.fixture
def near() -> Iterator[Namespace]:
    with Namespace() as space, space.entered():
        yield space


@pytest.fixture
def wires(loaded: Loaded, near: Namespace) -> Iterator[dict[str, Veth]]:
    """What alpha and beta, two "NICs" in the test's namespace, are plugged into."""
    drain(loaded)
    with Namespace() as far:
        yield {name: veth_pair(near, far, (name, f"{name}-wire"))[1] for name in ("alpha", "beta")}


@pytest.fixture
def outlet(loaded: Loaded, wires: dict[str, Veth]) -> Iterator[Outlet]:
    with Outlet(loaded) as made:
        yield made


def announce(wire: Veth, capture: Capture, backends: tuple[Backend, ...] = BOTH) -> None:
    """One announcement by a peer behind that wire, over a new connection, which these ways out have to bring."""
    body = b"\x01" + os.urandom(80) + b"\0"
    flow = packets.Wire(packets.ipv4() / packets.from_peer(dport=int.from_bytes(body[1:3], "big")))
    with closing(wire.namespace.raw_socket(wire.name)) as raw:
        raw.send(flow.send(packets.message("headers", body)))
    collect(capture, saw(body, *backends))


def test_what_comes_in_on_either_leaves_by_the_same_outlet(outlet: Outlet, wires: dict[str, Veth]) -> None:
    with climb(outlet, "alpha") as alpha, Capture(outlet.handover()) as capture, climb(outlet, "beta") as beta:
        assert (alpha.mode, beta.mode) == ("native", "native")
        assert (alpha.reason, beta.reason) == (None, None)
        for wire in wires.values():
            announce(wire, capture)
    assert [interface(name).xdp for name in wires] == [(), ()]


def test_each_has_its_own_rung(outlet: Outlet, wires: dict[str, Veth]) -> None:
    with (
        climb(outlet, "alpha", ("tc",)) as alpha,
        Capture(outlet.handover()) as capture,
        climb(outlet, "beta", ("generic", "tc")) as beta,
    ):
        assert (alpha.mode, beta.mode) == ("tc", "generic")
        for wire in wires.values():
            announce(wire, capture)


def test_one_that_cannot_be_attached_leaves_the_other_alone(outlet: Outlet, wires: dict[str, Veth]) -> None:
    with (
        climb(outlet, "alpha"),
        Capture(outlet.handover()) as capture,
        tiny_bpf.load_program(tiny_bpf.XDP, tiny_bpf.mov(0, tiny_bpf.XDP_PASS), tiny_bpf.EXIT) as program,
        tiny_bpf.attach_xdp(program, interface("beta").index),
    ):
        with pytest.raises(AttachError, match="beta has XDP program tiny"):
            climb(outlet, "beta")
        announce(wires["alpha"], capture)


def test_one_that_is_deleted_and_made_again_disturbs_no_reader(
    outlet: Outlet, wires: dict[str, Veth], near: Namespace
) -> None:
    with ExitStack() as stack:
        alpha, beta = (stack.enter_context(climb(outlet, name)) for name in wires)
        capture = stack.enter_context(Capture(outlet.handover()))
        near.delete_link("alpha")
        assert not alpha.intact()
        assert beta.intact()
        announce(wires["beta"], capture)
        alpha.close()
        again = veth_pair(near, wires["beta"].namespace, ("alpha", "alpha-wire"))[1]
        with climb(outlet, "alpha") as new:
            assert new.intact()
            announce(again, capture)
            announce(wires["beta"], capture)


def test_one_that_was_renamed_or_down_is_still_captured_and_proves_it(
    outlet: Outlet, wires: dict[str, Veth], near: Namespace
) -> None:
    with climb(outlet, "alpha") as alpha, Capture(outlet.handover()) as capture:
        near.set_link("alpha", state="down")
        near.set_link("alpha", ifname="gamma")
        near.set_link("gamma", state="up")
        Veth(near, "gamma", near.index("gamma"), b"").wait_until_running()
        assert alpha.intact()
        alpha.prove()
        wires["alpha"].wait_until_running()
        announce(wires["alpha"], capture)


def test_a_link_that_somebody_forces_off_is_noticed(outlet: Outlet, wires: dict[str, Veth]) -> None:
    with climb(outlet, "alpha") as alpha:
        kernel.bpf(LINK_DETACH, struct.pack("=I", alpha._links[-1]))  # the only one where tc has no links
        assert not alpha.intact()
        with pytest.raises(OSError, match="forced off"):
            alpha.prove()
    with climb(outlet, "alpha"):
        pass


@pytest.mark.parametrize("has_tcx", [True, False])
def test_of_a_killed_owner_of_two_nothing_stays_on_either_and_the_rest_is_cleaned(
    loaded: Loaded, wires: dict[str, Veth], monkeypatch: pytest.MonkeyPatch, has_tcx: bool, tcx: bool
) -> None:
    if has_tcx and not tcx:
        pytest.skip("no TCX before Linux 6.6")
    if not has_tcx:
        monkeypatch.setattr(kernel, "ATTACH_TCX_INGRESS", 0x7FFF)  # as a kernel before 6.6: EINVAL
    kept: list[object] = []

    def hold() -> None:
        outlet = Outlet(loaded)
        kept.extend((outlet, climb(outlet, "alpha"), outlet.handover(), climb(outlet, "beta")))

    with forked(hold):
        assert [len(interface(name).xdp) for name in wires] == [1, 1]
        assert links.leftovers() == []
    give_up = time.monotonic() + PATIENCE_S
    while any(interface(name).xdp for name in wires):  # the kernel takes them off a moment after the process
        assert time.monotonic() < give_up
    left = {entry.name for entry in links.leftovers() if entry.filter is not None}
    assert left == (set() if has_tcx else {"alpha", "beta"})
    assert len(links.clean()) == len(left) + 1
    assert links.ours() == []
    with Outlet(loaded) as outlet, climb(outlet, "alpha") as alpha, climb(outlet, "beta") as beta:
        assert (alpha.mode, beta.mode) == ("native", "native")


def test_a_mirror_that_was_switched_off_or_taken_away_is_noticed(outlet: Outlet, near: Namespace) -> None:
    assert outlet.mirror is not None
    assert outlet.intact()
    assert outlet.carries()
    near.set_link(outlet.mirror.near, state="down")
    assert outlet.intact()
    assert not outlet.carries()
    near.delete_link(outlet.mirror.near)
    assert not outlet.intact()
    assert not outlet.carries()
    outlet.close()
    assert links.ours() == []


def test_a_ring_buffer_that_is_written_over_during_the_self_test_is_a_reason_and_no_crash(
    outlet: Outlet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overrun(_ring: RingBuffer, _limit: int) -> list[memoryview]:
        raise RingCorruptError("a record ends behind the producer")

    monkeypatch.setattr(RingBuffer, "poll", overrun)
    with pytest.raises(AttachError, match="native: the ring buffer was overrun during the self-test"):
        climb(outlet, "alpha")
    assert interface("alpha").xdp == ()


def test_an_interface_without_ethernet_frames_is_refused(outlet: Outlet, near: Namespace) -> None:
    with rtnetlink("a tunnel") as route:
        route.link("add", ifname="point", kind="tuntap", mode="tun")
    assert not interface("point").ethernet
    with pytest.raises(AttachError, match="carries no Ethernet frames"):
        climb(outlet, "point")


def test_a_machine_whose_memory_order_the_rings_cannot_rely_on_is_a_reason_and_no_crash(
    outlet: Outlet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(AttachError, match="native: machine aarch64: rings shared with the kernel need x86-64"):
        climb(outlet, "alpha")
    assert interface("alpha").xdp == ()


def test_self_tests_while_only_the_mirror_is_in_use_do_not_fill_the_ring_buffer(
    loaded: Loaded, wires: dict[str, Veth]
) -> None:
    with (
        Outlet(loaded, {Backend.AF_XDP}) as outlet,
        climb(outlet, "alpha") as alpha,
        Capture(outlet.handover()) as capture,
    ):
        for _ in range(3):
            alpha.prove()
        announce(wires["alpha"], capture, (Backend.AF_XDP,))
        assert outlet.counters()["express"] == 4  # the self-tests', and no announcement
        with RingBuffer.open(loaded.maps["express"]) as ring:
            assert ring.poll() == []
