"""The ways from the wire to the relay that `bench detect` compares, each as a source of the product's.

A socket is read by the product's own Upstream, which needs the whole message, as every node does, for the checksum is
over all of it. A capture is read by CaptureSource, and so is AF_PACKET: a packet socket with a kernel filter, one
recv() a packet, the same parsing of frames and the same reassembly.
"""

from __future__ import annotations

import random
import select
import socket
import struct
import time
from ctypes import addressof, create_string_buffer
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sprint.addresses import Address
from sprint.bench.detect_announcements import NETWORK
from sprint.bench.detect_wire import NEAR
from sprint.errors import HostError
from sprint.events import Sighting
from sprint.sources.upstream import Upstream
from xdp.frames import parse_frame
from xdp.segments import Backend

if TYPE_CHECKING:
    from sprint.sources import Heard
    from sprint.sources.capture import Captures
    from xdp.segments import Segment

PATIENCE_S = 2.0
"""After which what hasn't come is lost."""
BUFFER_SIZE = 1 << 18
_HANDSHAKE_TURNS = 64
_ETH_P_IP = 0x0800
_SOL_PACKET, _PACKET_IGNORE_OUTGOING = 263, 23  # linux/if_packet.h
_SO_ATTACH_FILTER = 26
_FRAME_SIZE = 1 << 17
# Classic BPF (kernel's Documentation/networking/filter.rst): IPv4, TCP, no fragment, and from the network's port.
_FILTER = (
    (0x28, 0, 0, 12),
    (0x15, 0, 8, _ETH_P_IP),
    (0x30, 0, 0, 23),
    (0x15, 0, 6, socket.IPPROTO_TCP),
    (0x28, 0, 0, 20),
    (0x45, 4, 0, 0x1FFF),
    (0xB1, 0, 0, 14),
    (0x48, 0, 0, 14),
    (0x15, 0, 1, NETWORK.port),
    (0x06, 0, 0, _FRAME_SIZE),
    (0x06, 0, 0, 0),
)


@dataclass(frozen=True, slots=True)
class Way:
    """One way from the wire to the relay."""

    name: str
    kind: str
    """`socket`, `packet` (AF_PACKET), `af_xdp` or `ringbuf`."""
    busy: bool

    @property
    def backend(self) -> Backend:
        """What has to be attached: also a way that isn't a capture needs the stamps of arrival."""
        return Backend.AF_XDP if self.kind == "af_xdp" else Backend.RINGBUF


WAYS = (
    Way("socket_blocking", "socket", busy=False),
    Way("socket_busy", "socket", busy=True),
    Way("packet_busy", "packet", busy=True),
    Way("af_xdp_blocking", "af_xdp", busy=False),
    Way("af_xdp_busy", "af_xdp", busy=True),
    Way("ringbuf_blocking", "ringbuf", busy=False),
    Way("ringbuf_busy", "ringbuf", busy=True),
)
"""Of AF_PACKET, which is only there to compare, the faster mode alone."""


class PlainSocket:
    """A connection to the peer, read as the product reads it."""

    def __init__(self, host: str) -> None:
        """Connect, and shake hands. Raises HostError."""
        self.upstream = connected_upstream(host, NETWORK.port)
        until = time.monotonic() + PATIENCE_S
        while not self.upstream.ready:
            if self.upstream.socket is None or time.monotonic() > until:
                raise HostError(f"no handshake with {host}: {self.upstream.account.last_error or 'time is up'}")
            wait_s = until - time.monotonic()
            if self.upstream.account.connects == 0:
                select.select([], [self.upstream.socket], [], wait_s)
                self.upstream.on_writable(time.monotonic_ns())
            else:
                select.select([self.upstream.socket], [], [], wait_s)
                self.upstream.on_readable(memoryview(bytearray(BUFFER_SIZE)))
        self._buffer = memoryview(bytearray(BUFFER_SIZE))
        self.seen_ns = 0

    def fileno(self) -> int:
        """The socket."""
        assert self.upstream.socket is not None
        return self.upstream.socket.fileno()

    def poll(self, _now_ns: int) -> list[Heard]:
        """What one recv() completes."""
        heard = self.upstream.on_readable(self._buffer)
        if heard and isinstance(heard[0], Sighting):
            self.seen_ns = heard[0].seen_ns
        return heard

    def deadline(self) -> int | None:
        """It needs no other turn."""
        return None

    def close(self) -> None:
        """Close the connection."""
        self.upstream.close()


def connected_upstream(host: str, port: int) -> Upstream:
    """An upstream that is connecting."""
    upstream = Upstream(Address(host, port), NETWORK, random.getrandbits(64), lambda: 0)
    upstream.candidates = [(socket.AF_INET, (host, port))]
    upstream.connect(time.monotonic_ns(), high_bandwidth=True)
    return upstream


class Seen:
    """A capture that notes when it last had something."""

    def __init__(self, capture: Captures) -> None:
        self._capture = capture
        self._poll = capture.poll
        self.fileno, self.counters, self.close = capture.fileno, capture.counters, capture.close
        self.deadline = capture.deadline
        self.seen_ns = 0

    def poll(self) -> list[Segment]:
        """The capture's."""
        segments = self._poll()
        if segments:
            self.seen_ns = time.monotonic_ns()
        return segments


class PacketCapture:
    """Segments by a packet socket."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        program = create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in _FILTER))
        fprog = struct.pack("@HP", len(_FILTER), addressof(program))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        self._socket.bind((NEAR, _ETH_P_IP))
        self._buffer = memoryview(bytearray(_FRAME_SIZE))

    def fileno(self) -> int:
        """The socket."""
        return self._socket.fileno()

    def poll(self) -> list[Segment]:
        """The next packet."""
        try:
            size = self._socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        segment = parse_frame(self._buffer[:size])
        return [] if segment is None else [segment]

    def deadline(self) -> int | None:
        """The descriptor says everything."""
        return None

    def counters(self) -> dict[str, int]:
        """It counts nothing."""
        return {}

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
