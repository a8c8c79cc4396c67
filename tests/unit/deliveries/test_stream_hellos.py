"""Hellos over real sockets: too long, too late, in pieces, one too many, and what may follow them."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress

import pytest

from sprint.deliveries.requests import MAX_EXTRA
from sprint.tiers import Tier
from tests.unit.deliveries.stream_stage import MS, run, serving, until


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
