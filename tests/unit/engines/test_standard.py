"""StandardSprint with a real source, a node in the same loop, a real ring and a delivery that notes what it reads."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from sprint.addresses import Address
from sprint.bitcoin.networks import REGTEST
from sprint.broadcaster import Broadcaster
from sprint.chain import HeaderChain
from sprint.composition import log_relayed
from sprint.demo.node import Node
from sprint.engines import turns
from sprint.engines.standard import StandardSprint
from sprint.engines.turns import Turns
from sprint.errors import HostError
from sprint.events import Event, PeerReady, State, Want
from sprint.events import Source as Kind
from sprint.header_file import HeaderFile
from sprint.ledger import Ledger
from sprint.record import Record, decode
from sprint.regtest import RegtestChain
from sprint.relay import Relay
from sprint.ring import Ring, RingReader, RingWriter, size_for
from sprint.sources.p2p import P2PSource
from sprint.status import StatusBlock
from sprint.tiers import Tier
from tests.unit.chains import WALL_S, sighting_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from sprint.sources import Heard, Source

LABEL = "Turbo relay successful"
PROVEN, VALIDATED = Event.PROVEN, Event.VALIDATED


class _Notes:
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


class _Sprint:
    """All that an engine needs, and the engine."""

    def __init__(self, folder: Path, *upstreams: Address, sources: list[Source] | None = None) -> None:
        self.status = StatusBlock.create(7, {})
        self.chain = HeaderChain(REGTEST)
        self.file = HeaderFile.open(folder / "headers.dat", REGTEST)
        self.loaded = self.file.load_into(self.chain)
        ring = Ring.create(bytearray(size_for(64)), 64, 7)
        self.notes = _Notes(ring)
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
async def _node(blocks: int = 0) -> AsyncIterator[tuple[Node, Address]]:
    node = Node()
    node.mine(blocks)
    port = await node.listen("127.0.0.1")
    try:
        yield node, Address("127.0.0.1", port)
    finally:
        assert node._server is not None
        node._server.close()
        await _hang_up(node)


async def _hang_up(node: Node) -> None:
    for peer in list(node.peers):
        peer._transport.abort()
    while node.peers:
        await asyncio.sleep(0)


def _saved_tip(folder: Path) -> bytes:
    chain = HeaderChain(REGTEST)
    with HeaderFile.open(folder / "headers.dat", REGTEST) as file:
        file.load_into(chain)
    return chain.tip_hash


class _FakeSource:
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


def test_what_a_node_mines_goes_out_in_order_and_into_the_header_file(tmp_path: Path) -> None:
    async def story() -> None:
        async with _node(20) as (node, address):
            sprint = _Sprint(tmp_path, address)
            async with sprint.running():
                await sprint.caught_up()
                assert sprint.notes.records == []
                for number in range(1, 6):
                    (mined,) = node.mine()
                    await sprint.until(lambda n=number: len(sprint.notes.records) == 2 * n)  # type: ignore[misc]  # bound now
                    assert sprint.notes.told()[-2:] == [(PROVEN, mined), (VALIDATED, mined)]
            records = sprint.notes.records
            assert [record.sequence for record in records] == list(range(1, 11))
            assert [record.height for record in records[::2]] == [21, 22, 23, 24, 25]
            assert all(record.state & State.BEST and not record.state & State.CATCHUP for record in records)
            assert all(record.seen_ns <= record.published_ns for record in records)
            assert set(sprint.notes.reads) == {1}  # each record goes out before the next is written
            assert [line["height"] for line in sprint.notes.said(LABEL)] == [21, 22, 23, 24, 25]
            assert sprint.status.relay.proven == sprint.status.relay.validated == 5
            assert sprint.chain.tip_hash == node.chain.headers.tip_hash

    asyncio.run(story())
    assert _saved_tip(tmp_path) != REGTEST.genesis_hash


def test_a_restart_continues_from_the_file_and_tells_nothing_of_old_blocks(tmp_path: Path) -> None:
    async def story() -> None:
        async with _node(30) as (node, address):
            first = _Sprint(tmp_path, address)
            async with first.running():
                await first.caught_up()
            node.mine(3)
            second = _Sprint(tmp_path, address)
            assert second.loaded == 30
            async with second.running():
                await second.caught_up()
                assert second.chain.tip_height == 33
                (mined,) = node.mine()
                await second.until(lambda: len(second.notes.records) == 2)
            assert second.notes.told() == [(PROVEN, mined), (VALIDATED, mined)]
            third = _Sprint(tmp_path, address)
            assert third.loaded == 34
            third.file.close()
            for source in third.sources:
                source.close()

    asyncio.run(story())


def test_blocks_mined_while_the_connection_was_lost_carry_catchup(tmp_path: Path) -> None:
    async def story() -> None:
        async with _node(5) as (node, address):
            sprint = _Sprint(tmp_path, address)
            async with sprint.running():
                await sprint.caught_up()
                await _hang_up(node)
                missed = node.mine(2)
                await sprint.until(lambda: sprint.notes.said("Upstream lost"))
                await sprint.until(lambda: len(sprint.notes.records) == 4)
            told = sprint.notes.told()
            assert told[:2] == [(PROVEN, block_hash) for block_hash in missed]
            assert all(record.state & State.CATCHUP for record in sprint.notes.records)
            assert len(sprint.notes.said("Upstream connected")) == 2
            assert sprint.notes.said(LABEL) == []

    asyncio.run(story())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_good_order(tmp_path: Path, number: signal.Signals) -> None:
    async def story() -> None:
        before = len(os.listdir("/proc/self/fd"))
        async with _node(4) as (node, address):
            sprint = _Sprint(tmp_path, address)
            task = asyncio.create_task(sprint.engine.run())
            await sprint.caught_up()
            os.kill(os.getpid(), number)
            await asyncio.wait_for(task, 10)
            while node.peers:  # the node hears of it
                await asyncio.sleep(0)
        assert len(os.listdir("/proc/self/fd")) <= before

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    asyncio.run(story())
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert _saved_tip(tmp_path) != REGTEST.genesis_hash


def test_a_full_disk_delays_the_header_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "SAVE_RETRY_NS", 0)

    async def story() -> None:
        async with _node(3) as (node, address):
            sprint = _Sprint(tmp_path, address)
            append, full = sprint.file.append, True

            def refuse(headers: bytes) -> None:
                if full:
                    raise HostError("header file: No space left on device")
                append(headers)

            monkeypatch.setattr(sprint.file, "append", refuse)
            async with sprint.running():
                await sprint.caught_up()
                mined = node.mine(2)
                await sprint.until(lambda: len(sprint.notes.records) >= 4)
                waiting = [line["waiting"] for line in sprint.notes.said("Headers not saved")]
                assert waiting[0] == 3
                assert waiting[-1] == 5
                full = False
                mined += node.mine(1)
                await sprint.until(lambda: len(sprint.notes.records) >= 6)
            assert {block_hash for _, block_hash in sprint.notes.told()} == set(mined)

    asyncio.run(story())
    chain = HeaderChain(REGTEST)
    with HeaderFile.open(tmp_path / "headers.dat", REGTEST) as file:
        assert file.load_into(chain) == 6


def test_what_a_full_disk_refused_is_tried_once_more_at_the_end(tmp_path: Path) -> None:
    async def story() -> None:
        async with _node(3) as (_, address):
            sprint = _Sprint(tmp_path, address)
            append = sprint.file.append
            tries = 0

            def refuse_once(headers: bytes) -> None:
                nonlocal tries
                tries += 1
                if tries == 1:
                    raise HostError("header file: No space left on device")
                append(headers)

            sprint.file.append = refuse_once  # type: ignore[method-assign]  # a disk that is full for a moment
            async with sprint.running():
                await sprint.caught_up()
            assert tries == 2

    asyncio.run(story())
    assert _saved_tip(tmp_path) != REGTEST.genesis_hash


# What goes wrong inside


def test_an_exception_in_a_turn_ends_the_run_with_it(tmp_path: Path) -> None:
    async def story() -> None:
        source = _FakeSource()
        sprint = _Sprint(tmp_path, sources=[source])
        task = asyncio.create_task(sprint.engine.run())
        await asyncio.sleep(0)
        source.fault = ZeroDivisionError("in poll")
        source.say()
        with pytest.raises(ZeroDivisionError, match="in poll"):
            await asyncio.wait_for(task, 10)
        assert source.closed

    asyncio.run(story())


def test_an_exception_in_a_timers_turn_ends_the_run_with_it(tmp_path: Path) -> None:
    async def story() -> None:
        source = _FakeSource()
        source.due = [time.monotonic_ns() + 30_000_000]
        sprint = _Sprint(tmp_path, sources=[source])
        task = asyncio.create_task(sprint.engine.run())
        await asyncio.sleep(0)
        source.fault = ZeroDivisionError("in a timer")
        with pytest.raises(ZeroDivisionError, match="in a timer"):
            await asyncio.wait_for(task, 10)

    asyncio.run(story())


def test_an_exception_in_a_delivery_ends_the_run_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with _node(3) as (node, address):
            sprint = _Sprint(tmp_path, address)

            def fail() -> None:
                raise ZeroDivisionError("in publish")

            monkeypatch.setattr(sprint.notes, "publish", fail)
            task = asyncio.create_task(sprint.engine.run())
            await sprint.caught_up()
            node.mine()
            with pytest.raises(ZeroDivisionError, match="in publish"):
                await asyncio.wait_for(task, 10)

    asyncio.run(story())
    chain = HeaderChain(REGTEST)
    with HeaderFile.open(tmp_path / "headers.dat", REGTEST) as file:
        assert file.load_into(chain) == 4  # the header was accepted, and is saved


def test_an_exception_in_housekeeping_ends_the_run_with_it(tmp_path: Path) -> None:
    async def story() -> None:
        source = _FakeSource()
        source.account_fault = ZeroDivisionError("in account")
        sprint = _Sprint(tmp_path, sources=[source])
        with pytest.raises(ZeroDivisionError, match="in account"):
            await asyncio.wait_for(sprint.engine.run(), 10)

    asyncio.run(story())


# Turns


def test_a_source_is_polled_when_its_deadline_has_come_and_rests_in_between(tmp_path: Path) -> None:
    async def story() -> None:
        source = _FakeSource()
        sprint = _Sprint(tmp_path, sources=[source])
        start = time.monotonic_ns()
        source.due = [start + ms * 1_000_000 for ms in (20, 40, 60)]
        async with sprint.running():
            while source.due:
                await asyncio.sleep(0.005)
        late = [poll - start for poll in source.polls[1:]]
        assert 1 <= len(late) <= 20  # a busy machine may be late for one and meet two at once
        assert late[-1] >= 60_000_000

    asyncio.run(story())


def test_questions_go_to_every_source_and_timers_of_the_relay_run(tmp_path: Path) -> None:
    """What no upstream has connected is asked about five milliseconds later, with nothing else to wake the loop."""
    node = RegtestChain()

    async def story() -> None:
        one, other = _FakeSource(), _FakeSource()
        sprint = _Sprint(tmp_path, sources=[one, other])
        (block,) = node.extend(1, WALL_S)
        async with sprint.running():
            relay = sprint.relay
            relay.sync.caught_up = True
            one.say(PeerReady(Kind.P2P, "a", 1))
            while not one.wants:
                await asyncio.sleep(0.001)
            asked = len(one.wants)
            one.say(sighting_of(block, seen_ns=time.monotonic_ns()))
            await sprint.until(lambda: sprint.notes.records)
            relay.sync._peers["a"].asked_ns = None
            while len(one.wants) == asked:
                await asyncio.sleep(0.001)
            assert other.wants == one.wants

    asyncio.run(story())


def test_the_heartbeat_goes_on_while_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "HOUSEKEEPING_NS", 5_000_000)

    async def story() -> None:
        sprint = _Sprint(tmp_path, sources=[_FakeSource()])
        async with sprint.running():
            await asyncio.sleep(0)
            first = sprint.status.relay.heartbeat_ns
            while sprint.status.relay.heartbeat_ns == first:
                await asyncio.sleep(0.001)

    asyncio.run(story())
