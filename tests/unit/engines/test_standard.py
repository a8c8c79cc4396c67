"""StandardSprint with a real source, a node in the same loop, a real ring and a delivery that notes what it reads."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import pytest

from sprint.bitcoin.networks import REGTEST
from sprint.chain import HeaderChain
from sprint.engines import turns
from sprint.errors import HostError
from sprint.events import Event, State
from sprint.header_file import HeaderFile
from tests.descriptors import open_descriptors
from tests.unit.engines.standard_stage import SprintStage, hang_up, mining_node, saved_tip

if TYPE_CHECKING:
    from pathlib import Path

LABEL = "Turbo relay successful"
PROVEN, VALIDATED = Event.PROVEN, Event.VALIDATED


def test_what_a_node_mines_goes_out_in_order_and_into_the_header_file(tmp_path: Path) -> None:
    async def story() -> None:
        async with mining_node(20) as (node, address):
            sprint = SprintStage(tmp_path, address)
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
    assert saved_tip(tmp_path) != REGTEST.genesis_hash


def test_a_restart_continues_from_the_file_and_tells_nothing_of_old_blocks(tmp_path: Path) -> None:
    async def story() -> None:
        async with mining_node(30) as (node, address):
            first = SprintStage(tmp_path, address)
            async with first.running():
                await first.caught_up()
            node.mine(3)
            second = SprintStage(tmp_path, address)
            assert second.loaded == 30
            async with second.running():
                await second.caught_up()
                assert second.chain.tip_height == 33
                (mined,) = node.mine()
                await second.until(lambda: len(second.notes.records) == 2)
            assert second.notes.told() == [(PROVEN, mined), (VALIDATED, mined)]
            third = SprintStage(tmp_path, address)
            assert third.loaded == 34
            third.file.close()
            for source in third.sources:
                source.close()

    asyncio.run(story())


def test_blocks_mined_while_the_connection_was_lost_carry_catchup(tmp_path: Path) -> None:
    async def story() -> None:
        async with mining_node(5) as (node, address):
            sprint = SprintStage(tmp_path, address)
            async with sprint.running():
                await sprint.caught_up()
                await hang_up(node)
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
        before = len(open_descriptors())
        async with mining_node(4) as (node, address):
            sprint = SprintStage(tmp_path, address)
            task = asyncio.create_task(sprint.engine.run())
            await sprint.caught_up()
            os.kill(os.getpid(), number)
            await asyncio.wait_for(task, 10)
            while node.peers:  # the node hears of it
                await asyncio.sleep(0)
        assert len(open_descriptors()) <= before

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    asyncio.run(story())
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert saved_tip(tmp_path) != REGTEST.genesis_hash


def test_a_full_disk_delays_the_header_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "SAVE_RETRY_NS", 0)

    async def story() -> None:
        async with mining_node(3) as (node, address):
            sprint = SprintStage(tmp_path, address)
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
        async with mining_node(3) as (_, address):
            sprint = SprintStage(tmp_path, address)
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
    assert saved_tip(tmp_path) != REGTEST.genesis_hash
