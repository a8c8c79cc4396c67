"""Keeps the path from a packet to the ring warm: a dummy block through the very same functions, to no effect outside.

A rehearsal has a TCP connection, an upstream, a relay, a chain and a ring of its own, on regtest, where blocks cost
nothing. What it runs is what a real announcement runs: recv, framing, checksum, parsing, hashing, the chain's rules,
the record, the ring, the wake-up. It shares nothing with the real ones but the code and the processor's caches.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from sprint.bitcoin.connection import Connection, ConnectionConfig, Phase, Role
from sprint.bitcoin.framing import encode_frame
from sprint.bitcoin.networks import NETWORKS
from sprint.broadcaster import Broadcaster
from sprint.chain import HeaderChain
from sprint.channels import EventChannel
from sprint.errors import HostError
from sprint.events import PeerReady, Sighting, Source
from sprint.regtest import RegtestChain
from sprint.relay import Relay
from sprint.ring import Ring, RingWriter, size_for

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Protocol

    from sprint.sources import Heard

    class Listens(Protocol):
        """An upstream, as the source p2p has them."""

        socket: socket.socket | None

        @property
        def ready(self) -> bool:
            """The handshake is complete."""

        def on_writable(self, now_ns: int) -> list[Heard]:
            """The socket has connected, or takes more."""

        def on_readable(self, buffer: memoryview) -> list[Heard]:
            """Read once."""

    class Overhears(Protocol):
        """A capture of what is said to it."""

        def hear(self, frame: bytes, now_ns: int) -> list[Heard]:
            """What a captured announcement says."""

        def close(self) -> None:
            """Let go of its memory."""


BLOCKS = 128
"""Mined once, about 10 ms; after the last one the rehearsal begins anew with an empty chain."""
_BUFFER_SIZE = 1 << 14
_HANDSHAKE_TURNS = 64
_READS = 32
_TIMEOUT_S = 2.0
_RING_SLOTS = 8
_PEER = "rehearsal"


class Rehearsal:
    """A scratch relay and the announcements to feed it. perform() takes about as long as a real block does."""

    def __init__(
        self,
        upstream: Listens,
        theirs: socket.socket,
        overhears: Overhears | None = None,
        deliver: Callable[[], None] | None = None,
    ) -> None:
        """`upstream` is connecting, on regtest, to `theirs`; `overhears`: if there is a capture to be kept warm too;
        `deliver` rehearses what else is done with a record in this process.

        Raises HostError when the handshake fails.
        """
        network = NETWORKS["regtest"]
        self._upstream = upstream
        self._theirs = theirs
        self._overhears = overhears
        self._deliver = deliver
        self._buffer = memoryview(bytearray(_BUFFER_SIZE))
        blocks = RegtestChain().extend(BLOCKS, int(time.time()))
        self._frames = [encode_frame(network.magic, "cmpctblock", block.compact(0).encode()) for block in blocks]
        ring = Ring.create(bytearray(size_for(_RING_SLOTS)), _RING_SLOTS, 1)
        self._channel = EventChannel()
        self._broadcaster = Broadcaster(RingWriter(ring), network.magic, [self._channel], time.monotonic_ns)
        self._next = 0
        self._relay = _caught_up_relay()
        try:
            self._shake_hands()
        except OSError as error:
            raise HostError(f"the rehearsal's handshake failed: {error}") from None
        self.performed = 0
        self._over = False

    def perform(self) -> None:
        """Run the path once; nothing, once its connection has gone."""
        if self._over:
            return
        if self._next == len(self._frames):
            self._next = 0
            self._relay = _caught_up_relay()
        frame, now_ns = self._frames[self._next], time.monotonic_ns()
        self._next += 1
        if self._overhears is not None and self._next % 2:  # in turn: both at once would double what a block may meet
            heard_of = self._overhears.hear(frame, now_ns)
        else:
            try:
                self._theirs.send(frame)
            except OSError:
                self._over = True
                return
            heard_of = self._hear()
        for heard in heard_of:
            if isinstance(heard, Sighting):
                for block in self._relay.offer(heard, now_ns, time.time_ns()):
                    self._broadcaster.write(block)
                    self._broadcaster.wake()
                    if self._deliver is not None:
                        self._deliver()
                    self.performed += 1
        self._channel.drain()
        self._relay.take_journal()
        self._relay.take_headers()

    def _hear(self) -> list[Heard]:
        """What was sent; on a busy machine the kernel may hand it over a little later."""
        for _ in range(_READS):
            heard = self._upstream.on_readable(self._buffer)
            if heard:
                return heard
        return []

    def close(self) -> None:
        """Close both ends, and the channel."""
        self._over = True
        if self._overhears is not None:
            self._overhears.close()
        os.close(self._channel.fileno())
        if self._upstream.socket is not None:
            self._upstream.socket.close()
        self._theirs.close()

    def _shake_hands(self) -> None:
        """Both sides of the handshake, in one thread."""
        config = ConnectionConfig(network=NETWORKS["regtest"], role=Role.RESPONDER)
        peer = Connection(config, 0, time.monotonic_ns(), int(time.time()))
        self._theirs.settimeout(_TIMEOUT_S)
        self._upstream.on_writable(time.monotonic_ns())
        for _ in range(_HANDSHAKE_TURNS):
            if self._upstream.ready and peer.phase is Phase.READY:
                self._theirs.setblocking(False)
                return
            peer.receive_data(self._theirs.recv(_BUFFER_SIZE), time.monotonic_ns())
            self._theirs.sendall(peer.data_to_send())
            self._upstream.on_readable(self._buffer)
        raise HostError("the rehearsal's handshake did not complete")


def _caught_up_relay() -> Relay:
    relay = Relay(HeaderChain(NETWORKS["regtest"]))
    relay.peer_ready(PeerReady(Source.P2P, _PEER, 0), 0)
    relay.take_wants()
    return relay
