"""The ladder as a subscriber meets it: which rung serves him, and that it is another when the network is another."""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING, Any

import pytest
from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types

from tests.net.netns import Namespace, veth_pair
from tests.net.slowness import SLOWNESS
from tests.net.subscribers import SOURCE_PORT, Cable, Collector, Datagram, read, switch_gro
from xdp import egress_frames
from xdp.datagrams import packed
from xdp.egress import Egress
from xdp.egress_frames import RETRY_NS
from xdp.fanout_maps import EGRESS, FanoutHandover, Rank, Sender, Step
from xdp.fanout_run import SHORT_RUNS, FanoutRun

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xdp.fanout import Fanout

PATIENCE_S = 5.0 * SLOWNESS
PEOPLE = [packed(f"10.62.0.{last}") for last in range(10, 20)]
RECORD = bytes(range(192))


@pytest.fixture
def lan(launch: Namespace, far: Namespace) -> Iterator[Cable]:
    """A link whose far end answers for ten addresses."""
    pair = Cable(*veth_pair(launch, far, ("lan", "home"), addresses=("10.62.0.1/24", "10.62.0.10/24")))
    with far.entered(), IPRoute(groups=0) as route:
        for last in range(11, 20):
            route.addr("add", index=pair.far.index, address=f"10.62.0.{last}", prefixlen=24)
    switch_gro(pair.far, on=True)
    yield pair
    launch.delete_link("lan")


@pytest.fixture
def relay(fanout: Fanout) -> Iterator[FanoutRun]:
    with FanoutRun(fanout.handover(), Sender.RELAY) as made:
        yield made


@pytest.fixture
def egress(fanout: Fanout, relay: FanoutRun, lan: Cable) -> Iterator[Egress]:
    with Egress(fanout.handover(), SOURCE_PORT) as made:
        yield made


def change(what: str, command: str, **fields: Any) -> None:
    with IPRoute(groups=0) as route:
        getattr(route, what)(command, **fields)


def watch(egress: Egress, steps: dict[object, Step], done: Callable[[], bool]) -> None:
    """Follow its changes until what is expected has come to pass."""
    give_up = time.monotonic() + PATIENCE_S
    now_ns = time.monotonic_ns()
    while not done():
        assert time.monotonic() < give_up, (steps, egress.reason)
        select.select([egress], [], [], 0.02)
        steps.update(egress.poll())
        now_ns += RETRY_NS  # each look is a retry
        steps.update(egress.tick(now_ns))


def all_join(egress: Egress, step: Step = Step.LIVE_FRAMES) -> dict[object, Step]:
    steps: dict[object, Step] = {}
    for number, address in enumerate(PEOPLE):
        rank = Rank.FIRST if number % 2 else Rank.SECOND
        steps[number] = egress.join(number, address, 5000 + number, rank)
    watch(egress, steps, lambda: set(steps.values()) == {step})
    assert egress.counts() == {**dict.fromkeys(Step, 0), step: len(PEOPLE)}
    return steps


def records(collector: Collector, count: int) -> list[Datagram]:
    """Our datagrams; the link carries ARP and proofs as well."""
    found: list[Datagram] = []
    give_up = time.monotonic() + PATIENCE_S
    while len(found) < count and time.monotonic() < give_up:
        frames = [frame for frame in collector.rest() if frame[12:14] == b"\x08\x00" and frame[23] == 17]
        found += [datagram for datagram in map(read, frames) if datagram.payload == RECORD]
    return found


def arrived(collector: Collector, count: int) -> list[tuple[bytes, int]]:
    """Destination and port of each."""
    return [(datagram.destination, datagram.port) for datagram in records(collector, count)]


DUE = [(address, 5000 + number) for number, address in enumerate(PEOPLE)]


def test_whoever_can_be_is_served_by_live_frames_and_gets_each_publication(
    relay: FanoutRun, egress: Egress, lan: Cable
) -> None:
    all_join(egress)
    assert (egress.step, egress.reason) == (Step.LIVE_FRAMES, None)
    assert egress._table is not None
    assert EGRESS.layouts["directory"].unpack(egress._table._directory.bytes)["narrow"] == 1  # the link has one queue
    with Collector(lan.far) as collector:
        assert relay.send(RECORD).transmitted == len(PEOPLE)
        assert sorted(arrived(collector, len(PEOPLE))) == DUE
        assert egress.transmit(RECORD) == 0
        egress.leave(3)
        egress.leave(3)
        assert relay.send(RECORD).transmitted == len(PEOPLE) - 1
        assert (PEOPLE[3], 5003) not in arrived(collector, len(PEOPLE) - 1)


@pytest.mark.parametrize("address", ["127.0.0.1", "10.62.0.1", "203.0.113.5"])
def test_this_host_and_unreachable_ones_are_left_to_a_plain_socket(egress: Egress, address: str) -> None:
    assert egress.join("x", packed(address), 9, Rank.FIRST) is Step.SENDMMSG


def test_a_neighbour_that_moves_is_followed(relay: FanoutRun, egress: Egress, lan: Cable) -> None:
    steps = all_join(egress)
    change("neigh", "replace", dst="10.62.0.12", lladdr="02:00:00:00:00:12", ifindex=lan.near.index, state=0x80)
    assert select.select([egress], [], [], PATIENCE_S)[0]
    steps.update(egress.poll())
    assert set(steps.values()) == {Step.LIVE_FRAMES}
    with Collector(lan.far) as collector:
        relay.send(RECORD)
        macs = {d.destination: d.destination_mac for d in records(collector, len(PEOPLE))}
    assert macs.pop(PEOPLE[2]) == bytes.fromhex("020000000012")
    assert set(macs.values()) == {lan.far.mac}


def test_a_route_withdrawn_leaves_its_subscribers_to_a_plain_socket_until_it_is_back(
    relay: FanoutRun, egress: Egress, lan: Cable
) -> None:
    change("route", "add", dst="192.0.2.0/24", gateway="10.62.0.10")
    steps = all_join(egress)
    steps["behind"] = egress.join("behind", packed("192.0.2.9"), 9, Rank.FIRST)
    watch(egress, steps, lambda: steps["behind"] is Step.LIVE_FRAMES)
    change("route", "del", dst="192.0.2.0/24")
    watch(egress, steps, lambda: steps["behind"] is Step.SENDMMSG)
    assert egress.counts()[Step.LIVE_FRAMES] == len(PEOPLE)
    change("route", "add", dst="192.0.2.0/24", gateway="10.62.0.10")
    watch(egress, steps, lambda: steps["behind"] is Step.LIVE_FRAMES)


def test_a_neighbour_that_fails_is_left_to_a_plain_socket_and_retried(egress: Egress, lan: Cable) -> None:
    steps = all_join(egress)
    change("neigh", "replace", dst="10.62.0.12", ifindex=lan.near.index, state=0x20)  # NUD_FAILED
    watch(egress, steps, lambda: steps[2] is not Step.LIVE_FRAMES)
    assert steps[2] is Step.SENDMMSG
    watch(egress, steps, lambda: steps[2] is Step.LIVE_FRAMES)


def test_an_interface_that_stops_to_take_live_frames_is_served_by_af_xdp_meanwhile(
    relay: FanoutRun, egress: Egress, lan: Cable
) -> None:
    steps = all_join(egress)
    switch_gro(lan.far, on=False)
    watch(egress, steps, lambda: set(steps.values()) == {Step.AF_XDP})
    assert egress.step is Step.AF_XDP
    assert (egress.reason or "").startswith("lan: ")
    with Collector(lan.far) as collector:
        assert relay.send(RECORD).attempted == 0
        assert egress.transmit(RECORD) == len(PEOPLE)
        found = arrived(collector, len(PEOPLE))
        assert sorted(found) == DUE
        assert [port % 2 for _, port in found] == [1] * 5 + [0] * 5  # the first rank first
        switch_gro(lan.far, on=True)
        watch(egress, steps, lambda: set(steps.values()) == {Step.LIVE_FRAMES})
        assert egress.transmit(RECORD) == 0
        assert relay.send(RECORD).transmitted == len(PEOPLE)


def test_a_relay_that_steps_down_takes_its_subscribers_with_it_and_comes_back(
    relay: FanoutRun, egress: Egress, lan: Cable
) -> None:
    steps = all_join(egress)
    with Collector(lan.far) as collector:
        switch_gro(lan.far, on=False)
        for _ in range(SHORT_RUNS):
            relay.send(RECORD)
        assert relay.step is Step.AF_XDP
        steps.update(egress.tick(1))
        assert set(steps.values()) == {Step.AF_XDP}
        assert "relay" in (egress.reason or "")
        assert egress.transmit(RECORD) == len(PEOPLE)
        assert sorted(arrived(collector, len(PEOPLE))) == DUE
        switch_gro(lan.far, on=True)
        assert not relay.recover()
        watch(egress, steps, relay.recover)  # it needs no publication to find that it may try again
        watch(egress, steps, lambda: set(steps.values()) == {Step.LIVE_FRAMES})
        assert relay.send(RECORD).transmitted == len(PEOPLE)


def test_a_heartbeat_goes_to_all_on_the_first_rung_by_a_run_of_this_side_s_own(
    relay: FanoutRun, egress: Egress, lan: Cable
) -> None:
    steps = all_join(egress)
    assert egress._run is not None
    with Collector(lan.far) as collector:
        assert egress.beat(RECORD, lambda: True) == len(PEOPLE)
        assert sorted(arrived(collector, len(PEOPLE))) == DUE
        assert (relay.sent, relay.lost) == (0, 0)
        switch_gro(lan.far, on=False)
        for _ in range(SHORT_RUNS - 1):
            assert egress.beat(RECORD, lambda: True) == 0
        assert egress.beat(RECORD, lambda: True) is None
        switch_gro(lan.far, on=True)
        watch(egress, steps, lambda: egress.beat(RECORD, lambda: True) == len(PEOPLE))


def test_without_a_relay_that_makes_runs_nobody_is_on_the_first_rung(
    relay: FanoutRun, egress: Egress, lan: Cable
) -> None:
    steps = all_join(egress)
    relay.close()
    steps.update(egress.tick(1))
    assert set(steps.values()) == {Step.AF_XDP}
    assert egress.reason == "the relay makes no runs"


def test_a_device_deleted_leaves_all_behind_it_to_plain_sockets_and_its_place_free(
    launch: Namespace, fanout: Fanout, egress: Egress, lan: Cable
) -> None:
    steps = all_join(egress)
    launch.delete_link("lan")
    watch(egress, steps, lambda: set(steps.values()) == {Step.SENDMMSG})
    assert egress._table is not None
    assert egress._table._devices == {}
    assert egress.transmit(RECORD) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces and links")
def test_without_a_fan_out_everybody_is_served_by_af_xdp_and_growth_keeps_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress_frames, "SMALLEST", 4)
    with Namespace() as near, Namespace() as far, near.entered():
        pair = Cable(*veth_pair(near, far, addresses=("10.62.0.1/24", "10.62.0.10/24")))
        with far.entered(), IPRoute(groups=0) as route:
            for last in range(11, 20):
                route.addr("add", index=pair.far.index, address=f"10.62.0.{last}", prefixlen=24)
        with Egress(None, SOURCE_PORT) as egress:
            all_join(egress, Step.AF_XDP)
            assert egress.reason == "no fan-out is loaded"
            with Collector(pair.far) as collector:
                assert egress.transmit(RECORD) == len(PEOPLE)
                assert sorted(arrived(collector, len(PEOPLE))) == DUE


def test_an_af_xdp_socket_that_failed_is_made_anew_with_everybody_in_it(
    relay: FanoutRun, egress: Egress, lan: Cable
) -> None:
    steps = all_join(egress)
    switch_gro(lan.far, on=False)
    watch(egress, steps, lambda: set(steps.values()) == {Step.AF_XDP})
    frames = egress._frames[lan.near.index]
    frames.close()  # as after an error
    assert egress.transmit(RECORD) == 0
    assert frames.open(time.monotonic_ns())
    with Collector(lan.far) as collector:
        assert egress.transmit(RECORD) == len(PEOPLE)
        assert sorted(arrived(collector, len(PEOPLE))) == DUE


def test_a_name_joins_once(egress: Egress) -> None:
    egress.join("x", packed("127.0.0.1"), 9, Rank.FIRST)
    with pytest.raises(ValueError, match="'x' has joined already"):
        egress.join("x", packed("127.0.0.1"), 9, Rank.FIRST)


def test_a_handover_says_what_another_process_needs(fanout: Fanout) -> None:
    handover = fanout.handover()
    moved = handover.with_fds([fd + 100 for fd in handover.fds()])
    assert moved.fds() == [fd + 100 for fd in handover.fds()]
    assert isinstance(moved, FanoutHandover)
    assert moved.contexts == handover.contexts
