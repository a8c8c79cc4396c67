"""The loops around a DatagramProtocol: one TCP connection and one UDP socket, read together; plain and for asyncio.

The UDP socket is bound to the address that the TCP connection has here, and stays when the connection is made again, so
that what arrives meanwhile isn't lost. Only datagrams from the server's address are looked at.
"""

from __future__ import annotations

import asyncio
import selectors
import socket
import time
from collections import deque
from contextlib import aclosing, closing, suppress
from typing import TYPE_CHECKING, Any, Final

from sprint.client_retry import TROUBLE
from sprint.client_waiting import open_connection, within
from sprint.datagrams import MAX_FROM_SERVER
from sprint.subscription import ANSWER_TIMEOUT_NS, ConnectionLostError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from sprint.addresses import Address
    from sprint.client_datagrams import DatagramProtocol
    from sprint.client_protocol import Subscribed
    from sprint.client_retry import Pauses
    from sprint.frames import Item

_READ: Final = 1 << 16
_EARLY: Final = 64
"""Datagrams taken in one go, and kept until TCP has told where the server sends from."""
_QUEUED: Final = 4_096
"""Datagrams that wait for an asyncio subscriber who is busy elsewhere; what comes then is lost, and fetched again."""


class _Port:
    """The UDP socket, and where its other end is."""

    def __init__(self) -> None:
        self.sock: socket.socket | None = None
        self._peer = ""
        self._early: deque[tuple[bytes, Any]] = deque(maxlen=_EARLY)

    def open_beside(self, connection: socket.socket) -> int:
        """Have a socket at the address that the connection has here; returns its port."""
        host = connection.getsockname()[0]
        self._peer = connection.getpeername()[0]
        if self.sock is None or self.sock.getsockname()[0] != host:
            self.close()
            self.sock = socket.socket(connection.family, socket.SOCK_DGRAM)
            self.sock.setblocking(False)
            self.sock.bind((host, 0))
        return int(self.sock.getsockname()[1])

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def send(self, protocol: DatagramProtocol) -> None:
        """What the protocol has to say; what the machine refuses is as good as lost."""
        for datagram in protocol.datagrams_to_send():
            if self.sock is not None and (server := self.server(protocol)) is not None:
                with suppress(OSError):
                    self.sock.sendto(datagram, server)

    def receive(self, protocol: DatagramProtocol) -> list[Item]:
        """What has come from the server."""
        if self.sock is None:
            return []
        with suppress(OSError):  # it would block, or there is an ICMP error to something that we sent
            for _ in range(_EARLY):
                self._early.append(self.sock.recvfrom(MAX_FROM_SERVER + 1))
        return self.sort(protocol, self._early)

    def sort(self, protocol: DatagramProtocol, came: deque[tuple[bytes, Any]]) -> list[Item]:
        """Those of the server; before it is known where that is, they wait."""
        items: list[Item] = []
        server = self.server(protocol)
        while came and server is not None:
            data, source = came.popleft()
            if source[:2] == server:
                items += protocol.receive_datagram(data, time.monotonic_ns())
        return items

    def server(self, protocol: DatagramProtocol) -> tuple[str, int] | None:
        """Where datagrams come from."""
        server = protocol.server
        return None if server is None else (server.host or self._peer, server.port)


def datagram_events(
    where: Address, protocol: DatagramProtocol, pauses: Pauses
) -> Generator[Item | Subscribed, None, None]:
    """Everything that is said, over TCP or UDP, for as long as `pauses` lets it be tried."""
    with closing(_Port()) as port:
        while True:
            pause_s = yield from _one_session(where, protocol, port, pauses)
            until = time.monotonic() + pause_s
            while (left_s := until - time.monotonic()) > 0:
                if port.sock is None:
                    time.sleep(left_s)
                    break
                with selectors.DefaultSelector() as selector:
                    selector.register(port.sock, selectors.EVENT_READ)
                    selector.select(left_s)
                yield from port.receive(protocol)


def _one_session(
    where: Address, protocol: DatagramProtocol, port: _Port, pauses: Pauses
) -> Generator[Item | Subscribed, None, float]:
    """One TCP connection's time; returns how many seconds to wait before the next."""
    try:
        with socket.create_connection(where, ANSWER_TIMEOUT_NS / 1e9) as sock, selectors.DefaultSelector() as selector:
            sock.sendall(protocol.connected(time.monotonic_ns(), port.open_beside(sock)))
            assert port.sock is not None
            selector.register(sock, selectors.EVENT_READ)
            selector.register(port.sock, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select(_seconds_left(protocol))}
                if port.sock in ready:
                    yield from port.receive(protocol)
                if sock in ready:
                    data = sock.recv(_READ)
                    if not data:
                        raise ConnectionLostError(f"{where} closed the connection")
                    while items := protocol.receive(data, time.monotonic_ns()):
                        data = b""
                        pauses.reset()
                        yield from items
                    yield from port.receive(protocol)
                elif time.monotonic_ns() >= protocol.deadline():
                    protocol.on_timer(time.monotonic_ns())
                port.send(protocol)
                if lines := protocol.data_to_send():
                    sock.sendall(lines)
    except TROUBLE as error:
        return pauses.after(error)


class _Inbox(asyncio.DatagramProtocol):
    """The UDP socket on asyncio's loop: what came waits here."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self._port = _Port()
        self._came: deque[tuple[bytes, Any]] = deque()
        self._transport: asyncio.DatagramTransport | None = None

    async def open_beside(self, connection: socket.socket) -> int:
        before = self._port.sock
        number = self._port.open_beside(connection)
        if self._port.sock is not before:
            if self._transport is not None:
                self._transport.close()
            loop = asyncio.get_running_loop()
            self._transport, _ = await loop.create_datagram_endpoint(lambda: self, sock=self._port.sock)
        return number

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()  # and the socket with it
        else:
            self._port.close()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        if len(self._came) < _QUEUED:
            self._came.append((data, addr))
        self.arrived.set()

    def error_received(self, exc: Exception) -> None:
        """An ICMP error to something that we sent: it will be sent again."""

    def receive(self, protocol: DatagramProtocol) -> list[Item]:
        """What has come from the server."""
        self.arrived.clear()
        return self._port.sort(protocol, self._came)

    def send(self, protocol: DatagramProtocol) -> None:
        """What the protocol has to say."""
        for datagram in protocol.datagrams_to_send():
            if self._transport is not None and (server := self._port.server(protocol)) is not None:
                self._transport.sendto(datagram, server)


async def datagram_events_async(
    where: Address, protocol: DatagramProtocol, pauses: Pauses
) -> AsyncGenerator[Item | Subscribed, None]:
    """As datagram_events(), for asyncio."""
    with closing(_Inbox()) as inbox:
        while True:
            try:
                reader, writer = await open_connection(where)
                with closing(writer):
                    number = await inbox.open_beside(writer.get_extra_info("socket"))
                    writer.write(protocol.connected(time.monotonic_ns(), number))
                    async with aclosing(_one_session_async(protocol, reader, writer, inbox)) as stream:
                        async for item in stream:
                            pauses.reset()
                            yield item
                raise ConnectionLostError(f"{where} closed the connection")
            except TROUBLE as error:
                pause_s = pauses.after(error)
            until = time.monotonic() + pause_s
            while (left_s := until - time.monotonic()) > 0:
                with suppress(asyncio.TimeoutError):
                    await within(left_s, inbox.arrived.wait())
                for item in inbox.receive(protocol):
                    yield item


async def _one_session_async(
    protocol: DatagramProtocol, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, inbox: _Inbox
) -> AsyncGenerator[Item | Subscribed, None]:
    """One TCP connection's time, until the server closes it."""
    reading: asyncio.Task[bytes] | None = None
    try:
        while True:
            reading = reading or asyncio.ensure_future(reader.read(_READ))
            await _either(reading, inbox.arrived, _seconds_left(protocol))
            for item in inbox.receive(protocol):
                yield item
            if reading.done():
                data = reading.result()
                reading = None
                if not data:
                    return
                while items := protocol.receive(data, time.monotonic_ns()):
                    data = b""
                    for said in items:
                        yield said
                for item in inbox.receive(protocol):
                    yield item
            elif time.monotonic_ns() >= protocol.deadline():
                protocol.on_timer(time.monotonic_ns())
            inbox.send(protocol)
            if lines := protocol.data_to_send():
                writer.write(lines)
    finally:
        if reading is not None and not reading.cancel():
            reading.exception()  # or asyncio would complain that nobody had asked


async def _either(reading: asyncio.Task[bytes], arrived: asyncio.Event, timeout_s: float) -> None:
    """Until one of the two has something, or the time is over."""
    waiting = asyncio.ensure_future(arrived.wait())
    try:
        await asyncio.wait({reading, waiting}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


def _seconds_left(protocol: DatagramProtocol) -> float:
    return max(0, protocol.deadline() - time.monotonic_ns()) / 1e9
