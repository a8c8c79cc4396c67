"""What the doctor says of interfaces, from made-up forecasts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sprint.doctor import Finding, Need, State
from sprint.doctor.interfaces import MAX_INTERFACES, describe, judge
from sprint.doctor.running import RunningBypass
from tests.unit.xdp.test_prospects import CAN, NIC, VETH
from xdp.interfaces import AttachedXdp, Interface
from xdp.netdev import XdpFeature
from xdp.prospects import Prospect, Surroundings
from xdp.prospects import judge as forecast

RUNNING = RunningBypass(True, "native", ("enp3s0",), 10, 0, "")


def told(*facts: Interface, captured: str = "enp3s0", around: Surroundings | None = None) -> dict[str, Finding]:
    """The findings by name, that interface being captured by INTERFACE."""
    return named([forecast(each, around or Surroundings(CAN)) for each in facts], captured)


def named(found: list[Prospect], captured: str, running: RunningBypass | None = None) -> dict[str, Finding]:
    return {each.name: each for each in judge(found, [captured], (), running, chosen=True)}


def test_the_captured_one_has_a_line_for_each_thing_that_counts() -> None:
    found = told(NIC, replace(NIC, name="enp4s0"))
    assert list(found) == [
        *("interface enp3s0", "MTU enp3s0", "LRO enp3s0", "GRO_HW enp3s0", "XDP mode enp3s0", "fan-out enp3s0"),
        "interface enp4s0",
    ]
    assert {each.state for each in found.values()} == {State.OK}
    assert "would get native" in found["XDP mode enp3s0"].detail
    assert (
        "would be captured (by INTERFACE): ice, queues 4 of 8 in, 4 out, MTU 1500, up"
        in found["interface enp3s0"].detail
    )


def test_what_stands_in_the_way_is_told_with_a_command() -> None:
    found = told(replace(NIC, mtu=9000, lro=True, gro_hw=True, carrier=False))
    for name, remedy in {
        "interface": "ip link set dev enp3s0 up",
        "MTU": "ip link set dev enp3s0 mtu 3046",
        "LRO": "ethtool -K enp3s0 lro off",
        "GRO_HW": "ethtool -K enp3s0 rx-gro-hw off",
        "XDP mode": "ip link set dev enp3s0 mtu 3046",
    }.items():
        finding = found[f"{name} enp3s0"]
        assert (finding.state, remedy in finding.remedy) == (State.DEGRADED, True), name
    assert "would get generic" in found["XDP mode enp3s0"].detail


def test_a_doubt_makes_native_a_maybe() -> None:
    mode = told(replace(NIC, lro=True))["XDP mode enp3s0"]
    assert (mode.state, mode.remedy) == (State.DEGRADED, "ethtool -K enp3s0 lro off")
    assert "would get native, unless" in mode.detail


@pytest.mark.parametrize(("bits", "state"), [(1 << 2 | 1 << 7, State.OK), (1 << 7, State.DEGRADED)])
def test_virtios_merging_counts_only_where_it_can_not_be_switched_off(bits: int, state: State) -> None:
    facts = replace(NIC, driver="virtio_net", gro_hw=True)
    found = told(facts, around=Surroundings(CAN, None, bits))
    assert (found["GRO_HW enp3s0"].state, found["XDP mode enp3s0"].state) == (state, state)


def test_an_offload_that_the_driver_does_not_tell_is_unknown() -> None:
    assert told(replace(NIC, lro=None))["LRO enp3s0"].state is State.UNKNOWN


def test_somebody_elses_program_leaves_nothing_and_is_named() -> None:
    mode = told(replace(NIC, xdp=(AttachedXdp("native", 7, "katran", ()),)))["XDP mode enp3s0"]
    assert (mode.state, mode.need) == (State.MISSING, Need.BYPASS)
    assert "katran (id 7, native)" in mode.detail
    assert "xdpdrv off" in mode.remedy


@pytest.mark.parametrize(("mode", "state"), [("native", State.OK), ("generic", State.DEGRADED)])
def test_sprints_own_program_is_nobody_elses(mode: str, state: State) -> None:
    found = [forecast(replace(NIC, xdp=(AttachedXdp(mode, 7, "classify", ()),)), Surroundings(CAN))]
    finding = named(found, "enp3s0", replace(RUNNING, mode=mode))["XDP mode enp3s0"]
    assert (finding.state, "Sprint runs on it now" in finding.detail) == (state, True)
    for other in (replace(RUNNING, active=False), replace(RUNNING, interfaces=("enp4s0",))):
        assert named(found, "enp3s0", other)["XDP mode enp3s0"].state is State.MISSING


def test_of_several_that_sprint_runs_on_each_has_its_own_mode_and_reason() -> None:
    beta = replace(NIC, name="beta")
    why = "interface beta: native: Operation not supported"
    running = replace(RUNNING, mode="tc", interfaces=("enp3s0", "beta"), rungs={"enp3s0": "native", "beta": "tc"})
    running = replace(running, reasons={"beta": why})
    found = [forecast(each, Surroundings(CAN)) for each in (NIC, beta)]
    told = {each.name: each for each in judge(found, ["enp3s0", "beta"], (), running, chosen=True)}
    assert (told["XDP mode enp3s0"].state, told["XDP mode enp3s0"].detail[:8]) == (State.OK, "native: ")
    assert (told["XDP mode beta"].state, told["XDP mode beta"].detail[:4]) == (State.DEGRADED, "tc: ")
    assert "native: Operation not supported" in told["XDP mode beta"].detail


def test_one_that_is_not_captured_is_a_fact_and_no_fault() -> None:
    other = told(NIC, replace(VETH, mtu=9000, lro=True))["interface veth0"]
    assert (other.state, other.remedy, other.need) == (State.OK, "", None)
    assert "would get generic (MTU 9000 of veth0" in other.detail
    assert "LRO on" in other.detail


def test_a_named_one_that_is_not_there_is_missing_only_if_it_is_the_only_one() -> None:
    found = [forecast(NIC, Surroundings(CAN))]
    (gone, *_) = judge(found, ["eth9"], (), None, chosen=True)
    assert (gone.name, gone.state, gone.need) == ("interface eth9", State.MISSING, Need.BYPASS)
    assert "INTERFACE=enp3s0" in gone.remedy
    states = {each.name: each.state for each in judge(found, ["enp3s0", "eth9"], (), None, chosen=True)}
    assert (states["interface enp3s0"], states["interface eth9"]) == (State.OK, State.DEGRADED)


def test_a_host_that_nothing_leads_from_has_nothing_to_capture_on() -> None:
    findings = judge([], [], ["nothing leads to 192.0.2.1"], None, chosen=False)
    assert [each.state for each in findings] == [State.DEGRADED, State.MISSING]
    assert all(each.remedy for each in findings)


def test_a_host_of_containers_does_not_fill_the_screen() -> None:
    many = [forecast(replace(NIC, name=f"veth{n}"), Surroundings(CAN)) for n in range(300)]
    findings = judge(many, ["veth0"], (), None, chosen=True)
    assert len(findings) == 6 + MAX_INTERFACES + 1
    assert findings[-1].detail == f"{299 - MAX_INTERFACES} more, not shown"


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        (replace(NIC, most_queues=4), "ice, queues 4 in, 4 out, MTU 1500, up"),
        (
            replace(NIC, rx_queues=None, driver=None, kind="ifb", up=False, carrier=False),
            "ifb, queues untold, MTU 1500, down",
        ),
        (replace(NIC, driver=None, carrier=False), "no driver, queues 4 of 8 in, 4 out, MTU 1500, no carrier"),
    ],
)
def test_an_interface_is_described_in_a_line(facts: Interface, text: str) -> None:
    assert describe(facts) == text


@pytest.mark.parametrize(
    ("features", "part"),
    [
        (None, "Linux 6.3"),
        (CAN, "sends no redirected frames"),
        (CAN | XdpFeature.NDO_XMIT, "it sends redirected frames"),
    ],
)
def test_what_the_fan_out_can_send_by_is_the_drivers_word(features: XdpFeature | None, part: str) -> None:
    assert part in told(NIC, around=Surroundings(features))["fan-out enp3s0"].detail
