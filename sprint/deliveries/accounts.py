"""One tier's delivery accounts: each delivery ends on_time, late, dropped or overwritten, and is counted once.

Sends come by the thousand in one publication, so a whole run of them is counted at once: sorted, a run of times falls
into a histogram's buckets by bisection, at a tenth of the cost of counting one after the other.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from operator import sub
from typing import TYPE_CHECKING

from sprint.histograms import HISTOGRAM_BUCKETS, Histogram, bucket_of, bucket_upper_ns
from sprint.tiers import SlowReader

if TYPE_CHECKING:
    from sprint.status import TierAccounts
    from sprint.tiers import TierProfile


class SortedHistogram(Histogram):
    """A histogram that takes many latencies at once."""

    __slots__ = ()

    def record_sorted(self, times: list[int], origin: int = 0) -> None:
        """Count the nanoseconds from `origin` to each of `times`, which ascend; negative ones count as 0."""
        if not times:
            return
        words = self._words
        count = len(times)
        words[0] += count
        words[2] = max(words[2], times[-1] - origin)
        if times[0] < origin:
            times = [max(origin, at) for at in times]
        words[1] += sum(times) - count * origin
        at = 0
        while at < count:
            bucket = bucket_of(times[at] - origin)
            last = bucket == HISTOGRAM_BUCKETS - 1
            end = count if last else bisect_left(times, bucket_upper_ns(bucket) + origin, at)
            words[3 + bucket] += end - at
            at = end

    def record_even(self, count: int, first_ns: int, last_ns: int) -> None:
        """Count as many latencies, spread evenly from the first to the last; negative ones as 0."""
        first_ns, last_ns = max(0, first_ns), max(0, last_ns)
        words = self._words
        words[0] += count
        words[1] += (first_ns + last_ns) * count // 2
        words[2] = max(words[2], last_ns)
        counted = 0
        for bucket in range(bucket_of(first_ns), bucket_of(last_ns) + 1):
            last = bucket == HISTOGRAM_BUCKETS - 1
            end = count if last else below(bucket_upper_ns(bucket), count, first_ns, last_ns)
            words[3 + bucket] += end - counted
            counted = end


def below(bound_ns: int, count: int, first_ns: int, last_ns: int) -> int:
    """Of `count` values spread evenly from the first to the last: how many are less than the bound."""
    if bound_ns > last_ns:
        return count
    if bound_ns <= first_ns:
        return 0
    return min(count, -(-(bound_ns - first_ns) * (count - 1) // (last_ns - first_ns)))


class TierLedger:
    """The accounts of one tier's subscribers, in the status block."""

    def __init__(self, accounts: TierAccounts, profile: TierProfile, write_deadline_ns: int) -> None:
        self.accounts = accounts
        self.profile = profile
        self.write_deadline_ns = write_deadline_ns
        self.overwrites = profile.slow_reader is SlowReader.OVERWRITE
        self._relay_latency = SortedHistogram(accounts.relay_latency)
        self._write_time = SortedHistogram(accounts.write_time)

    def sent(self, times: list[int], failed: list[int], seen_ns: int) -> None:
        """Count a run of sends of one record, one behind the other.

        `times` holds when the run began and when each send returned; `failed` the places, ascending and counted from
        0, of sends that did not take the whole frame. `seen_ns` is when the record's block was first seen, 0 where
        relay latency means nothing (catch-up).
        """
        ended = times[1:]
        took = list(map(sub, ended, times))
        for place in reversed(failed):
            del ended[place], took[place]
        took.sort()
        on_time = bisect_right(took, self.write_deadline_ns)
        self.accounts.on_time += on_time
        self.accounts.late += len(took) - on_time
        self._write_time.record_sorted(took)
        if seen_ns:
            self.accounts.over_target += len(ended) - bisect_right(ended, seen_ns + self.profile.relay_target_ns)
            self._relay_latency.record_sorted(ended, seen_ns)

    def delivered(self, started_ns: int, ended_ns: int, seen_ns: int) -> None:
        """Count one record handed to the kernel; `seen_ns` as in sent()."""
        self.sent([started_ns, ended_ns], [], seen_ns)

    def sent_together(self, count: int, started_ns: int, ended_ns: int, seen_ns: int) -> None:
        """Count `count` records sent by one system call, as if each had taken its share of the time."""
        if not count:
            return
        took_ns = (ended_ns - started_ns) // count
        if took_ns <= self.write_deadline_ns:
            self.accounts.on_time += count
        else:
            self.accounts.late += count
        self._write_time.record_even(count, took_ns, took_ns)
        if seen_ns:
            first_ns, last_ns = started_ns + took_ns - seen_ns, ended_ns - seen_ns
            self.accounts.over_target += count - below(self.profile.relay_target_ns + 1, count, first_ns, last_ns)
            self._relay_latency.record_even(count, first_ns, last_ns)

    def dropped(self, count: int) -> None:
        """Count records that a subscriber lost because its socket was unwritable at their deadline, or is gone."""
        self.accounts.dropped += count

    def lost(self, count: int) -> None:
        """Count records that a subscriber of this tier lost to its own slowness, as the tier's policy names it."""
        if self.overwrites:
            self.accounts.overwritten += count
        else:
            self.accounts.dropped += count

    def backlog(self, records: int) -> None:
        """Note the worst backlog among the tier's subscribers, in records."""
        self.accounts.buffer_used = records
        self.accounts.buffer_used_max = max(self.accounts.buffer_used_max, records)
