"""StandardSprint's turns: what wakes it up, and that an exception in any of them ends the run with it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from sprint.bitcoin.networks import REGTEST
from sprint.chain import HeaderChain
from sprint.engines import turns
from sprint.events import PeerReady
from sprint.events import Source as Kind
from sprint.header_file import HeaderFile
from sprint.regtest import RegtestChain
from tests.unit.chains import WALL_S, sighting_of
from tests.unit.engines.standard_stage import FakeSource, SprintStage, mining_node

if TYPE_CHECKING:
    from pathlib import Path


# What goes wrong inside


def test_an_exception_in_a_turn_ends_the_run_with_it(tmp_path: Path) -> None:
    async def story() -> None:
        source = FakeSource()
        sprint = SprintStage(tmp_path, sources=[source])
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
        source = FakeSource()
        source.due = [time.monotonic_ns() + 30_000_000]
        sprint = SprintStage(tmp_path, sources=[source])
        task = asyncio.create_task(sprint.engine.run())
        await asyncio.sleep(0)
        source.fault = ZeroDivisionError("in a timer")
        with pytest.raises(ZeroDivisionError, match="in a timer"):
            await asyncio.wait_for(task, 10)

    asyncio.run(story())


def test_an_exception_in_a_delivery_ends_the_run_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with mining_node(3) as (node, address):
            sprint = SprintStage(tmp_path, address)

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
        source = FakeSource()
        source.account_fault = ZeroDivisionError("in account")
        sprint = SprintStage(tmp_path, sources=[source])
        with pytest.raises(ZeroDivisionError, match="in account"):
            await asyncio.wait_for(sprint.engine.run(), 10)

    asyncio.run(story())


# Turns


def test_a_source_is_polled_when_its_deadline_has_come_and_rests_in_between(tmp_path: Path) -> None:
    async def story() -> None:
        source = FakeSource()
        sprint = SprintStage(tmp_path, sources=[source])
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
        one, other = FakeSource(), FakeSource()
        sprint = SprintStage(tmp_path, sources=[one, other])
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
        sprint = SprintStage(tmp_path, sources=[FakeSource()])
        async with sprint.running():
            await asyncio.sleep(0)
            first = sprint.status.relay.heartbeat_ns
            while sprint.status.relay.heartbeat_ns == first:
                await asyncio.sleep(0.001)

    asyncio.run(story())
