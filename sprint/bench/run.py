"""The benchmarks by name, and how a result is printed: `{"bench", "machine", "results", "ratios"}`."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from sprint.bench.plots import plot_detect, plot_fanout, plot_ring, plot_stream, require_matplotlib
from sprint.errors import HostError

Result = dict[str, dict[str, Any]]
Advance = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says beyond the name; None: the benchmark's own default."""

    subscribers: int | None = None
    announcements: int | None = None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One that `sprint bench` knows."""

    run: Callable[[Advance, Options], Result]
    plot: Callable[[Mapping[str, Any], Path], None] | None = None
    """Draws the whole printed object into a PNG file."""
    takes_subscribers: bool = False
    takes_announcements: bool = False


def wire(progress: Advance, _options: Options) -> Result:
    """Messages parsed a second beside python-bitcoinlib on the same bytes; headers verified a second; their memory."""
    from sprint.bench.wire_headers import measure_headers  # noqa: PLC0415 - only this benchmark needs its parts
    from sprint.bench.wire_messages import messages_per_second  # noqa: PLC0415

    progress("messages by both parsers", 0, 1)
    messages = messages_per_second()
    progress("messages by both parsers", 1, 1)
    headers = measure_headers(progress=progress)
    ratio = round(messages["ratio"], 2)
    return {
        "results": {
            "messages_per_second": round(messages["sprint"]),
            "bitcoinlib_messages_per_second": round(messages["bitcoinlib"]),
            **{f"messages_{name}": value for name, value in messages.items() if name not in {"sprint", "bitcoinlib"}},
            **headers,
        },
        "ratios": {"messages_per_second_vs_bitcoinlib": ratio},
    }


def ring(progress: Advance, _options: Options) -> Result:
    """A record's hop between two processes by our ring, beside Queue, pipe, Unix datagram socket and iceoryx2."""
    from sprint.bench.ring import measure_ring  # noqa: PLC0415

    return measure_ring(progress)


def stream(progress: Advance, options: Options) -> Result:
    """One record to up to 10,000 TCP subscribers, beside a bare loop of send() over the same sockets."""
    from sprint.bench.stream import SIZES, measure_stream  # noqa: PLC0415

    return measure_stream(progress, SIZES[-1] if options.subscribers is None else options.subscribers)


def detect(progress: Advance, options: Options) -> Result:
    """From a packet's arrival at the interface to hash and record: socket, AF_PACKET, AF_XDP, ring buffer."""
    from sprint.bench.detect import ANNOUNCEMENTS, measure_detect  # noqa: PLC0415

    return measure_detect(progress, ANNOUNCEMENTS if options.announcements is None else options.announcements)


def fanout(progress: Advance, options: Options) -> Result:
    """One record to up to 50,000 subscribers, on the wire and to sockets, beside libzmq, Redis and NATS."""
    from sprint.bench.fanout import SUBSCRIBERS, measure_fanout  # noqa: PLC0415

    return measure_fanout(progress, SUBSCRIBERS if options.subscribers is None else options.subscribers)


def end_to_end(progress: Advance, options: Options) -> Result:
    """From a block's announcement at the interface to each subscriber's frame at the far end, by the product itself."""
    from sprint.bench.end_to_end import BLOCKS, SUBSCRIBERS, measure_end_to_end  # noqa: PLC0415

    return measure_end_to_end(
        progress,
        BLOCKS if options.announcements is None else options.announcements,
        SUBSCRIBERS if options.subscribers is None else options.subscribers,
    )


def bulk(progress: Advance, _options: Options) -> Result:
    """Bulk TCP through an interface that is captured, beside one with an empty XDP program; native and generic."""
    from sprint.bench.bulk import measure_bulk  # noqa: PLC0415

    return measure_bulk(progress)


BENCHMARKS: dict[str, Benchmark] = {
    "bulk": Benchmark(bulk),
    "detect": Benchmark(detect, plot_detect, takes_announcements=True),
    "end-to-end": Benchmark(end_to_end, takes_subscribers=True, takes_announcements=True),
    "fanout": Benchmark(fanout, plot_fanout, takes_subscribers=True),
    "ring": Benchmark(ring, plot_ring),
    "stream": Benchmark(stream, plot_stream, takes_subscribers=True),
    "wire": Benchmark(wire),
}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
        "cpu": _cpu_model(),
        "python": platform.python_version(),
    }


def report(name: str, options: Options, *, as_json: bool, plot: Path | None = None) -> None:
    """Run the benchmark of that name and print what it found; progress goes to standard error.

    `plot`: draw it into that file too. Raises HostError, before anything is measured, where that can't be done.
    """
    if plot is not None:
        require_matplotlib()
        if not plot.parent.is_dir():
            raise HostError(f"--plot {plot}: no directory {plot.parent}")
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=total)
            bar.update(tasks[step], completed=done, total=total)

        result: dict[str, Any] = {"bench": name, "machine": machine(), **BENCHMARKS[name].run(advance, options)}
    draw = BENCHMARKS[name].plot
    if plot is not None and draw is not None:
        draw(result, plot)
    if as_json:
        print(json.dumps(result))
        return
    for part in ("machine", "results", "ratios"):
        print(f"{part}:")
        for key, value in result[part].items():
            print(f"  {key}: {value}")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
