"""Keys at the stream's door: refusals that wait, and sessions that end with their key."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from sprint.admission import FREE_FAILURES, Admission
from sprint.key_book import KeyBook
from sprint.keys import FILE_NAME, KeyStore
from sprint.seats import private_seats
from sprint.tiers import Tier
from tests.unit.deliveries.test_stream import Client, Server, run, serving, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MADE_S = 1_000_000_000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    with KeyStore(tmp_path / FILE_NAME) as opened:
        yield opened


def gate_of(tmp_path: Path) -> Admission:
    return Admission(Tier.TURBO, KeyBook(tmp_path / FILE_NAME), private_seats())


async def ask(server: Server, key: str) -> Client:
    client = await server.call()
    await client.send(json.dumps({"key": key}).encode() + b"\n")
    return client


def test_after_some_bad_keys_a_refusal_waits_and_a_good_key_does_not(store: KeyStore, tmp_path: Path) -> None:
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
