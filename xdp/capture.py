"""The relay's half of the capture: segments out of the BPF ring buffer and out of the mirror's AF_XDP socket.

The programs are attached by another process (see attachment), which hands over descriptors of maps, and facts. Ours
are what ends with us: the AF_XDP socket and the mappings. So this process may be killed at any time, and a successor
makes a Capture from the same handover; one at a time, since both ways out have exactly one reader.

Rules: payloads are valid until the next poll(), which gives their memory back to the kernel. fileno() stays readable
until then, so a reader that blocks looks once more after each batch. Whoever sleeps is woken once for what comes both
ways, by the ring buffer, which is first: the mirrored copies are read along with what comes later, and at the latest
when deadline() says. The mirror wakes by itself where it is the only way. What can't be parsed is counted. A ring whose
indices contradict each other is given up and counted; the other goes on.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, final

from xdp import kernel
from xdp.frames import FLAGS, parse_frame
from xdp.interfaces import driver_counters
from xdp.loader import COMMON
from xdp.ringbuf import RingBuffer
from xdp.rings import RingCorruptError
from xdp.segments import Backend, Flow, Segment
from xdp.xsk import Xsk

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    class Mirror(Protocol):
        """What a Capture needs of an Xsk while it runs."""

        def peek(self, limit: int) -> list[memoryview]:
            """Frames that came."""

        def release(self) -> None:
            """Give them back."""

        def close(self) -> None:
            """Unmap."""


BATCH = 64
"""Segments of one poll and backend: bounds the time until the caller sees the first."""
COPY_NS, COPIES = 20_000_000, 32
"""Mirrored copies of what came out of the ring buffer are in no hurry, and cheaper read together: after that much time,
or so many arrivals (each may be 45 frames, and the mirror holds 2,048), or when nothing else is to be done."""
COPY_DUE_NS = (25_000_000, 500_000_000)
"""After an arrival, when its copy is looked for if nothing else comes: it is there within a millisecond, or lost."""
_ENTRY = COMMON.layouts["express_entry"]
_STAMP = COMMON.layouts["mirror_stamp"]
_COUNTERS = COMMON.layouts["counters"]
_MARK = COMMON.constants["MARK"]
_RINGBUF = Backend.RINGBUF  # an enumeration's member costs a look-up of its own in Python 3.10
_QUEUE = 0
"""All queues of the interface come together in the mirror's only one."""
_MEMBERS = {
    "express_entry": "arrival_ns flow.source flow.destination flow.source_port flow.destination_port sequence length "
    "captured skipped flags reasons zero",
    "mirror_stamp": "arrival_ns skipped mark",
}
SELF_TEST_SOURCE = bytes(10) + b"\xff\xff" + bytes((192, 0, 2, 83))
"""Of self-test packets (see attachment), mapped into IPv6; of TEST-NET-1 (RFC 5737), so nobody's. Never handed out."""
for _name, _members in _MEMBERS.items():
    if [member.name for member in COMMON.layouts[_name].members] != _members.split():
        raise ImportError(f"common.h: struct {_name} isn't what capture unpacks: {_members}")
_ENTRY_NEEDED = struct.Struct("=Q16s16sHHIII4xB3x")
"""Of an entry, without `skipped` and what is behind the flags."""
if _ENTRY_NEEDED.size != _ENTRY.size:
    raise ImportError(f"common.h: struct express_entry has {_ENTRY.size} bytes, {_ENTRY_NEEDED.size} expected")


@dataclass(frozen=True, slots=True)
class Handover:
    """What a Capture needs of an Outlet: plain values, and descriptors of maps, which are the outlet's.

    Valid as it is in a forked child; another process is sent fds() by SCM_RIGHTS and uses with_fds().
    """

    backends: frozenset[Backend]
    express_fd: int
    xsks_fd: int
    counters_fd: int
    mirror_index: int
    """Of the mirror's far end; 0 without AF_XDP."""
    baseline: Mapping[str, int] = field(default_factory=dict)
    """Raw counters when the first interface was proven: counted from there."""

    def fds(self) -> list[int]:
        """To be sent, in this order."""
        return [self.express_fd, self.xsks_fd, self.counters_fd]

    def with_fds(self, fds: Sequence[int]) -> Handover:
        """The same, with the numbers that the descriptors have in this process."""
        express, xsks, counters = fds
        return replace(self, express_fd=express, xsks_fd=xsks, counters_fd=counters)


def open_mirror(handover: Handover) -> Xsk:
    """The AF_XDP socket at the mirror's far end, in the calling thread's namespace. Raises OSError."""
    xsk = Xsk(handover.mirror_index, _QUEUE, metadata_bytes=_STAMP.size)
    try:
        # The kernel takes it out of the map again when the socket ends, however it ends.
        kernel.map_update(handover.xsks_fd, struct.pack("=I", _QUEUE), struct.pack("=I", xsk.fileno()))
    except BaseException:
        xsk.close()
        raise
    return xsk


def raw_counters(counters_fd: int, mirror_index: int = 0) -> dict[str, int]:
    """struct counters, all CPUs together, and what of `redirected` the AF_XDP socket took: `delivered`. Raises OSError.

    `mirror_index`: of the mirror's far end, whose driver counts that; without, and where it has gone, it is left out.
    """
    cpus = kernel.possible_cpus()
    raw = kernel.map_lookup(counters_fd, bytes(4), _COUNTERS.size * cpus) or bytes(_COUNTERS.size * cpus)
    each = [_COUNTERS.packing.unpack_from(raw, cpu * _COUNTERS.size) for cpu in range(cpus)]
    counted = {m.name: sum(column) for m, column in zip(_COUNTERS.members, zip(*each, strict=True), strict=True)}
    if mirror_index:
        with contextlib.suppress(OSError, KeyError):
            by_driver = driver_counters(socket.if_indextoname(mirror_index))
            counted["delivered"] = by_driver[f"rx_queue_{_QUEUE}_xdp_redirect"]
    return counted


def ingest_counters(raw: Mapping[str, int], baseline: Mapping[str, int]) -> dict[str, int]:
    """What of raw_counters() was counted since the baseline, under the names that the API has."""
    # Opaque flows are counted down too, on another CPU than up: differences are modulo 2**64 and may be negative.
    since = {name: (value - baseline.get(name, 0)) % (1 << 64) for name, value in raw.items()}
    counted = {name: value if value < 1 << 63 else 0 for name, value in since.items()}
    mirrored = counted.get("delivered", counted["redirected"])
    return {
        "packets": counted["packets"],
        "announcements": counted["announcements"],
        "captured": counted["captured"],
        "surplus": counted["surplus"],
        "mirrored": mirrored,
        "mirrorLost": counted["uncloned"] + counted["unredirected"],
        "socketDropped": max(0, counted["redirected"] - mirrored),
        "unmarked": counted["unmarked"],
        "express": counted["express"],
        "dropped": counted["dropped"],
        "opaqueFlows": counted["opaque_flows"],
    }


@final
class Capture:
    """Both ways out of the kernel, as one source of segments; a context manager."""

    def __init__(self, handover: Handover, ring: RingBuffer | None = None, mirror: Mirror | None = None) -> None:
        """Bind to the mirror's far end in the calling thread's namespace, and map the ring buffer.

        `ring`, `mirror`: in the place of those, where the handover has none: a rehearsal's, closed with this.
        Raises OSError, its message naming the step (EBUSY: another process still holds the socket's place).
        """
        self._handover = handover
        self._ring, self._mirror = ring, mirror
        self._xsk: Xsk | None = None
        self._payloads: list[memoryview] = []
        self._holds = False
        """Whether memory is to be given back: asking both rings each time would double the cost of an empty poll."""
        self._mirror_due = False
        """The next poll looks at the mirror, whatever the ring buffer has."""
        self._mirror_goes_on = False
        """It had a whole batch: there may be more."""
        self._handed_out: list[Segment] = []
        """What a poll had whose first were the ring buffer's, until that is noted."""
        self._express_spoke = False
        """The ring buffer had something the last time: whatever is mirrored of it can wait."""
        self._express_ns = 0
        """The last arrival in the ring buffer."""
        self._awaited_ns = self._awaited = 0
        """The first arrival whose copy may not have been read, 0: there is none; and how many have come since."""
        self._unparsed = self._given_up = 0
        self._epoll = select.epoll()
        try:
            if Backend.RINGBUF in handover.backends:
                self._ring = RingBuffer.open(handover.express_fd)
                self._epoll.register(self._ring.fileno(), select.EPOLLIN)
            if Backend.AF_XDP in handover.backends:
                self._xsk = self._mirror = open_mirror(handover)
                if self._ring is None:
                    self._epoll.register(self._xsk.fileno(), select.EPOLLIN)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Readable when poll() has something, or has memory to give back; the same as long as the capture lives.

        Not for mirrored copies of what the ring buffer has had: see deadline().
        """
        return self._epoll.fileno()

    def deadline(self) -> int | None:
        """When to poll() even if fileno() isn't readable, CLOCK_MONOTONIC ns; None: no need to."""
        if self._mirror is None or self._ring is None:
            return None
        if self._mirror_goes_on:
            return 0
        self._note_express()
        if self._awaited_ns:
            now_ns = time.monotonic_ns()
            for pause_ns in COPY_DUE_NS:
                if self._awaited_ns + pause_ns > now_ns:
                    return self._awaited_ns + pause_ns
            self._awaited_ns = 0
        return None

    def poll(self) -> list[Segment]:
        """What came since the last call, at most BATCH a backend; no system call if nothing.

        What the ring buffer has is returned at once, and the mirror looked at by a later call. Ends the validity of the
        payloads handed out before.
        """
        if self._holds:
            self._note_express()
            self._release()
        segments: list[Segment] = []
        ring = self._ring
        if ring is not None:
            try:
                records = ring.peek(BATCH)
            except RingCorruptError:
                self._give_up(ring)
                self._ring = None
            else:
                if records:
                    self._holds = True
                    self._read_express(ring.data, records, segments)
                    self._handed_out = segments
                    if segments and not self._mirror_due:
                        return segments
                elif self._express_spoke:
                    self._express_spoke = False
                    if not self._mirror_due:
                        return segments
        mirror = self._mirror
        if mirror is not None:
            self._mirror_due = False
            try:
                frames = mirror.peek(BATCH)
            except RingCorruptError:
                self._give_up(mirror)
                self._xsk = self._mirror = None
            else:
                if frames:
                    self._holds = True
                    self._read_mirrored(frames, segments)
        if self._holds and not segments:
            self._release()  # at once: nobody will look at them, and fileno() would stay readable
        return segments

    def _note_express(self) -> None:
        """Of what the ring buffer had the last time: off the hot path, which is over when that is handed out."""
        if self._handed_out:
            express = [segment for segment in self._handed_out if segment[0] is _RINGBUF]
            self._handed_out = []
            if express:
                self._express_spoke = True
                self._express_ns = express[-1][1]
                self._awaited_ns = self._awaited_ns or express[0][1]
                self._awaited += len(express)
                self._mirror_due = self._awaited >= COPIES or self._express_ns - self._awaited_ns >= COPY_NS

    def _read_express(
        self, data: memoryview, records: list[tuple[int, int]], segments: list[Segment]
    ) -> None:  # fmt: skip
        """The hot path: named tuples' own constructors would cost twice as much."""
        unpack, size, payloads, make = _ENTRY_NEEDED.unpack_from, _ENTRY_NEEDED.size, self._payloads, tuple.__new__
        for start, end in records:
            arrival, source, destination, source_port, destination_port, sequence, length, captured, flags = unpack(
                data, start
            )
            if source == SELF_TEST_SOURCE:
                continue
            payload = data[start + size : min(start + size + captured, end)]
            payloads.append(payload)
            flow = make(Flow, (source, destination, source_port, destination_port))
            segments.append(make(Segment, (_RINGBUF, arrival, flow, sequence, FLAGS[flags], length, payload)))

    def _read_mirrored(self, frames: list[memoryview], segments: list[Segment]) -> None:
        known = len(segments)
        for frame in frames:
            segment = _mirrored(frame)
            if segment is None:
                self._unparsed += 1
            elif segment.flow[0] != SELF_TEST_SOURCE:
                payload = segment.payload
                assert isinstance(payload, memoryview)
                self._payloads.append(payload)
                segments.append(segment)
        self._mirror_goes_on = len(frames) == BATCH
        if len(segments) > known:
            self._awaited = 0
            self._awaited_ns = 0 if segments[-1][1] >= self._express_ns else self._express_ns

    def _release(self) -> None:
        # So that a stale payload can't be read as somebody else's bytes, nor hold a mapping.
        for payload in self._payloads:
            payload.release()
        self._payloads.clear()
        self._holds = self._mirror_goes_on = False
        if self._ring is not None:
            self._ring.release()
        if self._mirror is not None:
            self._mirror.release()

    def _give_up(self, backend: RingBuffer | Mirror) -> None:
        self._given_up += 1
        if isinstance(backend, RingBuffer):
            self._epoll.unregister(backend.fileno())
            if self._xsk is not None:
                self._epoll.register(self._xsk.fileno(), select.EPOLLIN)  # from now on it is what wakes
        elif self._ring is None and self._xsk is not None:
            self._epoll.unregister(self._xsk.fileno())
        backend.close()

    def counters(self) -> dict[str, int]:
        """The programs' (as Attachment.counters()), and losses on our side of the kernel."""
        handover = self._handover
        counted = ingest_counters(raw_counters(handover.counters_fd, handover.mirror_index), handover.baseline)
        return counted | {"unparsed": self._unparsed, "givenUp": self._given_up}

    def close(self) -> None:
        """Unmap and close what is ours; the handover's descriptors stay open. Harmless if repeated."""
        self._release()
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        if self._mirror is not None:
            self._mirror.close()
            self._xsk = self._mirror = None
        self._epoll.close()

    def __enter__(self) -> Capture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def close_handover(handover: Handover) -> None:
    """Close the descriptors that were received by SCM_RIGHTS."""
    for fd in handover.fds():
        with contextlib.suppress(OSError):
            os.close(fd)


def _mirrored(frame: memoryview) -> Segment | None:
    arrival, skipped, mark = _STAMP.packing.unpack_from(frame)
    # Without the mark the program had no room for a stamp.
    return parse_frame(frame[_STAMP.size :], arrival, skipped) if mark == _MARK else parse_frame(frame[_STAMP.size :])
