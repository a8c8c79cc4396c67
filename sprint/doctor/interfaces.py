"""Each interface: what it is, and what the kernel bypass would get on it. Looked at, never touched.

Those that would be captured have a line for each thing that counts; each other has one line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sprint.doctor.findings import Finding, Need, State
from sprint.uplinks import default_interfaces
from xdp.links import ours
from xdp.netdev import XdpFeature
from xdp.prospects import Prospect, prospects

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sprint.config import Config
    from sprint.doctor.running import RunningBypass
    from xdp.interfaces import Interface

MAX_INTERFACES = 64
"""Shown beside the captured ones: a host of containers has hundreds."""
RESOLVE_S = 2.0
"""For the names in BITCOIN_NODE."""


def interfaces(config: Config, running: RunningBypass | None) -> list[Finding]:
    """All but the loopback and the bypass's own private links, the captured ones first."""
    private = {each.index for each in ours() if each.filter is None}
    found = [each for each in prospects() if not {each.interface.index, each.interface.peer_index} & private]
    if config.interfaces:
        return judge(found, config.interfaces, (), running, chosen=True)
    names, problems = default_interfaces(config.upstreams, RESOLVE_S)
    return judge(found, names, problems, running, chosen=False)


def judge(
    found: Sequence[Prospect],
    captured: Sequence[str],
    problems: Sequence[str],
    running: RunningBypass | None,
    *,
    chosen: bool,
) -> list[Finding]:
    """`problems`: why one might be lacking in `captured`; `chosen`: those that INTERFACE names."""
    by_name = {each.interface.name: each for each in found}
    there = [name for name in captured if name in by_name]
    findings = []
    for name in captured:
        if name in by_name:
            findings += _captured(by_name[name], running, chosen=chosen)
            continue
        detail = "named by INTERFACE, and not there: it is captured once it comes"
        state = State.DEGRADED if there else State.MISSING
        remedy = f"INTERFACE={','.join(there) or next(iter(by_name), 'NAME')}, or make {name}"
        findings.append(Finding("interface", name, state, detail, remedy, Need.BYPASS))
    for problem in problems:
        detail = f"{problem}: the interface to it is not known"
        remedy = "name a node that resolves in BITCOIN_NODE, or set INTERFACE"
        findings.append(Finding("interface", "", State.DEGRADED, detail, remedy, Need.BYPASS))
    if not captured:
        detail = "none leads to a node or to the internet: there is nothing to capture on"
        remedy = "a route to the internet, or INTERFACE=NAME"
        findings.append(Finding("interface", "", State.MISSING, detail, remedy, Need.BYPASS))
    others = [each for each in found if each.interface.name not in captured]
    findings += [_other(each) for each in others[:MAX_INTERFACES]]
    if len(others) > MAX_INTERFACES:
        findings.append(Finding("interface", "…", State.OK, f"{len(others) - MAX_INTERFACES} more, not shown"))
    return findings


def describe(facts: Interface) -> str:
    """Driver, queues, MTU, state."""
    queues = "queues untold"
    if facts.rx_queues is not None:
        most = f" of {facts.most_queues}" if facts.most_queues not in {None, facts.rx_queues} else ""
        queues = f"queues {facts.rx_queues}{most} in, {facts.tx_queues} out"
    state = "up" if facts.carrier else "no carrier" if facts.up else "down"
    return f"{facts.driver or facts.kind or 'no driver'}, {queues}, MTU {facts.mtu}, {state}"


def _other(prospect: Prospect) -> Finding:
    """One that is not captured: nothing is needed of it, so nothing is wrong with it."""
    facts = prospect.interface
    offloads = [name for name, on in (("LRO", facts.lro), ("GRO_HW", facts.gro_hw)) if on]
    parts = [describe(facts), f"{' and '.join(offloads)} on" if offloads else "LRO and GRO_HW off"]
    mode = f"would get {prospect.mode}" if prospect.mode else "would get none"
    because = "; ".join(obstacle.what for obstacle in (*prospect.obstacles, *prospect.doubts))
    parts.append(f"not captured, {mode}" + (f" ({because})" if because else ""))
    return Finding("interface", facts.name, State.OK, ", ".join(parts))


def _captured(prospect: Prospect, running: RunningBypass | None, *, chosen: bool) -> list[Finding]:
    facts = prospect.interface
    name = facts.name
    by = "by INTERFACE" if chosen else "by default: it leads to a node or to the internet"
    state = State.OK if facts.carrier else State.DEGRADED
    remedy = "" if facts.carrier else f"ip link set dev {name} up; the cable, or the other end"
    return [
        Finding("interface", name, state, f"would be captured ({by}): {describe(facts)}", remedy, Need.BYPASS),
        _mtu(prospect),
        _offload(name, "LRO", facts.lro, "lro", prospect),
        _offload(name, "GRO_HW", facts.gro_hw, "rx-gro-hw", prospect),
        _mode(prospect, running),
        _fan_out(prospect),
    ]


def _mtu(prospect: Prospect) -> Finding:
    """Of veth the other end's counts, which the forecast has looked at."""
    facts = prospect.interface
    for obstacle in prospect.obstacles:
        if obstacle.what.startswith("MTU "):
            return Finding("MTU", facts.name, State.DEGRADED, f"{facts.mtu}: {obstacle.what}", obstacle.remedy)
    known = f"native XDP with {facts.driver or 'its driver'} takes up to {prospect.mtu_limit}, a frame a page"
    return Finding("MTU", facts.name, State.OK, f"{facts.mtu}: {known}")


def _offload(name: str, label: str, on: bool | None, feature: str, prospect: Prospect) -> Finding:
    if on is None:
        return Finding(label, name, State.UNKNOWN, "the driver doesn't tell", f"ethtool -k {name}")
    if not on:
        return Finding(label, name, State.OK, "off")
    if prospect.interface.driver == "virtio_net" and label == "GRO_HW":
        if not any("GRO_HW" in obstacle.what for obstacle in prospect.obstacles):
            return Finding(label, name, State.OK, "on, and virtio_net switches it off while XDP is attached natively")
        (why,) = [obstacle for obstacle in prospect.obstacles if "GRO_HW" in obstacle.what]
        return Finding(label, name, State.DEGRADED, why.what, why.remedy)
    detail = "on: packets come merged, which most drivers refuse native XDP beside (generic XDP switches it off itself)"
    return Finding(label, name, State.DEGRADED, detail, f"ethtool -K {name} {feature} off")


def _mode(prospect: Prospect, running: RunningBypass | None) -> Finding:
    facts = prospect.interface
    check, name = "XDP mode", facts.name
    if running is not None and running.active and name in running.interfaces:
        mode, why = running.rungs.get(name, running.mode), running.reasons.get(name)
        state = State.OK if mode == "native" else State.DEGRADED
        remedy = "" if state is State.OK else "the log's line on the kernel bypass tells why it is no higher step"
        detail = f"{mode}: Sprint runs on it now, proven by its self-test" + (f"; {why}" if why else "")
        return Finding(check, name, state, detail, remedy, Need.BYPASS)
    said = "; ".join(obstacle.what for obstacle in prospect.obstacles)
    remedy = "; ".join(dict.fromkeys(obstacle.remedy for obstacle in prospect.obstacles))
    if prospect.mode is None:
        return Finding(check, name, State.MISSING, f"would get none: {said}", remedy, Need.BYPASS)
    by = f"known by {prospect.known_by}"
    if prospect.mode == "generic":
        detail = f"would get generic, which costs more and comes later: {said}; {by}"
        return Finding(check, name, State.DEGRADED, detail, remedy, Need.BYPASS)
    if prospect.doubts:
        doubts = "; ".join(doubt.what for doubt in prospect.doubts)
        remedy = "; ".join(dict.fromkeys(doubt.remedy for doubt in prospect.doubts))
        detail = f"would get native, unless the driver refuses it ({doubts}); {by}"
        return Finding(check, name, State.DEGRADED, detail, remedy, Need.BYPASS)
    return Finding(check, name, State.OK, f"would get native; {by}, and proven only when attached", need=Need.BYPASS)


def _fan_out(prospect: Prospect) -> Finding:
    """Whether frames can be sent by it from a program: many drivers can only while a program is attached to them."""
    check, name, features = "fan-out", prospect.interface.name, prospect.features
    if features is None:
        detail = "whether it sends redirected frames is told by Linux 6.3 or later only; tried when attached"
    elif XdpFeature.NDO_XMIT in features:
        detail = "it sends redirected frames as it is set up now"
    else:
        detail = "it sends no redirected frames as it is set up now; many drivers do once a program is attached"
    return Finding(check, name, State.OK, detail)
