"""`sprint bench stream`, very small: that the figures are of what was sent and received."""

from __future__ import annotations

import functools
import json
import resource
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from sprint.bench import plots, stream
from sprint.bench.run import BENCHMARKS, Options, report
from sprint.errors import HostError
from sprint.tiers import NS_PER_US, PROFILES, Tier

if TYPE_CHECKING:
    from pathlib import Path

SUBSCRIBERS, ROUNDS = 150, 4
Measured = tuple[dict[str, Any], list[tuple[str, int, int]]]


@pytest.fixture(scope="module")
def measured() -> Measured:
    steps: list[tuple[str, int, int]] = []
    return stream.measure_stream(lambda *step: steps.append(step), SUBSCRIBERS, ROUNDS), steps


def test_each_size_up_to_the_largest_is_measured_both_ways(measured: Measured) -> None:
    result, steps = measured
    sizes = result["results"]["sizes"]
    assert [size["subscribers"] for size in sizes] == [1, 100, SUBSCRIBERS]
    for size in sizes:
        assert size["rounds"] == ROUNDS
        assert (f"{size['subscribers']:,} subscribers", ROUNDS, ROUNDS) in steps
        for way in (size["sprint"], size["bare"]):
            assert 0 < way["first_ms"] <= way["median_ms"] <= way["last_ms"] < 60_000
            assert way["cpu_ms"] > 0
            assert way["sent_ms"] <= way["sent_p90_ms"]
            # Nothing goes out in less than a microsecond a send.
            assert way["sent_ms"] * 1000 >= size["subscribers"]
    assert sizes[0]["sprint"]["first_ms"] == sizes[0]["sprint"]["last_ms"]


def test_the_ratio_is_the_largest_size_s(measured: Measured) -> None:
    result, _ = measured
    assert result["ratios"] == {"vs_bare_send_loop": result["results"]["sizes"][-1]["vs_bare_send_loop"]}
    assert result["ratios"]["vs_bare_send_loop"] > 0.1


def test_how_many_fit_a_tier_follows_from_its_target_and_the_cost_of_a_send(measured: Measured) -> None:
    results = measured[0]["results"]
    for tier in Tier:
        fit = results["subscribers_within_relay_target"][tier.label]
        cost_us = PROFILES[tier].relay_target_ns / NS_PER_US / fit
        assert cost_us == pytest.approx(results["us_a_send"], rel=0.05)


def test_a_frame_that_isn_t_the_round_s_yields_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = stream._Sender.publication

    def mistaken(sender: stream._Sender) -> Any:
        sequence, send = prepared(sender)
        return sequence + 1, send

    monkeypatch.setattr(stream._Sender, "publication", mistaken)
    with pytest.raises(RuntimeError, match="received frame 1 where 2 was sent"):
        stream.measure({"subscribers": 3, "rounds": 1}, lambda *_: None)


def test_more_subscribers_than_a_process_may_have_descriptors_are_refused_with_the_number_that_fits() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        pytest.skip("this machine has no such limit")
    with pytest.raises(HostError, match=f"{hard + 1} subscribers need .* --subscribers {hard - 64}"):
        stream.measure_stream(lambda *_: None, hard + 1)


def test_the_plot_is_a_picture(measured: Measured, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "stream.png"
    plots.plot_stream({"machine": {"cpu": "a CPU", "cpus": 2}, **json.loads(json.dumps(measured[0]))}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sprint", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "no benchmark 'nonsense': one of " + ", ".join(BENCHMARKS)),
        (["wire", "--plot", "x.png"], "--plot: nothing to draw of wire"),
        (["ring", "--subscribers", "5"], "--subscribers: ring has none"),
    ],
)
def test_what_a_benchmark_does_not_take_is_wrong_usage_in_one_line(arguments: list[str], words: str) -> None:
    done = bench(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"sprint: {words}\n")


def test_a_plot_that_can_t_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = bench("stream", "--plot", str(tmp_path / "missing" / "x.png"))
    assert done.returncode == 1
    assert done.stderr == f"sprint: --plot {tmp_path}/missing/x.png: no directory {tmp_path}/missing\n"


def test_without_matplotlib_a_plot_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    with pytest.raises(HostError, match="--plot needs matplotlib: pip install matplotlib"):
        plots.require_matplotlib()


def test_the_command_prints_one_json_object_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stream, "measure_stream", functools.partial(stream.measure_stream, rounds=2))
    report("stream", Options(subscribers=2), as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ["bench", "machine", "results", "ratios"]
    assert [size["subscribers"] for size in printed["results"]["sizes"]] == [1, 2]
