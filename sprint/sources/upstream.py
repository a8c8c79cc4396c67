"""One configured upstream: its socket, its connection, when to try again, and its words as sightings.

An upstream is never given up: the first new attempt comes within 250 ms, later ones after growing, jittered pauses, and
a completed handshake starts the pauses afresh.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sprint.bitcoin.block import HEADER_SIZE, double_sha256
from sprint.bitcoin.connection import USER_AGENT, Connection, ConnectionConfig, PeerViolation, Phase, Role
from sprint.bitcoin.messages import MAX_HEADERS, GetHeaders
from sprint.bitcoin.peer_events import (
    BlockAnnounced,
    BlockReceived,
    BlocksAnnouncedByInv,
    ConnectionEvent,
    HandshakeCompleted,
    HeadersReceived,
    LatencyMeasured,
)
from sprint.errors import LocalProtocolError
from sprint.events import Announcement, HeaderRun, PeerGone, PeerReady, Sighting, Source
from sprint.tiers import NS_PER_MS, NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from sprint.addresses import Address
    from sprint.bitcoin.codec import Message
    from sprint.bitcoin.networks import Network
    from sprint.sources import Heard
    from sprint.sources.resolver import SocketAddress

FIRST_PAUSE_NS = 250 * NS_PER_MS
LAST_PAUSE_NS = 30 * NS_PER_S
CONNECT_TIMEOUT_NS = 5 * NS_PER_S
MAX_ANNOUNCED_HEADERS = 8
"""BIP130: a node announces up to eight headers at once; more in one message are an answer."""
MAX_UNSENT_BYTES = 1 << 20
"""A peer that reads nothing can't make us keep more; a getheaders is 3 kB at most."""


@dataclass(slots=True)
class Account:
    """What the status shows of an upstream."""

    agent: str = ""
    height: int = 0
    connects: int = 0
    failures: int = 0
    last_error: str = ""
    rtt_ns: int = 0
    bytes_received: int = 0
    skipped_messages: int = 0
    high_bandwidth: bool = False
    connected: bool = False


class Upstream:
    """A peer that we keep a connection to."""

    user_agent: ClassVar[str] = USER_AGENT
    """What the peer is told that we are (BIP14)."""

    def __init__(self, address: Address, network: Network, nonce: int, tip_height: Callable[[], int]) -> None:
        self.address = address
        self.name = str(address)
        self.account = Account()
        self.socket: socket.socket | None = None
        self.candidates: list[SocketAddress] = []
        """Where the name leads, until the next attempt has been made; used in turn."""
        self.retry_ns: int | None = 0
        """When to connect again; None while connected, connecting or resolving."""
        self.wants_to_write = False
        self._network = network
        self._nonce = nonce
        self._tip_height = tip_height
        self._connection: Connection | None = None
        self._connect_by_ns: int | None = None
        self._turn = 0
        """Counts attempts that led to no handshake: so the candidate that last worked comes first again."""
        self._failures = 0
        """Since the last handshake."""
        self._told_ready = False
        """The relay has this connection's PeerReady."""
        self._unsent = bytearray()
        self._asked = 0
        """getheaders without an answer yet."""
        self._synced = False
        """The answer to the first getheaders of this connection has come."""

    @property
    def ready(self) -> bool:
        """The handshake is complete."""
        return self._connection is not None and self._connection.phase is Phase.READY

    def connect(self, now_ns: int, *, high_bandwidth: bool) -> None:
        """Begin to connect to the next candidate. What goes wrong sets retry_ns."""
        self.retry_ns = None
        family, sockaddr = self.candidates[self._turn % len(self.candidates)]
        self.account.high_bandwidth = high_bandwidth
        try:
            self.socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = self.socket.connect_ex(sockaddr)
        except OSError as error:  # no descriptor left, or no IPv6 on this host
            code = error.errno or errno.EIO
        if code not in {0, errno.EINPROGRESS}:
            self.drop(now_ns, f"can't connect: {os.strerror(code)}")
            return
        self._connect_by_ns = now_ns + CONNECT_TIMEOUT_NS
        self.wants_to_write = True

    def postpone(self, now_ns: int, error: str) -> None:
        """Try again later; the pause grows with each failure since the last handshake."""
        self.account.failures += 1
        self.account.last_error = error
        pause_ns = min(FIRST_PAUSE_NS << min(self._failures, 16), LAST_PAUSE_NS)
        self._failures += 1
        self.retry_ns = now_ns + int(pause_ns * random.uniform(0.5, 1.0))

    def drop(self, now_ns: int, error: str) -> list[Heard]:
        """Close the connection, if there is one, and arrange for the next."""
        gone: list[Heard] = [PeerGone(Source.P2P, self.name)] if self._told_ready else []
        self._turn += not self._told_ready
        self.candidates = []
        self.close()
        self.postpone(now_ns, error)
        return gone

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._connect_by_ns = None
        self._told_ready = False
        self._unsent.clear()
        self._asked = 0
        self._synced = False
        self.wants_to_write = False
        self.account.connected = False
        self.account.high_bandwidth = False

    def on_writable(self, now_ns: int) -> list[Heard]:
        """The socket has connected, or takes more."""
        assert self.socket is not None
        if self._connection is None:
            code = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                return self.drop(now_ns, f"can't connect: {os.strerror(code)}")
            self._connect_by_ns = None
            config = ConnectionConfig(
                network=self._network,
                role=Role.INITIATOR,
                user_agent=self.user_agent,
                start_height=self._tip_height(),
                compact_high_bandwidth=self.account.high_bandwidth,
            )
            self._connection = Connection(config, self._nonce, now_ns, int(time.time()))
            self.account.connects += 1
        return self._flush(now_ns)

    def on_readable(self, buffer: memoryview) -> list[Heard]:
        """Read once, at most a bufferful: other upstreams have their turn before more."""
        if self.socket is None or self._connection is None:
            return []
        try:
            size = self.socket.recv_into(buffer)
        except BlockingIOError:
            return []
        except OSError as error:
            return self.drop(time.monotonic_ns(), f"connection lost: {error.strerror}")
        seen_ns = time.monotonic_ns()
        if not size:
            return self.drop(seen_ns, "connection closed by the peer")
        heard: list[Heard] = []
        try:
            for event in self._connection.receive_data(buffer[:size], seen_ns):
                self._translate(event, seen_ns, heard)
        except PeerViolation as violation:
            for event in violation.events:
                self._translate(event, seen_ns, heard)
            return heard + self.drop(seen_ns, str(violation))
        return heard + self._flush(seen_ns)

    def ask_headers(self, locator: tuple[bytes, ...], now_ns: int) -> list[Heard]:
        """Send a getheaders, if the handshake is complete."""
        self._asked += self.ready
        return self.send(GetHeaders(locator), now_ns)

    def send(self, message: Message, now_ns: int) -> list[Heard]:
        """Send a message, if the handshake is complete."""
        if self._connection is None or not self.ready:
            return []
        try:
            self._connection.send(message)
        except LocalProtocolError as error:
            return self.drop(now_ns, str(error))
        return self._flush(now_ns)

    def request_high_bandwidth(self) -> list[Heard]:
        """Ask that compact blocks be pushed from now on."""
        if self._connection is None or not self.ready:
            return []
        self._connection.request_compact(high_bandwidth=True)
        self.account.high_bandwidth = True
        return self._flush(time.monotonic_ns())

    def deadline(self) -> int | None:
        """When on_timer has something to do."""
        times = [self.retry_ns, self._connect_by_ns]
        if self._connection is not None:
            times.append(self._connection.deadline())
        return min((time_ns for time_ns in times if time_ns is not None), default=None)

    def on_timer(self, now_ns: int) -> list[Heard]:
        """Time-outs and pings; connecting again is the source's, who knows the other upstreams."""
        if self._connect_by_ns is not None and now_ns >= self._connect_by_ns:
            return self.drop(now_ns, f"no connection within {CONNECT_TIMEOUT_NS // NS_PER_S} s")
        if self._connection is None:
            return []
        try:
            self._connection.on_timer(now_ns)
        except PeerViolation as violation:
            return self.drop(now_ns, str(violation))
        return self._flush(now_ns)

    def refresh_account(self) -> None:
        """Bring what only the connection knows into the account."""
        if self._connection is not None:
            self.account.bytes_received = self._connection.bytes_received
            self.account.skipped_messages = self._connection.counters.skipped
            self.account.connected = self.ready

    def _flush(self, now_ns: int) -> list[Heard]:
        if self.socket is None or self._connection is None:
            return []
        data = self._connection.data_to_send()
        if self._unsent:
            self._unsent += data
            data = bytes(self._unsent)
        if data:
            try:
                sent = self.socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                return self.drop(now_ns, f"connection lost: {error.strerror}")
            self._unsent[:] = data[sent:]
            if len(self._unsent) > MAX_UNSENT_BYTES:
                return self.drop(now_ns, f"the peer reads nothing: {len(self._unsent)} bytes unsent")
        self.wants_to_write = bool(self._unsent)
        return []

    def _translate(self, event: ConnectionEvent, seen_ns: int, heard: list[Heard]) -> None:
        """One fact of the wire as what the relay understands."""
        if isinstance(event, BlockAnnounced):
            heard.append(self._sighting(Announcement.CMPCTBLOCK, event.hash, event.header, seen_ns, event.transactions))
        elif isinstance(event, HeadersReceived):
            self._on_headers(event.headers, event.count, seen_ns, heard)
        elif isinstance(event, BlocksAnnouncedByInv):
            # As in Core, the last entry is taken for the peer's tip: one question a message, however many it names.
            heard.append(self._sighting(Announcement.INV, event.hashes[-1], None, seen_ns, validated=True))
        elif isinstance(event, BlockReceived):
            size, transactions = len(event.payload), event.transactions
            heard.append(self._sighting(Announcement.BLOCK, event.hash, event.header, seen_ns, transactions, size))
        elif isinstance(event, LatencyMeasured):
            self.account.rtt_ns = event.rtt_ns
        elif isinstance(event, HandshakeCompleted):
            self._failures = 0
            self._told_ready = True
            self.account.connected = True
            agent = event.version.user_agent.decode("ascii", "replace")
            self.account.agent = "".join(letter if " " <= letter <= "~" else "?" for letter in agent)
            self.account.height = max(0, event.version.start_height)
            heard.append(PeerReady(Source.P2P, self.name, self.account.height))

    def _on_headers(self, headers: bytes, count: int, seen_ns: int, heard: list[Heard]) -> None:
        """A headers message is an announcement, or the answer to a question, or looks like either.

        Few headers while a question is open may be either, so they are taken as both: what is taken twice is known the
        second time. Only the first answer of a connection can't be an announcement: it brings what we missed.
        """
        answer = self._asked > 0
        if 0 < count <= MAX_ANNOUNCED_HEADERS and self._synced:
            for at in range(0, len(headers), HEADER_SIZE):
                header = headers[at : at + HEADER_SIZE]
                block_hash = double_sha256(header)
                heard.append(self._sighting(Announcement.HEADERS, block_hash, header, seen_ns, validated=True))
        if answer or count > MAX_ANNOUNCED_HEADERS or not self._synced:
            self._asked = max(0, self._asked - 1)
            self._synced = self._synced or count < MAX_HEADERS
            heard.append(HeaderRun(Source.P2P, self.name, headers, seen_ns, complete=count < MAX_HEADERS))

    def _sighting(
        self,
        announcement: Announcement,
        block_hash: bytes,
        header: bytes | None,
        seen_ns: int,
        transactions: int = 0,
        size: int = 0,
        *,
        validated: bool = False,
    ) -> Sighting:
        return Sighting(
            Source.P2P, self.name, announcement, block_hash, header, seen_ns, transactions, size, validated
        )  # fmt: skip
