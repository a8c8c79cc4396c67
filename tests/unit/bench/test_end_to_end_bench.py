"""`sprint bench end-to-end`, small: the product's own processes, and what each subscriber's frame says."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from sprint.bench.detect_wire import FAR, NEAR
from sprint.bench.end_to_end import measure_end_to_end
from sprint.bench.end_to_end_figures import Deliveries, Times
from sprint.events import Source
from sprint.tiers import NS_PER_MS, NS_PER_US
from xdp.loader import missing

BLOCKS, SUBSCRIBERS = 20, 200


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    result = measure_end_to_end(lambda *_: None, BLOCKS, SUBSCRIBERS)
    assert not {NEAR, FAR} & {name for _, name in socket.if_nameindex()}
    return result


def test_every_block_reaches_every_subscriber_once_and_was_first_seen_by_the_capture(measured: dict[str, Any]) -> None:
    results = measured["results"]
    assert results["subscribers"] == {"enterprise": SUBSCRIBERS // 10, "turbo": SUBSCRIBERS - SUBSCRIBERS // 10}
    assert (results["blocks"], results["deliveries"]) == (BLOCKS, BLOCKS * SUBSCRIBERS)
    assert (results["missing"], results["surplus"], results["loss_before_repair"]) == (0, 0, 0)
    assert results["captured_share"] > 0.5, "else its arrival isn't what is measured"
    assert results["product"]["egress"]["sent"] >= BLOCKS * SUBSCRIBERS
    assert results["product"]["egress"]["dropped"] == 0


def test_the_times_are_of_the_deliveries_in_their_order(measured: dict[str, Any]) -> None:
    results = measured["results"]
    for tier in ("enterprise", "turbo", "all"):
        times = results[tier]
        assert 0 < times["p50_ms"] <= times["p99_ms"] <= times["p99.9_ms"] <= times["max_ms"] < 60_000
    assert results["enterprise_p999_ms"] == results["enterprise"]["p99.9_ms"]
    assert 0 < results["first_ms_p50"] <= results["enterprise_last_ms_p50"] < results["turbo_last_ms_p50"]
    assert results["turbo_last_ms_p50"] <= results["turbo_last_ms_p99"] <= results["turbo_last_ms_max"]
    assert 0 <= results["steal_share"] < 1


# ── without a kernel ──


def test_percentiles_are_by_nearest_rank_and_times_round_up_to_microseconds() -> None:
    times = Times()
    times.add([number * NS_PER_US for number in range(1_000, 0, -1)])
    assert times.figures() == {"p50_ms": 0.5, "p99_ms": 0.99, "p99.9_ms": 0.999, "max_ms": 1.0}
    other = Times()
    other.add([1])
    assert other.percentile_ms(50) == 0.001
    assert len(times + other) == 1_001


def test_a_delivery_is_judged_by_its_own_frame_and_what_is_missing_counts() -> None:
    deliveries = Deliveries(1, 3)
    seen = NS_PER_MS
    deliveries.note([3 * NS_PER_MS, 4 * NS_PER_MS, 6 * NS_PER_MS], [seen] * 3, {Source.CAPTURE}, 0)
    deliveries.note([0, 9 * NS_PER_MS, 0], [0, seen, 0], {Source.P2P, 0}, 2)
    figures = deliveries.figures()
    assert (figures["blocks"], figures["deliveries"], figures["missing"], figures["surplus"]) == (2, 4, 2, 2)
    assert figures["captured_share"] == 0.5
    assert figures["loss_before_repair"] == round(2 / 6, 9)
    assert figures["enterprise"]["max_ms"] == 2
    assert (figures["turbo"]["p50_ms"], figures["turbo"]["max_ms"]) == (5, 8)
    assert (figures["turbo_last_ms_p50"], figures["turbo_last_ms_p99"]) == (5, 8)
    assert figures["first_ms_p50"] == 2


def test_a_tier_that_got_nothing_is_an_error_and_no_figure() -> None:
    deliveries = Deliveries(1, 2)
    deliveries.note([5, 0], [1, 0], {Source.CAPTURE, 0}, 0)
    with pytest.raises(RuntimeError, match="a tier has got nothing"):
        deliveries.figures()
