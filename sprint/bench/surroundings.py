"""What else goes on on the machine while a benchmark runs: its figures are read beside it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from sprint.tiers import NS_PER_S


class Surroundings:
    """From now until figures() is asked for."""

    def __init__(self) -> None:
        self._begun_ns = time.monotonic_ns()
        self._load_average = os.getloadavg()[0]
        self._stolen_ns = stolen_ns()

    def figures(self) -> dict[str, Any]:
        """Load average before and after, the hypervisor's share of all CPUs' time (`steal_share`), and seconds."""
        elapsed_ns = time.monotonic_ns() - self._begun_ns
        stolen = stolen_ns() - self._stolen_ns
        return {
            "load_average": {"before": self._load_average, "after": os.getloadavg()[0]},
            "steal_share": round(stolen / (elapsed_ns * (os.cpu_count() or 1)), 5),
            "seconds": round(elapsed_ns / NS_PER_S, 1),
        }


def stolen_ns() -> int:
    """Time in which a hypervisor ran somebody else, of all CPUs together since the start (proc(5))."""
    first = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
    return int(first.split()[8]) * NS_PER_S // os.sysconf("SC_CLK_TCK")


def cpu_ns(pid: int) -> int:
    """What a process has used of CPUs by now, all its threads (clock_getcpuclockid(3))."""
    return time.clock_gettime_ns((~pid << 3) | 2)


def kept_waiting_ns(pid: int) -> int:
    """For how long a process's first thread has been ready to run while something else ran (proc(5), schedstat)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[1])
