"""Subscribers that stall, die or are lapped: what each loses, how it is told and counted, and that nobody else does."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc

import pytest

from sprint.frames import Heartbeat
from sprint.record import Record
from sprint.tiers import Tier
from tests.unit.deliveries.stream_stage import MS, TINY, Client, run, serving, until


@pytest.mark.parametrize("tier", Tier)
def test_a_subscriber_that_doesn_t_read_loses_what_its_policy_says_and_reads_no_torn_frame(tier: Tier) -> None:
    async def test() -> None:
        deadlines = dict.fromkeys(Tier, 2 * MS)
        async with serving(slots=512, send_buffer=TINY, write_deadline_ns=deadlines) as server:
            healthy = await server.join(key=tier.label)
            stalled = await server.join(key=tier.label, receive_buffer=TINY)
            count = 0
            lost = "dropped" if tier < Tier.TURBO else "overwritten"
            while server.ended(tier)[lost] < 20:
                server.publish()
                count += 1
                assert await healthy.told(count) == [count]
                await asyncio.sleep(0.0005)
            assert server.accounts.tiers[tier].buffer_used_max > 0
            told = await stalled.told(count)
            expected = 1
            for item in told:
                first, number = item if isinstance(item, tuple) else (item, 1)
                assert first == expected
                expected += number
            assert expected == count + 1
            ended = server.ended(tier)
            missing = sum(item[1] for item in told if isinstance(item, tuple))
            assert ended[lost] == missing
            assert ended["on_time"] + ended["late"] == 2 * count - missing
            assert server.accounts.tiers[tier].lost_notices == sum(isinstance(item, tuple) for item in told)
            if tier >= Tier.TURBO:
                assert told[-1] == count

    run(test())


def test_a_subscriber_that_never_reads_is_closed_after_the_stall_timeout_and_counted() -> None:
    async def test() -> None:
        async with serving(slots=512, send_buffer=TINY, heartbeat_ns=20 * MS, stall_timeout_ns=200 * MS) as server:
            stalled = await server.join(receive_buffer=TINY)
            healthy = await server.join()
            while not server.accounts.tiers[Tier.FREE].buffer_used:
                server.publish()
            await until(lambda: server.delivery.stalled_closed)
            assert server.accounts.disconnected == 1
            await healthy.told(server.ring.tail)
            assert sum(server.ended().values()) == 2 * server.ring.tail
            await stalled.closed()

    run(test())


def test_a_subscriber_that_died_ends_alone_and_every_delivery_is_counted() -> None:
    async def test() -> None:
        async with serving() as server:
            clients = [await server.join() for _ in range(3)]
            clients[1].reset()
            server.publish()
            for client in (clients[0], clients[2]):
                assert await client.told(1) == [1]
            await until(lambda: server.accounts.disconnected == 1)
            assert sum(server.ended().values()) == 3
            assert server.ended()["dropped"] == 1

    run(test())


def test_a_ring_that_was_overwritten_before_publish_ran_is_told_as_lost() -> None:
    async def test() -> None:
        async with serving(slots=4) as server:
            client, top = await server.join(), await server.join(key="enterprise")
            for _ in range(10):
                server.put()
            server.delivery.publish()
            assert await client.told(10) == [(1, 6), 7, 8, 9, 10]
            assert await top.told(10) == [(1, 9), 10]
            server.publish()
            assert await client.told(11) == [11]
            assert await top.told(11) == [11]

    run(test())


class Tally:
    """Counts what many clients have received, and wakes whoever waits for a total."""

    def __init__(self) -> None:
        self.total = 0
        self._wanted = 0
        self._reached = asyncio.Event()

    def add(self) -> None:
        self.total += 1
        if self.total == self._wanted:
            self._reached.set()

    async def reaches(self, total: int) -> None:
        self._wanted = total
        self._reached.clear()
        if self.total < total:
            await self._reached.wait()


async def count_in_order(client: Client, newest: int, tally: Tally) -> None:
    """Each record must be the successor of the one before, until `newest`; none is kept."""
    expected = 1
    while expected <= newest:
        item = await client.item()
        if isinstance(item, Record):
            assert item.sequence == expected
            expected += 1
            tally.add()
        else:
            assert isinstance(item, Heartbeat)


def test_of_1000_subscribers_ten_stall_and_every_other_gets_every_block_in_order_in_flat_memory() -> None:
    blocks = 30

    async def test() -> None:
        async with serving(slots=64, send_buffer=TINY, write_deadline_ns=dict.fromkeys(Tier, MS)) as server:
            keys = [tier.label for tier in Tier]
            for number in range(10):
                await server.join(receive_buffer=TINY, key=keys[number % 5], format="json")  # larger frames
            healthy = [await server.join(key=keys[number % 5]) for number in range(990)]
            tally = Tally()
            counting = [asyncio.ensure_future(count_in_order(client, blocks, tally)) for client in healthy]
            held: list[int] = []
            tracemalloc.start()
            try:
                for block in range(1, blocks + 1):
                    server.publish()
                    await tally.reaches(990 * block)
                    if block % 10 == 0:
                        gc.collect()
                        held.append(tracemalloc.get_traced_memory()[0])
            finally:
                tracemalloc.stop()
            await asyncio.gather(*counting)
            ended = {tier: server.ended(tier) for tier in Tier}
            waiting = sum(subscriber.backlog for subscriber in server.delivery._rosters)
            assert sum(sum(ends.values()) for ends in ended.values()) + waiting == blocks * 1000
            lost = [ends["dropped"] + ends["overwritten"] for ends in ended.values()]
            assert min(lost) > blocks // 3  # two stalled in each tier, after a buffer full
            assert held[-1] - held[0] < 200_000  # 200 bytes a subscriber over 20 blocks

    run(test())
