"""`sprint bench bulk`, very small: that everything passes, and that what is to be captured is; not how fast it is."""

from __future__ import annotations

import socket

import pytest

from sprint.bench.bulk import PORTS, WAYS, _ratios, measure_bulk
from xdp.loader import missing

BYTES, ROUNDS = 16_000_000, 2


def test_every_way_has_its_turns_and_what_is_announced_meanwhile_is_captured() -> None:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    before = socket.if_nameindex()
    steps: list[tuple[str, int, int]] = []
    measured = measure_bulk(lambda *step: steps.append(step), BYTES, ROUNDS)
    assert socket.if_nameindex() == before
    results = measured["results"]
    assert (results["bytes_of_each"], results["rounds"]) == (BYTES, ROUNDS)
    for kind in PORTS:
        assert list(results[kind]) == [way.name for way in WAYS]
        for way in WAYS:
            figures = results[kind][way.name]
            speeds = figures["gbit_per_s"]
            assert 0 < speeds["least"] <= speeds["median"] <= speeds["most"]
            assert ("counters" in figures) == way.captured
            if way.captured:
                # A block each 1.5 MB, or what a peer says every 20 ms: more than one a turn, heard both ways.
                assert figures["counters"]["announcements"] >= ROUNDS
                assert figures["sightings"] >= ROUNDS
        assert (f"bulk, {kind}", ROUNDS, ROUNDS) in steps


def test_a_ratio_is_the_captures_share_of_what_passes_the_empty_program_in_the_same_mode() -> None:
    speeds = {
        "empty_native": [4.0, 1.0, 8.0],
        "capture_native": [3.0, 1.0, 4.0],
        "empty_generic": [8.0],
        "capture_generic": [2.0],
    }
    assert _ratios({(kind, name): speed for kind in PORTS for name, speed in speeds.items()}) == {
        "capture_vs_empty_xdp": 0.75,
        "capture_vs_empty_xdp_generic": 0.25,
        "capture_vs_empty_xdp_download": 0.75,
        "capture_vs_empty_xdp_download_generic": 0.25,
    }
