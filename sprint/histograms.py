"""Latency histograms in fixed memory: one writer, any number of readers. They live in the status block.

Bucket widths grow with the value: none is wider than an eighth of it, from 4 µs to 34 s.
"""

from __future__ import annotations

import ctypes
from typing import Final

HISTOGRAM_BUCKETS: Final = 192
_HISTOGRAM_SHIFT: Final = 9


class HistogramData(ctypes.LittleEndianStructure):
    """Counts by latency."""

    _pack_ = 8
    _fields_ = (
        ("count", ctypes.c_uint64),
        ("sum_ns", ctypes.c_uint64),
        ("max_ns", ctypes.c_uint64),
        ("buckets", ctypes.c_uint64 * HISTOGRAM_BUCKETS),
    )


class Histogram:
    """The writer's quick hold on one HistogramData: record() costs two stores and an addition."""

    __slots__ = ("_words",)

    def __init__(self, data: HistogramData) -> None:
        self._words = memoryview(data).cast("B").cast("Q")

    def record(self, ns: int) -> None:
        """Count one latency, in nanoseconds; a negative one (clocks of two hosts) counts as 0."""
        words = self._words
        words[0] += 1
        if ns > 0:
            words[1] += ns
            words[2] = max(words[2], ns)
            words[3 + bucket_of(ns)] += 1
        else:
            words[3] += 1


def bucket_of(ns: int) -> int:
    """The bucket in which a latency is counted."""
    value = ns >> _HISTOGRAM_SHIFT
    shift = value.bit_length() - 4
    bucket = value if shift <= 0 else (shift << 3) + (value >> shift)
    return bucket if bucket < HISTOGRAM_BUCKETS else HISTOGRAM_BUCKETS - 1


def bucket_upper_ns(bucket: int) -> int:
    """The smallest latency that is too large for that bucket."""
    shift = (bucket >> 3) - 1
    if shift <= 0:
        return (bucket + 1) << _HISTOGRAM_SHIFT
    return ((bucket & 7) + 9) << (shift + _HISTOGRAM_SHIFT)


def quantile_ns(data: HistogramData, share: float) -> int | None:
    """The latency that `share` of the counted ones stay under, to a bucket's width; None when nothing was counted."""
    counts = list(data.buckets)
    total = sum(counts)
    if not total:
        return None
    seen = 0
    for bucket, count in enumerate(counts):
        seen += count
        if count and seen >= share * total:
            if bucket == HISTOGRAM_BUCKETS - 1:  # which has no upper end
                break
            return min(bucket_upper_ns(bucket), max(int(data.max_ns), 1))
    return int(data.max_ns)
