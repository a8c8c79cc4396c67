from __future__ import annotations

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from sprint.deliveries.accounts import SortedHistogram, TierLedger, below
from sprint.histograms import Histogram, HistogramData
from sprint.status import StatusBlock
from sprint.tiers import PROFILES, Tier


@settings(deadline=None)
@given(st.lists(st.integers(-1000, 1 << 40), max_size=200))
def test_counting_many_at_once_is_counting_them_one_by_one(latencies: list[int]) -> None:
    at_once, one_by_one = HistogramData(), HistogramData()
    SortedHistogram(at_once).record_sorted(sorted(latencies))
    for latency in latencies:
        Histogram(one_by_one).record(latency)
    assert bytes(at_once) == bytes(one_by_one)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1 << 40), max_size=50), st.integers(0, 1 << 40))
def test_an_origin_is_taken_off_each_time(times: list[int], origin: int) -> None:
    with_origin, one_by_one = HistogramData(), HistogramData()
    SortedHistogram(with_origin).record_sorted(sorted(times), origin)
    for at in times:
        Histogram(one_by_one).record(at - origin)
    assert bytes(with_origin) == bytes(one_by_one)


def test_a_run_of_sends_is_on_time_or_late_by_each_one_s_own_time() -> None:
    accounts = StatusBlock.create(1, {}).delivery(0, "stream").tiers[Tier.TURBO]
    ledger = TierLedger(accounts, PROFILES[Tier.TURBO], write_deadline_ns=100)
    ledger.sent([1000, 1100, 1201, 1250, 9000], failed=[3], seen_ns=0)
    assert (accounts.on_time, accounts.late) == (2, 1)
    assert accounts.write_time.count == 3
    assert accounts.relay_latency.count == 0


def test_over_target_counts_what_came_later_than_the_tier_s_relay_target() -> None:
    accounts = StatusBlock.create(1, {}).delivery(0, "stream").tiers[Tier.ENTERPRISE]
    ledger = TierLedger(accounts, PROFILES[Tier.ENTERPRISE], write_deadline_ns=100)
    target = PROFILES[Tier.ENTERPRISE].relay_target_ns
    ledger.sent([50 + target - 1, 50 + target, 50 + target + 1], failed=[], seen_ns=50)
    assert accounts.over_target == 1
    assert accounts.relay_latency.count == 2
    assert accounts.relay_latency.max_ns == target + 1


def test_the_worst_backlog_is_kept() -> None:
    accounts = StatusBlock.create(1, {}).delivery(0, "stream").tiers[0]
    ledger = TierLedger(accounts, PROFILES[Tier.FREE], 1)
    for records in (3, 7, 0):
        ledger.backlog(records)
    assert (accounts.buffer_used, accounts.buffer_used_max) == (0, 7)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 10**8), st.integers(0, 10**8))
def test_latencies_spread_evenly_are_counted_as_if_one_by_one(count: int, first_ns: int, span_ns: int) -> None:
    last_ns = first_ns + span_ns
    data = HistogramData()
    SortedHistogram(data).record_even(count, first_ns, last_ns)
    values = [last_ns - Fraction(span_ns * k, max(1, count - 1)) for k in range(count)]
    assert data.count == count
    assert data.max_ns == last_ns
    assert sum(data.buckets) == count
    for bound in (first_ns, first_ns + span_ns // 3, last_ns, last_ns + 1):
        assert below(bound, count, first_ns, last_ns) == sum(value < bound for value in values)


def test_records_sent_together_are_on_time_by_their_share_of_the_call() -> None:
    accounts = StatusBlock.create(1, {}).delivery(0, "udp").tiers[Tier.ENTERPRISE]
    ledger = TierLedger(accounts, PROFILES[Tier.ENTERPRISE], 200_000)
    ledger.sent_together(0, 0, 10, 0)
    assert (accounts.on_time, accounts.late) == (0, 0)
    ledger.sent_together(100, 1_000_000, 11_000_000, 1_000_000)  # 100 µs each; the last one 10 ms after the sighting
    assert (accounts.on_time, accounts.late) == (100, 0)
    assert accounts.over_target == 50  # enterprise's 5 ms
    assert accounts.relay_latency.max_ns == 10_000_000
    ledger.sent_together(10, 0, 3_000_000, 0)
    assert (accounts.on_time, accounts.late) == (100, 10)
    assert accounts.relay_latency.count == 100
