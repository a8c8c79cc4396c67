"""Pictures of what the benchmarks found. matplotlib is loaded only when one is asked for."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sprint.bench.percentiles import PERCENTS
from sprint.errors import HostError
from sprint.tiers import NS_PER_MS, PROFILES, Tier

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DPI = 130
_OURS, _ALSO_OURS = "#d9480f", "#f59f00"
_OTHERS = ("#1864ab", "#2b8a3e", "#862e9c", "#495057")
_FAINT = "#868e96"


def require_matplotlib() -> None:
    """Raises HostError, with the remedy, when no picture can be drawn."""
    if find_spec("matplotlib") is None:
        raise HostError("--plot needs matplotlib: pip install matplotlib")


def plot_ring(result: Mapping[str, Any], path: Path) -> None:
    """Percentiles of the hop, a line for each way, both axes logarithmic: to the right, each step is rarer."""
    hops, results = result["results"]["hops"], result["results"]
    figure = _figure(9, 5.6)
    axes = figure.subplots()
    shown = [percent for percent in PERCENTS if percent >= 10]
    rarity = [100 / (100 - percent) for percent in shown]
    ends = []
    others = iter(_OTHERS)
    for name, hop in hops.items():
        ours = name.startswith("sprint")
        colour = {"sprint_busy": _OURS, "sprint_blocking": _ALSO_OURS}.get(name) or next(others)
        values = [hop[f"p{percent}_us"] for percent in shown]
        axes.plot(rarity, values, color=colour, linewidth=2.6 if ours else 1.5, marker="o", markersize=3.5)
        ends.append((hop["p50_us"], f"{name.replace('_', ' ')}  {hop['p50_us']:,.1f} µs", colour))
    axes.set(xscale="log", yscale="log", xlim=(min(rarity), max(rarity)))
    axes.set_xticks(rarity, [f"{percent:g}" for percent in shown])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.set_xlabel("percentile of records (each step to the right is rarer)")
    axes.set_ylabel("writer hands over → reader has it, µs")
    handles = [axes.plot([], [], color=colour, linewidth=2.6)[0] for _, _, colour in sorted(ends)[::-1]]
    legend = axes.legend(handles, [label for _, label, _ in sorted(ends)[::-1]], title="median", loc="upper left")
    legend.get_frame().set_linewidth(0)
    _finish(
        figure,
        axes,
        path,
        f"A record of {results['record_bytes']} bytes from one process to another",
        f"{min(hop['records'] for hop in hops.values()):,} records each, {results['pause_us']} µs apart, "
        f"in {results['rounds']} interleaved rounds; {result['machine']['cpu']}, {result['machine']['cpus']} CPUs",
    )


def plot_stream(result: Mapping[str, Any], path: Path) -> None:
    """Time against subscribers, both axes logarithmic, with the tiers' relay targets across."""
    sizes = result["results"]["sizes"]
    numbers = [size["subscribers"] for size in sizes]
    figure = _figure(9, 5.8)
    axes = figure.subplots()
    lines = (
        ("last subscriber has it", "sprint", "last_ms", _OURS, "-"),
        ("median subscriber has it", "sprint", "median_ms", _ALSO_OURS, "-"),
        ("first subscriber has it", "sprint", "first_ms", _OTHERS[1], "-"),
        ("all sent, by publish()", "sprint", "sent_ms", _OTHERS[0], "-"),
        ("all sent, by a bare loop of send()", "bare", "sent_ms", _OTHERS[0], ":"),
    )
    for label, way, key, colour, style in lines:
        values = [size[way][key] for size in sizes]
        axes.plot(numbers, values, style, color=colour, linewidth=2, marker="o", markersize=4, label=label)
    top = max(size["sprint"]["last_ms"] for size in sizes)
    for tier in Tier:
        target_ms = PROFILES[tier].relay_target_ns / NS_PER_MS
        if target_ms <= 3 * top:
            axes.axhline(target_ms, color=_FAINT, linewidth=0.8, linestyle=(0, (6, 4)))
            label = f"{tier.label}: within {target_ms:g} ms"
            axes.annotate(
                label, (0.995, target_ms), xycoords=("axes fraction", "data"), xytext=(0, 2),
                textcoords="offset points", color=_FAINT, fontsize=8, ha="right", va="bottom",
            )  # fmt: skip
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.set_xlabel("TCP subscribers")
    axes.set_ylabel("after the publication, ms (median round)")
    axes.legend(loc="upper left", frameon=False)
    _finish(
        figure,
        axes,
        path,
        "One record to every TCP subscriber, over loopback",
        f"{result['results']['us_a_send']:g} µs a send, {result['ratios']['vs_bare_send_loop']:.2f} of a bare loop's; "
        f"{result['machine']['cpu']}, {result['machine']['cpus']} CPUs",
    )


def _figure(width: float, height: float) -> Any:
    # By name: its types demand a newer Python than we support.
    return import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def _finish(figure: Any, axes: Any, path: Path, title: str, small_print: str) -> None:
    axes.grid(axis="y", color="#dee2e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=10)
    figure.supxlabel(small_print, x=0.01, ha="left", fontsize=8, color=_FAINT)
    try:
        figure.savefig(path, dpi=DPI, format="png")
    except OSError as error:
        raise HostError(f"--plot {path}: {error.strerror or error}") from None
