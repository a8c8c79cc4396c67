"""The best chain in memory, packed: 80 bytes a header, an index of 4 bytes a slot, work at every 48th height.

950,000 headers as Python objects would cost many hundred megabytes; here they are one bytearray. A header's hash is not
stored: it is the `previous` field of its successor, so only the tip's stands apart. The index (hash → height) is a
table of heights with open addressing, whose entries are hints, checked against the chain at each lookup: headers cut
off by a reorganisation need no deletion, and what they leave behind goes when the table is next built. Nothing here
judges a header.
"""

from __future__ import annotations

from array import array
from struct import Struct

from sprint.bitcoin.block import HEADER_SIZE, work_of
from sprint.bitcoin.difficulty import MEDIAN_SPAN, header_bits

WORK_STRIDE = 48
"""Divides 2,016 and 144: no stretch of constant nBits is cut needlessly, and a work is at most 47 additions away."""

_EMPTY = 0
_FIRST_SLOTS = 1 << 12
_PREVIOUS = 4
_TIME = Struct("<68xI8x")


class PackedChain:
    """A chain of headers from genesis to a tip, with its index and its cumulative work."""

    def __init__(self, genesis: bytes, genesis_hash: bytes) -> None:
        self.headers = bytearray(genesis)
        """height × 80 bytes on; whoever appends calls `commit` before anything else is asked."""
        self.tip_hash = genesis_hash
        self.tip_height = 0
        self.tip_work = work_of(header_bits(genesis))
        self._work = [self.tip_work]
        self._slots = array("I", bytes(4 * _FIRST_SLOTS))
        self._mask = _FIRST_SLOTS - 1
        self._used = 0
        self._index([int.from_bytes(genesis_hash, "little")], 0)

    def commit(self, hashes: list[int], tip_hash: bytes, bits: int) -> None:
        """Takes in the headers just appended: their hashes as little-endian integers, all of these nBits.

        They must not reach beyond the next multiple of WORK_STRIDE.
        """
        first = self.tip_height + 1
        self.tip_hash = tip_hash
        self.tip_height += len(hashes)
        self.tip_work += len(hashes) * work_of(bits)
        if self.tip_height % WORK_STRIDE == 0:
            self._work.append(self.tip_work)
        self._used += len(hashes)
        if 3 * self._used > 2 * len(self._slots):
            self._rebuild()
        else:
            self._index(hashes, first)

    def truncate(self, height: int) -> None:
        """Makes `height` the tip."""
        work = self.work_at(height)
        self.tip_hash = self.hash_at(height)
        self.tip_height = height
        self.tip_work = work
        del self.headers[(height + 1) * HEADER_SIZE :]
        del self._work[height // WORK_STRIDE + 1 :]

    def header_at(self, height: int) -> bytes:
        """80 bytes. Raises IndexError for a height that the chain doesn't have."""
        self._check(height)
        return bytes(self.headers[height * HEADER_SIZE : (height + 1) * HEADER_SIZE])

    def hash_at(self, height: int) -> bytes:
        """32 bytes, wire order. Raises IndexError for a height that the chain doesn't have."""
        self._check(height)
        if height == self.tip_height:
            return self.tip_hash
        start = (height + 1) * HEADER_SIZE + _PREVIOUS
        return bytes(self.headers[start : start + 32])

    def height_of(self, block_hash: bytes) -> int | None:
        """The height of that hash on this chain; None if it isn't on it."""
        slots = self._slots
        mask = self._mask
        slot = int.from_bytes(block_hash[:4], "little") & mask
        while (entry := slots[slot]) != _EMPTY:
            height = entry - 1
            if height <= self.tip_height and self.hash_at(height) == block_hash:
                return height
            slot = (slot + 1) & mask
        return None

    def work_at(self, height: int) -> int:
        """The chain's work from genesis up to and with that height. Raises IndexError beyond the tip."""
        self._check(height)
        if height == self.tip_height:
            return self.tip_work
        stop = (height + 1) * HEADER_SIZE
        start = (height // WORK_STRIDE * WORK_STRIDE + 1) * HEADER_SIZE
        own = (
            work_of(int.from_bytes(self.headers[at + 72 : at + 76], "little")) for at in range(start, stop, HEADER_SIZE)
        )
        return self._work[height // WORK_STRIDE] + sum(own)

    def times_up_to(self, height: int, count: int = MEDIAN_SPAN) -> list[int]:
        """The times of the last `count` headers up to that height, oldest first; fewer near genesis."""
        start = max(0, height - count + 1) * HEADER_SIZE
        stop = (height + 1) * HEADER_SIZE
        return [time for (time,) in _TIME.iter_unpack(self.headers[start:stop])]

    def _check(self, height: int) -> None:
        if not 0 <= height <= self.tip_height:
            raise IndexError(f"height {height}: the chain goes from 0 to {self.tip_height}")

    def _index(self, hashes: list[int], height: int) -> None:
        slots = self._slots
        mask = self._mask
        for value in hashes:
            # The low bits of a little-endian hash are random even where proof of work makes the high ones zero.
            slot = value & mask
            while slots[slot]:
                slot = (slot + 1) & mask
            height += 1
            slots[slot] = height

    def _rebuild(self) -> None:
        """A table at most a third full. A pause of 0.3 s at 700,000 headers, and then not before 1,400,000."""
        count = self.tip_height + 1
        size = len(self._slots)
        while 3 * count > size:
            size *= 2
        self._slots = array("I", bytes(4)) * size
        self._mask = size - 1
        self._used = count
        headers = self.headers
        step = 4096
        for first in range(0, count - 1, step):
            last = min(first + step, count - 1)
            starts = range((first + 1) * HEADER_SIZE + _PREVIOUS, (last + 1) * HEADER_SIZE, HEADER_SIZE)
            self._index([int.from_bytes(headers[at : at + 4], "little") for at in starts], first)
        self._index([int.from_bytes(self.tip_hash[:4], "little")], count - 1)
