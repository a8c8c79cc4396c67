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
_HOPS = {
    "sprint_busy": ("Sprint's ring, polled", _OURS),
    "sprint_blocking": ("Sprint's ring, woken by eventfd", _ALSO_OURS),
    "multiprocessing_queue": ("multiprocessing.Queue", _OTHERS[0]),
    "pipe": ("pipe", _OTHERS[1]),
    "unix_datagram": ("Unix datagram socket", _OTHERS[2]),
    "iceoryx2": ("iceoryx2, polled", _OTHERS[3]),
}

_WAYS = {
    "socket": ("socket", _OTHERS[0]),
    "packet": ("AF_PACKET", _OTHERS[3]),
    "af_xdp": ("AF_XDP", _ALSO_OURS),
    "ringbuf": ("BPF ring buffer", _OURS),
}
"""Of `bench detect`: what a way is called, and its colour."""
_FAN_OUTS = (
    ("wire", "live_frames", "live frames", _OURS),
    ("wire", "live_frames_two_cpus", "live frames, two CPUs", _ALSO_OURS),
    ("wire", "af_xdp", "AF_XDP", _OTHERS[3]),
    ("wire", "sendmmsg", "sendmmsg", _OTHERS[0]),
    ("sockets", "live_frames", "live frames", _OURS),
    ("sockets", "stream", "Sprint's TCP stream", _ALSO_OURS),
    ("sockets", "libzmq", "libzmq", _OTHERS[1]),
    ("sockets", "redis", "Redis", _OTHERS[2]),
    ("sockets", "nats", "NATS", _FAINT),
)
"""Of `bench fanout`: what is drawn, in this order."""
_STAGES = (("seen", 1.0), ("hash", 0.6), ("record", 0.3))


def require_matplotlib() -> None:
    """Raises HostError, with the remedy, when no picture can be drawn."""
    if find_spec("matplotlib") is None:
        raise HostError("--plot needs matplotlib: pip install matplotlib")


def plot_ring(result: Mapping[str, Any], path: Path) -> None:
    """Percentiles of the hop, a line for each way, both axes logarithmic."""
    results = result["results"]
    hops = sorted(results["hops"].items(), key=lambda item: -item[1]["p50_us"])
    figure = _figure()
    axes = figure.subplots()
    shown = [percent for percent in PERCENTS if percent >= 25]
    rarity = [100 / (100 - percent) for percent in shown]
    for name, hop in hops:
        label, colour = _HOPS[name]
        width = 2.6 if colour in {_OURS, _ALSO_OURS} else 1.5
        values = [hop[f"p{percent}_us"] for percent in shown]
        label = f"{label}: {hop['p50_us']:,.1f} µs"
        axes.plot(rarity, values, color=colour, linewidth=width, marker="o", markersize=3.5, label=label)
    axes.set(xscale="log", yscale="log", xlim=(min(rarity), max(rarity) * 1.02))
    axes.set_xticks(rarity, [f"{percent:g}" for percent in shown])
    axes.set_xlabel("percentile of records")
    axes.set_ylabel("writer hands over → reader has it, µs")
    legend = axes.legend(title="median", alignment="left", loc="upper left", framealpha=1, edgecolor="none")
    legend.get_title().set_fontweight("bold")
    _finish(
        figure,
        axes,
        path,
        f"A record of {results['record_bytes']} bytes from one process to another",
        f"{min(hop['records'] for _, hop in hops):,} records each, {results['pause_us']} µs apart, "
        f"in {results['rounds']} interleaved rounds; {result['machine']['cpu']}, {result['machine']['cpus']} CPUs",
    )


def plot_detect(result: Mapping[str, Any], path: Path) -> None:
    """Percentiles of the time to the hash, a line for each way, both axes logarithmic; beside it the stages."""
    results = result["results"]
    realistic = results["realistic"]
    ways = sorted(realistic["ways"].items(), key=lambda item: -item[1]["hash"]["p50_us"])
    figure = _figure()
    axes, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    shown = [percent for percent in PERCENTS if 25 <= percent <= 99]
    rarity = [100 / (100 - percent) for percent in shown]
    for row, (name, way) in enumerate(reversed(ways)):
        label, colour, busy = _way(name)
        style = "-" if busy else "--"
        values = [way["hash"][f"p{percent}_us"] for percent in shown]
        axes.plot(rarity, values, color=colour, linestyle=style, marker="o", markersize=3.5)
        done = 0.0
        for stage, alpha in _STAGES:
            until = way[stage]["p50_us"]
            bars.barh(row, until - done, left=done, color=colour, alpha=alpha, height=0.7)
            done = until
        bars.annotate(
            f"{label}: {way['hash']['p50_us']:,.0f} µs", (0, row + 0.36), xytext=(2, 0), textcoords="offset points",
            fontsize=7.5, va="bottom",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(min(rarity), max(rarity) * 1.02))
    axes.set_xticks(rarity, [f"{percent:g}" for percent in shown])
    axes.set_xlabel("percentile of announcements")
    axes.set_ylabel("its first packet at the interface → hash known, µs")
    bars.set_yticks([])
    bars.set_ylim(-0.5, len(ways) - 0.2)
    bars.set_xlabel("medians: seen, hash, record; µs")
    bars.spines[["top", "right", "left"]].set_visible(False)
    _finish(
        figure,
        axes,
        path,
        f"A compact block of {realistic['announcement_bytes'] / 1_000:,.0f} kB, until Python knows the hash",
        f"{min(way['count'] for _, way in ways):,} announcements each, solid: polled, dashed: waited for; "
        f"{result['machine']['cpu']}, {result['machine']['cpus']} CPUs",
    )


def _way(name: str) -> tuple[str, str, bool]:
    """What a way of `bench detect` is called, its colour, and whether it polls."""
    kind, _, mode = name.rpartition("_")
    label, colour = _WAYS[kind]
    busy = mode == "busy"
    return f"{label}, {'polled' if busy else 'blocking'}", colour, busy


def plot_stream(result: Mapping[str, Any], path: Path) -> None:
    """Time against subscribers, both axes logarithmic, with the tiers' relay targets across."""
    sizes = result["results"]["sizes"]
    numbers = [size["subscribers"] for size in sizes]
    figure = _figure()
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
            axes.axhline(target_ms, color=_FAINT, linewidth=0.8, linestyle=(0, (6, 4)), zorder=1)
            label = f"{tier.label} tier, {target_ms:g} ms"
            axes.annotate(
                label, (0.995, target_ms), xycoords=("axes fraction", "data"), xytext=(0, 2),
                textcoords="offset points", color=_FAINT, fontsize=8, ha="right", va="bottom",
            )  # fmt: skip
    # To the right there is room for the tiers' names, where no line runs through them.
    axes.set(xscale="log", yscale="log", xlim=(numbers[0] / 1.5, numbers[-1] * 8))
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.set_xlabel("TCP subscribers")
    axes.set_ylabel("after the publication, ms (median round)")
    axes.legend(loc="upper left", framealpha=1, edgecolor="none").set_zorder(1.5)  # hides targets, but no data
    _finish(
        figure,
        axes,
        path,
        "One record to every TCP subscriber, over loopback",
        f"{result['results']['us_a_send']:g} µs a send, {result['ratios']['vs_bare_send_loop']:.2f} of a bare loop's; "
        f"{result['machine']['cpu']}, {result['machine']['cpus']} CPUs",
    )


def plot_fanout(result: Mapping[str, Any], path: Path) -> None:
    """Time until the last subscriber has it against subscribers, both axes logarithmic; wire beside sockets."""
    results = result["results"]
    sizes = results["sizes"]
    numbers = [size["subscribers"] for size in sizes]
    figure = _figure()
    wire, sockets = figure.subplots(1, 2, sharey=True)
    axes = {"wire": wire, "sockets": sockets}
    for place, way, label, colour in _FAN_OUTS:
        found = [(size["subscribers"], size[place][way]) for size in sizes if size[place] and way in size[place]]
        points = [(number, figures["last_ms"]) for number, figures in found if "last_ms" in figures]
        if points:
            last = f"{label}: {points[-1][1]:.3g} ms"
            width = 2.6 if colour in {_OURS, _ALSO_OURS} else 1.5
            axes[place].plot(*zip(*points, strict=True), color=colour, linewidth=width, marker="o", ms=4, label=last)
    for place, words in (("wire", "on the wire: stamped by XDP at the far end"), ("sockets", "to sockets, and read")):
        axes[place].set(xscale="log", yscale="log", xlim=(numbers[0] / 1.5, numbers[-1] * 1.5))
        axes[place].set_xticks(numbers, [f"{number:,}" for number in numbers], fontsize=8)
        axes[place].set_xlabel(f"subscribers {words}", fontsize=9)
        axes[place].legend(loc="upper left", framealpha=1, edgecolor="none", fontsize=8)
    wire.set_ylabel("publication → the last subscriber has it, ms (median)")
    sockets.minorticks_off()
    sockets.grid(axis="y", color="#dee2e6", linewidth=0.7)
    sockets.spines[["top", "right"]].set_visible(False)
    _finish(
        figure,
        wire,
        path,
        f"One record of {results['record_bytes']} bytes to every subscriber",
        f"values: at the largest number; one veth pair, all ways in turns; "
        f"{result['machine']['cpu']}, {result['machine']['cpus']} CPUs",
    )


def _figure() -> Any:
    # By name: its types demand a newer Python than we support.
    return import_module("matplotlib.figure").Figure(figsize=(9, 5.7), layout="constrained")


def _finish(figure: Any, axes: Any, path: Path, title: str, small_print: str) -> None:
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.grid(axis="y", color="#dee2e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=10)
    figure.supxlabel(small_print, x=0.01, ha="left", fontsize=8, color=_FAINT)
    try:
        figure.savefig(path, dpi=DPI, format="png")
    except OSError as error:
        raise HostError(f"--plot {path}: {error.strerror or error}") from None
