"""The memory that the fan-out's program shares with its three processes, and the descriptors that give access to it.

Layouts come from bpf/egress.h, their only copy. Whoever is handed a FanoutHandover maps what it needs: the table's
owner (fanout_table) writes subscribers and orders, a sender (fanout_run) its own runs.

How an order changes under runs that go on: it never does. The owner writes a whole new one into a place of the eight
that no run has pinned, and makes it the current one by one store; a run pins the current one, looks whether it still is
the current one, and visits it to its end. An entry that left is written again only when no run has an order pinned
that may name it. Pinning is a store followed by a load, which x86-64 may reorder: the store can stay in the processor's
buffer for some nanoseconds. That is no danger, since places and entries are taken again in the order in which they
were given up, several changes (of tens of microseconds each) later.

Rule: a shared word is written by item assignment on a memoryview cast to its width, which is one store (see rings).
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, final

from xdp.loader import BPF_FOLDER, parse_common
from xdp.rings import require_strong_order

if TYPE_CHECKING:
    from collections.abc import Sequence

EGRESS = parse_common((BPF_FOLDER / "egress.h").read_text())
SUBSCRIBERS = EGRESS.constants["SUBSCRIBERS"]
ENTRIES = EGRESS.constants["ENTRIES"]
SNAPSHOTS = EGRESS.constants["SNAPSHOTS"]
RUNS = EGRESS.constants["RUNS"]
RUN_CPUS = EGRESS.constants["RUN_CPUS"]
INTERFACES = EGRESS.constants["INTERFACES"]
BATCH = EGRESS.constants["FRAMES_A_BATCH"]
PAYLOAD_LIMIT = EGRESS.constants["PAYLOAD_LIMIT"]
MAPS = ("subscribers", "orders", "snapshots", "directory", "runs", "devices")


class Sender(IntEnum):
    """Who runs; each has runs of its own, so that they don't get into each other's way."""

    RELAY = 0
    """Publications."""
    WORKER = 1
    """Heartbeats, and the proofs of interfaces."""
    OTHER = 2
    """Benchmarks and tests."""


class Rank(IntEnum):
    """The lower is served first."""

    FIRST = 0
    """Enterprise."""
    SECOND = 1
    """Turbo."""


class Step(IntEnum):
    """The ladder of how subscribers are served, best first."""

    LIVE_FRAMES = 0
    AF_XDP = 1
    SENDMMSG = 2


@dataclass(frozen=True, slots=True)
class FanoutHandover:
    """What a FanoutTable and a FanoutRun need of a Fanout: plain values, and descriptors, which are the fan-out's.

    Valid as it is in a forked child; another process is sent fds() by SCM_RIGHTS and uses with_fds().
    """

    program_fd: int
    subscribers_fd: int
    orders_fd: int
    snapshots_fd: int
    directory_fd: int
    runs_fd: int
    devices_fd: int
    contexts: tuple[int, ...]
    """Each run's interface, by which the program knows the run; nothing is sent or received there."""

    def fds(self) -> list[int]:
        """To be sent, in this order."""
        return [
            self.program_fd,
            self.subscribers_fd,
            self.orders_fd,
            self.snapshots_fd,
            self.directory_fd,
            self.runs_fd,
            self.devices_fd,
        ]

    def with_fds(self, fds: Sequence[int]) -> FanoutHandover:
        """The same, with the numbers that the descriptors have in this process."""
        program, subscribers, orders, snapshots, directory, runs, devices = fds
        return replace(
            self,
            program_fd=program,
            subscribers_fd=subscribers,
            orders_fd=orders,
            snapshots_fd=snapshots,
            directory_fd=directory,
            runs_fd=runs,
            devices_fd=devices,
        )


def close_handover(handover: FanoutHandover) -> None:
    """Close the descriptors that were received by SCM_RIGHTS."""
    for fd in handover.fds():
        os.close(fd)


@final
class MappedArray:
    """An array map of structs in this process's memory."""

    def __init__(self, fd: int, entry_bytes: int, entries: int) -> None:
        """Raises OSError."""
        require_strong_order()
        self.entry_bytes = entry_bytes
        size = entry_bytes * entries
        self._memory = mmap.mmap(fd, size + -size % mmap.PAGESIZE)
        self.bytes = memoryview(self._memory)
        self.words = self.bytes.cast("I")
        self.longs = self.bytes.cast("Q")
        self._views = [self.longs, self.words, self.bytes]

    def close(self) -> None:
        """Unmap. Harmless if repeated."""
        for view in self._views:
            view.release()
        if not self._memory.closed:
            self._memory.close()


def word(struct_name: str, member: str) -> int:
    """Where a u32 of a struct lies, counted in u32."""
    offset = EGRESS.layouts[struct_name].offset(member)
    if offset % 4:
        raise ImportError(f"egress.h: {struct_name}.{member} is not aligned to 4 bytes")
    return offset // 4


def long(struct_name: str, member: str) -> int:
    """Where a u64 of a struct lies, counted in u64."""
    offset = EGRESS.layouts[struct_name].offset(member)
    if offset % 8:
        raise ImportError(f"egress.h: {struct_name}.{member} is not aligned to 8 bytes")
    return offset // 8
