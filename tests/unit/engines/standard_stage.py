"""What tests of StandardSprint share: the engine with all it needs, a node in the same loop, a source without peers.

A delivery that notes what it reads is the log too, so that a test can wait for either.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from sprint.addresses import Address
from sprint.bitcoin.networks import REGTEST
from sprint.broadcaster import Broadcaster
from sprint.chain import HeaderChain
from sprint.composition import log_relayed
from sprint.demo.node import Node
from sprint.engines.standard import StandardSprint
from sprint.engines.turns import Turns
from sprint.header_file import HeaderFile
from sprint.ledger import Ledger
from sprint.record import Record, decode
from sprint.relay import Relay
from sprint.ring import Ring, RingReader, RingWriter, size_for
from sprint.sources.p2p import P2PSource
from sprint.status import StatusBlock
from sprint.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from sprint.events import Event, Want
    from sprint.sources import Heard, Source


class Notes:
    """A delivery and a log in one: what came out, and an event for whoever waits for it."""

    def __init__(self, ring: Ring) -> None:
        self._reader = RingReader(ring)
        self.records: list[Record] = []
        self.reads: list[int] = []
        """How many records each call of publish() found."""
        self.lines: list[tuple[str, str, dict[str, Any]]] = []
        self.news = asyncio.Event()

    def publish(self) -> None:
        before = len(self.records)
        while (record := self._reader.read()) is not None:
            assert isinstance(record, bytes)
            self.records.append(decode(record))
        self.reads.append(len(self.records) - before)
        self.news.set()

    def info(self, line: str, **values: Any) -> None:
        self._note("info", line, values)

    def warning(self, line: str, **values: Any) -> None:
        self._note("warning", line, values)

    def error(self, line: str, **values: Any) -> None:
        self._note("error", line, values)

    def said(self, line: str) -> list[dict[str, Any]]:
        return [values for _, said, values in self.lines if said == line]

    def told(self) -> list[tuple[Event, bytes]]:
        return [(record.event, record.hash) for record in self.records]

    def _note(self, level: str, line: str, values: dict[str, Any]) -> None:
        self.lines.append((level, line, values))
        self.news.set()


class SprintStage:
    """All that an engine needs, and the engine."""

    def __init__(self, folder: Path, *upstreams: Address, sources: list[Source] | None = None) -> None:
        self.status = StatusBlock.create(7, {})
        self.chain = HeaderChain(REGTEST)
        self.file = HeaderFile.open(folder / "headers.dat", REGTEST)
        self.loaded = self.file.load_into(self.chain)
        ring = Ring.create(bytearray(size_for(64)), 64, 7)
        self.notes = Notes(ring)
        if sources is None:
            sources = [P2PSource(upstreams, REGTEST, lambda: self.chain.tip_height, self.status)]
        self.sources = sources
        self.relay = Relay(self.chain)
        self.engine = StandardSprint(
            Turns(
                relay=self.relay,
                broadcaster=Broadcaster(RingWriter(ring), REGTEST.magic, [self.notes], time.monotonic_ns),
                ring=ring,
                ledger=Ledger(self.status),
                header_file=self.file,
                sources=sources,
                log=self.notes,
                on_relayed=lambda record: log_relayed(self.notes, Tier.TURBO, record),
            )
        )

    async def until(self, condition: Callable[[], object]) -> None:
        """Each piece of news is looked at; at most ten seconds."""
        while not condition():
            await asyncio.wait_for(self.notes.news.wait(), 10)
            self.notes.news.clear()

    async def caught_up(self) -> None:
        await self.until(lambda: self.notes.said("Header chain caught up"))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        task = asyncio.get_running_loop().create_task(self.engine.run())
        task.add_done_callback(lambda _: self.notes.news.set())
        try:
            yield task
        finally:
            self.engine.stop()
            await asyncio.wait_for(task, 10)


@asynccontextmanager
async def mining_node(blocks: int = 0) -> AsyncIterator[tuple[Node, Address]]:
    node = Node()
    node.mine(blocks)
    port = await node.listen("127.0.0.1")
    try:
        yield node, Address("127.0.0.1", port)
    finally:
        assert node._server is not None
        node._server.close()
        await hang_up(node)


async def hang_up(node: Node) -> None:
    for peer in list(node.peers):
        peer._transport.abort()
    while node.peers:
        await asyncio.sleep(0)


def saved_tip(folder: Path) -> bytes:
    chain = HeaderChain(REGTEST)
    with HeaderFile.open(folder / "headers.dat", REGTEST) as file:
        file.load_into(chain)
    return chain.tip_hash


class FakeSource:
    """A source without peers: it says what a test gives it, and counts how often it is asked."""

    def __init__(self) -> None:
        self._ears, self._mouth = os.pipe()
        self.due: list[int] = []
        """Deadlines still to come, each met by the poll at or after it."""
        self.polls: list[int] = []
        self.words: list[Heard] = []
        self.wants: list[Want] = []
        self.closed = False
        self.fault: Exception | None = None
        self.account_fault: Exception | None = None

    def fileno(self) -> int:
        return self._ears

    def say(self, *words: Heard) -> None:
        self.words += words
        os.write(self._mouth, b"\0")

    def poll(self, now_ns: int) -> list[Heard]:
        self.polls.append(now_ns)
        if self.fault is not None:
            raise self.fault
        self.due = [due for due in self.due if due > now_ns]
        if self.words:
            os.read(self._ears, 64)
        words, self.words = self.words, []
        return words

    def deadline(self) -> int | None:
        return min(self.due, default=None)

    def want(self, want: Want, now_ns: int) -> None:
        self.wants.append(want)

    def account(self) -> None:
        if self.account_fault is not None:
            raise self.account_fault

    def close(self) -> None:
        if not self.closed:
            os.close(self._ears)
            os.close(self._mouth)
        self.closed = True
