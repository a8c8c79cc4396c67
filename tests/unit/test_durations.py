from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprint.durations import format_duration, parse_duration
from sprint.tiers import PROFILES, Tier

WRITTEN = [
    ("500us", 500_000),
    ("500µs", 500_000),
    ("500μs", 500_000),
    ("200ms", 200_000_000),
    ("1.5s", 1_500_000_000),
    ("2s", 2_000_000_000),
    (" 2 s ", 2_000_000_000),
    ("0.25ms", 250_000),
    ("7ns", 7),
    ("0s", 0),
]


@pytest.mark.parametrize(("text", "ns"), WRITTEN)
def test_a_number_with_a_unit_is_a_duration(text: str, ns: int) -> None:
    assert parse_duration(text) == ns


@pytest.mark.parametrize(
    "text", ["", "s", "500", "-1s", "+1s", "1e3s", "1.s", ".5s", "1m", "1 h", "0.5ns", "1,5s", "nan s", "٣s", "1s1s"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


def test_the_guide_s_deadlines_are_shown_as_the_guide_writes_them() -> None:
    shown = {tier: format_duration(PROFILES[tier].write_deadline_ns) for tier in Tier}
    assert shown == {
        Tier.FREE: "2s",
        Tier.PRO: "1.5s",
        Tier.BUSINESS: "1s",
        Tier.TURBO: "500µs",
        Tier.ENTERPRISE: "200µs",
    }


@given(st.integers(0, 10**15))
def test_a_shown_duration_reads_back_as_the_same(ns: int) -> None:
    assert parse_duration(format_duration(ns)) == ns


def test_a_negative_duration_can_t_be_shown() -> None:
    with pytest.raises(ValueError, match="-1 ns"):
        format_duration(-1)
