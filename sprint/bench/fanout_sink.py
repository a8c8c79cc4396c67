"""The far end of the wire, as `bench fanout` and `bench end-to-end` watch it: when each subscriber's frame came in.

A subscriber is a UDP port. The XDP program (xdp/bpf/arrivals.c) stamps the first frame of each with CLOCK_MONOTONIC and
drops it, as it drops those of a block's later records: no socket, no copy, nothing that a subscriber's own machine
would have to pay for. By default it reads the clock for each of them (arrivals.c says what else it can do, and why).
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple, final

from sprint.tiers import NS_PER_S
from xdp.fanout_maps import MappedArray
from xdp.loader import BPF_FOLDER, TIMEOUT_S, load_in_child, parse_common

if TYPE_CHECKING:
    from types import TracebackType

SOURCE_PORT = 8436
"""That datagrams come from."""
FIRST_PORT = 10_000
MOST = 50_000
"""Subscribers: the ports up to 60,000; those beyond are the kernel's to give away."""
_LAYOUT = parse_common((BPF_FOLDER / "arrivals.h").read_text())
_ARRIVAL = _LAYOUT.layouts["arrival"]
_LONGS, _WORDS = _ARRIVAL.size // 8, _ARRIVAL.size // 4
_LOOK_S = 0.0005
_EXACT = 16
"""The last subscribers, whose times are exact whatever the others' are."""


class Arrivals(NamedTuple):
    """What came of one publication, by subscriber, in their order; 0 where nothing came."""

    at_ns: list[int]
    seen_ns: list[int]
    """What the records say of when the block was first seen."""
    sources: set[int]
    """Of the records, all that there were."""
    sequences: set[int]
    surplus: int
    """Frames beyond the first."""


@final
class Sink:
    """The program, loaded, and its memory; a context manager. Whoever is in the far namespace attaches `program_fd`."""

    def __init__(self, clock_each: int = 1, timeout_s: float = TIMEOUT_S) -> None:
        """Load it: takes some seconds. With `clock_each`, the clock is read for each so many frames only.

        Raises LoadError, OSError.
        """
        with ExitStack() as undo:
            defines = {"SOURCE_PORT": SOURCE_PORT, "CLOCK_EACH": clock_each}
            programs, maps = load_in_child("arrivals.c", {"stamp": "XDP"}, ["arrivals"], defines, timeout_s)
            self.program_fd = programs["stamp"]
            for descriptor in (*programs.values(), *maps.values()):
                undo.callback(os.close, descriptor)
            self._area = MappedArray(maps["arrivals"], _ARRIVAL.size, _LAYOUT.constants["PORTS"])
            undo.callback(self._area.close)
            self._undo = undo.pop_all()

    def clear(self, subscribers: int) -> None:
        """Forget what the first so many have got."""
        start, size = FIRST_PORT * _ARRIVAL.size, subscribers * _ARRIVAL.size
        self._area.bytes[start : start + size] = bytes(size)
        exact = start + size - min(subscribers, _EXACT) * _ARRIVAL.size + _ARRIVAL.offset("exact")
        self._area.bytes[exact : start + size : _ARRIVAL.size] = bytes([1]) * min(subscribers, _EXACT)

    def wait(self, subscribers: int, patience_s: float) -> bool:
        """Until each of the first so many has got a frame; False: some haven't when time is up."""
        longs, give_up_ns = self._area.longs, time.monotonic_ns() + int(patience_s * NS_PER_S)
        last = (FIRST_PORT + subscribers - 1) * _LONGS + _ARRIVAL.offset("at_ns") // 8
        # The last one first: looking at all of them takes memory from who is sending.
        while longs[last] == 0 or 0 in longs[self._slice("at_ns", subscribers)].tolist():
            if time.monotonic_ns() > give_up_ns:
                return False
            time.sleep(_LOOK_S)
        return True

    def read(self, subscribers: int) -> Arrivals:
        """What the first so many have got since clear()."""
        longs, words = self._area.longs, self._area.words
        at_ns, seen_ns, sequences = (
            longs[self._slice(name, subscribers)].tolist() for name in ("at_ns", "seen_ns", "sequence")
        )
        start, stop = FIRST_PORT * _ARRIVAL.size, (FIRST_PORT + subscribers) * _ARRIVAL.size
        sources = self._area.bytes[start + _ARRIVAL.offset("source") : stop : _ARRIVAL.size].tolist()
        frames = words[(start + _ARRIVAL.offset("frames")) // 4 : stop // 4 : _WORDS].tolist()
        came = subscribers - at_ns.count(0)
        return Arrivals(at_ns, seen_ns, set(sources), set(sequences), sum(frames) - came)

    def close(self) -> None:
        """Unmap, and let go of the program."""
        self._undo.close()

    @staticmethod
    def _slice(name: str, subscribers: int) -> slice:
        start = FIRST_PORT * _LONGS + _ARRIVAL.offset(name) // 8
        return slice(start, (FIRST_PORT + subscribers) * _LONGS, _LONGS)

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
