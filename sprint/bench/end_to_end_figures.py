"""What `bench end-to-end` notes of each block, and the figures that come of it. Pure."""

from __future__ import annotations

from collections import Counter
from math import ceil
from typing import TYPE_CHECKING, Any

from sprint.bench.percentiles import percentile
from sprint.events import Source
from sprint.tiers import NS_PER_MS, NS_PER_US

if TYPE_CHECKING:
    from collections.abc import Sequence

_PERCENTS = (50, 99, 99.9)
_US_A_MS = NS_PER_MS // NS_PER_US


class Times:
    """Some tens of millions of times: counted by the microsecond, rounded up."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, times_ns: Sequence[int]) -> None:
        """All of one block."""
        self._counts.update([-(-time_ns // NS_PER_US) for time_ns in times_ns])

    def __add__(self, other: Times) -> Times:
        both = Times()
        both._counts = self._counts + other._counts
        return both

    def __len__(self) -> int:
        """How many there are."""
        return self._counts.total()

    def percentile_ms(self, percent: float) -> float:
        """Nearest rank; of at least one."""
        due = max(1, ceil(len(self) * percent / 100))
        for time_us in sorted(self._counts):
            due -= self._counts[time_us]
            if due <= 0:
                return time_us / _US_A_MS
        raise ValueError("no times")

    def figures(self) -> dict[str, float]:
        """`p50_ms`, `p99_ms`, `p99.9_ms` and `max_ms`."""
        return {**{f"p{p}_ms": self.percentile_ms(p) for p in _PERCENTS}, "max_ms": max(self._counts) / _US_A_MS}


class Deliveries:
    """Of all blocks that count."""

    def __init__(self, enterprise: int, subscribers: int) -> None:
        """So many subscribers, the first ones enterprise's."""
        self._enterprise, self._subscribers = enterprise, subscribers
        self._times = {"enterprise": Times(), "turbo": Times()}
        self._last: dict[str, list[int]] = {"enterprise": [], "turbo": []}
        self._first: list[int] = []
        self.blocks = self.captured = self.missing = self.surplus = 0

    def note(self, at_ns: Sequence[int], seen_ns: Sequence[int], sources: set[int], surplus: int) -> None:
        """One block: when each subscriber's frame came (0: never), and what these frames say of the block's arrival."""
        self.blocks += 1
        self.captured += sources - {0} == {Source.CAPTURE}
        self.surplus += surplus
        took = [at - seen for at, seen in zip(at_ns, seen_ns, strict=True) if at]
        self.missing += self._subscribers - len(took)
        enterprise = len(took) - sum(1 for at in at_ns[self._enterprise :] if at)
        for name, part in (("enterprise", took[:enterprise]), ("turbo", took[enterprise:])):
            if part:
                self._times[name].add(part)
                self._last[name].append(max(part))
        if took:
            self._first.append(min(took))

    def figures(self) -> dict[str, Any]:
        """Raises RuntimeError where nobody has got anything."""
        if not all(self._last.values()):
            raise RuntimeError("end-to-end: a tier has got nothing at all")
        turbo_last = sorted(self._last["turbo"])
        return {
            "enterprise_p999_ms": self._times["enterprise"].percentile_ms(99.9),
            "turbo_last_ms_p99": _ms(percentile(turbo_last, 99)),
            "enterprise": self._times["enterprise"].figures(),
            "turbo": self._times["turbo"].figures(),
            "all": (self._times["enterprise"] + self._times["turbo"]).figures(),
            "first_ms_p50": _ms(percentile(sorted(self._first), 50)),
            "enterprise_last_ms_p50": _ms(percentile(sorted(self._last["enterprise"]), 50)),
            "turbo_last_ms_p50": _ms(percentile(turbo_last, 50)),
            "turbo_last_ms_max": _ms(turbo_last[-1]),
            "blocks": self.blocks,
            "deliveries": sum(map(len, self._times.values())),
            "captured_share": round(self.captured / self.blocks, 6),
            "missing": self.missing,
            "loss_before_repair": round(self.missing / (self.blocks * self._subscribers), 9),
            "surplus": self.surplus,
        }


def _ms(time_ns: int) -> float:
    return round(time_ns / NS_PER_MS, 4)
