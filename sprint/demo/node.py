"""A small regtest node: speaks enough of the protocol to be an upstream, and mines when told to.

It serves headers and blocks, announces by cmpctblock, headers or inv as each peer asked for, and answers pings. It
takes nothing from others: a demo's blocks are its own.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from typing import TYPE_CHECKING, Any

from sprint.bitcoin.connection import Connection, ConnectionConfig, Phase, Role
from sprint.bitcoin.messages import (
    MSG_BLOCK,
    MSG_WITNESS_BLOCK,
    NODE_NETWORK,
    NODE_WITNESS,
    Block,
    Headers,
    Inv,
    NotFoundMessage,
)
from sprint.bitcoin.networks import NETWORKS
from sprint.bitcoin.peer_events import DataRequested, HeadersRequested
from sprint.demo.wire import connect_far_end, enter_namespace
from sprint.errors import LocalProtocolError, RemoteProtocolError
from sprint.regtest import MinedBlock, RegtestChain

if TYPE_CHECKING:
    from multiprocessing.connection import Connection as Pipe

    from sprint.demo.wire import Wire

TICK_S = 1.0


class _Peer(asyncio.Protocol):
    """One connection to us."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._transport: Any = None
        config = ConnectionConfig(
            network=NETWORKS["regtest"],
            role=Role.RESPONDER,
            services=NODE_NETWORK | NODE_WITNESS,
            user_agent="/SprintDemoNode:0.1.0/",
            start_height=node.chain.headers.tip_height,
        )
        self._connection = Connection(config, node.nonce, time.monotonic_ns(), int(time.time()))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._node.peers.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._node.peers.discard(self)

    def data_received(self, data: bytes) -> None:
        try:
            for event in self._connection.receive_data(data, time.monotonic_ns()):
                if isinstance(event, HeadersRequested):
                    self._send(Headers(self._node.chain.headers_after(event.locator, event.stop)))
                elif isinstance(event, DataRequested):
                    self._serve(event)
        except (LocalProtocolError, RemoteProtocolError):
            self._transport.close()
            return
        self._flush()

    def announce(self, block: MinedBlock) -> None:
        """Tell this peer of a new block in the way it asked for."""
        connection = self._connection
        if connection.phase is not Phase.READY:
            return
        if connection.peer_wants_compact_high_bandwidth:
            self._send(block.compact(secrets.randbits(64)))
        elif connection.peer_wants_headers:
            self._send(Headers(block.header.encode()))
        else:
            self._send(Inv(((MSG_BLOCK, block.hash),)))
        self._flush()

    def tick(self) -> None:
        """Pings and time-outs."""
        try:
            self._connection.on_timer(time.monotonic_ns())
        except RemoteProtocolError:
            self._transport.close()
            return
        self._flush()

    def _serve(self, request: DataRequested) -> None:
        missing = []
        for kind, block_hash in request.inventory:
            block = self._node.chain.blocks.get(block_hash) if kind in {MSG_BLOCK, MSG_WITNESS_BLOCK} else None
            if block is None:
                missing.append((kind, block_hash))
            else:
                self._send(Block(block.payload))
        if missing:
            self._send(NotFoundMessage(tuple(missing)))

    def _send(self, message: Any) -> None:
        self._connection.send(message)

    def _flush(self) -> None:
        data = self._connection.data_to_send()
        if data:
            self._transport.write(data)


class Node:
    """The node: its chain, its peers, and a listener."""

    def __init__(self) -> None:
        self.chain = RegtestChain()
        self.peers: set[_Peer] = set()
        self.nonce = secrets.randbits(64)
        self._server: asyncio.Server | None = None

    async def listen(self, host: str) -> int:
        """Accept peers; returns the port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Peer(self), host, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def mine(self, count: int = 1) -> list[bytes]:
        """Mine blocks and announce each; returns their hashes in wire order."""
        hashes = []
        for _ in range(count):
            (block,) = self.chain.extend(1, int(time.time()))
            hashes.append(block.hash)
            for peer in list(self.peers):
                peer.announce(block)
        return hashes

    def tick(self) -> None:
        """Once a second: the peers' timers."""
        for peer in list(self.peers):
            peer.tick()


def run_node(pipe: Pipe, initial_blocks: int, wire: Wire | None = None) -> None:
    """A node in a process of its own: sends its address, then answers each number n with the n hashes it mined.

    With a wire it sits in a network namespace behind that, and first sends word that it can be laid. Ends when the
    other end of the pipe is closed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the demo's first process
    host = "127.0.0.1"
    if wire is not None:
        enter_namespace()
        pipe.send(os.getpid())
        pipe.recv()
        connect_far_end(wire)
        host = wire.far_address
    asyncio.run(_run(pipe, initial_blocks, host))


async def _run(pipe: Pipe, initial_blocks: int, host: str) -> None:
    node = Node()
    node.mine(initial_blocks)
    pipe.send((host, await node.listen(host)))
    ended = asyncio.Event()

    def obey() -> None:
        try:
            pipe.send(node.mine(pipe.recv()))
        except (EOFError, OSError):
            ended.set()

    loop = asyncio.get_running_loop()
    loop.add_reader(pipe.fileno(), obey)
    while not ended.is_set():
        node.tick()
        try:
            await asyncio.wait_for(ended.wait(), TICK_S)
        except (asyncio.TimeoutError, TimeoutError):
            continue
    loop.remove_reader(pipe.fileno())
