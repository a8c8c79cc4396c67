"""One connection to one peer as a state machine: bytes and `now` in, events and bytes out.

Owns the handshake, the answers to ping, our own pings, and what both sides agreed on. Opens no socket and reads no
clock; times are CLOCK_MONOTONIC nanoseconds. What may be said when stands in one table, `Connection.TRANSITIONS`; a
message that isn't in it for the phase is counted as unexpected and skipped, as Core does with a second version, a
second verack, and anything but version before version. wtxidrelay and sendaddrv2 after verack end the connection, as in
Core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256
from typing import TYPE_CHECKING, ClassVar

from sprint.bitcoin.codec import MAX_PAYLOAD_SIZE, U64, MalformedError, Message
from sprint.bitcoin.framing import Counters, Framer, encode_frame
from sprint.bitcoin.messages import (
    COMPACT_VERSION,
    PROTOCOL_VERSION,
    FeeFilter,
    Ping,
    Pong,
    SendAddrV2,
    SendCmpct,
    SendHeaders,
    Verack,
    Version,
    WtxidRelay,
)
from sprint.bitcoin.peer_events import TRANSLATIONS, ConnectionEvent, HandshakeCompleted, LatencyMeasured
from sprint.errors import LocalProtocolError, RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sprint.bitcoin.networks import Network

USER_AGENT = "/BitcoinSprint:0.1.0/"
MIN_PEER_VERSION = 70015
"""From this version on a peer may push a compact block that it hasn't fully validated, and bears with one that turns
out invalid; a relay that is to be first depends on both. It implies sendheaders (70012) and sendcmpct (70014)."""

WTXID_RELAY_VERSION = 70016
"""BIP339: only a peer of this version is offered wtxidrelay; Core ties sendaddrv2 to it as well."""

MAX_UNSENT_SIZE = 4 * MAX_PAYLOAD_SIZE
"""Four of the largest messages waiting for `data_to_send`; more means that the peer doesn't read."""

MAX_UNSENT_PONGS = 10_000
"""Pings answered between two calls of `data_to_send`; a flood of them must not become a buffer of ours."""

_MASK_64 = 0xFFFF_FFFF_FFFF_FFFF


class Role(Enum):
    """Who opened the connection."""

    INITIATOR = "initiator"
    RESPONDER = "responder"


class Phase(Enum):
    """How far the handshake has come."""

    AWAITING_VERSION = "awaiting version"
    AWAITING_VERACK = "awaiting verack"
    READY = "ready"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionConfig:
    """What stays the same over all connections to an upstream, or of a listener."""

    network: Network
    """Its magic starts each message."""
    role: Role
    """An initiator speaks first."""
    services: int = 0
    """The NODE_… bits we claim; none, unless blocks are served."""
    user_agent: str = USER_AGENT
    """BIP14; ASCII, at most 256 bytes."""
    start_height: int = 0
    """The height we claim, for information only."""
    relay: bool = False
    """Whether we want transactions announced (BIP37)."""
    compact_high_bandwidth: bool = False
    """Ask at once that new blocks be pushed as cmpctblock; at most three peers should be asked (BIP152)."""
    handshake_timeout_ns: int = 5_000_000_000
    """From the start to the peer's verack."""
    ping_interval_ns: int = 30_000_000_000
    """From ping to ping. Core's two minutes would leave a dead peer unnoticed for a fifth of a block's time."""
    ping_timeout_ns: int = 20_000_000_000
    """From a ping to its pong. A node that connects a block answers late: Core's own limit is 20 minutes."""


class PeerViolation(RemoteProtocolError):  # noqa: N818  # the name is the fact; the base says that it is an error
    """The peer broke the protocol; the connection is closed."""

    def __init__(self, message: str, events: tuple[ConnectionEvent, ...]) -> None:
        super().__init__(message)
        self.events = events
        """What the same bytes said before they broke the protocol: still good."""


Handler = Callable[["Connection", bytes, int], "ConnectionEvent | None"]


@dataclass(frozen=True, slots=True)
class Transition:
    """What a message does in a phase."""

    phase: Phase
    """The phase afterwards."""
    handle: Handler
    """Its docstring says what happens."""


def _reporting(command: str) -> Handler:
    translation = TRANSLATIONS[command]

    def report(_connection: Connection, payload: bytes, _now_ns: int) -> ConnectionEvent | None:
        """Becomes an event."""
        return translation(payload)

    return report


def _by_phase(transitions: Mapping[tuple[Phase, str], Transition]) -> dict[Phase, dict[str, Transition]]:
    """The table as it is looked up: hashing an Enum for each message would cost more than some messages do."""
    return {phase: {command: step for (of, command), step in transitions.items() if of is phase} for phase in Phase}


class Connection:
    """The protocol of one connection, from its first byte to its last."""

    def __init__(self, config: ConnectionConfig, nonce: int, now_ns: int, wall_s: int) -> None:
        """`nonce`: 64 random bits, the same for all connections of a process, so that each knows the others' as its
        own. `wall_s`: Unix time, for the version message."""
        self.config = config
        self._nonce = nonce & _MASK_64
        self._wall_s = wall_s
        self._framer = Framer(config.network.magic)
        self._phase = Phase.AWAITING_VERSION
        self._steps = self._STEPS[self._phase]
        self._out = bytearray()
        self._unsent_pongs = 0
        self._peer_version: Version | None = None
        self._compact_version_agreed = 0
        self._peer_wants_headers = False
        self._peer_wants_compact_high_bandwidth = False
        self._handshake_deadline_ns = now_ns + config.handshake_timeout_ns
        self._ping_nonce: int | None = None
        self._ping_sent_ns = now_ns
        self._pings = 0
        if config.role is Role.INITIATOR:
            self._queue(self._own_version())

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def peer_version(self) -> Version | None:
        """The peer's version message, once it came."""
        return self._peer_version

    @property
    def counters(self) -> Counters:
        return self._framer.counters

    @property
    def compact_version_agreed(self) -> int:
        """2 once the peer has sent sendcmpct of that version, else 0."""
        return self._compact_version_agreed

    @property
    def peer_wants_headers(self) -> bool:
        """The peer sent sendheaders (BIP130)."""
        return self._peer_wants_headers

    @property
    def peer_wants_compact_high_bandwidth(self) -> bool:
        """The last sendcmpct of version 2 asked for compact blocks unasked."""
        return self._peer_wants_compact_high_bandwidth

    @property
    def bytes_received(self) -> int:
        return self._framer.offset

    def receive_data(self, data: bytes | memoryview, now_ns: int) -> list[ConnectionEvent]:
        """Takes what the socket gave; returns what it meant, in order. `data` isn't kept.

        Raises PeerViolation, a RemoteProtocolError that says what and at which byte of the stream; then the phase is
        CLOSED. Raises LocalProtocolError if it was CLOSED before.
        """
        if self._phase is Phase.CLOSED:
            raise LocalProtocolError("data for a connection that is closed")
        events: list[ConnectionEvent] = []
        counters = self._framer.counters
        try:
            for command, payload, offset in self._framer.receive(data):
                transition = self._steps.get(command)
                if transition is None:
                    counters.unexpected += 1
                    continue
                try:
                    event = transition.handle(self, payload, now_ns)
                except MalformedError:
                    counters.malformed += 1
                    continue
                except RemoteProtocolError as error:
                    raise RemoteProtocolError(f"{command} at byte {offset} of the stream: {error}") from None
                if event is not None:
                    events.append(event)
                if transition.phase is not self._phase:
                    self._enter(transition.phase, now_ns)
            if self._framer.violation is not None:
                raise self._framer.violation
        except RemoteProtocolError as error:
            self.close()
            raise PeerViolation(str(error), tuple(events)) from None
        return events

    def data_to_send(self) -> bytes:
        """All that waits to be sent; the caller has it from here on."""
        data = bytes(self._out)
        self._out.clear()
        self._unsent_pongs = 0
        return data

    def send(self, message: Message) -> None:
        """Queues a message. Raises LocalProtocolError before the handshake is complete, after the end, for a list over
        its protocol limit, or with more than four messages' worth unsent."""
        if self._phase is not Phase.READY:
            raise LocalProtocolError(f"{message.command} can't be sent while the connection is {self._phase.value}")
        if len(self._out) > MAX_UNSENT_SIZE:
            raise LocalProtocolError(f"{message.command} can't be sent with {len(self._out)} bytes still unsent")
        self._queue(message)

    def request_compact(self, high_bandwidth: bool) -> None:
        """Asks for compact blocks: pushed unasked in high-bandwidth mode, else announced by headers or inv first."""
        self.send(SendCmpct(high_bandwidth, COMPACT_VERSION))

    def deadline(self) -> int | None:
        """When `on_timer` has to be called next, unless something changes before; None once closed."""
        if self._phase is Phase.CLOSED:
            return None
        if self._phase is not Phase.READY:
            return self._handshake_deadline_ns
        wait = self.config.ping_interval_ns if self._ping_nonce is None else self.config.ping_timeout_ns
        return self._ping_sent_ns + wait

    def on_timer(self, now_ns: int) -> list[ConnectionEvent]:
        """Does what is due: sends a ping, or raises PeerViolation when the handshake or a pong is overdue.

        Does nothing when called early.
        """
        deadline = self.deadline()
        if deadline is None or now_ns < deadline:
            return []
        if self._phase is not Phase.READY:
            waiting, limit_ns = self._phase.value, self.config.handshake_timeout_ns
        elif self._ping_nonce is not None:
            waiting, limit_ns = "awaiting pong", self.config.ping_timeout_ns
        else:
            self._ping(now_ns)
            return []
        received = self.bytes_received
        self.close()
        raise PeerViolation(f"still {waiting} after {limit_ns / 1e9:g} s, {received} bytes received", ())

    def close(self) -> None:
        """The transport has ended, or is about to. May be called again."""
        self._phase = Phase.CLOSED
        self._steps = self._STEPS[Phase.CLOSED]

    def _queue(self, message: Message) -> None:
        self._out += encode_frame(self.config.network.magic, message.command, message.encode())

    def _own_version(self) -> Version:
        config = self.config
        user_agent = config.user_agent.encode("ascii")
        return Version(
            PROTOCOL_VERSION, config.services, self._wall_s, self._nonce, user_agent, config.start_height, config.relay
        )

    def _enter(self, phase: Phase, now_ns: int) -> None:
        self._phase = phase
        self._steps = self._STEPS[phase]
        if phase is Phase.READY:
            self._queue(SendHeaders())
            self._queue(SendCmpct(self.config.compact_high_bandwidth, COMPACT_VERSION))
            self._ping(now_ns)

    def _ping(self, now_ns: int) -> None:
        # Hard to guess, or a peer could answer before it was asked and look closer than it is.
        seed = U64.pack(self._nonce) + U64.pack(now_ns & _MASK_64) + U64.pack(self._pings)
        self._pings += 1
        self._ping_nonce = U64.unpack_from(sha256(seed).digest())[0]
        self._ping_sent_ns = now_ns
        self._queue(Ping(self._ping_nonce))

    def _on_version(self, payload: bytes, _now_ns: int) -> None:
        """A responder answers with its version; both sides follow with wtxidrelay, sendaddrv2 and verack."""
        version = Version.parse(payload)
        if version.nonce == self._nonce:
            raise RemoteProtocolError(f"nonce {version.nonce:#018x} is our own: connected to ourselves")
        if version.version < MIN_PEER_VERSION:
            raise RemoteProtocolError(
                f"protocol version {version.version}: at least {MIN_PEER_VERSION} is needed for compact blocks"
            )
        self._peer_version = version
        if self.config.role is Role.RESPONDER:
            self._queue(self._own_version())
        if version.version >= WTXID_RELAY_VERSION:
            self._queue(WtxidRelay())
            self._queue(SendAddrV2())
        self._queue(Verack())

    def _on_verack(self, _payload: bytes, _now_ns: int) -> ConnectionEvent:
        """The handshake is complete; sendheaders, sendcmpct and a first ping go out."""
        assert self._peer_version is not None
        return HandshakeCompleted(self._peer_version)

    def _on_announced_ability(self, _payload: bytes, _now_ns: int) -> None:
        """Taken note of by nobody: Sprint relays no transactions or addresses."""

    def _on_late_ability(self, _payload: bytes, _now_ns: int) -> None:
        """Ends the connection."""
        raise RemoteProtocolError("only allowed between version and verack")

    def _on_sendheaders(self, _payload: bytes, _now_ns: int) -> None:
        """The peer wants headers instead of inv."""
        self._peer_wants_headers = True

    def _on_sendcmpct(self, payload: bytes, _now_ns: int) -> None:
        """The peer understands compact blocks; versions other than 2 are ignored."""
        message = SendCmpct.parse(payload)
        if message.version == COMPACT_VERSION:
            self._compact_version_agreed = COMPACT_VERSION
            self._peer_wants_compact_high_bandwidth = message.announce

    def _on_feefilter(self, payload: bytes, _now_ns: int) -> None:
        """Has to be sound, and is ignored: Sprint relays no transactions."""
        FeeFilter.parse(payload)

    def _on_ping(self, payload: bytes, _now_ns: int) -> None:
        """Is answered by a pong."""
        pong = Pong(Ping.parse(payload).nonce)
        if self._unsent_pongs == MAX_UNSENT_PONGS:
            raise RemoteProtocolError(f"more than {MAX_UNSENT_PONGS} pings without reading an answer")
        self._unsent_pongs += 1
        self._queue(pong)

    def _on_pong(self, payload: bytes, now_ns: int) -> ConnectionEvent | None:
        """Gives the round-trip time, if it answers our last ping."""
        if Pong.parse(payload).nonce != self._ping_nonce:
            self._framer.counters.unexpected += 1
            return None
        self._ping_nonce = None
        return LatencyMeasured(now_ns - self._ping_sent_ns)

    TRANSITIONS: ClassVar[Mapping[tuple[Phase, str], Transition]] = {
        (Phase.AWAITING_VERSION, "version"): Transition(Phase.AWAITING_VERACK, _on_version),
        (Phase.AWAITING_VERACK, "wtxidrelay"): Transition(Phase.AWAITING_VERACK, _on_announced_ability),
        (Phase.AWAITING_VERACK, "sendaddrv2"): Transition(Phase.AWAITING_VERACK, _on_announced_ability),
        (Phase.AWAITING_VERACK, "sendheaders"): Transition(Phase.AWAITING_VERACK, _on_sendheaders),
        (Phase.AWAITING_VERACK, "sendcmpct"): Transition(Phase.AWAITING_VERACK, _on_sendcmpct),
        (Phase.AWAITING_VERACK, "verack"): Transition(Phase.READY, _on_verack),
        (Phase.READY, "wtxidrelay"): Transition(Phase.CLOSED, _on_late_ability),
        (Phase.READY, "sendaddrv2"): Transition(Phase.CLOSED, _on_late_ability),
        (Phase.READY, "sendheaders"): Transition(Phase.READY, _on_sendheaders),
        (Phase.READY, "sendcmpct"): Transition(Phase.READY, _on_sendcmpct),
        (Phase.READY, "feefilter"): Transition(Phase.READY, _on_feefilter),
        (Phase.READY, "ping"): Transition(Phase.READY, _on_ping),
        (Phase.READY, "pong"): Transition(Phase.READY, _on_pong),
        **{(Phase.READY, command): Transition(Phase.READY, _reporting(command)) for command in TRANSLATIONS},
    }
    _STEPS: ClassVar[Mapping[Phase, Mapping[str, Transition]]] = _by_phase(TRANSITIONS)
