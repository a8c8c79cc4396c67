"""A stream and a UDP side over one ring on one loop, linked as the product links them, in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from sprint.addresses import Address
from sprint.deliveries import udp_link
from sprint.deliveries.gate import OpenGate
from sprint.deliveries.stream import StreamDelivery
from sprint.deliveries.udp import UdpDelivery, bound_address
from sprint.deliveries.udp_sessions import UdpService
from sprint.ring import Ring, RingWriter, size_for
from sprint.status import StatusBlock
from sprint.tiers import NS_PER_S, PROFILES, Tier
from tests.unit.shm_host import tier_of_key
from tests.unit.test_client import SESSION, record

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

T = TypeVar("T")
PATIENCE_S = 30.0
DEADLINES = {tier: PROFILES[tier].write_deadline_ns for tier in Tier}


class Stage:
    """Keys are tiers' names; publish() is the relay."""

    def __init__(
        self, slots: int = 256, host: str = "127.0.0.1", heartbeat_ns: int = NS_PER_S, session: int = SESSION
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self.ring = Ring.create(bytearray(size_for(slots)), slots, session)
        self.writer = RingWriter(self.ring)
        self.status = StatusBlock.create(session, {})
        self.counters = self.status.layout.udp
        self.sock = UdpDelivery.bind(Address(host, 0))
        self.udp_address = bound_address(self.sock)
        self._heartbeat_ns = heartbeat_ns
        self._host = host
        self._ours, self._theirs = udp_link.pair()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.stream: StreamDelivery
        self.udp: UdpDelivery
        self.address = ""
        self.on_loop(self.start_udp)
        self.on_loop(self.start_stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.on_loop(self.stream.close)
        self.on_loop(self.udp.close)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE_S)
        self.loop.close()
        for one in (self.sock, self._ours, self._theirs):
            one.close()

    def start_udp(self) -> None:
        self.udp = UdpDelivery(
            self.ring,
            self.status.delivery(1, "udp"),
            self.counters,
            [self._theirs],
            write_deadline_ns=DEADLINES,
            heartbeat_ns=self._heartbeat_ns,
        )
        self.udp.start(self.loop, self.sock)

    def start_stream(self, port: int = 0) -> None:
        self.stream = StreamDelivery(
            self.ring,
            self.status.delivery(0, "stream"),
            network="main",
            gate=OpenGate(tier_of_key),
            write_deadline_ns=DEADLINES,
            max_sessions=2_000,
            udp=UdpService(self.udp_address, self._ours),
        )
        host, port = self.stream.start(self.loop, self._host, port)
        self.address = str(Address(host, port))

    def on_loop(self, call: Callable[[], T]) -> T:
        done: SimpleQueue[tuple[bool, Any]] = SimpleQueue()

        def step() -> None:
            try:
                done.put((True, call()))
            except Exception as error:  # handed to the test's thread
                done.put((False, error))

        self.loop.call_soon_threadsafe(step)
        good, result = done.get(timeout=PATIENCE_S)
        if not good:
            raise result
        return result  # type: ignore[no-any-return]  # what call() gave

    def publish(self, count: int = 1, *, udp: bool = True, stream: bool = True) -> int:
        """The newest sequence; with `udp` False the UDP side isn't woken, and sends nothing; `stream` likewise."""

        def step() -> int:
            for _ in range(count):
                self.writer.claim()[:] = record(self.writer.next_sequence, self.ring.session).encode()
                self.writer.commit(best=True)
            if stream:
                self.stream.publish()
            if udp:
                self.udp.publish()
            return self.ring.tail

        return self.on_loop(step)

    def tier(self, row: int, tier: Tier = Tier.TURBO) -> Any:
        return self.status.layout.deliveries[row].tiers[tier]


class Session:
    """One who asks for UDP by hand: a TCP connection of JSON lines and a UDP socket."""

    def __init__(
        self, stage: Stage, key: str | None = "turbo", udp: str | None = None, host: str = "127.0.0.1"
    ) -> None:
        self.datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.datagrams.bind((host, 0))
        self.datagrams.settimeout(PATIENCE_S)
        where = f"{host}:{self.datagrams.getsockname()[1]}" if udp is None else udp
        host_of_stream, _, port = stage.address.rpartition(":")
        self.tcp = socket.create_connection((host_of_stream, int(port)), PATIENCE_S)
        hello = {"format": "json", "udp": where} | ({} if key is None else {"key": key})
        self.tcp.sendall(json.dumps(hello).encode() + b"\n")
        self.lines = self.tcp.makefile("rb")
        self.answer: dict[str, Any] = json.loads(self.lines.readline())
        offer = self.answer.get("udp", {})
        self.token = bytes.fromhex(offer.get("token", ""))
        self.server = stage.udp_address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.tcp.close()
        self.datagrams.close()

    def event(self, name: str) -> dict[str, Any]:
        """The next line of that kind."""
        while True:
            said: dict[str, Any] = json.loads(self.lines.readline())
            if said["event"] == name:
                return said

    def ask(self, first: int, count: int) -> None:
        self.tcp.sendall(b'{"resend":{"first":%d,"count":%d}}\n' % (first, count))

    def send(self, datagram: bytes, by: socket.socket | None = None) -> None:
        (by or self.datagrams).sendto(datagram, self.server)

    def datagram(self, magic: bytes) -> bytes:
        """The next datagram that begins so."""
        while True:
            data = self.datagrams.recv(2048)
            if data.startswith(magic):
                return data


def until(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s: {what}"
        time.sleep(0.005)
