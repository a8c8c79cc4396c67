"""The stream over real loopback sockets and a real event loop: who is served what, in which order, until it closes."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import time
from typing import Any

import pytest

from sprint.errors import HostError
from sprint.frames import Heartbeat
from sprint.tiers import Tier
from tests.unit.deliveries.stream_stage import MS, SESSION, Client, Server, run, serving, until


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


def test_records_that_were_committed_together_are_all_sent() -> None:
    async def test() -> None:
        async with serving() as server:
            client = await server.join()
            for _ in range(40):
                server.put()
            server.delivery.publish()
            assert await client.told(40) == list(range(1, 41))

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


def test_a_port_that_is_taken_is_a_host_error_that_names_it() -> None:
    async def test() -> None:
        async with serving() as server:
            host, port = server.address
            with pytest.raises(HostError, match=rf"STREAM_BIND={host}:{port}: .+"):
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
