"""What a subscriber imports: `for record in sprint.client.connect("127.0.0.1:8434"): …`.

ClientProtocol is the protocol without a socket or a clock: bytes and `now` in, items out. connect() and connect_async()
are loops around it that read, reconnect and resume. With `udp=True` they are loops around a DatagramProtocol, which has
its records sent by UDP, the quickest way off the server's host, and fills gaps over TCP. The server is not trusted: see
client_protocol.

SharedReader is for subscribers on Sprint's own host: the same records, read where the relay writes them.
"""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Final

from sprint.addresses import parse_address
from sprint.client_datagrams import DatagramProtocol
from sprint.client_protocol import ClientProtocol, Subscribed, UnprovenRecordError, check_proof
from sprint.client_retry import TROUBLE, Pauses
from sprint.client_udp import datagram_events, datagram_events_async
from sprint.client_waiting import open_connection, within
from sprint.events import Lapped
from sprint.record import Record
from sprint.shared_reader import SharedReader
from sprint.subscription import ANSWER_TIMEOUT_NS, ConnectionLostError, ServerFullError, SubscriptionRefusedError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from sprint.addresses import Address
    from sprint.frames import Item

__all__ = (
    "ClientProtocol",
    "ConnectionLostError",
    "DatagramProtocol",
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
_READ: Final = 1 << 16


def connect(
    address: str = DEFAULT_ADDRESS,
    *,
    key: str | None = None,
    since: int | None = None,
    udp: bool = False,
    reconnect: bool = True,
    check_proof: bool = True,
    on_lost: Callable[[Lapped], None] | None = None,
) -> Generator[Record, None, None]:
    """Records as they come, each once, from now on or from sequence `since`; blocks between them.

    With `udp` they come by UDP, which turbo and enterprise offer, and over TCP where that fails. One that was lost on
    the way is fetched again, and comes after younger ones; `sequence` tells.

    A lost connection is made again, and resumes behind the last record. `on_lost` is told, between the records where
    they are missing, which ones this subscriber will not get. With `reconnect=False` a lost connection raises
    ConnectionLostError, and so does a first one that can't be made. Whatever `reconnect` says, a refusal raises
    SubscriptionRefusedError, and a record without proof of work UnprovenRecordError.
    """
    for item in events(address, key=key, since=since, udp=udp, reconnect=reconnect, check_proof=check_proof):
        if isinstance(item, Record):
            yield item
        elif isinstance(item, Lapped) and on_lost is not None:
            on_lost(item)


def events(
    address: str = DEFAULT_ADDRESS,
    *,
    key: str | None = None,
    since: int | None = None,
    udp: bool = False,
    reconnect: bool = True,
    check_proof: bool = True,
    on_trouble: Callable[[Exception], None] | None = None,
) -> Generator[Item | Subscribed, None, None]:
    """As connect(), with everything that the stream says: Subscribed after each connect, losses, heartbeats.

    `on_trouble` is told why a connection was lost, or couldn't be made, each time before it is tried again.
    """
    where = parse_address(address, DEFAULT_PORT)
    pauses = Pauses(reconnect, on_trouble)
    if udp:
        yield from datagram_events(where, DatagramProtocol(key=key, since=since, check_proof=check_proof), pauses)
        return
    protocol = ClientProtocol(key=key, since=since, check_proof=check_proof)
    while True:
        pause_s = yield from _one_connection(where, protocol, pauses)
        time.sleep(pause_s)


def _one_connection(
    where: Address, protocol: ClientProtocol, pauses: Pauses
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
    except TROUBLE as error:
        return pauses.after(error)


async def connect_async(
    address: str = DEFAULT_ADDRESS,
    *,
    key: str | None = None,
    since: int | None = None,
    udp: bool = False,
    reconnect: bool = True,
    check_proof: bool = True,
    on_lost: Callable[[Lapped], None] | None = None,
) -> AsyncGenerator[Record, None]:
    """As connect(), for asyncio."""
    stream = events_async(address, key=key, since=since, udp=udp, reconnect=reconnect, check_proof=check_proof)
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
    udp: bool = False,
    reconnect: bool = True,
    check_proof: bool = True,
) -> AsyncGenerator[Item | Subscribed, None]:
    """As events(), for asyncio."""
    where = parse_address(address, DEFAULT_PORT)
    pauses = Pauses(reconnect)
    if udp:
        datagrams = DatagramProtocol(key=key, since=since, check_proof=check_proof)
        async with aclosing(datagram_events_async(where, datagrams, pauses)) as stream:
            async for item in stream:
                yield item
        return
    protocol = ClientProtocol(key=key, since=since, check_proof=check_proof)
    while True:
        try:
            reader, writer = await open_connection(where)
            with closing(writer):
                writer.write(protocol.connected(time.monotonic_ns()))
                while True:
                    data = await within(_seconds_left(protocol), reader.read(_READ))
                    if not data:
                        raise ConnectionLostError(f"{where} closed the connection")
                    while items := protocol.receive(data, time.monotonic_ns()):
                        data = b""
                        pauses.reset()
                        for item in items:
                            yield item
        except TROUBLE as error:
            pause_s = pauses.after(error)
        await asyncio.sleep(pause_s)


def _seconds_left(protocol: ClientProtocol) -> float:
    """Until the protocol's deadline; never 0, which would mean a socket that doesn't wait."""
    return max(1_000_000, protocol.deadline() - time.monotonic_ns()) / 1e9
