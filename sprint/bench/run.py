"""The benchmarks by name, and how a result is printed: `{"bench", "machine", "results", "ratios"}`."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

Result = dict[str, dict[str, Any]]
Advance = Callable[[str, int, int], None]


def wire(progress: Advance) -> Result:
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


BENCHMARKS: dict[str, Callable[[Advance], Result]] = {"wire": wire}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
        "cpu": _cpu_model(),
        "python": platform.python_version(),
    }


def report(name: str, *, as_json: bool) -> None:
    """Run the benchmark of that name and print what it found; progress goes to standard error."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=total)
            bar.update(tasks[step], completed=done, total=total)

        result: dict[str, Any] = {"bench": name, "machine": machine(), **BENCHMARKS[name](advance)}
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    for part in ("machine", "results", "ratios"):
        print(f"{part}:")
        for key, value in result[part].items():
            print(f"  {key}: {value}")
    sys.stdout.flush()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
