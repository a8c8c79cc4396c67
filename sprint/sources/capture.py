"""Source capture: announcements overheard on the interface, from the segments that a capture hands over.

It has no connection of its own, asks nothing and knows no peer's name: each way out of the kernel stands in the status
as one row, `capture ringbuf` and `capture af_xdp`, so that their leads can be compared; each tells every announcement
that it sees, once, and those of a flow that comes in order in that order. A poll looks at what each flow's first new
segment begins with, and if that says anything, it is returned at once; the rest of the work on the same segments is
done by the next poll, which deadline() asks for, and which looks at what came meanwhile. Mirrored copies of what the
ring buffer has had are in no hurry, and spared the first look.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Protocol

from sprint.bitcoin.networks import NETWORKS
from sprint.events import Source
from sprint.reassembly import Reassembler
from sprint.status import StatusBlock, writing
from xdp.rehearsed import RehearsedCapture
from xdp.segments import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sprint.bitcoin.networks import Network
    from sprint.events import Want
    from sprint.sources import Heard
    from xdp.segments import Flow, Segment

    class Captures(Protocol):
        """Where segments come from. What goes wrong there is for it to count and to mend: nothing here raises."""

        def fileno(self) -> int:
            """Readable when poll() has something; the same as long as the capture lives."""

        def poll(self) -> list[Segment]:
            """What came since the last call, without blocking, a bounded number; payloads hold until the next call."""

        def deadline(self) -> int | None:
            """When to poll() even if fileno() isn't readable, CLOCK_MONOTONIC ns; None: no need to."""

        def close(self) -> None:
            """Let go of the kernel's side."""

        def counters(self) -> dict[str, int]:
            """What the kernel's side has counted."""


_BACKENDS = tuple(Backend)
_RINGBUF, _MIRROR = Backend.RINGBUF, Backend.AF_XDP  # members cost a look-up each in Python 3.10
PEERS = {backend: f"capture {backend.name.lower()}" for backend in Backend}
"""What each backend is called in sightings and in /api/sources."""


class CaptureSource:
    """Turns a capture's segments into sightings."""

    def __init__(
        self, capture: Captures, network: Network, status: StatusBlock, backends: Sequence[Backend] = tuple(Backend)
    ) -> None:
        """`backends`: those that are on; they have their rows in the status from the beginning."""
        self._capture = capture
        self._look = capture.poll
        self._status = status
        self._reassemblers = {backend: Reassembler(network.magic, PEERS[backend]) for backend in Backend}
        self._glances = {backend: one.announcements.glance for backend, one in self._reassemblers.items()}
        self._backends = tuple(backends)
        self._glanced: list[Segment] = []
        """Segments of the last poll that are to be looked at again, in full."""
        self._express_ns = -1
        """When the last segment came that has been read out of the ring buffer: older mirrored ones are its copies."""
        self._closed = False
        for backend in self._backends:
            status.peer_index(PEERS[backend])

    def fileno(self) -> int:
        """The capture's descriptor."""
        return self._capture.fileno()

    def poll(self, now_ns: int) -> list[Heard]:
        """All that segments say which have only been glanced at; and new ones, at first glance, else all of it."""
        heard: list[Heard] = []
        if self._glanced:
            segments, self._glanced = self._glanced, []
            self._read(segments, now_ns, heard, glanced=True)
            return self._poll_behind(heard, now_ns)
        segments = self._look()
        if not segments:
            return heard
        if len(segments) > 1:
            return self._poll_several(segments, heard, now_ns)
        segment = segments[0]
        heard += self._glances[segment[0]](segment, now_ns)
        if heard:
            self._glanced = segments
        else:
            self._read(segments, now_ns, heard, glanced=True)
        return heard

    def _poll_behind(self, heard: list[Heard], now_ns: int) -> list[Heard]:
        """Add what came meanwhile, behind what was only glanced at before."""
        segments = self._look()
        return self._poll_several(segments, heard, now_ns) if segments else heard

    def _poll_several(self, segments: list[Segment], heard: list[Heard], now_ns: int) -> list[Heard]:
        """Add what these say at first glance, else all of it."""
        if segments[0][0] is _MIRROR and segments[-1][1] <= self._express_ns:
            self._read(segments, now_ns, heard, glanced=False)
            segments = self._look()  # their memory is given back now, for the next announcement would wait for it
        known = len(heard)
        # Not at a flow's later ones: what they say would come before what the first says further on.
        for segment in _first_of_each_flow(segments).values():
            heard += self._glances[segment.backend](segment, now_ns)
        if len(heard) > known:
            self._glanced = segments
        else:
            self._read(segments, now_ns, heard, glanced=True)
        return heard

    def _read(self, segments: list[Segment], now_ns: int, heard: list[Heard], *, glanced: bool) -> None:
        """Add all that they say; `glanced`: but for what the first of each flow begins with."""
        reassemblers = self._reassemblers
        if glanced and len(segments) == 1:
            (segment,) = segments
            if segment[0] is _RINGBUF:
                self._express_ns = segment[1]
            heard += reassemblers[segment[0]].receive(segment, now_ns, glanced=True)
            return
        first = _first_of_each_flow(segments) if glanced else {}
        for segment in segments:
            backend = segment[0]
            if backend is _RINGBUF:
                self._express_ns = segment[1]
            was_glanced = first.get((backend, segment[2])) is segment
            heard += reassemblers[backend].receive(segment, now_ns, glanced=was_glanced)

    def deadline(self) -> int | None:
        """At once, if there are segments that have only been glanced at; else the capture's."""
        return 0 if self._glanced else self._capture.deadline()

    def want(self, want: Want, now_ns: int) -> None:
        """A capture can't ask anybody."""

    def account(self) -> None:
        """Write each backend's row of the status block, and forget flows that have fallen silent."""
        now_ns = time.monotonic_ns()
        for backend in self._backends:
            reassembler = self._reassemblers[backend]
            reassembler.forget(now_ns)
            index = self._status.peer_index(PEERS[backend])
            if index is None:
                continue
            row = self._status.layout.peers[index]
            with writing(row):
                row.source = Source.CAPTURE
                row.connected = not self._closed
                row.bytes_received = reassembler.counters.bytes
                row.skipped_messages = reassembler.counters.skipped

    def counters(self) -> dict[str, int]:
        """The capture's own counters, and those of each backend's reassembly as `<backend>_<counter>`."""
        counted = dict(self._capture.counters())
        for backend in self._backends:
            reassembler, prefix = self._reassemblers[backend], backend.name.lower()
            counted |= {f"{prefix}_{name}": count for name, count in asdict(reassembler.counters).items()}
            counted |= {f"{prefix}_flows": reassembler.flows, f"{prefix}_kept_bytes": reassembler.kept_bytes}
        return counted

    def close(self) -> None:
        """Close the capture; what it had handed over is gone with it."""
        self._glanced = []
        if not self._closed:
            self._closed = True
            self._capture.close()


def _first_of_each_flow(segments: Sequence[Segment]) -> dict[tuple[Backend, Flow], Segment]:
    """By the way out of the kernel and the flow."""
    first: dict[tuple[Backend, Flow], Segment] = {}
    for segment in segments:
        first.setdefault((segment.backend, segment.flow), segment)
    return first


class Overheard:
    """A capture's part of the rehearsal: regtest announcements through the same code, by memory of their own."""

    def __init__(self) -> None:
        self._capture = RehearsedCapture()
        self._source = CaptureSource(self._capture, NETWORKS["regtest"], StatusBlock.create(1, {}))
        self._turn = 0

    def hear(self, frame: bytes, now_ns: int) -> list[Heard]:
        """What a captured announcement, of at most 1,400 bytes, says; by each backend in turn."""
        self._turn += 1
        self._capture.say(frame, now_ns, _BACKENDS[self._turn % len(_BACKENDS)])
        source = self._source
        return source.poll(now_ns) + source.poll(now_ns)  # at first glance, and in full

    def close(self) -> None:
        """Let go of the memory."""
        self._source.close()
