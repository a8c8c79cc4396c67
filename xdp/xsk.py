"""An AF_XDP socket that receives, with its UMEM: frames that a native XDP program redirects to it, seen without a copy.

Owns the socket, the memory that frames land in, and the mappings of three rings (fill and completion are mandatory,
RX is what we read; nothing is sent). Limits: the kernel drops a frame when all chunks are in use (`fill_ring_empty`,
`rx_dropped`), when the RX ring is full (`rx_ring_full`), or when it is longer than a chunk (`rx_dropped`): counted,
never an error. Only one socket can hold an (interface, queue), and the hold ends when the last mapping and descriptor
of it are gone: a forked child has both, and must call close(), which lets go of the child's own.

Rules: what peek() returned is valid until release(), which makes those views unusable so that a stale one can't be read
as somebody else's frame. A slice made from one escapes that: copy what is to be kept.
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
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING, NamedTuple, final

from xdp.rings import CompletionRing, FillRing, RingOffsets, RxRing, require_strong_order

if TYPE_CHECKING:
    from types import TracebackType

# linux/if_xdp.h
AF_XDP, SOL_XDP = 44, 283
_MMAP_OFFSETS, _RX_RING, _UMEM_REG, _FILL_RING, _COMPLETION_RING, _STATISTICS = 1, 2, 4, 5, 6, 7
_RX_PAGE, _FILL_PAGE, _COMPLETION_PAGE = 0, 0x100000000, 0x180000000
_SOCKADDR = struct.Struct("=HHIII")
HEADROOM_BYTES = 256
"""XDP_PACKET_HEADROOM: what the kernel keeps free at the start of each chunk."""
BUSY_RETRY_S, BUSY_PAUSE_S = 0.5, 0.002
"""A closed socket's hold on its queue ends in a kernel worker, a moment after close(): bind waits that long for it."""

_libc = ctypes.CDLL(None, use_errno=True)


class BindFlag(IntFlag):
    """How to bind. Without COPY and ZERO_COPY the kernel takes zero-copy where the driver has it."""

    COPY = 1 << 1
    ZERO_COPY = 1 << 2
    """Only drivers that can; others refuse with EOPNOTSUPP."""
    NEED_WAKEUP = 1 << 3
    """The kernel may sleep and say so in the fill ring's flags: poll() or wake() then."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """How much memory a socket takes: chunks × chunk_bytes, locked."""

    chunks: int = 2048
    """A power of two. All of them fit the fill ring, so each chunk is always in exactly one place."""
    chunk_bytes: int = 4096
    """2048 or 4096 (one page). A frame has 256 bytes less: 3,840 take the largest that veth carries in native mode."""
    rx_entries: int = 2048
    """A power of two; more than `chunks` are never used."""

    def __post_init__(self) -> None:
        for name, value in (("chunks", self.chunks), ("rx_entries", self.rx_entries)):
            if value <= 0 or value & (value - 1):
                raise ValueError(f"{name}={value}: a power of two is expected")
        if self.chunk_bytes not in {2048, 4096}:
            raise ValueError(f"chunk_bytes={self.chunk_bytes}: 2048 or 4096 is expected")


class XskStatistics(NamedTuple):
    """The kernel's counters of this socket (struct xdp_statistics; the last three from Linux 5.9 on, else 0)."""

    rx_dropped: int
    """For want of a chunk, or too long for one."""
    rx_invalid_descriptors: int
    tx_invalid_descriptors: int
    rx_ring_full: int
    fill_ring_empty: int
    tx_ring_empty: int


@final
class Xsk:
    """A bound AF_XDP socket, a context manager. Frames come once its fd is in the XSKMAP of its queue's program."""

    def __init__(
        self,
        index: int,
        queue: int = 0,
        *,
        flags: BindFlag = BindFlag.COPY,
        geometry: Geometry | None = None,
        metadata_bytes: int = 0,
    ) -> None:
        """Create, register and bind to the interface of that index, in the namespace of the calling thread.

        `metadata_bytes` lie in front of each frame where the program put that much by
        bpf_xdp_adjust_meta; peek() then gives both as one.

        Raises OSError, whose message says which step was refused and why that may be; UnsupportedMachineError.
        """
        require_strong_order()
        if not 0 <= metadata_bytes < HEADROOM_BYTES or metadata_bytes % 4:
            raise ValueError(f"metadata_bytes={metadata_bytes}: a multiple of 4 below {HEADROOM_BYTES} is expected")
        self.geometry = geometry = geometry or Geometry()
        self.index, self.queue, self.flags = index, queue, flags
        self.received = 0
        """Frames handed out by peek()."""
        self._metadata_bytes = metadata_bytes
        self._held: list[memoryview] = []
        self._addresses: list[int] = []
        with contextlib.ExitStack() as undo:
            self._socket = undo.enter_context(_socket())
            self._frames = undo.enter_context(self._register_umem())
            for ring, entries in (
                (_FILL_RING, geometry.chunks),
                (_COMPLETION_RING, geometry.chunks),
                (_RX_RING, geometry.rx_entries),
            ):
                self._socket.setsockopt(SOL_XDP, ring, entries)
            raw = self._socket.getsockopt(SOL_XDP, _MMAP_OFFSETS, 128)
            if len(raw) != 128:
                raise OSError(errno.ENOSYS, f"AF_XDP: ring offsets of {len(raw)} bytes, 128 expected (Linux 5.4)")
            rx, _, fill, completion = (RingOffsets(*struct.unpack_from("=4Q", raw, at)) for at in (0, 32, 64, 96))
            self._rx = RxRing(self._map(undo, _RX_PAGE, RxRing.size(rx, geometry.rx_entries)), rx, geometry.rx_entries)
            undo.callback(self._rx.close)
            size = FillRing.size(fill, geometry.chunks)
            self._fill = FillRing(self._map(undo, _FILL_PAGE, size), fill, geometry.chunks)
            undo.callback(self._fill.close)
            size = CompletionRing.size(completion, geometry.chunks)
            # Mapped for nothing but to be sure that this kernel lays it out as expected; without TX it stays empty.
            sent = CompletionRing(self._map(undo, _COMPLETION_PAGE, size), completion, geometry.chunks)
            undo.callback(sent.close)
            self._give(range(0, geometry.chunks * geometry.chunk_bytes, geometry.chunk_bytes))
            self._bind()
            self._undo = undo.pop_all()

    def _register_umem(self) -> memoryview:
        geometry = self.geometry
        size = geometry.chunks * geometry.chunk_bytes
        memory = mmap.mmap(-1, size)
        # The address is needed once; an export that stayed would keep the mapping from being closed.
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        registration = struct.pack("=QQIIII", address, size, geometry.chunk_bytes, 0, 0, 0)
        try:
            self._socket.setsockopt(SOL_XDP, _UMEM_REG, registration)
        except OSError as error:
            hint = ": is RLIMIT_MEMLOCK large enough?" if error.errno in {errno.ENOBUFS, errno.ENOMEM} else ""
            raise OSError(error.errno, f"AF_XDP: {size} bytes of UMEM refused: {error.strerror}{hint}") from None
        return memoryview(memory)

    def _map(self, undo: contextlib.ExitStack, page_offset: int, size: int) -> memoryview:
        mapping = mmap.mmap(self._socket.fileno(), size, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=page_offset)
        undo.callback(mapping.close)
        view = memoryview(mapping)
        undo.callback(view.release)
        return view

    def _bind(self) -> None:
        # The sockets of Python know no AF_XDP addresses.
        address = _SOCKADDR.pack(AF_XDP, self.flags, self.index, self.queue, 0)
        give_up = time.monotonic() + BUSY_RETRY_S
        while _libc.bind(self._socket.fileno(), address, len(address)):
            number = ctypes.get_errno()
            if number != errno.EBUSY or time.monotonic() > give_up:
                hints = {
                    errno.EBUSY: "another socket holds this queue",
                    errno.EOPNOTSUPP: "the driver has no zero-copy",
                    errno.ENODEV: "no such interface in this namespace",
                    errno.EINVAL: "no such queue, or a mode that this kernel doesn't know",
                    errno.ENETDOWN: "the interface is down",
                }
                hint = f" ({hints[number]})" if number in hints else ""
                raise OSError(
                    number,
                    f"AF_XDP: bind to interface {self.index}, queue {self.queue}, {self.flags!r}: "
                    f"{os.strerror(number)}{hint}",
                )
            time.sleep(BUSY_PAUSE_S)

    def _give(self, addresses: range | list[int]) -> None:
        """Let the kernel receive into these chunks. There is always room: the fill ring holds as many as there are."""
        positions = self._fill.reserve(len(addresses))
        for position, address in zip(positions, addresses, strict=True):
            self._fill[position] = address
        self._fill.submit(len(positions))

    def fileno(self) -> int:
        """For the XSKMAP, and for poll and epoll: readable while frames wait."""
        return self._socket.fileno()

    def peek(self, limit: int = 64) -> list[memoryview]:
        """The next frames in order, at most `limit`, from the Ethernet header (or the metadata) on; [] when none waits.

        No system call. Frames of earlier peeks stay valid and stay held until release().
        """
        positions = self._rx.peek(limit)
        if not positions:
            return []
        rx, frames, addresses, before = self._rx, self._frames, self._addresses, self._metadata_bytes
        found = []
        for position in positions:
            address, length, _ = rx[position]
            addresses.append(address)  # goes back as it is: the kernel masks what lies within the chunk
            found.append(frames[address - before : address + length])
        self._held += found
        self.received += len(found)
        return found

    def release(self) -> None:
        """Give every frame that was peeked back to the kernel; their views raise ValueError from now on."""
        addresses = self._addresses
        if not addresses:
            return
        for view in self._held:
            view.release()
        self._held.clear()
        self._give(addresses)
        self._rx.release(len(addresses))
        addresses.clear()

    @property
    def needs_wakeup(self) -> bool:
        """Whether a spinning reader has to call wake(); never without BindFlag.NEED_WAKEUP."""
        return self._fill.needs_wakeup

    def wake(self) -> None:
        """Let the kernel go on receiving: one system call that never blocks."""
        with contextlib.suppress(BlockingIOError):
            self._socket.recv(0, socket.MSG_DONTWAIT)

    def statistics(self) -> XskStatistics:
        """The kernel's counters since the socket was created."""
        raw = self._socket.getsockopt(SOL_XDP, _STATISTICS, 48)
        return XskStatistics(*struct.unpack("=6Q", raw.ljust(48, b"\0")))

    def close(self) -> None:
        """Unmap the rings, then close the socket: what stayed mapped would hold the queue. Harmless if repeated."""
        for view in self._held:
            view.release()
        self._held.clear()
        self._addresses.clear()
        self._undo.close()

    def __enter__(self) -> Xsk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _socket() -> socket.socket:
    try:
        return socket.socket(AF_XDP, socket.SOCK_RAW)
    except OSError as error:
        hints = {
            errno.EPERM: "CAP_NET_RAW is needed",
            errno.EAFNOSUPPORT: "this kernel is built without CONFIG_XDP_SOCKETS",
        }
        hint = hints.get(error.errno or 0, "")
        raise OSError(error.errno, f"AF_XDP socket: {error.strerror}{hint and f' ({hint})'}") from None
