"""What a subscriber imports: `for record in sprint.client.connect("127.0.0.1:8434"): …`.

ClientProtocol is the protocol without a socket or a clock: bytes and `now` in, items out. connect() and connect_async()
are loops around it that read, reconnect and resume. The server is not trusted: each header's proof of work is checked
against its own nBits, a record comes at most once, and nothing that the server sends can make more than one frame be
held. Not detected here: a chain of cheap headers with easy nBits; whoever must know checks nBits against his own node.

SharedReader is for subscribers on Sprint's own host: the same records, read where the relay writes them.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sprint.addresses import parse_address
from sprint.bitcoin.block import double_sha256, meets_target
from sprint.errors import RemoteProtocolError, SprintError
from sprint.events import Lapped
from sprint.frames import FrameDecoder, Heartbeat, Item, json_line
from sprint.record import Record
from sprint.shared_reader import SharedReader
from sprint.subscription import (
    ANSWER_TIMEOUT_NS,
    MAX_ANSWER,
    ConnectionLostError,
    ServerFullError,
    SubscriptionRefusedError,
    read_answer,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from sprint.addresses import Address

__all__ = (
    "ClientProtocol",
    "ConnectionLostError",
    "ServerFullError",
    "SharedReader",
    "Subscribed",
    "SubscriptionRefusedError",
    "UnprovenRecordError",
    "check_proof",
    "connect",
    "connect_async",
    "events",
    "events_async",
)

DEFAULT_ADDRESS: Final = "127.0.0.1:8434"
DEFAULT_PORT: Final = 8434
SILENCE_TIMEOUT_NS: Final = 3_000_000_000
"""Three heartbeats."""

_READ: Final = 1 << 16
_FIRST_RETRY_S: Final = 0.25
_LAST_RETRY_S: Final = 5.0
_BITS: Final = slice(72, 76)


class UnprovenRecordError(RemoteProtocolError):
    """A record whose header doesn't hash to its hash, or whose hash misses the header's own target."""


@dataclass(frozen=True, slots=True)
class Subscribed:
    """The server accepted the hello."""

    tier: str
    write_deadline: str
    oldest: int
    next: int
    """The first sequence that is not a replay."""
    session: int
    network: str


class ClientProtocol:
    """One subscription over any number of connections, one after the other."""

    def __init__(self, *, key: str | None = None, since: int | None = None, check_proof: bool = True) -> None:
        self.session: int | None = None
        """The numbering that `last` belongs to; None until a server has answered."""
        self.last: int | None = None if since is None else since - 1
        """The newest sequence that was received, or told as lost."""
        self._key = key
        self._check_proof = check_proof
        self._decoder = FrameDecoder()
        self._answer = b""
        self._answered = False
        self._deadline_ns = 0
        self._broken: SprintError | None = None

    def connected(self, now_ns: int) -> bytes:
        """A connection stands: the hello to send on it. It asks for what came after the last record received."""
        self._decoder = FrameDecoder()
        self._answer = b""
        self._answered = False
        self._broken = None
        self._deadline_ns = now_ns + ANSWER_TIMEOUT_NS
        hello: dict[str, object] = {}
        if self._key is not None:
            hello["key"] = self._key
        if self.last is not None:
            hello["since"] = self.last + 1
        return json_line(hello)

    def deadline(self) -> int:
        """When silence means that the connection is dead, in the time of `now`."""
        return self._deadline_ns

    def receive(self, data: bytes, now_ns: int) -> list[Item | Subscribed]:
        """What these bytes say: Subscribed first, then records, losses and heartbeats.

        Raises SubscriptionRefusedError or ServerFullError when the server doesn't want us, UnprovenRecordError for a
        record without proof of work, and RemoteProtocolError for anything else that breaks the protocol, heartbeats
        included that tell of records which never came: the connection must be given up, and a new one resumes. What
        came before the error is returned first; the next call, with no bytes if need be, then raises it.
        """
        if self._broken is not None:
            raise self._broken
        items: list[Item | Subscribed] = []
        try:
            self._receive(data, now_ns, items)
        except SprintError as error:
            if not items:
                raise
            self._broken = error
        return items

    def _receive(self, data: bytes, now_ns: int, items: list[Item | Subscribed]) -> None:
        if not self._answered:
            self._answer += data
            line, newline, data = self._answer.partition(b"\n")
            if len(line) > MAX_ANSWER:
                raise RemoteProtocolError(f"answer to the hello longer than {MAX_ANSWER} bytes")
            if not newline:
                return
            self._answer = b""
            items.append(self._subscribed(line))
            self._answered = True
            self._deadline_ns = now_ns + SILENCE_TIMEOUT_NS
        came = bool(data)
        while decoded := self._decoder.receive(data):
            data = b""
            self._deadline_ns = now_ns + SILENCE_TIMEOUT_NS
            for item in decoded:
                items.extend(self._checked(item))
        if came and now_ns >= self._deadline_ns:
            raise RemoteProtocolError("bytes came, but for too long no frame that says anything")

    def _subscribed(self, line: bytes) -> Subscribed:
        answer = read_answer(line)
        try:
            subscribed = Subscribed(
                str(answer["tier"]),
                str(answer["writeDeadline"]),
                int(answer["oldest"]),
                int(answer["next"]),
                int(answer["session"], 16),
                str(answer["network"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            raise RemoteProtocolError(f"answer to the hello lacks a field: {line[:200]!r}") from None
        if self.session is not None and self.session != subscribed.session:
            # Another numbering: where we stood means nothing in it. Ask anew, for all that it still holds.
            self.session = None
            self.last = 0
            raise RemoteProtocolError("the server began a new session")
        self.session = subscribed.session
        if self.last is None or self.last >= subscribed.next:
            self.last = subscribed.next - 1
        return subscribed

    def _checked(self, item: Item) -> list[Item]:
        last = 0 if self.last is None else self.last
        if isinstance(item, Heartbeat):
            if item.session != self.session or item.sequence > last:
                raise RemoteProtocolError(f"heartbeat of record {item.sequence}: {last} was the last that came")
            return [item]
        if isinstance(item, Lapped):
            end = item.first + item.lost
            if end <= last + 1:
                return []
            self.last = end - 1
            return [Lapped(last + 1, end - last - 1)]
        if item.session != self.session:
            raise RemoteProtocolError(f"record of session {item.session:016x} in another's stream")
        if item.sequence <= last:
            return []  # had it before the reconnect
        if self._check_proof:
            check_proof(item)
        self.last = item.sequence
        gap = item.sequence - last - 1
        return [Lapped(last + 1, gap), item] if gap else [item]


def check_proof(record: Record) -> None:
    """Raises UnprovenRecordError unless the header hashes to the record's hash, and that meets the header's nBits."""
    if double_sha256(record.header) != record.hash:
        raise UnprovenRecordError(f"record {record.sequence}: its header does not hash to {record.hash[::-1].hex()}")
    bits = int.from_bytes(record.header[_BITS], "little")
    if not meets_target(record.hash, bits):
        raise UnprovenRecordError(f"record {record.sequence}: {record.hash[::-1].hex()} misses the target {bits:08x}")


def connect(
    address: str = DEFAULT_ADDRESS,
    *,
    key: str | None = None,
    since: int | None = None,
    reconnect: bool = True,
    check_proof: bool = True,
    on_lost: Callable[[Lapped], None] | None = None,
) -> Generator[Record, None, None]:
    """Records as they come, each once, from now on or from sequence `since`; blocks between them.

    A lost connection is made again, and resumes behind the last record. `on_lost` is told, between the records where
    they are missing, which ones this subscriber will not get. With `reconnect=False` a lost connection raises
    ConnectionLostError, and so does a first one that can't be made. Whatever `reconnect` says, a refusal raises
    SubscriptionRefusedError, and a record without proof of work UnprovenRecordError.
    """
    for item in events(address, key=key, since=since, reconnect=reconnect, check_proof=check_proof):
        if isinstance(item, Record):
            yield item
        elif isinstance(item, Lapped) and on_lost is not None:
            on_lost(item)


def events(
    address: str = DEFAULT_ADDRESS,
    *,
    key: str | None = None,
    since: int | None = None,
    reconnect: bool = True,
    check_proof: bool = True,
) -> Generator[Item | Subscribed, None, None]:
    """As connect(), with everything that the stream says: Subscribed after each connect, losses, heartbeats."""
    where = parse_address(address, DEFAULT_PORT)
    protocol = ClientProtocol(key=key, since=since, check_proof=check_proof)
    pauses = _Pauses(reconnect)
    while True:
        pause_s = yield from _one_connection(where, protocol, pauses)
        time.sleep(pause_s)


def _one_connection(
    where: Address, protocol: ClientProtocol, pauses: _Pauses
) -> Generator[Item | Subscribed, None, float]:
    """All that one connection says; returns how many seconds to wait before the next."""
    try:
        with socket.create_connection(where, timeout=ANSWER_TIMEOUT_NS / 1e9) as sock:
            sock.sendall(protocol.connected(time.monotonic_ns()))
            while True:
                sock.settimeout(_seconds_left(protocol))
                data = sock.recv(_READ)
                if not data:
                    raise ConnectionLostError(f"{where} closed the connection")
                while items := protocol.receive(data, time.monotonic_ns()):
                    data = b""
                    pauses.reset()
                    yield from items
    except _TROUBLE as error:
        return pauses.after(error)


async def connect_async(
    address: str = DEFAULT_ADDRESS,
    *,
    key: str | None = None,
    since: int | None = None,
    reconnect: bool = True,
    check_proof: bool = True,
    on_lost: Callable[[Lapped], None] | None = None,
) -> AsyncGenerator[Record, None]:
    """As connect(), for asyncio."""
    stream = events_async(address, key=key, since=since, reconnect=reconnect, check_proof=check_proof)
    async with aclosing(stream):
        async for item in stream:
            if isinstance(item, Record):
                yield item
            elif isinstance(item, Lapped) and on_lost is not None:
                on_lost(item)


async def events_async(
    address: str = DEFAULT_ADDRESS,
    *,
    key: str | None = None,
    since: int | None = None,
    reconnect: bool = True,
    check_proof: bool = True,
) -> AsyncGenerator[Item | Subscribed, None]:
    """As events(), for asyncio."""
    where = parse_address(address, DEFAULT_PORT)
    protocol = ClientProtocol(key=key, since=since, check_proof=check_proof)
    pauses = _Pauses(reconnect)
    while True:
        try:
            opening = asyncio.open_connection(where.host, where.port, limit=_READ)
            reader, writer = await asyncio.wait_for(opening, ANSWER_TIMEOUT_NS / 1e9)
            with closing(writer):
                writer.write(protocol.connected(time.monotonic_ns()))
                while True:
                    data = await asyncio.wait_for(reader.read(_READ), _seconds_left(protocol))
                    if not data:
                        raise ConnectionLostError(f"{where} closed the connection")
                    while items := protocol.receive(data, time.monotonic_ns()):
                        data = b""
                        pauses.reset()
                        for item in items:
                            yield item
        except _TROUBLE as error:
            pause_s = pauses.after(error)
        await asyncio.sleep(pause_s)


_TROUBLE: Final = (OSError, asyncio.TimeoutError, RemoteProtocolError, ServerFullError, ConnectionLostError)
"""What ends a connection; asyncio's TimeoutError is no OSError before Python 3.11."""


class _Pauses:
    """How long to wait before the next connection: growing and jittered, from the start again once items came."""

    def __init__(self, reconnect: bool) -> None:
        self._reconnect = reconnect
        self._pause_s = _FIRST_RETRY_S

    def reset(self) -> None:
        self._pause_s = _FIRST_RETRY_S

    def after(self, error: Exception) -> float:
        """Seconds to wait after that error; raises it, or what it means to the caller, when there is to be no more."""
        if isinstance(error, UnprovenRecordError):
            raise error
        if not self._reconnect:
            if isinstance(error, SprintError):
                raise error
            raise ConnectionLostError(str(error) or "nothing came for too long") from error
        pause_s = self._pause_s * random.uniform(0.5, 1.0)
        self._pause_s = min(2 * self._pause_s, _LAST_RETRY_S)
        return pause_s


def _seconds_left(protocol: ClientProtocol) -> float:
    """Until the protocol's deadline; never 0, which would mean a socket that doesn't wait."""
    return max(1_000_000, protocol.deadline() - time.monotonic_ns()) / 1e9
