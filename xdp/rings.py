"""The four rings of an AF_XDP socket, over memory that the kernel shares: reserve/submit and peek/release.

We produce into the fill and TX rings and consume from the RX and completion rings; the kernel does the reverse.
Positions run freely modulo 2**32 and are masked to find their slot, so a full ring and an empty one differ (see the
kernel's Documentation/networking/af_xdp.rst for the layout; MMAP_OFFSETS tells where things lie in each mapping).

Memory model: a slot must be written before the index that publishes it, and read after the index that announced it. On
x86-64 loads are not reordered with loads nor stores with stores, and the interpreter makes each in program order, so
plain accesses are enough and there is no fence here. Machines of weaker order (arm64) would need one, and are refused.

Rule: a shared index is written only by item assignment on a memoryview cast to its width, which is one aligned store.
struct.pack_into zeroes its destination first, and the other side would see that zero.
"""

from __future__ import annotations

import platform
from typing import NamedTuple

MODULUS = 1 << 32
"""Indices are u32 and wrap."""
NEED_WAKEUP = 1
"""XDP_RING_NEED_WAKEUP, in the flags of the fill and TX rings: the kernel wants a system call to go on."""
STRONGLY_ORDERED = frozenset({"x86_64", "AMD64"})
_INDEX_MASK = MODULUS - 1
_NONE = range(0)


class UnsupportedMachineError(OSError):
    """This processor's memory order isn't what the rings rely on; no errno, for it isn't the kernel that refuses."""


class RingCorruptError(RuntimeError):
    """The indices contradict each other: somebody else writes this ring."""


def require_strong_order(machine: str | None = None) -> None:
    """Raise UnsupportedMachineError unless plain loads and stores are ordered enough; `machine` as uname -m has it."""
    machine = platform.machine() if machine is None else machine
    if machine not in STRONGLY_ORDERED:
        raise UnsupportedMachineError(
            f"machine {machine}: rings shared with the kernel need x86-64, whose memory order makes fences unnecessary"
        )


class RingOffsets(NamedTuple):
    """Where a ring's parts lie in its mapping, in bytes (struct xdp_ring_offset)."""

    producer: int
    consumer: int
    descriptors: int
    flags: int


Descriptor = tuple[int, int, int]
"""A frame in the UMEM: address, length, options (struct xdp_desc). Bare, since naming the three costs as much again."""


class _Ring:
    """The shared indices and slots of one ring; `entries` is a power of two."""

    __slots__ = ("_consumer", "_flags", "_mask", "_producer", "_slots", "entries")
    SLOT_BYTES = 8

    def __init__(self, memory: memoryview, offsets: RingOffsets, entries: int) -> None:
        require_strong_order()
        if entries <= 0 or entries & (entries - 1):
            raise ValueError(f"a ring of {entries} entries: a power of two is expected")
        end = offsets.descriptors + entries * self.SLOT_BYTES
        self.entries = entries
        self._mask = entries - 1
        self._producer = memory[offsets.producer : offsets.producer + 4].cast("I")
        self._consumer = memory[offsets.consumer : offsets.consumer + 4].cast("I")
        self._flags = memory[offsets.flags : offsets.flags + 4].cast("I")
        self._slots = memory[offsets.descriptors : end].cast("Q")

    @classmethod
    def size(cls, offsets: RingOffsets, entries: int) -> int:
        """Bytes to map for a ring of that many entries."""
        return offsets.descriptors + entries * cls.SLOT_BYTES

    @property
    def needs_wakeup(self) -> bool:
        """Whether the kernel sleeps until a system call wakes it; fill and TX rings bound with USE_NEED_WAKEUP only."""
        return bool(self._flags[0] & NEED_WAKEUP)

    def close(self) -> None:
        """Let go of the memory, so that it can be unmapped. The ring is of no use afterwards."""
        for view in (self._producer, self._consumer, self._flags, self._slots):
            view.release()


class _Producer(_Ring):
    __slots__ = ("_reserved", "_seen_consumer", "_submitted")

    def __init__(self, memory: memoryview, offsets: RingOffsets, entries: int) -> None:
        super().__init__(memory, offsets, entries)
        self._submitted = self._reserved = self._producer[0]
        self._seen_consumer = self._consumer[0]

    def reserve(self, count: int) -> range:
        """Positions to write next, at most `count`, fewer or none when the ring is full; goes on after earlier ones."""
        if count < 0:
            raise ValueError(f"reserve({count}): a count is expected")
        start = self._reserved
        free = self.entries - ((start - self._seen_consumer) & _INDEX_MASK)
        if free < count:
            self._seen_consumer = self._consumer[0]
            free = self.entries - ((start - self._seen_consumer) & _INDEX_MASK)
            if free < 0:
                raise RingCorruptError(f"consumer index {self._seen_consumer} is ahead of the producer's {start}")
        granted = min(free, count)
        self._reserved = (start + granted) & _INDEX_MASK
        return range(start, start + granted)

    def submit(self, count: int) -> None:
        """Hand the oldest `count` reserved positions to the kernel; each must have been written."""
        if not 0 <= count <= (self._reserved - self._submitted) & _INDEX_MASK:
            raise ValueError(f"submit({count}): {(self._reserved - self._submitted) & _INDEX_MASK} are reserved")
        self._submitted = (self._submitted + count) & _INDEX_MASK
        self._producer[0] = self._submitted


class FillRing(_Producer):
    """Chunks of the UMEM that the kernel may receive into."""

    __slots__ = ()

    def __setitem__(self, position: int, address: int) -> None:
        """Write the address of a chunk, bytes from the UMEM's start, into a reserved position."""
        self._slots[position & self._mask] = address


class TxRing(_Producer):
    """Frames for the kernel to send."""

    __slots__ = ()
    SLOT_BYTES = 16

    def __setitem__(self, position: int, frame: Descriptor) -> None:
        """Write a descriptor into a reserved position."""
        address, length, options = frame
        slot = (position & self._mask) << 1
        self._slots[slot] = address
        self._slots[slot + 1] = options << 32 | length


class _Consumer(_Ring):
    __slots__ = ("_peeked", "_released")

    def __init__(self, memory: memoryview, offsets: RingOffsets, entries: int) -> None:
        super().__init__(memory, offsets, entries)
        self._released = self._peeked = self._consumer[0]

    def peek(self, limit: int) -> range:
        """The next positions to read, at most `limit`; none when nothing new is there. Goes on after earlier peeks."""
        start = self._peeked
        there = self._producer[0]
        if there == start:
            return _NONE
        available = (there - start) & _INDEX_MASK
        if available > self.entries:
            raise RingCorruptError(f"producer index {there} is {available} ahead, in a ring of {self.entries}")
        taken = min(available, limit)
        if taken < 0:
            raise ValueError(f"peek({limit}): a count is expected")
        self._peeked = (start + taken) & _INDEX_MASK
        return range(start, start + taken)

    def release(self, count: int) -> None:
        """Give the oldest `count` peeked positions back to the kernel, which may overwrite them at once."""
        if not 0 <= count <= (self._peeked - self._released) & _INDEX_MASK:
            raise ValueError(f"release({count}): {(self._peeked - self._released) & _INDEX_MASK} are peeked")
        self._released = (self._released + count) & _INDEX_MASK
        self._consumer[0] = self._released


class RxRing(_Consumer):
    """Frames that arrived."""

    __slots__ = ()
    SLOT_BYTES = 16

    def __getitem__(self, position: int) -> Descriptor:
        """The descriptor at a peeked position."""
        slot = (position & self._mask) << 1
        rest = self._slots[slot + 1]
        return self._slots[slot], rest & 0xFFFFFFFF, rest >> 32


class CompletionRing(_Consumer):
    """Frames that were sent, whose chunks are ours again."""

    __slots__ = ()

    def __getitem__(self, position: int) -> int:
        """The address at a peeked position, bytes from the UMEM's start."""
        return self._slots[position & self._mask]
