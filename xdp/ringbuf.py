"""A BPF ring buffer (BPF_MAP_TYPE_RINGBUF, Linux 5.8) read through its mapping, without a system call for a record.

The map is three things in one: a page with the consumer's position, which we write; a page with the producer's, and
the data, both read-only for us. The data are mapped twice over, so that a record which wraps lies in one piece. Each
record has a header of 8 bytes, whose first u32 is its length with two bits on top: BUSY while a program is writing it,
DISCARD when the program thought better of it. Positions are u64 and never wrap; records start at multiples of 8.

Limits: a program that finds no room can't write, and only it can count that; a record in writing holds up those after
it. Exactly one reader: two would each move the other's position. Memory order is as in rings: x86-64 only, and the
position is written by one store.

Rule: what poll() returned is valid until release(), which makes those views unusable. A slice made from one escapes
that: copy what is to be kept.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from typing import TYPE_CHECKING, final

from xdp.rings import RingCorruptError, require_strong_order

if TYPE_CHECKING:
    from types import TracebackType

BUSY, DISCARD = 1 << 31, 1 << 30
HEADER_BYTES = 8
_LENGTH_MASK = DISCARD - 1
_MAP_TYPE = 27  # BPF_MAP_TYPE_RINGBUF in linux/bpf.h
_PAGE = mmap.PAGESIZE


@final
class RingBuffer:
    """The reader's side of a ring buffer; a context manager. It goes on where the last reader's release() left off."""

    def __init__(self, control: memoryview, shared: memoryview, size: int) -> None:
        """Over memory that is mapped already: `control` the consumer's page, `shared` the producer's page and the data.

        `size` is that of the data, once, in bytes: a power of two. open() is what maps a map's descriptor.
        """
        require_strong_order()
        if size < 8 or size & (size - 1) or len(shared) < _PAGE + 2 * size:
            raise ValueError(
                f"a ring buffer of {size} bytes in {len(shared)}: a power of two, twice, and a page expected"
            )
        self.size = size
        self._mask = size - 1
        self.records = self.discarded = 0
        """Handed out, and passed over because the program discarded them."""
        self.busy = 0
        """How often poll() met a record that was still being written."""
        self._consumer = control[:8].cast("Q")
        self._producer = shared[:8].cast("Q")
        self.data = shared[_PAGE : _PAGE + 2 * size]
        """Both mappings; peek() tells where in it."""
        self._words = self.data.cast("I")
        self._next = self._released = self._consumer[0]
        self._held: list[memoryview] = []
        self._lent = False
        """Whether any record was handed out since the last release."""
        self._mappings: list[mmap.mmap] = []
        self._descriptor = -1

    @classmethod
    def open(cls, map_fd: int) -> RingBuffer:
        """Map the ring buffer behind a map's descriptor, which stays the caller's: ours is a duplicate.

        Raises ValueError when it is another kind of map, OSError when it can't be mapped, UnsupportedMachineError.
        """
        size = _size(map_fd)
        control = mmap.mmap(map_fd, _PAGE)
        shared = mmap.mmap(map_fd, _PAGE + 2 * size, prot=mmap.PROT_READ, offset=_PAGE)
        made = cls(memoryview(control), memoryview(shared), size)
        made._mappings += control, shared
        made._descriptor = os.dup(map_fd)
        return made

    def fileno(self) -> int:
        """For poll and epoll: readable while something lies unreleased, when programs submit with a wake-up.

        It is readable too while the only record is still busy: poll() returns [] then, for the moment that takes.
        """
        return self._descriptor

    def poll(self, limit: int = 64) -> list[memoryview]:
        """The next records in order, at most `limit` (discarded ones count towards it); [] when none is ready.

        No system call. Records of earlier polls stay valid, and keep their room, until release().
        """
        data = self.data
        found = [data[start:end] for start, end in self.peek(limit)]
        self._held += found
        return found

    def peek(self, limit: int = 64) -> list[tuple[int, int]]:
        """As poll(), but only where the records begin and end in `data`: a view of each would cost as much again.

        Whoever makes views has to let go of them by release(); the records' bytes are somebody else's after that.
        """
        there, at = self._producer[0], self._next
        if there == at:
            return []
        words, mask = self._words, self._mask
        found: list[tuple[int, int]] = []
        while limit > 0:
            start = at & mask
            length = words[start >> 2]
            if length >= DISCARD:
                if length & BUSY:
                    self.busy += 1
                    break
                length &= _LENGTH_MASK
                self.discarded += 1
            else:
                found.append((start + HEADER_BYTES, start + HEADER_BYTES + length))
            at += (length + HEADER_BYTES + 7) & -8
            if at >= there:
                break
            limit -= 1
        if at > there:
            raise RingCorruptError(f"a record of {length} bytes ends at {at}, the producer stands at {there}")
        self._next = at
        if found:
            self._lent = True
            self.records += len(found)
        elif not self._lent:
            # Nothing to wait for: room of discarded records that stayed taken would keep the descriptor readable.
            self._consumer[0] = self._released = at
        return found

    def release(self) -> None:
        """Give back the room of everything polled so far; its views raise ValueError from now on."""
        if self._released == self._next:
            return
        for view in self._held:
            view.release()
        self._held.clear()
        self._lent = False
        self._consumer[0] = self._released = self._next

    def close(self) -> None:
        """Unmap. What was not released comes again to the next reader. Harmless if repeated."""
        for view in (*self._held, self._consumer, self._producer, self._words, self.data):
            view.release()
        self._held.clear()
        for mapping in self._mappings:
            # A slice that somebody kept holds the mapping until it is dropped: that hurts nobody.
            with contextlib.suppress(BufferError):
                mapping.close()
        self._mappings.clear()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> RingBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _size(map_fd: int) -> int:
    """Bytes of data, as the kernel tells of any map's descriptor in /proc/self/fdinfo."""
    try:
        with open(f"/proc/self/fdinfo/{map_fd}", encoding="ascii") as file:
            facts = dict(line.split(":", 1) for line in file if ":" in line)
    except FileNotFoundError:
        raise OSError(errno.EBADF, f"ring buffer: descriptor {map_fd} isn't open") from None
    kind = facts.get("map_type", "none").strip()
    if kind != str(_MAP_TYPE):
        raise ValueError(f"descriptor {map_fd}: map type {kind}, {_MAP_TYPE} (ring buffer) expected")
    return int(facts["max_entries"])
