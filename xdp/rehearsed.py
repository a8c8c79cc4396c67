"""A capture of what we say ourselves: segments by the same code as real ones, through memory that nobody shares.

It is there to keep that code in the processor's caches while nothing happens. What it can't rehearse is the kernel's
part, and the rings of the AF_XDP socket.
"""

from __future__ import annotations

import mmap
import struct
from typing import TYPE_CHECKING, final

from xdp.capture import Capture, Handover
from xdp.loader import COMMON
from xdp.ringbuf import HEADER_BYTES, RingBuffer
from xdp.segments import Backend

if TYPE_CHECKING:
    from xdp.segments import Segment

_SIZE = 1 << 16
_ENTRY, _STAMP = COMMON.layouts["express_entry"], COMMON.layouts["mirror_stamp"]
_MARK = COMMON.constants["MARK"]
_PORTS = (18444, 50_000)
_ADDRESSES = (bytes(10) + b"\xff\xff\x7f\0\0\1",) * 2
_ETHERNET = bytes(12) + b"\x08\x00"
_IP = struct.Struct("!BxHxxxxBBxx4s4s")
_TCP = struct.Struct("!HHIIBBHHH")
_IP_AND_TCP_SIZE = 40
_ACK = 0x10


@final
class _Frames:
    """In the place of the AF_XDP socket."""

    def __init__(self) -> None:
        self.waiting: list[memoryview] = []

    def peek(self, _limit: int) -> list[memoryview]:
        frames, self.waiting = self.waiting, []
        return frames

    def release(self) -> None:
        """There is nothing to give back."""

    def close(self) -> None:
        self.waiting = []


@final
class RehearsedCapture:
    """What say() is given comes out of poll(): out of a ring buffer, and as a mirrored frame."""

    def __init__(self) -> None:
        self._shared = memoryview(bytearray(mmap.PAGESIZE + 2 * _SIZE))
        self._at = self._shared[:8].cast("Q")
        self._data = self._shared[mmap.PAGESIZE :]
        ring = RingBuffer(memoryview(bytearray(mmap.PAGESIZE)), self._shared, _SIZE)
        self._mirror = _Frames()
        self._capture = Capture(
            Handover(frozenset(), express_fd=-1, xsks_fd=-1, counters_fd=-1, mirror_index=0), ring, self._mirror
        )
        self._sequence = 0

    def say(self, payload: bytes, arrival_ns: int, backend: Backend) -> None:
        """One segment, of at most 1,400 bytes, next in a flow; it comes out of that backend alone."""
        size = len(payload)
        sequence, self._sequence = self._sequence, (self._sequence + size) & 0xFFFF_FFFF
        if backend is Backend.RINGBUF:
            entry = _ENTRY.packing.pack(arrival_ns, *_ADDRESSES, *_PORTS, sequence, size, size, 0, _ACK, 0, 0)
            self._write(entry + payload)
            return
        stamp = _STAMP.packing.pack(arrival_ns, 0, _MARK)
        ip = _IP.pack(0x45, _IP_AND_TCP_SIZE + size, 64, 6, _ADDRESSES[0][12:], _ADDRESSES[1][12:])
        tcp = _TCP.pack(*_PORTS, sequence, 0, 0x50, _ACK, 0, 0, 0)
        self._mirror.waiting.append(memoryview(stamp + _ETHERNET + ip + tcp + payload))

    def _write(self, record: bytes) -> None:
        """As the kernel does, but for the second mapping, which is only written where the record wraps."""
        at = self._at[0]
        start = at & (_SIZE - 1)
        self._data[start : start + HEADER_BYTES + len(record)] = struct.pack("<II", len(record), 0) + record
        over = start + HEADER_BYTES + len(record) - _SIZE
        if over > 0:
            self._data[:over] = self._data[_SIZE : _SIZE + over]
        self._at[0] = at + (len(record) + HEADER_BYTES + 7 & -8)

    def fileno(self) -> int:
        """There is none."""
        return -1

    def poll(self) -> list[Segment]:
        """As Capture.poll()."""
        return self._capture.poll()

    def deadline(self) -> int | None:
        """As Capture.deadline()."""
        return self._capture.deadline()

    def counters(self) -> dict[str, int]:
        """None."""
        return {}

    def close(self) -> None:
        """Let go of the memory."""
        self._capture.close()
