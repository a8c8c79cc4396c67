"""Percentiles by nearest rank: each is a value that was measured, none is interpolated."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

PERCENTS = (1, 10, 25, 50, 75, 90, 95, 99, 99.5, 99.9)


def percentile(ordered: list[int], percent: float) -> int:
    """The smallest of these ascending values that at least `percent` of them don't exceed."""
    return ordered[max(1, ceil(len(ordered) * percent / 100)) - 1]


def median(values: Iterable[int]) -> int:
    """The middle one, or the lower of the two in the middle."""
    return percentile(sorted(values), 50)


def percentiles_us(values_ns: Iterable[int]) -> dict[str, float]:
    """`p50_us`, `p99_us`, `p99.9_us` and others, and `max_us`, of at least one time in nanoseconds."""
    ordered = sorted(values_ns)
    named = {f"p{percent}_us": percentile(ordered, percent) / 1_000 for percent in PERCENTS}
    return {**named, "max_us": ordered[-1] / 1_000}
