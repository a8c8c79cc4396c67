"""Forecasts of the XDP mode, from made-up facts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from xdp.interfaces import AttachedXdp, Interface
from xdp.netdev import XdpFeature
from xdp.prospects import Surroundings, judge, virtio_features

if TYPE_CHECKING:
    from pathlib import Path

NIC = Interface(
    index=2,
    name="enp3s0",
    kind=None,
    driver="ice",
    mtu=1500,
    mac="02:00:00:00:00:01",
    up=True,
    carrier=True,
    loopback=False,
    rx_queues=4,
    tx_queues=4,
    lro=False,
    gro_hw=False,
    xdp=(),
    most_queues=8,
)
VETH = replace(NIC, name="veth0", kind="veth", driver="veth", rx_queues=1, tx_queues=1, peer_index=3)
PEER = replace(VETH, index=3, name="veth1", peer_index=2)
CAN = XdpFeature.BASIC | XdpFeature.REDIRECT
NOTHING = XdpFeature(0)
CONTROLLED, CSUM, TSO4 = 1 << 2, 1 << 1, 1 << 7  # virtio's feature bits


@pytest.mark.parametrize(
    ("facts", "around", "mode", "told"),
    [
        (NIC, Surroundings(CAN), "native", ""),
        (NIC, Surroundings(NOTHING), "generic", "offers no native XDP"),
        (NIC, Surroundings(), "native", ""),  # before 6.3, by the list
        (replace(NIC, driver="e1000e"), Surroundings(), "generic", "e1000e offers no native XDP"),
        (replace(NIC, driver="e1000e"), Surroundings(CAN), "native", ""),  # the kernel knows better than the list
        (replace(NIC, driver=None), Surroundings(), "generic", "offers no native XDP"),
        (replace(NIC, mtu=3046), Surroundings(CAN), "native", ""),
        (replace(NIC, mtu=3047), Surroundings(CAN), "generic", "MTU 3047"),
        (replace(NIC, driver="igc", mtu=1501), Surroundings(CAN), "generic", "MTU 1501"),
        (replace(NIC, driver="mlx5_core", mtu=3498), Surroundings(CAN), "native", ""),
        (replace(NIC, driver="mlx5_core", mtu=9000), Surroundings(CAN), "generic", "MTU 9000"),
        (replace(NIC, driver="ena"), Surroundings(CAN), "native", ""),
        (replace(NIC, driver="ena", rx_queues=5), Surroundings(CAN), "generic", "5 of 8 queues"),
        (replace(NIC, driver="virtio_net", gro_hw=True), Surroundings(CAN, None, CONTROLLED | TSO4), "native", ""),
        (replace(NIC, driver="virtio_net", gro_hw=True), Surroundings(CAN, None, None), "native", ""),
        (replace(NIC, driver="virtio_net", gro_hw=True), Surroundings(CAN, None, TSO4), "generic", "GRO_HW"),
        (replace(NIC, driver="virtio_net"), Surroundings(CAN, None, 0), "native", ""),
        (replace(NIC, kind="vlan", driver="802.1Q VLAN Support"), Surroundings(NOTHING), "generic", "a vlan has no"),
        (replace(NIC, loopback=True), Surroundings(CAN), None, "loopback"),
        (VETH, Surroundings(CAN, PEER), "native", ""),
        (VETH, Surroundings(CAN, replace(PEER, mtu=3507)), "generic", "MTU 3507 of veth1"),
        (replace(VETH, mtu=9000), Surroundings(CAN, PEER), "native", ""),  # what counts is what the peer may send
        (VETH, Surroundings(NOTHING, replace(PEER, tx_queues=2)), "generic", "fewer than the 2 that veth1"),
        (VETH, Surroundings(None, replace(PEER, tx_queues=2)), "generic", "fewer than the 2 that veth1"),
        (replace(NIC, xdp=(AttachedXdp("native", 7, "lb", ()),)), Surroundings(CAN), None, "never replaced"),
        (
            replace(NIC, kind="wireguard", driver=None, ethernet=False),
            Surroundings(NOTHING),
            None,
            "no Ethernet frames",
        ),
        (replace(NIC, kind="tun", driver="tun", ethernet=False), Surroundings(CAN), None, "no Ethernet frames"),
    ],
)
def test_the_mode_follows_from_the_facts(facts: Interface, around: Surroundings, mode: str | None, told: str) -> None:
    prospect = judge(facts, around)
    assert prospect.mode == mode
    assert told in "; ".join(obstacle.what for obstacle in prospect.obstacles)
    assert bool(prospect.obstacles) == (mode != "native")
    assert all(obstacle.remedy for obstacle in prospect.obstacles)
    assert prospect.known_by


def test_a_forecast_says_what_it_rests_on() -> None:
    assert "own word" in judge(NIC, Surroundings(CAN)).known_by
    assert "before 6.3" in judge(NIC, Surroundings()).known_by
    assert "known to refuse" in judge(replace(NIC, mtu=9000), Surroundings(CAN)).known_by


@pytest.mark.parametrize(
    ("facts", "around", "doubts"),
    [
        (NIC, Surroundings(CAN), []),
        (replace(NIC, lro=True), Surroundings(CAN), ["ethtool -K enp3s0 lro off"]),
        (replace(NIC, gro_hw=True), Surroundings(CAN), ["ethtool -K enp3s0 rx-gro-hw off"]),
        (replace(NIC, driver="virtio_net", gro_hw=True), Surroundings(CAN, None, CONTROLLED | CSUM), []),
        (VETH, Surroundings(CAN, PEER), []),
        (VETH, Surroundings(CAN), ["there: an MTU of 3506 at most, and no more queues than here"]),
    ],
)
def test_what_only_some_drivers_refuse_is_a_doubt(facts: Interface, around: Surroundings, doubts: list[str]) -> None:
    prospect = judge(facts, around)
    assert (prospect.mode, [doubt.remedy for doubt in prospect.doubts]) == ("native", doubts)


@pytest.mark.parametrize(
    ("mode", "word"), [("native", "xdpdrv"), ("generic", "xdpgeneric"), ("offloaded", "xdpoffload")]
)
def test_the_way_to_take_off_a_foreign_program_is_that_of_its_mode(mode: str, word: str) -> None:
    (taken,) = judge(replace(NIC, xdp=(AttachedXdp(mode, 7, "lb", ()),)), Surroundings(CAN)).obstacles
    assert taken.remedy.endswith(f"ip link set dev enp3s0 {word} off")


def test_checksums_that_the_host_leaves_unfinished_are_a_doubt() -> None:
    prospect = judge(replace(NIC, driver="virtio_net"), Surroundings(CAN, None, CSUM))
    assert (prospect.mode, len(prospect.doubts)) == ("native", 1)
    assert "guest_csum=off" in prospect.doubts[0].remedy


@pytest.mark.parametrize(("written", "bits"), [("111000", 7), ("0001", 8), ("x", None), ("", None), (None, None)])
def test_virtios_feature_bits_are_read_from_the_first_on(tmp_path: Path, written: str | None, bits: int | None) -> None:
    if written is not None:
        (tmp_path / "eth0/device").mkdir(parents=True)
        (tmp_path / "eth0/device/features").write_text(f"{written}\n")
    assert virtio_features("eth0", tmp_path) == bits
