"""How fast headers are verified under main's rules, and what a chain of them costs in memory.

The chain is synthetic (see `synthetic`), made first and put into a file; a fresh process then reads it in messages of
2,000 headers, as a peer sends them, and verifies each: link, proof of work, nBits with every retarget, version, median
time, clock, work, index. Its clock runs only while it verifies. Resident memory is all of that process, interpreter
included, and its peak tells whether growing the chain cost more in between.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sprint.bench.synthetic import SYNTHETIC, synthetic_headers
from sprint.bitcoin.block import HEADER_SIZE
from sprint.bitcoin.difficulty import header_bits
from sprint.chain import HeaderChain
from sprint.header_tree import MAX_HEADERS

if TYPE_CHECKING:
    from collections.abc import Callable

HEADERS = 950_000
_LATER_THAN_ANY = 1 << 32
_MB = 1_000_000


def measure_headers(
    count: int = HEADERS, progress: Callable[[str, int, int], None] | None = None, runs: int = 3
) -> dict[str, Any]:
    """Makes the chain, verifies it in `runs` fresh processes one after another, and reports the median run.

    `progress` is told the step, how much of it is done, and how much there is. Raises RuntimeError, with what the
    process printed, if a run fails.
    """
    report = progress or (lambda *_: None)
    with TemporaryDirectory(prefix="sprint-headers-") as folder:
        path = Path(folder) / "headers"
        retargets = _write(path, count, report)
        results = []
        for run in range(runs):
            report("verifying headers, run", run, runs)
            results.append(_verify_in_a_child(path))
        report("verifying headers, run", runs, runs)
    results.sort(key=lambda result: result["headers_per_second"])
    return {
        **results[len(results) // 2],
        "headers": count,
        "runs": runs,
        "retargets": count // SYNTHETIC.interval,
        "retargets_that_changed_bits": retargets,
        "chain": (
            "synthetic: main's rules with regtest's limit and genesis, mined here; periods alternately fast and slow, "
            "each eighth header 900 s behind; verified in messages of 2,000 on one core"
        ),
    }


def verify(path: Path) -> dict[str, float]:
    """Reads and verifies a file of headers in this process. Raises RuntimeError if one is refused."""
    chain = HeaderChain(SYNTHETIC)
    spent_ns = 0
    with path.open("rb") as file:
        while headers := file.read(MAX_HEADERS * HEADER_SIZE):
            begun = time.perf_counter_ns()
            result = chain.extend(headers, _LATER_THAN_ANY)
            spent_ns += time.perf_counter_ns() - begun
            if result.rejection is not None:
                raise RuntimeError(f"header {chain.tip_height + 1} was refused: {result.rejection.value}")
    memory = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if ":" in line
    )
    return {
        "headers_per_second": round(chain.tip_height * 1e9 / spent_ns),
        "chain_rss_mb": _megabytes(memory["VmRSS"]),
        "chain_peak_rss_mb": _megabytes(memory["VmHWM"]),
        "tip_height": chain.tip_height,
    }


def _megabytes(field: str) -> float:
    kibibytes, unit = field.split()
    assert unit == "kB"
    return round(int(kibibytes) * 1024 / _MB, 1)


def _write(path: Path, count: int, report: Callable[[str, int, int], None]) -> int:
    made = changes = 0
    bits = header_bits(SYNTHETIC.genesis_header)
    with path.open("wb") as file:
        for piece in synthetic_headers(count, batch=SYNTHETIC.interval):
            file.write(piece)
            made += len(piece) // HEADER_SIZE
            # A piece is as long as a period and begins with height 1: its last header is the next period's first.
            changes += header_bits(piece[-HEADER_SIZE:]) != bits
            bits = header_bits(piece[-HEADER_SIZE:])
            report("making headers", made, count)
    return changes


def _verify_in_a_child(path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "sprint.bench.wire_headers", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own interpreter
    if done.returncode:
        raise RuntimeError(f"verifying {path} failed with {done.returncode}: {done.stderr.strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    sys.stdout.write(json.dumps(verify(Path(sys.argv[1]))))
