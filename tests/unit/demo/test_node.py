"""The demo's node, as a peer sees it: handshake, headers, blocks, and announcements in the way that was asked for."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from sprint.bitcoin.block import parse_block
from sprint.bitcoin.framing import Framer, encode_frame
from sprint.bitcoin.messages import (
    MSG_BLOCK,
    MSG_WITNESS_BLOCK,
    NODE_NETWORK,
    NODE_WITNESS,
    GetData,
    GetHeaders,
    Ping,
    SendCmpct,
    SendHeaders,
    Verack,
    Version,
)
from sprint.bitcoin.networks import REGTEST
from sprint.bitcoin.peer_events import BlockAnnounced, BlocksAnnouncedByInv, HeadersReceived, NotFound, translate
from sprint.demo.node import Node, run_node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sprint.bitcoin.codec import Message
    from sprint.bitcoin.framing import Frame

MSG_TX = 1


class _Client:
    """A peer that says exactly what it is told to, and nothing else."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self._framer = Framer(REGTEST.magic)
        self._frames: list[Frame] = []

    def say(self, *messages: Message) -> None:
        for message in messages:
            self.writer.write(encode_frame(REGTEST.magic, message.command, message.encode()))

    async def hear(self, command: str) -> bytes:
        """The next message of that kind; others are passed over."""
        while True:
            while self._frames:
                name, payload, _ = self._frames.pop(0)
                if name == command:
                    return payload
            data = await asyncio.wait_for(self._reader.read(1 << 16), 10)
            if not data:
                raise EOFError(f"the node hung up before {command}")
            self._frames += self._framer.receive(data)

    async def ended(self) -> None:
        while await asyncio.wait_for(self._reader.read(1 << 16), 10):
            continue

    async def shake_hands(self, *wishes: Message) -> Version:
        self.say(Version(70_016, 0, int(time.time()), 5, b"/test/", 0, relay=False))
        version = Version.parse(await self.hear("version"))
        self.say(Verack(), *wishes, Ping(1))
        await self.hear("pong")
        return version


@asynccontextmanager
async def _client_of(node: Node) -> AsyncIterator[_Client]:
    port = await node.listen("127.0.0.1")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield _Client(reader, writer)
    finally:
        writer.close()
        assert node._server is not None
        node._server.close()
        while node.peers:
            await asyncio.sleep(0)


def test_it_introduces_itself_with_its_height() -> None:
    async def story() -> None:
        node = Node()
        node.mine(7)
        async with _client_of(node) as client:
            version = await client.shake_hands()
            assert version.start_height == 7
            assert version.services == NODE_NETWORK | NODE_WITNESS
            assert version.user_agent.startswith(b"/SprintDemoNode")
            assert len(node.peers) == 1

    asyncio.run(story())


@pytest.mark.parametrize("wish", ["inv", "headers", "cmpctblock"])
def test_it_announces_in_the_way_that_the_peer_asked_for(wish: str) -> None:
    wishes: dict[str, tuple[Message, ...]] = {
        "inv": (),
        "headers": (SendHeaders(),),
        "cmpctblock": (SendHeaders(), SendCmpct(True, 2)),
    }

    async def story() -> None:
        node = Node()
        async with _client_of(node) as client:
            await client.shake_hands(*wishes[wish])
            (mined,) = node.mine()
            event = translate(wish, await client.hear(wish))
            if isinstance(event, BlocksAnnouncedByInv):
                assert event.hashes == (mined,)
            elif isinstance(event, HeadersReceived):
                assert event.headers == node.chain.headers.header_of(mined)
            else:
                assert isinstance(event, BlockAnnounced)
                assert (event.hash, event.transactions) == (mined, 1)

    asyncio.run(story())


def test_it_announces_nothing_before_the_handshake_is_complete() -> None:
    async def story() -> None:
        node = Node()
        async with _client_of(node) as client:
            client.say(Version(70_016, 0, 0, 5, b"", 0, relay=False))
            await client.hear("version")
            node.mine()
            client.say(Verack())
            await client.hear("sendheaders")
            (second,) = node.mine()
            event = translate("inv", await client.hear("inv"))
            assert isinstance(event, BlocksAnnouncedByInv)
            assert event.hashes == (second,)

    asyncio.run(story())


def test_it_serves_headers_two_thousand_at_a_time_and_blocks() -> None:
    async def story() -> None:
        node = Node()
        hashes = node.mine(2_100)
        async with _client_of(node) as client:
            await client.shake_hands()
            client.say(GetHeaders((REGTEST.genesis_hash,)))
            first = translate("headers", await client.hear("headers"))
            assert isinstance(first, HeadersReceived)
            assert first.count == 2_000
            client.say(GetHeaders((hashes[1_999],)), GetHeaders((hashes[-1],)))
            rest, none = [translate("headers", await client.hear("headers")) for _ in range(2)]
            assert isinstance(rest, HeadersReceived)
            assert isinstance(none, HeadersReceived)
            assert (rest.count, none.count) == (100, 0)
            client.say(GetData(((MSG_WITNESS_BLOCK, hashes[4]), (MSG_BLOCK, hashes[5]))))
            for expected in hashes[4:6]:
                header, _ = parse_block(await client.hear("block"))
                assert header.hash == expected

    asyncio.run(story())


def test_what_it_does_not_have_it_says_so() -> None:
    async def story() -> None:
        node = Node()
        (mined,) = node.mine()
        async with _client_of(node) as client:
            await client.shake_hands()
            missing = ((MSG_BLOCK, b"\x01" * 32), (MSG_TX, mined))
            client.say(GetData(missing))
            event = translate("notfound", await client.hear("notfound"))
            assert event == NotFound(missing)

    asyncio.run(story())


def test_a_peer_that_breaks_the_protocol_is_hung_up_on_and_others_are_not() -> None:
    async def story() -> None:
        node = Node()
        async with _client_of(node) as client:
            await client.shake_hands()
            assert node._server is not None
            port = node._server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await asyncio.wait_for(reader.read(), 10) in {b"", None}
            writer.close()
            node.mine()
            await client.hear("inv")

    asyncio.run(story())


def test_a_peer_that_never_finishes_its_handshake_is_hung_up_on_by_the_tick() -> None:
    async def story() -> None:
        node = Node()
        async with _client_of(node) as client:
            while not node.peers:
                await asyncio.sleep(0)
            (peer,) = node.peers
            node.tick()
            assert peer._connection.deadline() is not None
            peer._connection._handshake_deadline_ns = 0
            node.tick()
            await client.ended()

    asyncio.run(story())


def test_a_node_in_a_process_of_its_own_mines_on_request_and_ends_with_its_pipe() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_node, args=(theirs, 12))
    process.start()
    theirs.close()
    try:
        assert ours.poll(30)
        host, port = ours.recv()
        assert host == "127.0.0.1"
        ours.send(3)
        assert ours.poll(30)
        hashes = ours.recv()
        assert len(set(hashes)) == 3

        async def story() -> None:
            reader, writer = await asyncio.open_connection(host, port)
            client = _Client(reader, writer)
            assert (await client.shake_hands()).start_height == 15
            writer.close()

        asyncio.run(story())
    finally:
        ours.close()
        process.join(30)
    assert process.exitcode == 0
