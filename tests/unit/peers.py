"""What tests of our connections share: peers that say what a test tells them to, over real sockets on the loopback.

A Rig has a P2PSource and a listener for each of its upstreams, and turns the crank for all of them until something has
happened. Its clock is the machine's, put forward as far as a test wants.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from contextlib import contextmanager, suppress
from itertools import count
from typing import TYPE_CHECKING, TypeVar

from sprint.addresses import Address
from sprint.bitcoin.connection import Connection, ConnectionConfig, Phase, Role
from sprint.bitcoin.framing import encode_frame
from sprint.bitcoin.messages import MSG_BLOCK, NODE_NETWORK, Headers, Inv
from sprint.bitcoin.networks import REGTEST
from sprint.bitcoin.peer_events import HeadersRequested
from sprint.errors import RemoteProtocolError
from sprint.sources.p2p import P2PSource
from sprint.status import StatusBlock
from tests.unit.chains import blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sprint.bitcoin.codec import Message
    from sprint.bitcoin.peer_events import ConnectionEvent
    from sprint.regtest import MinedBlock
    from sprint.sources import Heard
    from sprint.status import Peer

T = TypeVar("T")
FIRST, SECOND_BLOCK, THIRD = blocks(3)
_PORTS = count(20_000)


class ScriptedPeer:
    """The node's end of one connection."""

    def __init__(self, sock: socket.socket, *, silent: bool = False, height: int = 0) -> None:
        """A silent one reads what it is sent, and says nothing that a test doesn't tell it to."""
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.silent = silent
        config = ConnectionConfig(
            network=REGTEST,
            role=Role.RESPONDER,
            services=NODE_NETWORK,
            user_agent="/Scripted:1.0/",
            start_height=height,
        )
        self.connection = Connection(config, 99, time.monotonic_ns(), int(time.time()))
        self.events: list[ConnectionEvent] = []
        self.closed = False
        """By us on the other end."""
        self.outgoing: deque[memoryview] = deque()

    @property
    def ready(self) -> bool:
        return self.connection.phase is Phase.READY

    @property
    def questions(self) -> list[HeadersRequested]:
        return [event for event in self.events if isinstance(event, HeadersRequested)]

    @property
    def pushes(self) -> bool:
        """We were asked to push compact blocks."""
        return self.connection.peer_wants_compact_high_bandwidth

    def pump(self) -> None:
        """Read and write whatever can be."""
        if self.closed:
            return
        try:
            while data := self.sock.recv(1 << 16):
                if not self.silent:
                    self.events += self.connection.receive_data(data, time.monotonic_ns())
            self.closed = True
        except BlockingIOError:
            pass
        except (OSError, RemoteProtocolError):
            self.closed = True
        self._write(b"" if self.silent else self.connection.data_to_send())

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.connection.send(message)
        self.pump()

    def compact(self, block: MinedBlock) -> None:
        self.send(block.compact(7))

    def headers(self, *blocks: MinedBlock) -> None:
        self.send(Headers(b"".join(block.header.encode() for block in blocks)))

    def inv(self, *blocks: MinedBlock) -> None:
        self.send(Inv(tuple((MSG_BLOCK, block.hash) for block in blocks)))

    def raw(self, *pieces: bytes) -> None:
        """Bytes as they are; what doesn't fit the socket follows as it is pumped."""
        for piece in pieces:
            self.outgoing.append(memoryview(piece))
        self.pump()

    def close(self) -> None:
        self.closed = True
        self.sock.close()

    def _write(self, data: bytes) -> None:
        if data:
            self.outgoing.append(memoryview(data))
        try:
            while self.outgoing:
                sent = self.sock.send(self.outgoing[0])
                self.outgoing[0] = self.outgoing[0][sent:]
                if not self.outgoing[0]:
                    self.outgoing.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True


class Listener:
    """Where one upstream is to be found."""

    def __init__(self, *, silent: bool = False, height: int = 0) -> None:
        self.silent = silent
        self.height = height
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.sock.setblocking(False)
        self.address = Address("127.0.0.1", self.sock.getsockname()[1])
        self.peers: list[ScriptedPeer] = []
        """All that have connected, the latest last."""

    @property
    def peer(self) -> ScriptedPeer:
        return self.peers[-1]

    def pump(self) -> None:
        try:
            sock, _ = self.sock.accept()
            self.peers.append(ScriptedPeer(sock, silent=self.silent, height=self.height))
        except OSError:
            pass
        for peer in self.peers:
            peer.pump()

    def close(self) -> None:
        self.sock.close()
        for peer in self.peers:
            peer.close()


def closed_port() -> int:
    """Another port on which nobody listens, below those that the kernel gives to whoever asks for any."""
    while True:
        port = next(_PORTS)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def junk(size: int, command: str = "junk") -> bytes:
    """A sound message of a type that nobody knows, or of one that everybody does."""
    return encode_frame(REGTEST.magic, command, bytes(size))


class Rig:
    """A P2PSource among its upstreams."""

    def __init__(
        self, upstreams: int = 1, *, addresses: Sequence[Address] = (), silent: bool = False, height: int = 0
    ) -> None:
        """That many listeners, and more upstreams at `addresses`."""
        self.listeners = [Listener(silent=silent, height=height) for _ in range(upstreams)]
        self.status = StatusBlock.create(1, {})
        self.tip_height = 0
        self.skew_ns = 0
        self.polled_ns = 0
        """When the source was last asked, by its own clock: what it puts off counts from then."""
        everywhere = [*(listener.address for listener in self.listeners), *addresses]
        self.source = P2PSource(everywhere, REGTEST, lambda: self.tip_height, self.status)
        self.heard: list[Heard] = []

    @property
    def now_ns(self) -> int:
        return time.monotonic_ns() + self.skew_ns

    @property
    def peers(self) -> list[ScriptedPeer]:
        return [listener.peer for listener in self.listeners if listener.peers]

    def step(self, wait_s: float = 0.0) -> list[Heard]:
        """One turn of everybody."""
        sockets = [listener.sock for listener in self.listeners]
        sockets += [peer.sock for listener in self.listeners for peer in listener.peers if not peer.closed]
        descriptors = [self.source.fileno(), *(sock.fileno() for sock in sockets)]
        select.select([each for each in descriptors if each >= 0], [], [], wait_s)
        for listener in self.listeners:
            listener.pump()
        self.polled_ns = self.now_ns
        heard = self.source.poll(self.polled_ns)
        self.source.deadline()
        self.heard += heard
        return heard

    def until(self, condition: Callable[[], T], seconds: float = 10.0) -> T:
        """Turn the crank until the condition holds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = condition()
            if value:
                return value
            self.step(0.002)
        raise AssertionError(f"not within {seconds} s; heard so far: {self.heard[-5:]}")

    def connect(self) -> list[ScriptedPeer]:
        """Until every listener has a peer whose handshake is complete on both ends."""
        self.until(lambda: sum(row.connected for row in self.accounts()) == len(self.listeners))
        self.until(lambda: all(peer.ready for peer in self.peers))
        return self.peers

    def of(self, kind: type[T]) -> list[T]:
        """What was heard of that kind."""
        return [heard for heard in self.heard if isinstance(heard, kind)]

    def forward(self, seconds: float) -> None:
        """Put the clock forward."""
        self.skew_ns += int(seconds * 1e9)

    def accounts(self) -> list[Peer]:
        self.source.account()
        return self.status.peers()

    def account(self, index: int = 0) -> Peer:
        return self.accounts()[index]

    def close(self) -> None:
        self.source.close()
        for listener in self.listeners:
            listener.close()


@contextmanager
def rig_of(
    upstreams: int = 1, *, addresses: Sequence[Address] = (), silent: bool = False, height: int = 0
) -> Iterator[Rig]:
    """A rig for the length of a test."""
    rig = Rig(upstreams, addresses=addresses, silent=silent, height=height)
    try:
        yield rig
    finally:
        rig.close()
