"""Which XDP mode an interface would get, judged without touching it.

The kernel's netlink tells what the driver can do (Linux 6.3; before that a list of drivers stands in), but not what it
refuses as it is set up: too large an MTU, offloads that merge packets, too many queues. Those rules are the drivers'
own, so what comes out is a forecast, and says what it rests on. Only attaching proves it (attachment.py), which a look
must never do.

Limits: our programs know no fragments (bcc can't load such), so a frame has to fit one page, or one of the driver's
receive buffers.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from xdp.interfaces import interfaces
from xdp.netdev import XdpFeature, xdp_features

if TYPE_CHECKING:
    from collections.abc import Iterable

    from xdp.interfaces import Interface

NATIVE_DRIVERS = frozenset(
    {
        *("atlantic", "bnxt_en", "bonding", "ena", "hv_netvsc", "i40e", "ice", "igb", "igc", "ixgbe", "ixgbevf"),
        *("mlx4_en", "mlx5_core", "mvneta", "mvpp2", "nfp", "qede", "sfc", "tun", "veth", "virtio_net"),
    }
)
"""As ethtool names them; those of Linux 5.18 to 6.2, after which the kernel itself tells."""
USUAL_MTU = 3_498
"""What fits a page of 4 KiB beside headroom (256) and struct skb_shared_info (320), with some bytes for tags."""
DRIVER_MTU = {
    "veth": 3_506,  # of the other end; tried: 3,506 attaches, 3,507 is refused
    "virtio_net": 3_506,
    "igc": 1_500,
    **dict.fromkeys(("i40e", "ice", "igb", "ixgbe", "ixgbevf"), 3_046),  # a buffer of 3,072
}
"""The largest MTU that a driver takes a program with, where that isn't USUAL_MTU. Pages of 4 KiB."""
_GUEST_CSUM, _CTRL_GUEST_OFFLOADS = 1 << 1, 1 << 2
_MERGING = 1 << 7 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 54 | 1 << 55
"""VIRTIO_NET_F_… (linux/virtio_net.h): the merged packets are GUEST_TSO4, TSO6, ECN, UFO, USO4, USO6."""
_AT_THE_HOST = (
    "on the host: guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off,guest_csum=off, or ctrl_guest_offloads=on "
    "(as QEMU's virtio-net-pci names them)"
)


class Obstacle(NamedTuple):
    """What stands in the way of the mode above."""

    what: str
    remedy: str
    """A command or a setting."""


@dataclass(frozen=True, slots=True)
class Prospect:
    """A forecast for one interface."""

    interface: Interface
    mode: Literal["native", "generic"] | None
    """None: nothing, for it is taken, or no interface that XDP is for."""
    known_by: str
    """What the forecast rests on."""
    mtu_limit: int
    """For native XDP."""
    obstacles: tuple[Obstacle, ...] = ()
    """Why it is no better mode."""
    doubts: tuple[Obstacle, ...] = ()
    """What some drivers refuse native XDP for."""
    features: XdpFeature | None = None
    """The driver's own word; None before Linux 6.3."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the forecast needs beside the interface's own facts; None is what can't be seen from here."""

    features: XdpFeature | None = None
    peer: Interface | None = None
    """veth's other end."""
    virtio: int | None = None
    """virtio_net: the feature bits that host and guest agreed on."""


def prospects() -> list[Prospect]:
    """For each interface of the calling thread's namespace but the loopback. Raises OSError."""
    found = interfaces()
    by_index = {each.index: each for each in found}
    return [judge(each, _surroundings(each, by_index)) for each in found if not each.loopback]


def _surroundings(facts: Interface, by_index: dict[int, Interface]) -> Surroundings:
    features = None
    with contextlib.suppress(OSError):  # gone meanwhile, or no answer: then by driver
        features = xdp_features(facts.index)
    peer = by_index.get(facts.peer_index) if facts.peer_index is not None else None
    virtio = virtio_features(facts.name) if facts.driver == "virtio_net" else None
    return Surroundings(features, peer, virtio)


def virtio_features(name: str, sys_class_net: Path = Path("/sys/class/net")) -> int | None:
    """The bits of a virtio device, which the kernel writes as a character each from bit 0 on; None if unreadable."""
    try:
        written = (sys_class_net / name / "device/features").read_text().strip()
        return int(written[::-1], 2)
    except (OSError, ValueError):
        return None


def judge(facts: Interface, around: Surroundings) -> Prospect:
    """The forecast, from facts alone."""
    limit = DRIVER_MTU.get(facts.driver or "", USUAL_MTU)
    native, known_by = _offers_native(facts, around.features)
    if facts.loopback:
        word = Obstacle("the loopback refuses native XDP, and no peer is reached by it", "name another in INTERFACE")
        return Prospect(facts, None, "it is the loopback", limit, (word,), (), around.features)
    if not facts.ethernet:
        word = Obstacle(
            "it carries no Ethernet frames, which the programs read", "name the interface below it in INTERFACE"
        )
        return Prospect(facts, None, "the kind of link it is", limit, (word,), (), around.features)
    if facts.xdp:
        taken = tuple(
            Obstacle(
                f"it has {program}, which is never replaced",
                f"stop its owner, or: ip link set dev {facts.name} {_OFF[program.mode]} off",
            )
            for program in facts.xdp
        )
        return Prospect(facts, None, "what the kernel shows on it", limit, taken, (), around.features)
    if not native:
        return Prospect(facts, "generic", known_by, limit, tuple(_no_native(facts, around)), (), around.features)
    obstacles = tuple(_refusals(facts, around, limit))
    if obstacles:
        known_by = f"what driver {facts.driver} is known to refuse"
        return Prospect(facts, "generic", known_by, limit, obstacles, (), around.features)
    return Prospect(facts, "native", known_by, limit, (), tuple(_doubts(facts, around)), around.features)


_OFF = {"native": "xdpdrv", "generic": "xdpgeneric", "offloaded": "xdpoffload"}


def _offers_native(facts: Interface, features: XdpFeature | None) -> tuple[bool, str]:
    if features is not None:
        return XdpFeature.BASIC in features, "the driver's own word (netdev netlink)"
    driver = facts.driver or "?"
    return driver in NATIVE_DRIVERS, f"what is known of driver {driver}: kernels before 6.3 don't tell"


def _too_few_queues(facts: Interface, around: Surroundings) -> Iterable[Obstacle]:
    """veth wants a receive queue for each that its other end sends by."""
    peer = around.peer
    if facts.driver == "veth" and peer is not None and (facts.rx_queues or 1) < (peer.tx_queues or 1):
        what = f"{facts.rx_queues} receive queues, fewer than the {peer.tx_queues} that {peer.name} sends by"
        yield Obstacle(what, f"ethtool -L {peer.name} tx {facts.rx_queues}")


def _no_native(facts: Interface, around: Surroundings) -> Iterable[Obstacle]:
    too_few = list(_too_few_queues(facts, around))
    if too_few:
        yield from too_few
        return
    if facts.kind in {"vlan", "macvlan", "ipvlan", "bridge", "team"}:
        yield Obstacle(f"a {facts.kind} has no native XDP", "name the interface below it in INTERFACE")
        return
    yield Obstacle(
        f"driver {facts.driver or '?'} offers no native XDP",
        "use a card whose driver has it (ice, mlx5_core, ena, virtio_net, …), or a newer kernel",
    )


def _refusals(facts: Interface, around: Surroundings, limit: int) -> Iterable[Obstacle]:
    """What drivers are known to refuse native XDP for."""
    # veth's limit is for what its other end may send.
    sender = around.peer or facts if facts.driver == "veth" else facts
    if sender.mtu > limit:
        yield Obstacle(
            f"MTU {sender.mtu} of {sender.name}: native XDP takes {limit} at most",
            f"ip link set dev {sender.name} mtu {limit}",
        )
    if facts.driver == "ena" and facts.rx_queues and facts.most_queues and 2 * facts.rx_queues > facts.most_queues:
        yield Obstacle(
            f"{facts.rx_queues} of {facts.most_queues} queues in use: ena needs as many again for XDP",
            f"ethtool -L {facts.name} combined {max(1, facts.most_queues // 2)}",
        )
    virtio = around.virtio or _CTRL_GUEST_OFFLOADS
    if facts.driver == "virtio_net" and not virtio & _CTRL_GUEST_OFFLOADS and virtio & _MERGING:
        yield Obstacle("the host merges packets (GRO_HW), and this guest can't switch it off", _AT_THE_HOST)
    yield from _too_few_queues(facts, around)


def _doubts(facts: Interface, around: Surroundings) -> Iterable[Obstacle]:
    if facts.lro:
        yield Obstacle("LRO is on: most drivers refuse native XDP beside it", f"ethtool -K {facts.name} lro off")
    if facts.gro_hw and facts.driver != "virtio_net":
        yield Obstacle(
            "GRO_HW is on: some drivers refuse native XDP beside it", f"ethtool -K {facts.name} rx-gro-hw off"
        )
    virtio = around.virtio or 0
    if facts.driver == "virtio_net" and virtio & _GUEST_CSUM and not virtio & _CTRL_GUEST_OFFLOADS:
        yield Obstacle(
            "the host leaves checksums unfinished, and this guest can't switch it off: most kernels refuse then",
            _AT_THE_HOST,
        )
    if facts.driver == "veth" and around.peer is None:
        yield Obstacle(
            "its other end is in another network namespace, unseen: its MTU and queues count too",
            f"there: an MTU of {DRIVER_MTU['veth']} at most, and no more queues than here",
        )
