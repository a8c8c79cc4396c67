from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sprint.bench.percentiles import PERCENTS, median, percentile, percentiles_us

TIMES = st.lists(st.integers(0, 10**9), min_size=1)


def test_of_a_thousand_values_each_percentile_is_the_one_of_that_rank() -> None:
    ordered = list(range(1, 1001))
    assert [percentile(ordered, percent) for percent in (1, 50, 99, 99.9, 100)] == [10, 500, 990, 999, 1000]


@given(TIMES, st.sampled_from(PERCENTS))
def test_a_percentile_is_a_measured_value_that_at_least_so_many_don_t_exceed(times: list[int], percent: float) -> None:
    found = percentile(sorted(times), percent)
    assert found in times
    assert sum(each <= found for each in times) >= len(times) * percent / 100
    assert sum(each < found for each in times) < len(times) * percent / 100 or found == min(times)


@given(TIMES)
def test_percentiles_are_named_in_microseconds_and_never_fall(times: list[int]) -> None:
    figures = percentiles_us(times)
    assert figures["p50_us"] == median(times) / 1000
    assert figures["max_us"] == max(times) / 1000
    assert list(figures) == [*(f"p{percent}_us" for percent in PERCENTS), "max_us"]
    assert list(figures.values()) == sorted(figures.values())
