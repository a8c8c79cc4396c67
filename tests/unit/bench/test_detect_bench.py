"""`sprint bench detect`, very small: that every announcement is heard and stamped, not how fast it is."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

import pytest

from sprint.bench import plots
from sprint.bench.detect import MODES, ROUNDS, WARM_UP, _faster, _ratios, measure_detect
from sprint.bench.percentiles import PERCENTS
from xdp.loader import missing

if TYPE_CHECKING:
    from pathlib import Path

ANNOUNCEMENTS = 20
RATIOS = {
    "capture_vs_socket_p50",
    "capture_vs_socket_p99",
    "capture_vs_socket_busy_p50",
    "xsk_vs_socket_p50",
    "xsk_vs_socket_busy_p50",
}


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, Any], list[tuple[str, int, int]]]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    before = socket.if_nameindex()
    steps: list[tuple[str, int, int]] = []
    result = measure_detect(lambda *step: steps.append(step), ANNOUNCEMENTS)
    assert socket.if_nameindex() == before
    return result, steps


def test_every_mode_hears_every_announcement_and_knows_its_arrival(
    measured: tuple[dict[str, Any], list[tuple[str, int, int]]],
) -> None:
    result, steps = measured
    modes = result["results"]["modes"]
    assert list(modes) == [mode.name for mode in MODES]
    sent = ANNOUNCEMENTS + ROUNDS * WARM_UP
    for name, mode in modes.items():
        assert (mode["announcements"], mode["sent"], mode["heard"], mode["captured"]) == (
            ANNOUNCEMENTS,
            sent,
            sent,
            sent,
        ), name
        times = [mode[key] for key in (*(f"p{percent}_us" for percent in PERCENTS), "max_us")]
        assert times == sorted(times)
        assert times[0] > 1, f"{name}: no packet becomes a hash within a microsecond"
        assert times[-1] < 5_000_000, name
        assert (f"announcements by {name}", ROUNDS, ROUNDS) in steps
    assert result["results"]["captured_share"] == 1


def test_the_ratios_are_those_of_the_faster_mode(
    measured: tuple[dict[str, Any], list[tuple[str, int, int]]],
) -> None:
    result, _ = measured
    modes, ratios = result["results"]["modes"], result["ratios"]
    assert set(ratios) == RATIOS
    best = modes[result["results"]["faster_capture"]]
    assert ratios["capture_vs_socket_p50"] == pytest.approx(
        best["p50_us"] / modes["socket_blocking"]["p50_us"], abs=1e-4
    )


def test_ratios_divide_the_better_mode_by_the_sockets() -> None:
    medians = {"socket_blocking": 200, "socket_busy": 50, "af_xdp_blocking": 150, "af_xdp_busy": 40}
    medians |= {"ringbuf_blocking": 100, "ringbuf_busy": 10}
    figures = {name: {"p50_us": float(p50), "p99_us": 3.0 * p50} for name, p50 in medians.items()}
    assert _faster(figures, ("af_xdp", "ringbuf")) == "ringbuf_busy"
    assert _ratios(figures) == {
        "capture_vs_socket_p50": 0.05,
        "capture_vs_socket_p99": 0.05,
        "capture_vs_socket_busy_p50": 0.2,
        "xsk_vs_socket_p50": 0.2,
        "xsk_vs_socket_busy_p50": 0.8,
    }


def test_the_plot_is_a_picture(measured: tuple[dict[str, Any], list[tuple[str, int, int]]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "detect.png"
    plots.plot_detect({"machine": {"cpu": "a CPU", "cpus": 2}, **json.loads(json.dumps(measured[0]))}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
