"""The stream over real loopback sockets and a real event loop."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import socket
import struct
import time
import tracemalloc
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from sprint.deliveries.gate import OpenGate
from sprint.deliveries.requests import MAX_EXTRA
from sprint.deliveries.stream import StreamDelivery
from sprint.errors import HostError
from sprint.events import Event, Lapped, Source, State
from sprint.frames import FrameDecoder, Heartbeat
from sprint.record import Record
from sprint.ring import Ring, RingWriter, size_for
from sprint.status import StatusBlock
from sprint.tiers import PROFILES, Tier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from sprint.frames import Item

SESSION = 0xABCDEF
MS = 1_000_000
TINY = 1
"""A buffer size that the kernel raises to its own minimum of a few kilobytes."""


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


async def until(holds: Callable[[], object]) -> None:
    while not holds():
        await asyncio.sleep(0.001)


def tier_of_key(key: str | None) -> Tier | None:
    if key is None:
        return Tier.FREE
    return {tier.label: tier for tier in Tier}.get(key)


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


class Recorder:
    """Stands before a subscriber's socket and notes who is sent to."""

    def __init__(self, subscriber: Any, name: str, log: list[str]) -> None:
        self._sock = subscriber.sock
        self._name = name
        self._log = log

    def send(self, data: bytes) -> int:
        self._log.append(self._name)
        return int(self._sock.send(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def record_sends(server: Server, log: list[str]) -> None:
    """Names are the tier's label and the number within it, by age."""
    for subscriber in server.delivery._rosters:
        name = f"{subscriber.tier.label}{subscriber.place}"
        subscriber.sock = Recorder(subscriber, name, log)  # type: ignore[assignment] # it only has to send


def test_a_subscriber_is_welcomed_and_gets_each_record_as_it_is_published() -> None:
    async def test() -> None:
        async with serving() as server:
            server.put()
            server.delivery.publish()
            client = await server.join(key="turbo")
            assert client.welcome == {
                "tier": "turbo",
                "writeDeadline": "500µs",
                "oldest": 1,
                "next": 2,
                "session": "0000000000abcdef",
                "network": "regtest",
                "format": "binary",
            }
            server.publish(2)
            assert await client.told(3) == [2, 3]
            ended = server.ended(Tier.TURBO)
            assert ended["on_time"] + ended["late"] == 2
            assert server.accounts.tiers[Tier.TURBO].relay_latency.count == 2
            assert server.accounts.tiers[Tier.TURBO].subscribers == 1
            assert server.accounts.processing.count == 3

    run(test())


def test_json_subscribers_get_a_line_an_event() -> None:
    async def test() -> None:
        async with serving() as server:
            client = await server.join(format="json")
            server.publish()
            event = json.loads(await client.line())
            assert (event["seq"], event["event"], event["session"]) == (1, "proven", "0000000000abcdef")

    run(test())


@pytest.mark.parametrize(
    ("since", "told"), [(3, [3, 4, 5, 6]), (5, [5, 6]), (6, [6]), (99, [6]), (1, [(1, 1), 2, 3, 4, 5, 6])]
)
def test_since_replays_what_the_ring_holds_and_continues_without_a_gap(since: int, told: list[object]) -> None:
    async def test() -> None:
        async with serving(slots=4) as server:
            for _ in range(5):
                server.put()
            server.delivery.publish()
            client = await server.join(since=since)
            got = await client.told(5) if since <= 5 else []
            server.publish()
            assert got + await client.told(6) == told
            assert sum(server.ended().values()) == 1

    run(test())


@pytest.mark.parametrize(
    ("hello", "error"),
    [
        (b'{"key":"guessed"}\n', "not accepted"),
        (b'{"udp":"127.0.0.1:1"}\n', "udp is not served here: subscribe without it"),
        (b"GET / HTTP/1.1\r\n\r\n", "hello is not JSON: expected one line with an object"),
    ],
)
def test_a_hello_that_can_t_be_served_is_answered_with_an_error_and_closed(hello: bytes, error: str) -> None:
    async def test() -> None:
        async with serving() as server:
            client = await server.call()
            await client.send(hello)
            assert json.loads(await client.line()) == {"error": error}
            assert await client.closed()
            assert (server.accounts.refused, server.accounts.accepted) == (1, 0)

    run(test())


def test_a_hello_of_one_megabyte_is_refused_without_being_kept() -> None:
    async def test() -> None:
        async with serving() as server:
            client = await server.call()
            sending = asyncio.ensure_future(client.send(b"x" * (1 << 20)))
            assert json.loads(await client.line()) == {"error": "hello longer than 4096 bytes"}
            assert await client.closed()
            with suppress(ConnectionError):  # unless the kernels' buffers took it all
                await sending
            other = await server.join()
            server.publish()
            assert await other.told(1) == [1]

    run(test())


def test_half_a_hello_is_closed_when_its_time_is_over() -> None:
    async def test() -> None:
        async with serving(hello_timeout_ns=50 * MS) as server:
            silent, half, good = await server.call(), await server.call(), await server.join()
            await half.send(b'{"format":')
            for client in (silent, half):
                assert json.loads(await client.line()) == {"error": "no hello in time"}
                assert await client.closed()
            server.publish()
            assert await good.told(1) == [1]
            assert server.accounts.refused == 2

    run(test())


def test_a_hello_may_come_in_pieces() -> None:
    async def test() -> None:
        async with serving() as server:
            client = await server.call()
            for piece in (b"{", b'"format"', b':"json"}', b"\n"):
                await client.send(piece)
                await asyncio.sleep(0)
            assert json.loads(await client.line())["format"] == "json"

    run(test())


@pytest.mark.parametrize("options", [{"max_sessions": 2}, {"max_sessions_per_address": 2}])
def test_one_connection_too_many_is_told_to_come_again(options: dict[str, int]) -> None:
    async def test() -> None:
        async with serving(**options) as server:
            first = await server.join()
            await server.call()
            third = await server.call()
            assert json.loads(await third.line()) == {"error": "too many subscribers", "retry": True}
            assert await third.closed()
            first.reset()
            await until(lambda: server.accounts.disconnected)
            assert (await server.join()).welcome["next"] == 1

    run(test())


def test_a_few_bytes_after_the_hello_are_ignored_and_many_end_the_session() -> None:
    async def test() -> None:
        async with serving() as server:
            client = await server.join()
            await client.send(b"\n" * MAX_EXTRA)
            server.publish()
            assert await client.told(1) == [1]
            await client.send(b"\n")
            assert await client.closed()
            assert server.accounts.tiers[Tier.FREE].subscribers == 0

    run(test())


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_closes_is_noticed_without_any_publication(how: str) -> None:
    async def test() -> None:
        async with serving(heartbeat_ns=3_600_000 * MS) as server:
            client, other = await server.join(), await server.join()
            if how == "reset":
                client.reset()
            else:
                client.sock.close()
            await until(lambda: server.accounts.disconnected)
            server.publish()
            assert await other.told(1) == [1]
            assert sum(server.ended().values()) == 1

    run(test())


def test_a_client_that_only_stops_sending_is_still_served() -> None:
    async def test() -> None:
        async with serving(heartbeat_ns=20 * MS) as server:
            client = await server.join()
            client.sock.shutdown(socket.SHUT_WR)
            beats = 0
            while beats < 10:
                beats += isinstance(await client.item(), Heartbeat)
            server.publish()
            assert await client.told(1) == [1]
            assert server.accounts.disconnected == 0

    run(test())


def test_heartbeats_tell_session_and_last_sequence_in_both_formats() -> None:
    async def test() -> None:
        async with serving(heartbeat_ns=20 * MS) as server:
            binary, text = await server.join(), await server.join(format="json")
            server.publish(3)
            await binary.told(3)
            beat = await binary.item()
            assert isinstance(beat, Heartbeat)
            assert (beat.session, beat.sequence) == (SESSION, 3)
            assert abs(beat.wall_ns - time.time_ns()) < 60_000 * MS
            event: dict[str, Any] = {}
            while event.get("event") != "heartbeat" or event["seq"] != 3:
                event = json.loads(await text.line())
            assert event["session"] == "0000000000abcdef"

    run(test())


def test_higher_tiers_are_sent_to_first() -> None:
    async def test() -> None:
        async with serving() as server:
            for tier in (Tier.PRO, Tier.ENTERPRISE, Tier.FREE, Tier.TURBO, Tier.BUSINESS, Tier.FREE):
                await server.join(key=tier.label)
            log: list[str] = []
            record_sends(server, log)
            server.publish()
            assert [name[:-1] for name in log] == ["enterprise", "turbo", "business", "pro", "free", "free"]

    run(test())


def test_within_a_tier_another_subscriber_is_first_each_time() -> None:
    async def test() -> None:
        async with serving() as server:
            for _ in range(3):
                await server.join(key="turbo")
            log: list[str] = []
            record_sends(server, log)
            server.publish(3)
            rounds = [log[at : at + 3] for at in range(0, 9, 3)]
            assert sorted(first for first, _, _ in rounds) == ["turbo0", "turbo1", "turbo2"]
            assert all(sorted(names) == ["turbo0", "turbo1", "turbo2"] for names in rounds)

    run(test())


@pytest.mark.parametrize("tier", Tier)
def test_a_subscriber_that_doesn_t_read_loses_what_its_policy_says_and_reads_no_torn_frame(tier: Tier) -> None:
    async def test() -> None:
        deadlines = dict.fromkeys(Tier, 2 * MS)
        async with serving(slots=512, send_buffer=TINY, write_deadline_ns=deadlines) as server:
            healthy = await server.join(key=tier.label)
            stalled = await server.join(key=tier.label, receive_buffer=TINY)
            count = 0
            lost = "dropped" if tier < Tier.TURBO else "overwritten"
            while server.ended(tier)[lost] < 20:
                server.publish()
                count += 1
                assert await healthy.told(count) == [count]
                await asyncio.sleep(0.0005)
            assert server.accounts.tiers[tier].buffer_used_max > 0
            told = await stalled.told(count)
            expected = 1
            for item in told:
                first, number = item if isinstance(item, tuple) else (item, 1)
                assert first == expected
                expected += number
            assert expected == count + 1
            ended = server.ended(tier)
            missing = sum(item[1] for item in told if isinstance(item, tuple))
            assert ended[lost] == missing
            assert ended["on_time"] + ended["late"] == 2 * count - missing
            assert server.accounts.tiers[tier].lost_notices == sum(isinstance(item, tuple) for item in told)
            if tier >= Tier.TURBO:
                assert told[-1] == count

    run(test())


def test_a_subscriber_that_never_reads_is_closed_after_the_stall_timeout_and_counted() -> None:
    async def test() -> None:
        async with serving(slots=512, send_buffer=TINY, heartbeat_ns=20 * MS, stall_timeout_ns=200 * MS) as server:
            stalled = await server.join(receive_buffer=TINY)
            healthy = await server.join()
            while not server.accounts.tiers[Tier.FREE].buffer_used:
                server.publish()
            await until(lambda: server.delivery.stalled_closed)
            assert server.accounts.disconnected == 1
            await healthy.told(server.ring.tail)
            assert sum(server.ended().values()) == 2 * server.ring.tail
            await stalled.closed()

    run(test())


def test_a_subscriber_that_died_ends_alone_and_every_delivery_is_counted() -> None:
    async def test() -> None:
        async with serving() as server:
            clients = [await server.join() for _ in range(3)]
            clients[1].reset()
            server.publish()
            for client in (clients[0], clients[2]):
                assert await client.told(1) == [1]
            await until(lambda: server.accounts.disconnected == 1)
            assert sum(server.ended().values()) == 3
            assert server.ended()["dropped"] == 1

    run(test())


def test_records_that_were_committed_together_are_all_sent() -> None:
    async def test() -> None:
        async with serving() as server:
            client = await server.join()
            for _ in range(40):
                server.put()
            server.delivery.publish()
            assert await client.told(40) == list(range(1, 41))

    run(test())


def test_a_ring_that_was_overwritten_before_publish_ran_is_told_as_lost() -> None:
    async def test() -> None:
        async with serving(slots=4) as server:
            client, top = await server.join(), await server.join(key="enterprise")
            for _ in range(10):
                server.put()
            server.delivery.publish()
            assert await client.told(10) == [(1, 6), 7, 8, 9, 10]
            assert await top.told(10) == [(1, 9), 10]
            server.publish()
            assert await client.told(11) == [11]
            assert await top.told(11) == [11]

    run(test())


def test_a_port_that_is_taken_is_a_host_error_that_names_it() -> None:
    async def test() -> None:
        async with serving() as server:
            host, port = server.address
            with pytest.raises(HostError, match=rf"stream on {host}:{port}: .+"):
                Server().delivery.start(asyncio.get_running_loop(), host, port)

    run(test())


def test_running_out_of_file_descriptors_pauses_accepting_and_loses_nobody() -> None:
    async def test() -> None:
        async with serving() as server:
            first = await server.join()
            waiting = socket.socket()
            waiting.setblocking(False)
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            spare: list[int] = []
            highest = max(int(name) for name in os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
            try:
                while len(os.listdir("/proc/self/fd")) < highest + 1:  # listing takes one descriptor for itself
                    spare.append(os.dup(0))
                await asyncio.get_running_loop().sock_connect(waiting, server.address)
                await until(lambda: server.delivery.accept_pauses)
                server.publish()
                assert await first.told(1) == [1]
            finally:
                for fd in spare:
                    os.close(fd)
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            server.clients.append(client := Client(waiting))
            await client.send(b"{}\n")
            assert json.loads(await client.line())["next"] == 2

    run(test())


def test_close_ends_every_connection_and_frees_the_port() -> None:
    async def test() -> None:
        async with serving() as server:
            joined, calling = await server.join(), await server.call()
            await calling.send(b"{")
            server.delivery.close()
            assert await joined.closed()
            assert await calling.closed()
            with pytest.raises(ConnectionRefusedError):
                await server.call()

    run(test())


class Tally:
    """Counts what many clients have received, and wakes whoever waits for a total."""

    def __init__(self) -> None:
        self.total = 0
        self._wanted = 0
        self._reached = asyncio.Event()

    def add(self) -> None:
        self.total += 1
        if self.total == self._wanted:
            self._reached.set()

    async def reaches(self, total: int) -> None:
        self._wanted = total
        self._reached.clear()
        if self.total < total:
            await self._reached.wait()


async def count_in_order(client: Client, newest: int, tally: Tally) -> None:
    """Each record must be the successor of the one before, until `newest`; none is kept."""
    expected = 1
    while expected <= newest:
        item = await client.item()
        if isinstance(item, Record):
            assert item.sequence == expected
            expected += 1
            tally.add()
        else:
            assert isinstance(item, Heartbeat)


def test_of_1000_subscribers_ten_stall_and_every_other_gets_every_block_in_order_in_flat_memory() -> None:
    blocks = 30

    async def test() -> None:
        async with serving(slots=64, send_buffer=TINY, write_deadline_ns=dict.fromkeys(Tier, MS)) as server:
            keys = [tier.label for tier in Tier]
            for number in range(10):
                await server.join(receive_buffer=TINY, key=keys[number % 5], format="json")  # larger frames
            healthy = [await server.join(key=keys[number % 5]) for number in range(990)]
            tally = Tally()
            counting = [asyncio.ensure_future(count_in_order(client, blocks, tally)) for client in healthy]
            held: list[int] = []
            tracemalloc.start()
            try:
                for block in range(1, blocks + 1):
                    server.publish()
                    await tally.reaches(990 * block)
                    if block % 10 == 0:
                        gc.collect()
                        held.append(tracemalloc.get_traced_memory()[0])
            finally:
                tracemalloc.stop()
            await asyncio.gather(*counting)
            ended = {tier: server.ended(tier) for tier in Tier}
            waiting = sum(subscriber.backlog for subscriber in server.delivery._rosters)
            assert sum(sum(ends.values()) for ends in ended.values()) + waiting == blocks * 1000
            lost = [ends["dropped"] + ends["overwritten"] for ends in ended.values()]
            assert min(lost) > blocks // 3  # two stalled in each tier, after a buffer full
            assert held[-1] - held[0] < 200_000  # 200 bytes a subscriber over 20 blocks

    run(test())
