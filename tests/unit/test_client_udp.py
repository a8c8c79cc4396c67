"""sprint.client by UDP, over real sockets: plain and for asyncio."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import aclosing, closing
from typing import TYPE_CHECKING

import pytest

from sprint import client
from sprint.client import Subscribed, SubscriptionRefusedError
from sprint.events import Lapped
from sprint.frames import UdpChange, UdpState
from sprint.record import Record
from sprint.tiers import NS_PER_S
from tests.unit.deliveries.udp_stage import Stage
from tests.unit.test_client import record

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sprint.frames import Item


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage(slots=8, heartbeat_ns=NS_PER_S // 10) as running:
        yield running


def await_active(stream: Iterator[Item | Subscribed]) -> None:
    while not (isinstance(item := next(stream), UdpChange) and item.state is UdpState.ACTIVE):
        pass


def next_record(stream: Iterator[Item | Subscribed]) -> Record:
    while not isinstance(item := next(stream), Record):
        pass
    return item


def test_connect_by_udp_replays_then_follows_and_fills_what_never_came(stage: Stage) -> None:
    stage.publish(3)
    with closing(client.events(stage.address, key="turbo", udp=True, since=1)) as stream:
        assert [next_record(stream).sequence for _ in range(3)] == [1, 2, 3]
        await_active(stream)
        stage.publish()
        assert next_record(stream).sequence == 4
        stage.publish(udp=False)  # the UDP side sends nothing; only heartbeats tell of it
        assert next_record(stream).sequence == 5
        assert stage.tier(0).repaired == 1
        assert stage.tier(1).on_time + stage.tier(1).late == 1


def test_what_the_ring_no_longer_holds_is_told_as_lost(stage: Stage) -> None:
    told: list[object] = []
    with closing(client.events(stage.address, key="turbo", udp=True)) as stream:
        await_active(stream)
        stage.publish(20, udp=False)
        while len(told) < 9:
            item = next(stream)
            if isinstance(item, Record | Lapped):
                told.append(item.sequence if isinstance(item, Record) else item)
    assert told == [Lapped(1, 12), *range(13, 21)]


def test_a_restarted_stream_is_joined_again_without_a_gap_or_a_double(stage: Stage) -> None:
    with closing(client.connect(stage.address, key="turbo", udp=True, since=1)) as stream:
        stage.publish()
        assert next(stream).sequence == 1
        stage.on_loop(stage.stream.close)
        port = int(stage.address.rpartition(":")[2])
        stage.on_loop(lambda: stage.start_stream(port))
        stage.publish(2)
        assert [next(stream).sequence for _ in range(2)] == [2, 3]


def test_a_forger_elsewhere_is_not_listened_to(stage: Stage) -> None:
    with closing(client.events(stage.address, key="turbo", udp=True)) as stream:
        await_active(stream)
        (target,) = [one.address for one in stage.on_loop(lambda: list(stage.udp._subscribers.values()))]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as forger:
            forger.sendto(record(1, height=666).encode(), target)
        stage.publish()
        assert next_record(stream).height == 0


def test_lower_tiers_are_refused(stage: Stage) -> None:
    with pytest.raises(SubscriptionRefusedError, match="tier business has none"):
        next(client.connect(stage.address, key="business", udp=True))


def test_connect_async_by_udp_is_the_same(stage: Stage) -> None:
    async def subscribe() -> list[int]:
        got = []
        async with aclosing(client.events_async(stage.address, key="turbo", udp=True, since=1)) as stream:
            async for item in stream:
                if isinstance(item, UdpChange) and item.state is UdpState.ACTIVE:
                    await asyncio.to_thread(stage.publish)
                if isinstance(item, Record):
                    got.append(item.sequence)
                    if item.sequence == 2:
                        await asyncio.to_thread(lambda: stage.publish(udp=False))
                    if item.sequence == 3:
                        break
        return got

    stage.publish()
    assert asyncio.run(asyncio.wait_for(subscribe(), 20)) == [1, 2, 3]
    assert stage.tier(0).repaired == 1


def test_without_udp_at_the_other_end_records_come_over_tcp(stage: Stage) -> None:
    """Nothing that is sent by UDP arrives: the challenge doesn't either."""
    stage.on_loop(stage.udp.close)
    with closing(client.connect(stage.address, key="turbo", udp=True, since=1)) as stream:
        stage.publish(udp=False)
        began = time.monotonic()
        assert next(stream).sequence == 1
        assert time.monotonic() - began < 20
    stage.on_loop(stage.start_udp)
