"""The ladder when what changes is passing: whoever stepped down for it is on the first rung again when it is over."""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
import time
from typing import TYPE_CHECKING

from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types

from tests.net.netns import Namespace, Veth, veth_pair
from tests.net.subscribers import SIOCETHTOOL, SOURCE_PORT, Cable, Collector, read, switch_gro, until
from tests.net.test_egress import PEOPLE, RECORD, all_join, change, egress, lan, relay, watch
from xdp import egress_frames
from xdp.datagrams import packed
from xdp.egress import Egress
from xdp.egress_frames import RETRY_NS
from xdp.fanout_maps import EGRESS, Rank, Sender, Step
from xdp.fanout_run import FIRST_PAUSE_NS, LAST_PAUSE_NS, SHORT_RUNS, FanoutRun
from xdp.transmit import Transmitter

if TYPE_CHECKING:
    import pytest

    from xdp.fanout import Fanout

__all__ = ("egress", "lan", "relay")  # fixtures


def test_datagrams_come_from_the_address_that_the_socket_is_bound_to(
    fanout: Fanout,
    relay: FanoutRun,
    lan: Cable,
) -> None:
    change("addr", "add", index=lan.near.index, address="10.62.0.2", prefixlen=24)
    ours = packed("10.62.0.2")
    with Egress(fanout.handover(), SOURCE_PORT, ours) as egress:
        steps = all_join(egress)
        for rung, send in ((Step.LIVE_FRAMES, relay.send), (Step.AF_XDP, egress.transmit)):
            switch_gro(lan.far, on=rung is Step.LIVE_FRAMES)
            watch(egress, steps, lambda rung=rung: set(steps.values()) == {rung})  # type: ignore[misc]  # bound now
            with Collector(lan.far) as collector:
                send(RECORD)
                assert sources(collector, len(PEOPLE)) == [ours] * len(PEOPLE)
        change("addr", "del", index=lan.near.index, address="10.62.0.2", prefixlen=24)
        watch(egress, steps, lambda: set(steps.values()) == {Step.SENDMMSG})  # nobody may send from there any more


def test_an_interface_that_was_elsewhere_and_is_back_under_its_number_takes_live_frames_again(
    launch: Namespace, relay: FanoutRun, egress: Egress, lan: Cable
) -> None:
    steps = all_join(egress)
    with Namespace() as elsewhere:  # the kernel strikes it off the DEVMAP
        launch.set_link("lan", net_ns_fd=elsewhere.descriptor)
        elsewhere.set_link("lan", net_ns_fd=launch.descriptor)
    assert launch.index("lan") == lan.near.index
    change("addr", "add", index=lan.near.index, address="10.62.0.1", prefixlen=24)
    launch.set_link("lan", state="up")
    lan.near.wait_until_running()
    steps.update(egress.poll())
    watch(egress, steps, lambda: set(steps.values()) == {Step.LIVE_FRAMES})
    assert relay.send(RECORD).transmitted == len(PEOPLE)


def test_who_found_the_table_full_for_a_moment_is_served_by_live_frames_afterwards(
    fanout: Fanout, egress: Egress, lan: Cable
) -> None:
    all_join(egress)
    for number in range(len(PEOPLE)):
        egress.leave(number)
    with FanoutRun(fanout.handover(), Sender.OTHER) as other:
        other._lanes[0].pin(1)  # a run that began long ago: no entry may be written
        steps = {0: egress.join(0, PEOPLE[0], 5000, Rank.FIRST)}
        assert steps == {0: Step.AF_XDP}
        other._lanes[0].unpin()
    watch(egress, steps, lambda: steps[0] is Step.LIVE_FRAMES)  # type: ignore[arg-type]  # its keys are numbers


def test_a_relay_that_keeps_stepping_down_waits_longer_each_time_but_not_once_a_link_has_changed(
    relay: FanoutRun, egress: Egress, lan: Cable, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_join(egress)
    clock = [time.monotonic_ns()]
    monkeypatch.setattr("xdp.fanout_run.time.monotonic_ns", lambda: clock[0])
    monkeypatch.setattr("xdp.fanout_run.AGAIN_NS", 0)  # it would be over never, by that clock

    def is_back() -> bool:
        egress.poll()
        egress.tick(clock[0])
        clock[0] += RETRY_NS
        return relay.recover()

    def fails() -> None:
        until("all by live frames", lambda: is_back() or egress.counts()[Step.LIVE_FRAMES] == len(PEOPLE))
        switch_gro(lan.far, on=False)
        for _ in range(SHORT_RUNS):
            relay.send(RECORD)
        assert relay.step is Step.AF_XDP
        switch_gro(lan.far, on=True)
        until("proven", lambda: egress.poll() or not egress._interfaces[lan.near.index].reason)

    for pause_ns in (0, FIRST_PAUSE_NS, 2 * FIRST_PAUSE_NS):
        fails()
        began = clock[0]
        while not is_back():
            assert clock[0] < began + pause_ns + 3 * RETRY_NS
        assert clock[0] >= began + pause_ns
    fails()
    assert not is_back()
    assert not is_back()
    lan.near.namespace.set_link("lan", mtu=1400)
    assert any(is_back() for _ in range(3))
    assert LAST_PAUSE_NS > 8 * FIRST_PAUSE_NS


def test_an_interface_that_never_takes_live_frames_keeps_nobody_else_from_them(
    launch: Namespace, far: Namespace, relay: FanoutRun, egress: Egress, lan: Cable
) -> None:
    steps = all_join(egress)
    other = Cable(*veth_pair(launch, far, ("slow", "slow2"), addresses=("10.63.0.1/24", "10.63.0.2/24")))
    steps["slow"] = egress.join("slow", packed("10.63.0.2"), 9, Rank.FIRST)
    watch(egress, steps, lambda: steps["slow"] is Step.AF_XDP)
    assert egress._run is not None
    switch_gro(lan.far, on=False)  # a passing trouble, of the other interface
    for _ in range(SHORT_RUNS):
        relay.send(RECORD)
        egress.beat(RECORD, lambda: True)
    assert (relay.step, egress._run.step) == (Step.AF_XDP, Step.AF_XDP)
    switch_gro(lan.far, on=True)
    watch(egress, steps, relay.recover)
    watch(egress, steps, lambda: egress.counts() == {Step.LIVE_FRAMES: len(PEOPLE), Step.AF_XDP: 1, Step.SENDMMSG: 0})
    assert relay.send(RECORD).transmitted == egress.beat(RECORD, lambda: True) == len(PEOPLE)
    launch.delete_link(other.near.name)


def test_the_policy_of_routing_is_followed(launch: Namespace, relay: FanoutRun, egress: Egress, lan: Cable) -> None:
    steps = all_join(egress)
    rule = {"dst": "10.62.0.12", "dst_len": 32, "table": 100, "priority": 100}
    with IPRoute(groups=0) as route:
        route.route("add", table=100, dst="10.62.0.12/32", gateway="10.62.0.13")
        route.rule("add", **rule)
    try:
        watch(egress, steps, lambda: egress._members[2].hop is not None and _via(egress, 2) == PEOPLE[3])
    finally:
        with IPRoute(groups=0) as route:
            route.rule("del", **rule)
    watch(egress, steps, lambda: _via(egress, 2) == PEOPLE[2])


def test_a_second_rung_that_can_t_grow_goes_on_with_those_it_has(
    launch: Namespace, lan: Cable, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def transmitter(ifindex: int, capacity: int) -> Transmitter:
        made.append(capacity)
        if capacity > 4:
            raise OSError("AF_XDP: UMEM refused: Cannot allocate memory")
        return Transmitter(ifindex, capacity)

    monkeypatch.setattr(egress_frames, "SMALLEST", 4)
    monkeypatch.setattr(egress_frames, "Transmitter", transmitter)
    served = {**dict.fromkeys(Step, 0), Step.AF_XDP: 4, Step.SENDMMSG: len(PEOPLE) - 4}
    with Egress(None, SOURCE_PORT) as egress:
        for number, address in enumerate(PEOPLE):
            egress.join(number, address, 5000 + number, Rank.FIRST)
        watch(egress, {}, lambda: egress.counts() == served)
        now_ns = time.monotonic_ns() + 100 * RETRY_NS
        for _ in range(5):
            made.clear()
            now_ns += RETRY_NS
            egress.tick(now_ns)
            egress.tick(now_ns + 1)
            assert egress.counts() == served
            assert made in ([], [8, 4])  # one try for all, and back
            assert egress.transmit(RECORD) == 4


def test_queues_that_a_link_has_lost_are_noticed(launch: Namespace, far: Namespace, egress: Egress) -> None:
    pair = Cable(
        *veth_pair(launch, far, ("wide", "wide2"), addresses=("10.63.0.1/24", "10.63.0.2/24"), queues=2),
    )
    switch_gro(pair.far, on=True)
    assert egress._table is not None
    directory = egress._table._directory
    steps: dict[object, Step] = {"x": egress.join("x", packed("10.63.0.2"), 9, Rank.FIRST)}
    watch(egress, steps, lambda: steps["x"] is Step.LIVE_FRAMES)
    assert EGRESS.layouts["directory"].unpack(directory.bytes)["narrow"] == 0
    for end in (pair.far, pair.near):  # that which receives may not have fewer than that which sends
        set_queues(end, 1)
    watch(egress, steps, lambda: EGRESS.layouts["directory"].unpack(directory.bytes)["narrow"] == 1)
    launch.delete_link("wide")


def set_queues(end: Veth, count: int) -> None:
    """ETHTOOL_SCHANNELS (linux/ethtool.h): so many to receive and to send by."""
    with end.namespace.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        value = ctypes.create_string_buffer(struct.pack("=9I", 0x3D, 0, 0, 0, 0, count, count, 0, 0))
        fcntl.ioctl(control, SIOCETHTOOL, struct.pack("=16sQ8x", end.name.encode(), ctypes.addressof(value)))


def sources(collector: Collector, count: int) -> list[bytes]:
    """Where so many of our datagrams came from; the link carries ARP and proofs as well."""
    found: list[bytes] = []

    def came() -> bool:
        frames = [frame for frame in collector.rest() if frame[12:14] == b"\x08\x00" and frame[23] == 17]
        found.extend(datagram.source for datagram in map(read, frames) if datagram.payload == RECORD)
        return len(found) >= count

    until("all have come", came)
    return found


def _via(egress: Egress, key: int) -> bytes | None:
    by = egress._hops._by[egress._members[key].address]
    return None if by is None else by[1]
