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
        if count:
            took_ns = ended_ns - started_ns
            self.sent([started_ns + took_ns * number // count for number in range(count + 1)], [], seen_ns)

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
