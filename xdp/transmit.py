"""An AF_XDP socket that sends frames which stand ready in its memory: the rung below live frames.

Each subscriber has a frame in the UMEM, headers made when he joined; a publication writes payload and checksum, and
hands over descriptors. Copying mode, so it works on any Ethernet interface, without a program on it, and beside others'
programs and sockets of the same queue's receive side. About 1.5 to 2 µs a frame; the kernel takes 32 a system call.

Owns the socket, the UMEM and three ring mappings. What a driver drops after taking it, AF_XDP doesn't tell: `sent` is
what was taken. One thread; the socket's queue can be held by one socket only (see xsk).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, NamedTuple, final

from xdp.datagrams import Headers, checksum, finish, word_sum
from xdp.rings import CompletionRing, RingOffsets, TxRing, require_strong_order
from xdp.xsk import AF_XDP, SOL_XDP, BindFlag

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

_MMAP_OFFSETS, _TX_RING, _UMEM_REG, _FILL_RING, _COMPLETION_RING = 1, 3, 4, 5, 6
_TX_PAGE, _COMPLETION_PAGE = 0x80000000, 0x180000000
_SOCKADDR = struct.Struct("=HHIII")
_CHUNK_BYTES = 4096
FRAME_BYTES = 512
"""A frame's room: several lie in a chunk, none across two."""
PAYLOAD_LIMIT = 256
RING_ENTRIES = 2048
BUSY_RETRY_S, BUSY_PAUSE_S = 0.1, 0.002
"""A closed socket's hold on its queue ends in a kernel worker, a moment after close()."""
STUCK_S = 0.05
"""Without a frame taken, until the rest is given up."""
_SO_SNDBUFFORCE, _SEND_BUFFER = 32, 8 << 20
_libc = ctypes.CDLL(None, use_errno=True)


class Taken(NamedTuple):
    """What became of one datagram to many."""

    sent: int
    error: int
    """The errno that ended it before its time, or 0."""


@final
class Transmitter:
    """Frames by slot, for one interface; a context manager."""

    def __init__(self, ifindex: int, capacity: int, queue: int = 0) -> None:
        """Bind in the calling thread's namespace; `capacity` slots, 512 bytes of locked memory each.

        Raises OSError, its message naming the step (EBUSY: another socket holds the queue).
        """
        require_strong_order()
        self.ifindex, self.capacity = ifindex, capacity
        size = capacity * FRAME_BYTES
        size += -size % _CHUNK_BYTES
        self._headers: dict[int, Headers] = {}
        self._lengths: dict[int, int] = {}
        """Payload lengths that the headers in a slot say."""
        with contextlib.ExitStack() as undo:
            self._socket = undo.enter_context(socket.socket(AF_XDP, socket.SOCK_RAW | socket.SOCK_CLOEXEC))
            memory = mmap.mmap(-1, size)
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            self._frames = memoryview(memory)
            undo.callback(self._frames.release)
            self._words = self._frames.cast("H")
            undo.callback(self._words.release)
            self._set(_UMEM_REG, struct.pack("=QQIIII", address, size, _CHUNK_BYTES, 0, 0, 0), "UMEM")
            # Nothing is received, but a UMEM without a fill ring can't be bound.
            for name, ring in (("fill", _FILL_RING), ("completion", _COMPLETION_RING), ("TX", _TX_RING)):
                self._set(ring, struct.pack("=I", RING_ENTRIES), f"{name} ring")
            with contextlib.suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER)
            raw = self._socket.getsockopt(SOL_XDP, _MMAP_OFFSETS, 128)
            if len(raw) != 128:
                raise OSError(errno.ENOSYS, f"AF_XDP: ring offsets of {len(raw)} bytes, 128 expected (Linux 5.4)")
            tx, completion = (RingOffsets(*struct.unpack_from("=4Q", raw, at)) for at in (32, 96))
            self._tx = TxRing(self._map(undo, _TX_PAGE, TxRing.size(tx, RING_ENTRIES)), tx, RING_ENTRIES)
            undo.callback(self._tx.close)
            area = self._map(undo, _COMPLETION_PAGE, CompletionRing.size(completion, RING_ENTRIES))
            self._done = CompletionRing(area, completion, RING_ENTRIES)
            undo.callback(self._done.close)
            bound_to = _SOCKADDR.pack(AF_XDP, BindFlag.COPY, ifindex, queue, 0)
            give_up = time.monotonic() + BUSY_RETRY_S
            while _libc.bind(self._socket.fileno(), bound_to, len(bound_to)):
                number = ctypes.get_errno()
                if number != errno.EBUSY or time.monotonic() > give_up:
                    raise OSError(number, f"AF_XDP: bind to interface {ifindex}, queue {queue}: {os.strerror(number)}")
                time.sleep(BUSY_PAUSE_S)
            self._undo = undo.pop_all()

    def _set(self, option: int, value: bytes, what: str) -> None:
        try:
            self._socket.setsockopt(SOL_XDP, option, value)
        except OSError as error:
            raise OSError(error.errno, f"AF_XDP: {what} refused: {error.strerror}") from None

    def _map(self, undo: contextlib.ExitStack, page_offset: int, size: int) -> memoryview:
        mapping = mmap.mmap(self._socket.fileno(), size, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=page_offset)
        undo.callback(mapping.close)
        view = memoryview(mapping)
        undo.callback(view.release)
        return view

    def put(self, slot: int, headers: Headers) -> None:
        """Make a slot's frame ready, in place of what was there. Raises ValueError for a slot beyond the capacity."""
        if not 0 <= slot < self.capacity:
            raise ValueError(f"slot {slot}: expected 0 to {self.capacity - 1}")
        at = slot * FRAME_BYTES
        self._frames[at : at + len(headers.frame)] = headers.frame
        self._headers[slot] = headers
        self._lengths.pop(slot, None)

    def send(self, payload: bytes | memoryview, slots: Sequence[int]) -> Taken:
        """The payload, of 1 to PAYLOAD_LIMIT bytes, to each of these, in order; what the kernel refuses is returned.

        Returns when the kernel has taken all, or has taken none for STUCK_S: after an error, close it and make another.
        """
        length = len(payload)
        if not 0 < length <= PAYLOAD_LIMIT:
            raise ValueError(f"a payload of {length} bytes: 1 to {PAYLOAD_LIMIT} are expected")
        total = word_sum(payload)
        sent = 0
        for start in range(0, len(slots), RING_ENTRIES):
            part = slots[start : start + RING_ENTRIES]
            positions = self._tx.reserve(len(part))
            if len(positions) < len(part):
                return Taken(sent, errno.ENOBUFS)
            for position, slot in zip(positions, part, strict=True):
                self._tx[position] = (slot * FRAME_BYTES, self._write(slot, payload, length, total), 0)
            self._tx.submit(len(part))
            taken, error = self._flush(len(part))
            sent += taken
            if error:
                return Taken(sent, error)
        return Taken(sent, 0)

    def _write(self, slot: int, payload: bytes | memoryview, length: int, total: int) -> int:
        """Payload and what depends on it; the frame's length."""
        headers, at = self._headers[slot], slot * FRAME_BYTES
        size = len(headers.frame)
        if self._lengths.get(slot) != length:
            finish(headers, self._frames[at : at + size], length, total)
            self._lengths[slot] = length
        else:
            udp_length = socket.htons(8 + length)
            word = at + size - 2 >> 1
            self._words[word] = checksum(headers.udp_sum + total + 2 * udp_length) or 0xFFFF
        self._frames[at + size : at + size + length] = payload
        return size + length

    def _flush(self, count: int) -> tuple[int, int]:
        """Until the kernel has taken and completed that many: how many it was, and what kept it from more."""
        done, give_up = 0, time.monotonic() + STUCK_S
        while done < count:
            error = 0
            try:
                self._socket.send(b"", socket.MSG_DONTWAIT)
            except OSError as refused:
                error = refused.errno or errno.EIO
            completed = len(self._done.peek(count - done))
            self._done.release(completed)
            done += completed
            if completed:
                give_up = time.monotonic() + STUCK_S
            elif time.monotonic() > give_up or error not in {0, errno.EAGAIN, errno.EBUSY, errno.ENOBUFS, errno.EINTR}:
                return done, error or errno.ETIMEDOUT
        return done, 0

    def close(self) -> None:
        """Unmap the rings, then close the socket. Harmless if repeated."""
        self._undo.close()

    def __enter__(self) -> Transmitter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
