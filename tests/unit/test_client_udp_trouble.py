"""sprint.client by UDP when it is left in the middle, disturbed by strangers, or served by somebody who means harm."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from contextlib import aclosing, closing, suppress
from typing import TYPE_CHECKING

import pytest

from sprint import client
from sprint.client_datagrams import AHEAD
from sprint.client_udp import _Inbox
from sprint.datagrams import MAX_FROM_SERVER
from sprint.errors import SprintError
from sprint.events import Lapped
from sprint.frames import Heartbeat, UdpState
from sprint.record import Record
from sprint.tiers import NS_PER_S
from tests.unit.deliveries.udp_stage import PATIENCE_S, Stage, until
from tests.unit.test_client import SESSION, frame, record, welcome
from tests.unit.test_client_datagrams import PORT, active, change, offer
from tests.unit.test_client_udp import await_active, next_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

    from sprint.client import Subscribed
    from sprint.frames import Item

OTHER_SESSION = SESSION + 1


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage(heartbeat_ns=NS_PER_S // 10) as running:
        yield running


def nobody_is_left(stage: Stage) -> None:
    until(lambda: stage.tier(0).subscribers + stage.tier(1).subscribers == 0, "the server knows of nobody any more")


def test_a_stream_that_is_closed_in_the_middle_lets_go_of_all(stage: Stage) -> None:
    stream = client.events(stage.address, key="turbo", udp=True)
    await_active(stream)
    stream.close()
    nobody_is_left(stage)


@pytest.mark.parametrize("udp", [True, False])
def test_a_task_that_is_cancelled_in_the_middle_lets_go_of_all(stage: Stage, udp: bool) -> None:
    """Wherever it waits, and whatever has come in the same turn of the loop."""

    async def subscribe(flowing: asyncio.Event) -> None:
        async with aclosing(client.connect_async(stage.address, key="turbo", udp=udp)) as stream:
            async for _ in stream:
                flowing.set()

    async def cancel_it(turns: int) -> bool:
        flowing = asyncio.Event()
        task = asyncio.ensure_future(subscribe(flowing))
        for _ in range(turns):
            await asyncio.sleep(0)
            stage.publish()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(task), PATIENCE_S)
        for _ in range(5):  # what was closed is taken off the loop in its next turns
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return flowing.is_set()

    assert sum(asyncio.run(cancel_it(turns)) for turns in range(40)) > 0  # some of them were in full swing
    nobody_is_left(stage)


def test_a_server_that_comes_back_with_another_session_is_followed_from_its_first_record(stage: Stage) -> None:
    with (
        Stage(heartbeat_ns=NS_PER_S // 10, session=OTHER_SESSION) as other,
        closing(client.events(stage.address, key="turbo", udp=True)) as stream,
    ):
        stage.publish(3)
        await_active(stream)
        port = int(stage.address.rpartition(":")[2])
        other.publish(2)
        stage.on_loop(stage.stream.close)
        other.on_loop(other.stream.close)
        other.on_loop(lambda: other.start_stream(port))
        assert [(one.session, one.sequence) for one in (next_record(stream), next_record(stream))] == [
            (OTHER_SESSION, 1),
            (OTHER_SESSION, 2),
        ]
        await_active(stream)
        other.publish()
        assert next_record(stream).sequence == 3
        stage.on_loop(lambda: stage.start_stream(0))


def test_strangers_who_flood_the_socket_keep_no_record_away(stage: Stage) -> None:
    over = threading.Event()
    told: list[Item | Subscribed] = []
    with closing(client.events(stage.address, key="turbo", udp=True)) as stream:
        await_active(stream)
        (target,) = [one.address for one in stage.on_loop(lambda: list(stage.udp._subscribers.values()))]

        def flood() -> None:
            noise = [random.randbytes(size) for size in (0, 1, 28, 36, 192, 1400)]
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
                while not over.is_set():
                    for datagram in noise:
                        with suppress(OSError):
                            stranger.sendto(datagram, target)

        flooder = threading.Thread(target=flood)
        flooder.start()
        try:
            for sequence in range(1, 21):
                stage.publish()
                while not isinstance(item := next(stream), Record):
                    told.append(item)
                assert item.sequence == sequence
        finally:
            over.set()
            flooder.join()
    assert not [item for item in told if isinstance(item, Lapped)]


class Liar:
    """A server that says what it is told to, to everybody who connects."""

    def __init__(self, says: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._says = says
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                theirs, _ = self._listener.accept()
                with theirs, suppress(OSError):
                    theirs.recv(4096)
                    theirs.sendall(self._says)
                    theirs.settimeout(PATIENCE_S)
                    while theirs.recv(4096):
                        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE_S)


HUGE = struct.pack("<IB", 0xFFFF_FFFF, 1)
LIES: dict[str, Callable[[], bytes]] = {
    "a frame of 4 GB": lambda: offer(5) + HUGE + bytes(1 << 16),
    "an answer without an end": lambda: b"[" * (1 << 20),
    "an answer with a number of a million digits": lambda: b'{"next":' + b"9" * 1_000_000 + b"}\n",
    "a record far ahead": lambda: offer(5) + frame(record(1 << 40)),
    "a heartbeat far ahead": lambda: offer(5) + frame(Heartbeat(SESSION, (1 << 64) - 1, 0)),
    "a loss far ahead": lambda: offer(5) + frame(Lapped(1 << 40, 5)),
    "a change of way far ahead": lambda: offer(5) + change(UdpState.ACTIVE, 1 << 60),
    "an offer of a name": lambda: offer(5, "host.example:99"),
    "a session that is too long": lambda: welcome(5).replace(f"{SESSION:016x}".encode(), b"f" * 5_000),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("by", ["loop", "asyncio"])
def test_what_no_server_of_ours_would_say_ends_the_connection_and_nothing_else(lie: str, by: str) -> None:
    def listen(address: str) -> None:
        for _ in client.events(address, udp=True, reconnect=False):
            pass

    async def listen_async(address: str) -> None:
        async with aclosing(client.events_async(address, udp=True, reconnect=False)) as stream:
            async for _ in stream:
                pass

    with Liar(LIES[lie]()) as liar, pytest.raises(SprintError):
        listen(liar.address) if by == "loop" else asyncio.run(listen_async(liar.address))


def test_a_loss_without_measure_is_forgotten_with_the_connection_that_told_it() -> None:
    """Else whoever has once been in the way makes a subscriber deaf for good."""
    protocol = active(5)
    (lost,) = protocol.receive(frame(Lapped(5, 1 << 60)), 0)
    assert isinstance(lost, Lapped)
    protocol.connected(0, PORT)
    protocol.receive(offer(7), 0)
    assert [one for one in protocol.receive(frame(record(7)), 0) if isinstance(one, Record)] == [record(7)]


def test_a_server_that_answers_before_it_knows_of_the_newest_records_makes_none_come_twice() -> None:
    protocol = active(5)
    for sequence in range(5, 5 + AHEAD // 2):
        assert protocol.receive_datagram(record(sequence).encode(), 0)
    protocol.connected(0, PORT)
    protocol.receive(offer(6), 0)
    assert protocol.receive(frame(record(6)), 0) == []


def test_a_socket_that_has_to_be_bound_anew_is_heard() -> None:
    """As when the way to the server is another one, and our address there with it."""

    async def connect(listener: socket.socket, host: str) -> socket.socket:
        return await asyncio.to_thread(socket.create_connection, listener.getsockname(), PATIENCE_S, (host, 0))

    async def move() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener, closing(_Inbox()) as inbox:
            ports = []
            for host in ("127.0.0.1", "127.0.0.5", "127.0.0.5"):
                with await connect(listener, host) as connection:
                    ports.append(await inbox.open_beside(connection))
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
                    inbox.arrived.clear()
                    server.sendto(b"x" * MAX_FROM_SERVER, (host, ports[-1]))
                    await asyncio.wait_for(inbox.arrived.wait(), PATIENCE_S)
            assert ports[1] == ports[2]

    asyncio.run(move())
