"""What `bench fanout` notes of each publication, and the figures and ratios that come of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from sprint.bench.percentiles import median, percentile
from sprint.tiers import NS_PER_MS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

LIVE, LIVE_TWO, AF_XDP, SENDMMSG = "live_frames", "live_frames_two_cpus", "af_xdp", "sendmmsg"
STREAM = "stream"
PEERS = ("libzmq", "redis", "nats")
"""By TCP, each; ours is STREAM."""
_POINTS = (("first", 0.0), ("median", 50.0), ("p99_9", 99.9), ("last", 100.0))


class Sent(NamedTuple):
    """What a publisher says of one publication; times are CLOCK_MONOTONIC ns."""

    begun_ns: int
    ended_ns: int
    cpu_ns: int | None
    """Used by the publishing process, all its threads; None: it can't tell yet."""
    taken: int | None
    """By the driver or the kernel; None where nobody tells."""
    payload: bytes
    """As it was sent."""


@dataclass(slots=True)
class Rounds:
    """One way's publications to one number of subscribers."""

    subscribers: int
    missing: int = 0
    """Subscribers who got nothing, of all rounds together."""
    refused: int = 0
    """Of them, those whose frames the driver or the kernel is known not to have taken."""
    surplus: int = 0
    """Frames beyond the first, of all rounds together."""
    incomplete: int = 0
    """Rounds in which somebody got nothing; they have no figures, but what they lost counts."""
    times: dict[str, list[int]] = field(default_factory=dict)
    """ns, a round each."""

    def note(
        self, sent: Sent, stamps: Iterable[int], cpu_ns: int, *, receivers_cpu_ns: int | None = None, surplus: int = 0
    ) -> None:
        """One round: when each subscriber had it (0, or not named: never)."""
        came = sorted(stamp for stamp in stamps if stamp)
        self.surplus += surplus
        if sent.taken is not None:
            self.refused += max(0, self.subscribers - sent.taken)
        if len(came) < self.subscribers:
            self.missing += self.subscribers - len(came)
            self.incomplete += 1
            return
        for name, percent in _POINTS:
            self._add(name, percentile(came, percent) - sent.begun_ns)
        self._add("call", sent.ended_ns - sent.begun_ns)
        self._add("cpu", cpu_ns)
        if receivers_cpu_ns is not None:
            self._add("receivers_cpu", receivers_cpu_ns)

    def _add(self, name: str, value_ns: int) -> None:
        self.times.setdefault(name, []).append(value_ns)

    def figures(self) -> dict[str, Any]:
        """Medians of rounds, and of the last subscriber the 90th percentile and the best, in milliseconds."""
        rounds = len(self.times.get("last", ())) + self.incomplete
        counts = {"rounds": rounds, "missing": self.missing, "refused": self.refused, "surplus": self.surplus}
        if not self.times:
            return {**counts, "incomplete": self.incomplete}
        last = sorted(self.times["last"])
        return {
            **{f"{name}_ms": _ms(median(times)) for name, times in self.times.items()},
            "last_p90_ms": _ms(percentile(last, 90)),
            "last_min_ms": _ms(last[0]),
            **counts,
            "incomplete": self.incomplete,
        }


def loss(ways: Iterable[tuple[int, Mapping[str, Any]]]) -> float:
    """The share of frames that didn't arrive, of some ways' figures, each with its number of subscribers."""
    sent = missing = 0
    for subscribers, way in ways:
        sent += subscribers * way["rounds"]
        missing += way["missing"]
    return missing / sent if sent else 0.0


def last_ms(figures: Mapping[str, Mapping[str, Any]], way: str) -> float | None:
    """When the last subscriber has it, median; None where that isn't known."""
    found = figures.get(way, {}).get("last_ms")
    return None if found is None else float(found)


def best_peer(figures: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The TCP peer, not of ours, whose last subscriber has it first."""
    known = {peer: value for peer in PEERS if (value := last_ms(figures, peer)) is not None}
    return min(known, key=lambda peer: known[peer]) if known else None


def ratios(wire: Mapping[str, Mapping[str, Any]], sockets: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Of one number of subscribers; None where one of the two is missing."""
    best = best_peer(sockets)
    peer = None if best is None else last_ms(sockets, best)
    return {
        "live_wire_vs_sendmmsg_wire": _ratio(last_ms(wire, LIVE), last_ms(wire, SENDMMSG)),
        "live_sockets_vs_best_tcp_peer": _ratio(last_ms(sockets, LIVE), peer),
        "stream_vs_best_tcp_peer": _ratio(last_ms(sockets, STREAM), peer),
    }


def _ratio(ours: float | None, other: float | None) -> float | None:
    return round(ours / other, 4) if ours is not None and other else None


def _ms(time_ns: int) -> float:
    return round(time_ns / NS_PER_MS, 4)
