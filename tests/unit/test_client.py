from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from contextlib import aclosing, contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprint import client, client_protocol
from sprint.bitcoin.block import double_sha256
from sprint.bitcoin.networks import MAIN, REGTEST
from sprint.client import (
    ClientProtocol,
    ConnectionLostError,
    ServerFullError,
    Subscribed,
    SubscriptionRefusedError,
    UnprovenRecordError,
)
from sprint.deliveries.gate import OpenGate
from sprint.deliveries.stream import StreamDelivery
from sprint.errors import RemoteProtocolError
from sprint.events import Event, Lapped, Source, State
from sprint.frames import Format, Heartbeat, UdpChange, heartbeat_frame, lost_frame, record_frame, udp_frame
from sprint.record import Record
from sprint.ring import Ring, RingWriter, size_for
from sprint.status import StatusBlock
from sprint.tiers import PROFILES, Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sprint.frames import Item

SESSION = 0xFEED
SECOND = 1_000_000_000


def record(sequence: int, session: int = SESSION, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "network": MAIN.magic, "session": session, "sequence": sequence, "event": Event.PROVEN, "source": Source.P2P,
        "state": State.PROVEN | State.BEST, "height": 0, "fork_height": 0, "next_bits": 0, "median_time_past": 0,
        "transactions": 0, "size": 0, "wall_ns": 0, "hash": MAIN.genesis_hash, "header": MAIN.genesis_header,
        "seen_ns": 0, "published_ns": 0,
    }  # fmt: skip
    return Record(**{**values, **changes})


def frame(item: Item) -> bytes:
    if isinstance(item, Record):
        return record_frame(item.encode(), Format.BINARY)
    if isinstance(item, UdpChange):
        return udp_frame(item, Format.BINARY)
    return lost_frame(item, Format.BINARY) if isinstance(item, Lapped) else heartbeat_frame(item, Format.BINARY)


def welcome(following: int, session: int = SESSION) -> bytes:
    answer = {
        "tier": "free", "writeDeadline": "2s", "oldest": 1, "next": following, "session": f"{session:016x}",
        "network": "main", "format": "binary",
    }  # fmt: skip
    return json.dumps(answer).encode() + b"\n"


def subscribed(following: int = 1, **options: Any) -> ClientProtocol:
    protocol = ClientProtocol(**options)
    protocol.connected(0)
    protocol.receive(welcome(following), 0)
    return protocol


def test_the_hello_asks_for_what_was_wanted() -> None:
    assert ClientProtocol().connected(0) == b"{}\n"
    assert json.loads(ClientProtocol(key="k", since=9).connected(0)) == {"key": "k", "since": 9}


def test_the_answer_is_the_first_item() -> None:
    protocol = ClientProtocol()
    protocol.connected(0)
    items = protocol.receive(welcome(5) + frame(record(5)), 0)
    assert items == [Subscribed("free", "2s", 1, 5, SESSION, "main"), record(5)]


@settings(deadline=None)
@given(st.data())
def test_bytes_cut_anywhere_say_the_same(data: st.DataObject) -> None:
    items: list[Item] = [record(5), Lapped(6, 3), record(9), Heartbeat(SESSION, 9, 1)]
    stream = welcome(5) + b"".join(frame(item) for item in items)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=12)))
    protocol = ClientProtocol()
    protocol.connected(0)
    got: list[object] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += protocol.receive(stream[start:end], 0)
    assert got[1:] == items


def test_a_new_connection_resumes_behind_the_last_record_and_drops_what_came_before() -> None:
    protocol = subscribed(5)
    protocol.receive(frame(record(5)) + frame(Lapped(6, 2)), 0)
    assert json.loads(protocol.connected(1)) == {"since": 8}
    assert protocol.receive(welcome(9) + frame(record(7)) + frame(record(8)), 1)[1:] == [record(8)]


def test_another_session_is_asked_anew_for_all_that_it_holds() -> None:
    protocol = subscribed(5)
    protocol.receive(frame(record(5)), 0)
    protocol.connected(1)
    with pytest.raises(RemoteProtocolError, match="new session"):
        protocol.receive(welcome(900, session=2), 1)
    assert json.loads(protocol.connected(2)) == {"since": 1}
    assert protocol.receive(welcome(3, session=2) + frame(record(1, session=2)), 2)[1:] == [record(1, session=2)]


def test_a_since_of_another_session_continues_with_the_next_record() -> None:
    protocol = ClientProtocol(since=900)
    protocol.connected(0)
    assert protocol.receive(welcome(5) + frame(record(5)), 0)[1:] == [record(5)]


def test_a_gap_that_nobody_told_of_is_told_as_lost() -> None:
    protocol = subscribed(1)
    assert protocol.receive(frame(record(1)) + frame(record(4)), 0) == [record(1), Lapped(2, 2), record(4)]


def test_losses_are_told_once() -> None:
    protocol = subscribed(1)
    assert protocol.receive(frame(Lapped(1, 4)) + frame(Lapped(1, 4)) + frame(Lapped(3, 4)), 0) == [
        Lapped(1, 4),
        Lapped(5, 2),
    ]


@pytest.mark.parametrize("beat", [Heartbeat(SESSION, 3, 0), Heartbeat(1, 2, 0)])
def test_a_heartbeat_that_tells_of_more_than_came_ends_the_connection(beat: Heartbeat) -> None:
    protocol = subscribed(1)
    protocol.receive(frame(record(1)) + frame(record(2)) + frame(Heartbeat(SESSION, 2, 0)), 0)
    with pytest.raises(RemoteProtocolError, match="heartbeat"):
        protocol.receive(frame(beat), 0)


@pytest.mark.parametrize(
    "forged",
    [
        record(1, header=bytes(80)),
        record(1, hash=bytes(32)),
        record(1, header=MAIN.genesis_header[:79] + b"\0"),
    ],
)
def test_a_record_without_proof_of_work_is_never_handed_on(forged: Record) -> None:
    with pytest.raises(UnprovenRecordError, match="record 1"):
        subscribed().receive(frame(forged), 0)
    assert subscribed(check_proof=False).receive(frame(forged), 0) == [forged]


def test_work_is_held_against_the_header_s_own_bits() -> None:
    easy = record(1, hash=REGTEST.genesis_hash, header=REGTEST.genesis_header)
    assert subscribed().receive(frame(easy), 0) == [easy]
    header = bytearray(REGTEST.genesis_header)
    header[72:76] = bytes.fromhex("ffff001d")
    hard = record(1, hash=double_sha256(bytes(header)), header=bytes(header))
    with pytest.raises(UnprovenRecordError, match="misses the target 1d00ffff"):
        subscribed().receive(frame(hard), 0)


def test_refusals_are_told_apart_by_whether_they_may_pass() -> None:
    for answer, error in (
        (b'{"error":"not accepted"}\n', SubscriptionRefusedError),
        (b'{"error":"too many subscribers","retry":true}\n', ServerFullError),
    ):
        protocol = ClientProtocol()
        protocol.connected(0)
        with pytest.raises(error, match="refused"):
            protocol.receive(answer, 0)


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400\r\n", b"[]\n", b"{}\n", b'{"tier":"free"}\n', b"[" * 3000 + b"\n", b"x" * 5000, b"\xff\n"],
)
def test_an_answer_that_is_none_ends_the_connection(answer: bytes) -> None:
    protocol = ClientProtocol()
    protocol.connected(0)
    with pytest.raises(RemoteProtocolError, match="answer"):
        protocol.receive(answer, 0)


def test_what_came_before_trouble_is_handed_out_before_it() -> None:
    for trouble in (b"\0\0\0\0", frame(Heartbeat(SESSION, 9, 0)), frame(record(2, hash=bytes(32)))):
        protocol = ClientProtocol()
        protocol.connected(0)
        assert protocol.receive(welcome(1) + frame(record(1)) + trouble, 0)[1:] == [record(1)]
        with pytest.raises(RemoteProtocolError):
            protocol.receive(b"", 0)
        assert json.loads(protocol.connected(0)) == {"since": 2}


def test_silence_is_trouble_after_three_seconds_and_so_is_noise() -> None:
    protocol = ClientProtocol()
    protocol.connected(0)
    assert protocol.deadline() == 5 * SECOND
    protocol.receive(welcome(1), SECOND)
    assert protocol.deadline() == 4 * SECOND
    protocol.receive(frame(Heartbeat(SESSION, 0, 0)), 2 * SECOND)
    assert protocol.deadline() == 5 * SECOND
    protocol.receive(b"\xc1", 4 * SECOND)
    assert protocol.deadline() == 5 * SECOND
    with pytest.raises(RemoteProtocolError, match="too long"):
        protocol.receive(b"\x00", 5 * SECOND)


def test_a_reader_that_took_its_time_over_the_items_is_not_the_server_s_fault() -> None:
    protocol = subscribed()
    assert protocol.receive(frame(record(1)), 0) == [record(1)]
    assert protocol.receive(b"", 60 * SECOND) == []
    assert protocol.receive(frame(Heartbeat(SESSION, 1, 0)), 61 * SECOND) == [Heartbeat(SESSION, 1, 0)]


@settings(deadline=None)
@given(st.binary(max_size=2000), st.booleans())
def test_no_bytes_make_the_protocol_fail_otherwise(data: bytes, answered: bool) -> None:
    protocol = ClientProtocol()
    protocol.connected(0)
    try:
        if answered:
            protocol.receive(welcome(1), 0)
        protocol.receive(data, 0)
    except (RemoteProtocolError, SubscriptionRefusedError, ServerFullError):
        pass


class Server:
    """A real stream delivery on a loop in a thread of its own."""

    def __init__(self, port: int = 0) -> None:
        self.loop = asyncio.new_event_loop()
        self.ring = Ring.create(bytearray(size_for(8)), 8, SESSION)
        self.writer = RingWriter(self.ring)
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.address = ""
        self.port = port
        self.open()

    def on_loop(self, call: Callable[[], None]) -> None:
        done: SimpleQueue[BaseException | None] = SimpleQueue()

        def step() -> None:
            try:
                call()
            except Exception as error:  # handed to the test's thread
                done.put(error)
            else:
                done.put(None)

        self.loop.call_soon_threadsafe(step)
        error = done.get(timeout=10)
        if error is not None:
            raise error

    def open(self) -> None:
        def start() -> None:
            self.delivery = StreamDelivery(
                self.ring,
                StatusBlock.create(SESSION, {}).delivery(0, "stream"),
                network="main",
                gate=OpenGate(lambda key: Tier.FREE if key is None else None),
                write_deadline_ns={tier: PROFILES[tier].write_deadline_ns for tier in Tier},
                max_sessions=10,
                heartbeat_ns=SECOND // 20,
            )
            host, self.port = self.delivery.start(self.loop, "127.0.0.1", self.port)
            self.address = f"{host}:{self.port}"

        self.on_loop(start)

    def publish(self, count: int = 1, **changes: Any) -> None:
        def step() -> None:
            for _ in range(count):
                self.writer.claim()[:] = record(self.writer.next_sequence, **changes).encode()
                self.writer.commit(best=True)
                self.delivery.publish()

        self.on_loop(step)

    def disconnect(self) -> None:
        """Everybody is cut off; the ring and its session stay."""
        self.on_loop(self.delivery.close)

    def stop(self) -> None:
        self.disconnect()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


def test_connect_yields_records_and_tells_losses_where_they_are(server: Server) -> None:
    server.publish(10)
    seen: list[object] = []
    for got in client.connect(server.address, since=1, on_lost=seen.append):
        seen.append(got.sequence)
        if got.sequence == 10:
            break
    assert seen == [Lapped(1, 2), *range(3, 11)]


def test_connect_resumes_after_the_server_came_back_without_a_gap_or_a_double(server: Server) -> None:
    server.publish(2)
    sequences = []
    stream = client.connect(server.address, since=1)
    for got in stream:
        sequences.append(got.sequence)
        if got.sequence == 2:
            server.disconnect()
            server.open()
            server.publish(2)
        if got.sequence == 4:
            break
    assert sequences == [1, 2, 3, 4]


def test_connect_without_reconnect_raises_when_the_server_goes(server: Server) -> None:
    server.publish()
    stream = client.connect(server.address, since=1, reconnect=False)
    assert next(stream).sequence == 1
    server.disconnect()
    with pytest.raises(ConnectionLostError, match="closed"):
        next(stream)
    with pytest.raises(ConnectionLostError):
        next(client.connect(server.address, reconnect=False))


def test_connect_raises_a_refusal_even_if_it_may_reconnect(server: Server) -> None:
    with pytest.raises(SubscriptionRefusedError, match="not accepted"):
        next(client.connect(server.address, key="guessed"))


def test_connect_raises_on_an_unproven_record_even_if_it_may_reconnect(server: Server) -> None:
    server.publish(hash=bytes(32))
    with pytest.raises(UnprovenRecordError):
        next(client.connect(server.address, since=1))


def test_events_show_subscription_and_heartbeats(server: Server) -> None:
    stream = client.events(server.address)
    first = next(stream)
    assert isinstance(first, Subscribed)
    assert (first.tier, first.session, first.next) == ("free", SESSION, 1)
    assert isinstance(next(stream), Heartbeat)


def test_connect_async_is_the_same_for_asyncio(server: Server) -> None:
    server.publish(10)

    async def subscribe() -> list[object]:
        seen: list[object] = []
        async with aclosing(client.connect_async(server.address, since=2, on_lost=seen.append)) as stream:
            async for got in stream:
                seen.append(got.sequence)
                if got.sequence == 10:
                    server.disconnect()
                    server.open()
                    server.publish()
                if got.sequence == 11:
                    break
        return seen

    assert asyncio.run(asyncio.wait_for(subscribe(), 20)) == [Lapped(2, 1), *range(3, 12)]


def test_connect_async_raises_a_refusal(server: Server) -> None:
    async def subscribe() -> None:
        async with aclosing(client.connect_async(server.address, key="guessed")) as stream:
            await stream.__anext__()

    with pytest.raises(SubscriptionRefusedError):
        asyncio.run(asyncio.wait_for(subscribe(), 20))


@contextmanager
def listening(handle: Callable[[socket.socket], None], times: int = 1) -> Iterator[str]:
    """A hostile or dying server: `handle` gets each connection after its hello."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(times):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    handle(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield "{}:{}".format(*listener.getsockname())
        thread.join(10)


def test_a_server_that_falls_silent_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_protocol, "SILENCE_TIMEOUT_NS", SECOND // 20)
    gone = threading.Event()

    def silent(connection: socket.socket) -> None:
        connection.sendall(welcome(1) + frame(record(1)))
        gone.wait(10)

    with listening(silent) as address:
        stream = client.connect(address, reconnect=False)
        assert next(stream).sequence == 1
        began = time.monotonic()
        with pytest.raises(ConnectionLostError):
            next(stream)
        assert time.monotonic() - began < 9  # by its own timeout, not because the server closed
        gone.set()


def test_a_heartbeat_ahead_of_what_came_makes_the_client_come_again_for_it() -> None:
    answers = iter(
        [
            welcome(1) + frame(record(1)) + frame(Heartbeat(SESSION, 2, 0)),
            welcome(3) + frame(record(2)),
        ]
    )
    with listening(lambda connection: connection.sendall(next(answers)), times=2) as address:
        stream = client.connect(address)
        assert [next(stream).sequence, next(stream).sequence] == [1, 2]
        stream.close()


def test_a_server_that_sends_junk_ends_in_a_protocol_error() -> None:
    with (
        listening(lambda connection: connection.sendall(welcome(1) + b"\xff" * 64)) as address,
        pytest.raises(RemoteProtocolError, match="frame of 4294967295 bytes"),
    ):
        next(client.connect(address, reconnect=False))
