"""The fan-out end to end: publications to thousands over veth pairs of the tests' own, every frame read."""

from __future__ import annotations

import os
import random
import signal
import struct
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.net.subscribers import (
    SOURCE_PORT,
    Cable,
    Collector,
    addresses,
    expected,
    join,
    read,
    scapy_agrees,
)
from tests.net.tiny_bpf import EXIT, XDP, XDP_DROP, Insn, attach_xdp, jump_if_above, load, load_program, mov, mov_reg
from xdp.fanout_maps import SUBSCRIBERS, Rank, Step
from xdp.fanout_run import CONSIDERATE_BURST
from xdp.fanout_table import FanoutTable

if TYPE_CHECKING:
    from xdp.fanout import Fanout
    from xdp.fanout_run import FanoutRun

RECORD = 192


# ── every frame ──


@pytest.mark.parametrize("ipv6", [False, True])
def test_each_of_ten_thousand_gets_one_right_frame_and_the_first_rank_before_the_second(
    table: FanoutTable, run: FanoutRun, cable: Cable, ipv6: bool
) -> None:
    count, first = 10_000, 1_000
    join(table, cable, count, first=first, ipv6=ipv6)
    with Collector(cable.far) as collector:
        for payload in (os.urandom(RECORD), os.urandom(RECORD)):
            report = run.send(payload)
            frames = collector.frames(count)
            assert (report.attempted, report.transmitted, report.lost, report.error) == (count, count, 0, 0)
            assert report.started_ns < report.first_frame_ns < report.first_rank_ended_ns < report.ended_ns
            due = [expected(cable, payload, *who) for who in addresses(count, ipv6=ipv6)]
            assert [read(frame) for frame in frames] == due  # in the order in which they joined
            for frame in random.sample(frames, 20):
                scapy_agrees(frame)
    assert (run.step, run.reason) == (Step.LIVE_FRAMES, None)


def test_both_families_and_both_interfaces_in_one_publication(
    table: FanoutTable, run: FanoutRun, cable: Cable, second: Cable
) -> None:
    count = 500
    join(table, cable, count, first=100)
    join(table, second, count, first=100, ipv6=True, network=89)
    join(table, cable, count, ipv6=True, network=90)
    payload = os.urandom(RECORD)
    with Collector(cable.far) as here, Collector(second.far) as there:
        report = run.send(payload)
        assert (report.transmitted, report.lost) == (3 * count, 0)
        due = [expected(cable, payload, *who) for who in addresses(count)]
        due += [expected(cable, payload, *who) for who in addresses(count, ipv6=True, network=90)]
        assert [read(frame) for frame in here.frames(2 * count)] == due
        due = [expected(second, payload, *who) for who in addresses(count, ipv6=True, network=89)]
        assert [read(frame) for frame in there.frames(count)] == due


@pytest.mark.parametrize("length", [1, 7, 24, 31, 191, 256])
def test_payloads_of_any_length_odd_ones_too(table: FanoutTable, run: FanoutRun, cable: Cable, length: int) -> None:
    join(table, cable, 3)
    join(table, cable, 3, ipv6=True)
    payload = os.urandom(length)
    with Collector(cable.far) as collector:
        assert run.send(payload).lost == 0
        due = [expected(cable, payload, *who) for ipv6 in (False, True) for who in addresses(3, ipv6=ipv6)]
        assert [read(frame) for frame in collector.frames(6)] == due


def test_a_checksum_that_comes_out_as_zero_is_sent_as_all_ones(
    table: FanoutTable, run: FanoutRun, cable: Cable
) -> None:
    join(table, cable, 1)
    ((address, port),) = addresses(1)
    with Collector(cable.far) as collector:
        zero = bytes(RECORD)
        run.send(zero)
        (frame,) = collector.frames(1)
        (check,) = struct.unpack_from("!H", frame, 40)
        payload = struct.pack("!H", check) + zero[2:]  # what fills the sum up
        run.send(payload)
        (frame,) = collector.frames(1)
        assert frame[40:42] == b"\xff\xff"
        assert read(frame) == expected(cable, payload, address, port)


@pytest.mark.parametrize("payload", [b"", bytes(257)])
def test_a_payload_of_another_size_is_refused(run: FanoutRun, payload: bytes) -> None:
    with pytest.raises(ValueError, match="1 to 256 are expected"):
        run.send(payload)


def test_a_run_that_is_told_to_stop_reaches_the_first_ones_and_loses_nobody(
    table: FanoutTable, run: FanoutRun, cable: Cable
) -> None:
    count = 3 * CONSIDERATE_BURST
    join(table, cable, count)
    asked: list[bool] = []

    def go_on() -> bool:
        asked.append(True)
        return len(asked) < 2

    with Collector(cable.far) as collector:
        report = run.send(bytes(28), go_on=go_on)
        due = list(addresses(count))[: 2 * CONSIDERATE_BURST]
        assert [(d.destination, d.port) for d in map(read, collector.frames(len(due)))] == due
        assert (report.attempted, report.transmitted, report.lost) == (len(due), len(due), 0)
        assert run.send(bytes(28), go_on=lambda: True).transmitted == count
        assert len(collector.frames(count)) == count


def test_a_rehearsal_sends_nothing_and_changes_nothing(table: FanoutTable, run: FanoutRun, cable: Cable) -> None:
    join(table, cable, 3)
    payload = os.urandom(RECORD)
    with Collector(cable.far) as collector:
        for _ in range(3):
            run.rehearse()
            assert run.send(payload).transmitted == 3
        assert [read(frame).payload for frame in collector.frames(9)] == [payload] * 9
    assert (run.sent, run.lost, run.step) == (9, 0, Step.LIVE_FRAMES)


def test_nobody_there_costs_no_call_and_is_no_loss(table: FanoutTable, run: FanoutRun) -> None:
    report = run.send(bytes(RECORD))
    assert (report.attempted, report.lost, report.error) == (0, 0, 0)


def scribble() -> list[Insn]:
    """XDP: overwrites the first 232 bytes of each frame, headers and payload, and drops it."""
    store = [Insn(0x7A, 2, 0, at, 0x5A5A5A5A) for at in range(0, 232, 8)]
    start = [load(4, 2, 1, 0), load(4, 3, 1, 4), mov_reg(4, 2), Insn(0x07, 4, 0, 0, 232)]
    return [*start, jump_if_above(4, 3, len(store)), *store, mov(0, XDP_DROP), EXIT]


def test_memory_that_a_far_end_has_scribbled_over_does_no_harm(
    table: FanoutTable, run: FanoutRun, cable: Cable, second: Cable
) -> None:
    count = 2000
    slots = []
    with table.batch():
        for number, (address, port) in enumerate(addresses(count)):
            slots.append(table.add((second if number % 2 else cable).hop(), address, port, Rank.SECOND))
    with (
        second.far.namespace.entered(),
        load_program(XDP, *scribble()) as program,
        attach_xdp(program, second.far.index),
        Collector(cable.far) as collector,
    ):
        payload = os.urandom(RECORD)
        report = run.send(payload)
        due = [expected(cable, payload, *who) for who in list(addresses(count))[::2]]
        assert [read(frame) for frame in collector.frames(count // 2)] == due
        assert report.transmitted == count


# ── the table ──


def test_who_leaves_gets_nothing_more_and_who_moves_gets_it_the_new_way(
    table: FanoutTable, run: FanoutRun, cable: Cable, second: Cable
) -> None:
    people = list(addresses(5))
    slots = [table.add(cable.hop(), *who, Rank.SECOND) for who in people]
    table.remove(slots[1])
    table.update(slots[2], second.hop())
    moved = cable.hop()._replace(destination_mac=bytes.fromhex("02aabbccddee"))
    table.update(slots[3], moved)
    payload = os.urandom(RECORD)
    with Collector(cable.far) as here, Collector(second.far) as there:
        assert run.send(payload).transmitted == 4
        frames = [read(frame) for frame in here.frames(3)]
        assert frames[0] == expected(cable, payload, *people[0])
        assert frames[1] == expected(cable, payload, *people[4])  # took the place of the one that left
        assert frames[2] == expected(cable, payload, *people[3])._replace(destination_mac=moved.destination_mac)
        assert [read(frame) for frame in there.frames(1)] == [expected(second, payload, *people[2])]
    assert len(table) == 4
    assert table.next_hop(slots[3]) == moved
    with pytest.raises(KeyError):
        table.remove(slots[1])


def test_a_new_owner_of_the_table_starts_with_nobody(fanout: Fanout, run: FanoutRun, cable: Cable) -> None:
    with FanoutTable(fanout.handover(), SOURCE_PORT) as before:
        join(before, cable, 10)
    with FanoutTable(fanout.handover(), SOURCE_PORT) as table, Collector(cable.far) as collector:
        assert run.send(bytes(RECORD)).attempted == 0
        join(table, cable, 1)
        assert run.send(bytes(RECORD)).transmitted == 1
        assert len(collector.frames(1)) == 1


def test_joins_and_leaves_during_publications_harm_nobody(
    table: FanoutTable, run: FanoutRun, cable: Cable, second: Cable
) -> None:
    """Those who stay get each publication once; whoever gets one has his own port and way, never half of another's."""
    stay, churn = 2000, 200
    people = {address: (port, cable) for address, port in addresses(stay)}
    others = {
        address: (port, second if number % 2 else cable)
        for number, (address, port) in enumerate(addresses(churn, network=89))
    }
    join(table, cable, stay, first=100)
    reading, writing = os.pipe()
    worker = os.fork()  # the table's owner is another process in the product, too
    if worker == 0:
        os.write(writing, struct.pack("=I", turn_over(table, others)))
        os._exit(0)
    os.close(writing)
    try:
        with Collector(cable.far) as here, Collector(second.far) as beside:
            for _ in range(5):
                payloads = [os.urandom(RECORD) for _ in range(6)]
                reports = [run.send(payload) for payload in payloads]
                assert {(report.lost, report.error) for report in reports} == {(0, 0)}
                seen: dict[bytes, Counter[bytes]] = {payload: Counter() for payload in payloads}
                for way, collector in ((cable, here), (second, beside)):
                    for datagram in map(read, collector.rest()):
                        port, its_way = (people | others)[datagram.destination]
                        assert its_way is way
                        assert datagram == expected(way, datagram.payload, datagram.destination, port)
                        seen[datagram.payload][datagram.destination] += 1
                for payload, report in zip(payloads, reports, strict=True):
                    assert set(seen[payload].values()) == {1}
                    assert people.keys() <= seen[payload].keys()
                    assert seen[payload].total() == report.transmitted
    finally:
        os.kill(worker, signal.SIGTERM)
        os.waitpid(worker, 0)
        with os.fdopen(reading, "rb") as pipe:
            told = pipe.read()
    (changes,) = struct.unpack("=I", told)
    assert changes > 100  # a thousand a second are tried


def turn_over(table: FanoutTable, others: dict[bytes, tuple[int, Cable]]) -> int:
    """A thousand joins and leaves a second until SIGTERM: how many they were."""
    stopping = False

    def stop(_number: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    there: dict[bytes, int] = {}
    changes, due = 0, time.monotonic()
    while not stopping:
        address, (port, way) = random.choice(list(others.items()))
        if address in there:
            table.remove(there.pop(address))
        else:
            there[address] = table.add(way.hop(), address, port, random.choice(list(Rank)))
        changes += 1
        due += 0.001
        time.sleep(max(0.0, due - time.monotonic()))
    return changes


def test_an_order_that_a_run_holds_is_not_written_nor_are_its_entries(
    fanout: Fanout, table: FanoutTable, run: FanoutRun, cable: Cable
) -> None:
    slots = [table.add(cable.hop(), *who, Rank.SECOND) for who in addresses(8)]
    lane = run._lanes[0]
    run._pin(lane)
    version = table._version
    try:
        place = version % 8 * SUBSCRIBERS
        before = bytes(table._orders.bytes[place * 4 : (place + 8) * 4])
        entries = [bytes(table._entries.bytes[n * 64 : n * 64 + 64]) for n in struct.unpack("=8I", before)]
        for _ in range(50):
            for slot, who in zip(slots[:4], addresses(4, network=90), strict=True):
                table.remove(slot)
                slots[slots.index(slot)] = table.add(cable.hop(), *who, Rank.FIRST)
        assert bytes(table._orders.bytes[place * 4 : (place + 8) * 4]) == before
        now = [bytes(table._entries.bytes[n * 64 : n * 64 + 64]) for n in struct.unpack("=8I", before)]
        assert [entry[4:] for entry in now] == [entry[4:] for entry in entries]
        assert [entry[0] for entry in now] == [0] * 4 + [1] * 4
    finally:
        lane.unpin()
