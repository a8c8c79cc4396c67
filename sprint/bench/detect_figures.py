"""What `bench detect` notes of each announcement, and the figures and ratios that come of it. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sprint.bench.percentiles import percentiles_us

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sprint.bench.detect_announcements import Workload
    from sprint.events import Sighting

STAGES = ("seen", "hash", "record")
_CAPTURES = ("af_xdp", "ringbuf")


class Noted:
    """One way's announcements: when each arrived, was seen, known, and recorded; CLOCK_MONOTONIC ns."""

    def __init__(self) -> None:
        self.sent = self.heard = self.captured = 0
        self.latencies: dict[str, list[int]] = {stage: [] for stage in STAGES}
        """ns after the arrival; of those that count."""
        self.turn: dict[bytes, bool] = {}
        """By block hash, those of this turn; whether they count."""
        self._times: dict[bytes, tuple[int, int, int]] = {}
        self._stamped: set[bytes] = set()

    def begin(self, hashes: Sequence[bytes], uncounted: int) -> None:
        """A turn in which these are announced."""
        self.turn = {block_hash: at >= uncounted for at, block_hash in enumerate(hashes)}
        self._times.clear()
        self._stamped.clear()
        self.sent += len(hashes)

    @property
    def unstamped(self) -> int:
        """How many of this turn have no arrival yet."""
        return len(self.turn) - len(self._stamped)

    def note(self, sighting: Sighting, seen_ns: int, hash_ns: int, record_ns: int) -> bool:
        """That it was heard; whether it is this turn's, and the first time. A capture's sighting has its arrival."""
        block_hash = sighting.hash
        if block_hash not in self.turn or block_hash in self._times:
            return False
        self._times[block_hash] = (seen_ns, hash_ns, record_ns)
        self.heard += 1
        if sighting.peer.startswith("capture") and sighting.seen_ns:
            self.stamp(block_hash, sighting.seen_ns)
        return True

    def stamp(self, block_hash: bytes, arrival_ns: int) -> None:
        """When the packet passed that an announcement began in."""
        if block_hash not in self.turn or block_hash in self._stamped or not arrival_ns:
            return
        self._stamped.add(block_hash)
        self.captured += 1
        if self.turn[block_hash] and block_hash in self._times:
            for stage, time_ns in zip(STAGES, self._times[block_hash], strict=True):
                self.latencies[stage].append(time_ns - arrival_ns)


def figures_of(noted: dict[str, Noted], workload: Workload) -> dict[str, Any]:
    """By way: percentiles of each stage, and counts. Raises RuntimeError where nothing was heard."""
    silent = [name for name, one in noted.items() if not one.latencies["hash"]]
    if silent:
        raise RuntimeError(f"{workload.name}: nothing was heard by {', '.join(silent)}")
    ways: dict[str, dict[str, Any]] = {
        name: {
            **{stage: percentiles_us(latencies) for stage, latencies in one.latencies.items()},
            "count": len(one.latencies["hash"]),
            "sent": one.sent,
            "heard": one.heard,
            "captured": one.captured,
        }
        for name, one in noted.items()
    }
    capture = faster(ways, _CAPTURES)
    share = ways[capture]["hash"]["p50_us"] / ways["socket_blocking"]["hash"]["p50_us"]
    return {"ways": ways, "faster_capture": capture, "vs_socket_p50": round(share, 5)}


def faster(ways: dict[str, dict[str, Any]], prefixes: tuple[str, ...]) -> str:
    """The way whose median to the hash is the lowest, of those whose names begin so."""
    return min((name for name in ways if name.startswith(prefixes)), key=lambda name: ways[name]["hash"]["p50_us"])


def ratios(figures: dict[str, Any], prefix: str) -> dict[str, float]:
    """To the hash: a way's better mode by its median, beside the socket's two; its p99 is of that same mode."""
    ways = figures["ways"]
    capture, xsk = ways[faster(ways, _CAPTURES)]["hash"], ways[faster(ways, ("af_xdp",))]["hash"]
    blocking, busy = ways["socket_blocking"]["hash"], ways["socket_busy"]["hash"]
    named = {
        "capture_vs_socket_p50": capture["p50_us"] / blocking["p50_us"],
        "capture_vs_socket_p99": capture["p99_us"] / blocking["p99_us"],
        "capture_vs_socket_busy_p50": capture["p50_us"] / busy["p50_us"],
        "xsk_vs_socket_p50": xsk["p50_us"] / blocking["p50_us"],
        "xsk_vs_socket_busy_p50": xsk["p50_us"] / busy["p50_us"],
    }
    return {f"{prefix}{name}": round(ratio, 4) for name, ratio in named.items()}
