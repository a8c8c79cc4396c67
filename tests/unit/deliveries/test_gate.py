"""Keys at the stream's door: refusals that wait, and sessions that end with their key."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from sprint import admission
from sprint.addresses import Address
from sprint.admission import FIRST_DELAY_NS, FREE_FAILURES, Admission
from sprint.deliveries import udp_link
from sprint.deliveries.hello import read_hello
from sprint.deliveries.udp_sessions import UdpService
from sprint.keys import FILE_NAME, KeyStore
from sprint.seats import private_seats
from sprint.tiers import NS_PER_S, Tier
from tests.unit.deliveries.stream_stage import Client, Server, run, serving, until
from tests.unit.key_books import open_book

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MADE_S = 1_000_000_000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    with KeyStore(tmp_path / FILE_NAME) as opened:
        yield opened


def gate_of(tmp_path: Path) -> Admission:
    return Admission(Tier.TURBO, open_book(tmp_path / FILE_NAME), private_seats())


async def ask(server: Server, key: str) -> Client:
    client = await server.call()
    await client.send(json.dumps({"key": key}).encode() + b"\n")
    return client


def test_after_some_bad_keys_a_refusal_waits_and_a_good_key_does_not(
    store: KeyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "FIRST_DELAY_NS", 2 * NS_PER_S)  # more than a busy machine takes for the good one
    good = store.create("acme", Tier.TURBO, MADE_S, connections=9)

    async def test() -> None:
        async with serving(gate=gate_of(tmp_path)) as server:
            for _ in range(FREE_FAILURES):
                assert json.loads(await (await ask(server, "bad")).line()) == {"error": "not accepted"}
            order: list[str] = []

            async def answered(name: str, client: Client) -> bytes:
                line = await client.line()
                order.append(name)
                return line

            bad = asyncio.ensure_future(answered("bad", await ask(server, "bad")))
            welcomed = asyncio.ensure_future(answered("good", await ask(server, good)))
            assert json.loads(await welcomed)["tier"] == "turbo"
            assert json.loads(await bad) == {"error": "not accepted"}
            assert order == ["good", "bad"]

    run(test())


def test_who_leaves_before_his_refusal_came_is_forgotten(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(gate=gate_of(tmp_path), max_sessions=FREE_FAILURES + 1) as server:
            for _ in range(FREE_FAILURES):
                (await ask(server, "bad")).sock.close()
            await until(lambda: server.accounts.refused == FREE_FAILURES)
            (await ask(server, "bad")).sock.close()
            joined = await until_joined(server)
            assert joined.welcome["tier"] == "free"

    run(test())


def test_a_late_hello_with_a_bad_key_waits_for_its_answer_all_the_same(tmp_path: Path) -> None:
    """Else the end of its time would come at once, and the wait be avoided."""
    gate = gate_of(tmp_path)
    for _ in range(FREE_FAILURES):
        gate.admit("bad", "127.0.0.1", time.monotonic_ns(), MADE_S)

    async def test() -> None:
        async with serving(gate=gate, hello_timeout_ns=500_000_000) as server:
            late = await server.call()
            reception = server.delivery._reception
            assert reception is not None
            await until(lambda: reception._arrivals)
            (arrival,) = reception._arrivals
            deadline_ns = arrival.deadline_ns
            await late.send(b'{"key":')
            while time.monotonic_ns() < deadline_ns - 100_000_000:
                await asyncio.sleep(0.01)
            if time.monotonic_ns() > deadline_ns - 50_000_000:
                pytest.skip("the machine is too busy to be late by so little")
            sent_ns = time.monotonic_ns()
            await late.send(b'"bad"}\n')
            assert json.loads(await late.line()) == {"error": "not accepted"}
            assert time.monotonic_ns() - sent_ns > FIRST_DELAY_NS * 0.9

    run(test())


def test_a_wait_that_is_longer_than_a_connections_time_ends_in_the_same_words(tmp_path: Path) -> None:
    gate = gate_of(tmp_path)
    for _ in range(FREE_FAILURES + 10):
        gate.admit("bad", "127.0.0.1", time.monotonic_ns(), MADE_S)

    async def test() -> None:
        async with serving(gate=gate, hello_timeout_ns=200_000_000) as server:
            client = await ask(server, "bad")
            assert json.loads(await client.line()) == {"error": "not accepted"}
            assert await client.closed()

    run(test())


def test_a_client_that_hangs_up_while_it_is_admitted_leaves_no_seat_taken(store: KeyStore, tmp_path: Path) -> None:
    key = store.create("acme", Tier.TURBO, MADE_S, connections=3)
    gate = gate_of(tmp_path)
    ours, theirs = udp_link.pair()

    async def test() -> None:
        async with serving(gate=gate, udp=UdpService(Address("127.0.0.1", 9), ours)) as server:
            for _ in range(8):  # more often than it has seats
                client = await server.call()
                await client.send(json.dumps({"key": key, "udp": ":9"}).encode() + b"\n")
                client.reset()
            await until(lambda: server.accounts.refused + server.accounts.disconnected == 8)
            assert gate.seats.taken(1) == 0
            assert (await server.join(key=key)).welcome["tier"] == "turbo"

    with ours, theirs:
        run(test())


@pytest.mark.parametrize("length", [257, 4_096, 1 << 20])
def test_a_key_of_any_length_is_refused_and_nobody_is_kept(tmp_path: Path, length: int) -> None:
    async def test() -> None:
        async with serving(gate=gate_of(tmp_path)) as server:
            client, other = await server.call(), await server.join()
            with suppress(ConnectionError):  # cut off in the middle of it
                await client.send(json.dumps({"key": "k" * length}).encode() + b"\n")
            with suppress(AssertionError):  # after so much a reset may overtake the answer
                assert b"error" in await client.line()
            client.sock.close()
            server.publish()
            assert await other.read()

    run(test())


def test_a_new_key_is_accepted_though_the_file_is_being_changed_when_it_comes(store: KeyStore, tmp_path: Path) -> None:
    gate = gate_of(tmp_path)
    key = store.create("new", Tier.TURBO, MADE_S, connections=1)
    operator = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    operator.execute("BEGIN EXCLUSIVE")

    async def test() -> None:
        async with serving(gate=gate) as server:
            new, gone = await ask(server, key), await ask(server, key)
            joined = await server.join()
            assert joined.welcome["tier"] == "free"
            assert gate.reason is not None
            gone.sock.close()
            operator.execute("ROLLBACK")
            assert json.loads(await new.line())["tier"] == "turbo"
            assert gate.denied == 0

    try:
        run(test())
    finally:
        operator.close()


def test_who_asks_while_the_file_stays_locked_is_not_accepted(store: KeyStore, tmp_path: Path) -> None:
    gate = gate_of(tmp_path)
    with sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None) as operator:
        operator.execute("BEGIN EXCLUSIVE")

        async def test() -> None:
            async with serving(gate=gate, hello_timeout_ns=300_000_000) as server:
                assert json.loads(await (await ask(server, "bad")).line()) == {"error": "not accepted"}

        run(test())
        operator.execute("ROLLBACK")
    operator.close()


def test_what_shows_a_hello_shows_no_key() -> None:
    assert "secret" not in repr(read_hello(b'{"key":"secret"}'))


async def until_joined(server: Server) -> Client:
    """A seat has to come free: a refused connection is held until its refusal is told."""
    while True:
        client = await server.join()
        if "error" not in client.welcome:
            return client
        await asyncio.sleep(0.001)


def test_closing_with_refusals_waiting_ends_in_good_order(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(gate=gate_of(tmp_path)) as server:
            waiting = [await ask(server, "bad") for _ in range(FREE_FAILURES + 4)]
            await until(lambda: server.accounts.refused == FREE_FAILURES)
            server.delivery.close()
            for client in waiting[FREE_FAILURES:]:
                assert await client.read() == b""

    run(test())


def test_a_session_ends_when_its_key_is_revoked_and_gives_its_seat_back(store: KeyStore, tmp_path: Path) -> None:
    key = store.create("acme", Tier.TURBO, MADE_S, connections=1)
    gate = gate_of(tmp_path)

    async def test() -> None:
        async with serving(gate=gate) as server:
            ended, other = await server.join(key=key), await server.join()
            assert (await server.join(key=key)).welcome == {"error": "too many subscribers", "retry": True}
            store.revoke("acme", MADE_S + 1)
            assert gate.check(MADE_S + 1) == 1
            assert await ended.read() == b""
            server.publish()
            assert await other.read()
            assert server.accounts.tiers[Tier.TURBO].subscribers == 0
            assert gate.seats.taken(1) == 0

    run(test())
