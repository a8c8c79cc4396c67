"""A stream on the test's own loop, what publishes to it, and clients of its real loopback sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from sprint.deliveries.gate import OpenGate
from sprint.deliveries.stream import StreamDelivery
from sprint.events import Event, Lapped, Source, State
from sprint.frames import FrameDecoder
from sprint.record import Record
from sprint.ring import Ring, RingWriter, size_for
from sprint.status import StatusBlock
from sprint.tiers import PROFILES, Tier
from tests.unit.shm_host import tier_of_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from sprint.frames import Item

SESSION = 0xABCDEF
MS = 1_000_000
TINY = 1
"""A buffer size that the kernel raises to its own minimum of a few kilobytes."""


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 110))  # a thousand subscribers take an idle core 5 s, a busy one a minute


async def until(holds: Callable[[], object]) -> None:
    while not holds():
        await asyncio.sleep(0.001)


class Server:
    def __init__(self, slots: int = 64, **options: Any) -> None:
        self.ring = Ring.create(bytearray(size_for(slots)), slots, SESSION)
        self.writer = RingWriter(self.ring)
        self.accounts = StatusBlock.create(SESSION, {}).delivery(0, "stream")
        arguments: dict[str, Any] = {
            "network": "regtest",
            "gate": OpenGate(tier_of_key),
            "write_deadline_ns": {tier: PROFILES[tier].write_deadline_ns for tier in Tier},
            "max_sessions": 2000,
        }
        self.delivery = StreamDelivery(self.ring, self.accounts, **{**arguments, **options})
        self.address = ("", 0)
        self.clients: list[Client] = []

    def put(self, *, best: bool = True) -> int:
        sequence = self.writer.next_sequence
        state = State.PROVEN | State.BEST if best else State.PROVEN
        now = time.monotonic_ns()
        self.writer.claim()[:] = Record(
            b"\xfa\xbf\xb5\xda", SESSION, sequence, Event.PROVEN, Source.P2P, state, sequence, 0, 0, 0, 0, 0,
            time.time_ns(), bytes(32), bytes(80), now, now,
        ).encode()  # fmt: skip
        return self.writer.commit(best=best)

    def publish(self, count: int = 1, *, best: bool = True) -> None:
        for _ in range(count):
            self.put(best=best)
            self.delivery.publish()

    def ended(self, tier: Tier = Tier.FREE) -> dict[str, int]:
        self.delivery._settle()  # what the loop does in its next turn
        accounts = self.accounts.tiers[tier]
        return {name: getattr(accounts, name) for name in ("on_time", "late", "dropped", "overwritten")}

    async def join(self, *, receive_buffer: int | None = None, **asked: Any) -> Client:
        client = await self.call(receive_buffer=receive_buffer)
        await client.send(json.dumps(asked).encode() + b"\n")
        client.welcome = json.loads(await client.line())
        return client

    async def call(self, *, receive_buffer: int | None = None) -> Client:
        sock = socket.socket()
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.clients.append(Client(sock))
        await asyncio.get_running_loop().sock_connect(sock, self.address)
        return self.clients[-1]


class Client:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.welcome: dict[str, Any] = {}
        self.decoder = FrameDecoder()
        self.buffered = b""
        self.got: list[Item] = []

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def read(self) -> bytes:
        """b"" once the server has closed, whichever way."""
        if self.buffered:
            data, self.buffered = self.buffered, b""
            return data
        try:
            return await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)
        except ConnectionError:
            return b""

    async def line(self) -> bytes:
        data = b""
        while b"\n" not in data:
            more = await self.read()
            assert more, f"closed after {data!r}"
            data += more
        line, _, self.buffered = data.partition(b"\n")
        return line

    async def item(self) -> Item:
        while not self.got:
            data = await self.read()
            assert data, "closed"
            self.got = self.decoder.receive(data)
        return self.got.pop(0)

    async def told(self, newest: int) -> list[int | tuple[int, int]]:
        """Records as sequences and losses as (first, count), up to the record or the loss of `newest`."""
        told: list[int | tuple[int, int]] = []
        end = 0
        while end < newest:
            item = await self.item()
            if isinstance(item, Record):
                end = item.sequence
                told.append(end)
            elif isinstance(item, Lapped):
                end = item.first + item.lost - 1
                told.append((item.first, item.lost))
        return told

    async def closed(self) -> bool:
        while await self.read():
            pass
        return True

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Server]:
    server = Server(**options)
    server.address = server.delivery.start(asyncio.get_running_loop(), "127.0.0.1", 0)
    try:
        yield server
    finally:
        server.delivery.close()
        for client in server.clients:
            client.sock.close()
