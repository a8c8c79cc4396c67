"""A thousand real UDP sockets, each with sprint.client's protocol: what is lost on purpose comes all the same."""

from __future__ import annotations

import random
import resource
import select
import socket
import time
from typing import TYPE_CHECKING

import pytest

from sprint import client_protocol
from sprint.client_datagrams import DatagramProtocol
from sprint.datagrams import MAX_FROM_SERVER
from sprint.record import MAGIC, Record
from sprint.tiers import NS_PER_S, Tier
from tests.unit.deliveries.udp_stage import PATIENCE_S, Stage, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

MANY = 1_000
RECORDS = 30
LOSS = 0.01
DESCRIPTORS = 4 * MANY
LOOK_S = 0.01
"""How often the clients' timers are looked at."""


@pytest.fixture(autouse=True)
def _enough_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < DESCRIPTORS:
        pytest.skip(f"a process may open {hard} files only, {DESCRIPTORS} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, DESCRIPTORS), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Client:
    def __init__(self, stage: Stage, tier: Tier) -> None:
        self.got: list[int] = []
        self.by_udp: list[int] = []
        self.dropped = 0
        """Records; heartbeats that are lost as well cost nothing, and how many there are hangs on the time it takes."""
        self.protocol = DatagramProtocol(key=tier.label, check_proof=False)
        host, _, port = stage.address.rpartition(":")
        self.tcp = socket.create_connection((host, int(port)), PATIENCE_S)
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind((host, 0))
        self.server = stage.udp_address
        self.tcp.sendall(self.protocol.connected(time.monotonic_ns(), self.udp.getsockname()[1]))
        for sock in (self.tcp, self.udp):
            sock.setblocking(False)

    def read_tcp(self) -> None:
        data = self.tcp.recv(1 << 16)
        assert data, "the server closed the connection"
        while items := self.protocol.receive(data, time.monotonic_ns()):
            data = b""
            self.got += [item.sequence for item in items if isinstance(item, Record)]
        self.say()

    def read_udp(self, drops: Callable[[bytes], bool]) -> None:
        data = self.udp.recv(MAX_FROM_SERVER + 1)
        if drops(data):
            self.dropped += data.startswith(MAGIC)
            return
        items = self.protocol.receive_datagram(data, time.monotonic_ns())
        self.by_udp += [item.sequence for item in items if isinstance(item, Record)]
        self.say()

    def look(self, now_ns: int) -> None:
        if now_ns >= self.protocol.deadline():
            self.protocol.on_timer(now_ns)
            self.say()

    def say(self) -> None:
        for datagram in self.protocol.datagrams_to_send():
            self.udp.sendto(datagram, self.server)
        if lines := self.protocol.data_to_send():
            assert self.tcp.send(lines) == len(lines)

    def has(self, newest: int) -> bool:
        return self.protocol.last == newest


class Swarm:
    """All clients on one epoll."""

    def __init__(self, stage: Stage, count: int) -> None:
        self.drops: Callable[[bytes], bool] = lambda _: False
        self._poll = select.epoll()
        self._readers: dict[int, Callable[[], None]] = {}
        self.clients = [Client(stage, (Tier.TURBO, Tier.ENTERPRISE)[number % 2]) for number in range(count)]
        for client in self.clients:
            self._readers[client.tcp.fileno()] = client.read_tcp
            self._readers[client.udp.fileno()] = lambda client=client: client.read_udp(self.drops)  # type: ignore[misc]
            for sock in (client.tcp, client.udp):
                self._poll.register(sock, select.EPOLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._poll.close()
        for client in self.clients:
            client.tcp.close()
            client.udp.close()

    def until(self, holds: Callable[[Client], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        looked = time.monotonic()
        waiting = list(self.clients)
        while waiting := [client for client in waiting if not holds(client)]:
            assert time.monotonic() < deadline, f"{len(waiting)} of {len(self.clients)} wait in vain: {what}"
            for descriptor, _ in self._poll.poll(LOOK_S):
                self._readers[descriptor]()
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                for client in self.clients:
                    client.look(time.monotonic_ns())


def test_a_thousand_lose_one_datagram_in_a_hundred_and_then_the_last_one_and_miss_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One thread is all of them: where it is slow, it hasn't looked for longer than a server may be silent.
    for limit in ("ANSWER_TIMEOUT_NS", "SILENCE_TIMEOUT_NS"):
        monkeypatch.setattr(client_protocol, limit, int(PATIENCE_S * NS_PER_S))
    chance = random.Random(5)
    with Stage() as stage, Swarm(stage, MANY) as swarm:
        swarm.until(lambda client: client.protocol.active, "every address is proven")
        until(lambda: stage.tier(1).subscribers + stage.tier(1, Tier.ENTERPRISE).subscribers == MANY, "all are counted")

        swarm.drops = lambda _: chance.random() < LOSS
        for number in range(1, RECORDS + 1):
            stage.publish()
            swarm.until(lambda client: len(client.got) + len(client.by_udp) >= number - 3, "the pace is kept")  # noqa: B023 - called at once
        swarm.until(lambda client: client.has(RECORDS), "what was lost is repaired")
        dropped = sum(client.dropped for client in swarm.clients)
        assert dropped > MANY * RECORDS * LOSS / 2
        repaired = sum(len(client.got) for client in swarm.clients)
        assert repaired >= dropped
        for client in swarm.clients:
            assert sorted(client.got + client.by_udp) == list(range(1, RECORDS + 1))

        swarm.drops = lambda data: data.startswith(
            MAGIC
        )  # for nobody does the next record come by UDP, and no later one
        before = stage.tier(0).repaired + stage.tier(0, Tier.ENTERPRISE).repaired
        last = stage.publish()
        swarm.until(lambda client: client.has(last), "a heartbeat tells of the last record")
        assert all(client.got[-1] == last for client in swarm.clients)
        assert stage.tier(0).repaired + stage.tier(0, Tier.ENTERPRISE).repaired >= before + MANY
        sent = [stage.tier(1, tier) for tier in (Tier.TURBO, Tier.ENTERPRISE)]
        until(lambda: sum(one.on_time + one.late for one in sent) == MANY * last, "every send is accounted for")
