from __future__ import annotations

import pytest

from sprint.bench.wire_messages import (
    bitcoinlib_reader,
    messages_by_kind,
    messages_per_second,
    mixed_stream,
    read_by_sprint,
)

pytest.importorskip("bitcoin.messages")


def test_both_sides_read_the_same_block_hashes_and_nonces_from_the_stream() -> None:
    kinds = messages_by_kind(seed=2, hours=1)
    data = mixed_stream(kinds)
    ours = list(read_by_sprint(data))
    assert ours == list(bitcoinlib_reader()(data))
    assert len(set(ours)) == len(ours) >= 30 + 6 + 6 + 6 + 2


def test_the_stream_is_the_same_for_the_same_seed_only() -> None:
    assert messages_by_kind(seed=3, hours=1) == messages_by_kind(seed=3, hours=1) != messages_by_kind(seed=4, hours=1)


def test_the_measurement_reports_both_sides_and_their_ratio() -> None:
    result = messages_per_second(0.0)
    assert result["rounds"] == 1
    assert result["ratio"] == pytest.approx(result["sprint"] / result["bitcoinlib"])  # one round: its own median
    assert {"ratio_without_transactions", "ratio_headers_many", "ratio_ping"} <= result.keys()
