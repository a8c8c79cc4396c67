"""The fan-out when it is disturbed: signals, a second CPU, links that go down or away while it publishes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading

import pytest

from tests.net.netns import Namespace, veth_pair
from tests.net.slowness import SLOWNESS
from tests.net.subscribers import (
    SOURCE_PORT,
    US,
    Cable,
    Collector,
    addresses,
    expected,
    join,
    read,
    switch_gro,
    until,
)
from xdp.datagrams import NextHop
from xdp.fanout import Fanout, open_fanout
from xdp.fanout_maps import EGRESS, RUN_CPUS, Rank, Sender, Step
from xdp.fanout_run import SHORT_RUNS, FanoutRun
from xdp.fanout_table import FanoutTable, Pacing
from xdp.loader import TIMEOUT_S

RECORD = 192


# ── signals, pacing, two CPUs ──


def test_signals_in_the_middle_neither_lose_nor_double_a_frame(
    table: FanoutTable, run: FanoutRun, cable: Cable
) -> None:
    count, heard = 10_000, 0
    join(table, cable, count)

    def hear(_number: int, _frame: object) -> None:
        nonlocal heard
        heard += 1

    before = signal.signal(signal.SIGALRM, hear)
    try:
        with Collector(cable.far) as collector:
            for _ in range(3):
                signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
                payload = os.urandom(RECORD)
                report = run.send(payload)
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert (report.transmitted, report.lost, report.error) == (count, 0, 0)
                due = [expected(cable, payload, *who) for who in addresses(count)]
                assert [read(frame) for frame in collector.frames(count)] == due
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert heard > 3


def test_two_cpus_send_each_frame_once_and_the_first_rank_first(
    fanout: Fanout, table: FanoutTable, launch: Namespace, far: Namespace
) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < RUN_CPUS:
        pytest.skip("one CPU only")
    pair = Cable(*veth_pair(launch, far, ("wide", "broad"), queues=2))
    switch_gro(pair.far, on=True)
    count, first = 4001, 401
    try:
        join(table, pair, count, first=first)
        with FanoutRun(fanout.handover(), Sender.OTHER, cpus=(cpus[-1],)) as run, Collector(pair.far) as collector:
            for _ in range(10):
                payload = os.urandom(RECORD)
                report = run.send(payload)
                assert (report.transmitted, report.lost, report.error) == (count, 0, 0)
                found = [read(frame) for frame in collector.frames(count)]
                due = [expected(pair, payload, *who) for who in addresses(count)]
                assert sorted(found) == sorted(due)
                # Each CPU keeps the order in its own half.
                place = {datagram.destination: at for at, datagram in enumerate(due)}
                for half in (0, 1):
                    mine = [at for datagram in found if (at := place[datagram.destination]) % 2 == half]
                    assert mine == sorted(mine)
            table.narrow(True)
            assert run.send(payload).transmitted == count
            assert [read(frame) for frame in collector.frames(count)] == due  # one CPU alone
    finally:
        table.narrow(False)
        launch.delete_link("wide")


def test_a_paced_publication_takes_its_time_and_sends_all(table: FanoutTable, run: FanoutRun, cable: Cable) -> None:
    join(table, cable, 1000, first=10)
    table.pace(Pacing(gap_ns=20_000, burst=64))
    try:
        with Collector(cable.far) as collector:
            report = run.send(os.urandom(RECORD))
            assert (report.transmitted, report.lost) == (1000, 0)
            assert len(collector.frames(1000)) == 1000
        assert report.ended_ns - report.started_ns >= (1000 - 64) * 20_000
    finally:
        table.pace(None)


# ── what goes wrong ──


def test_what_a_killed_sender_held_its_successor_lets_go_of(fanout: Fanout, table: FanoutTable) -> None:
    child = os.fork()
    if child == 0:
        run = FanoutRun(fanout.handover(), Sender.RELAY)
        run._pin(run._lanes[0])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    pinned = EGRESS.layouts["run"].offset("pinned") // 8
    assert table._runs.longs[pinned] == table._version
    assert table.step(Sender.RELAY) is Step.LIVE_FRAMES
    with FanoutRun(fanout.handover(), Sender.RELAY):
        assert table._runs.longs[pinned] == 0
    assert table.step(Sender.RELAY) is None


def test_an_interface_whose_peer_takes_nothing_is_found_out_and_the_sender_steps_down(
    table: FanoutTable, run: FanoutRun, cable: Cable
) -> None:
    with table.probe(cable.near.index, cable.near.mac) as entry:
        assert run.prove(entry) is None
    switch_gro(cable.far, on=False)
    with table.probe(cable.near.index, cable.near.mac) as entry:
        assert "took no live frame" in (run.prove(entry) or "")
    join(table, cable, 100)
    with Collector(cable.far) as collector:
        for _ in range(SHORT_RUNS):
            assert run.step is Step.LIVE_FRAMES
            report = run.send(bytes(RECORD))
            assert (report.transmitted, report.lost) == (0, 100)
        assert run.step is Step.AF_XDP
        assert run.reason == "3 times on end: drivers took 0 of 100 live frames"
        assert table.step(Sender.RELAY) is Step.AF_XDP
        assert run.send(bytes(RECORD)).attempted == 0
        assert collector.rest() == []
        switch_gro(cable.far, on=True)
        run.restore()
        assert run.send(bytes(RECORD)).transmitted == 100
        assert table.step(Sender.RELAY) is Step.LIVE_FRAMES
        assert len(collector.frames(100)) == 100


def test_an_interface_that_goes_down_in_the_middle_loses_only_what_is_counted(
    table: FanoutTable, run: FanoutRun, cable: Cable, second: Cable
) -> None:
    count = 2000
    join(table, cable, count, network=88)
    join(table, second, count, network=89)
    down, stop = threading.Event(), threading.Event()
    with Collector(cable.far) as here, Collector(second.far) as there:
        reports = []

        def publish() -> None:
            while not stop.is_set():
                run.restore()
                reports.append(run.send(bytes(RECORD)))
                if reports[-1].lost:
                    down.set()

        worker = threading.Thread(target=publish)
        worker.start()
        try:
            until("a first publication", lambda: reports)
            second.near.namespace.set_link(second.near.name, state="down")
            assert down.wait(5)
        finally:
            stop.set()
            worker.join()
        assert all(report.transmitted + report.lost == 2 * count for report in reports)
        assert {report.error for report in reports} == {0}
        arrived = len(here.rest()) + len(there.rest())
        assert arrived <= sum(report.transmitted for report in reports)
        assert run.send(bytes(RECORD)).transmitted == count  # those behind the other are served
        assert len(here.frames(count)) == count


def test_a_device_deleted_in_the_middle_loses_only_what_is_behind_it(
    table: FanoutTable, run: FanoutRun, cable: Cable, launch: Namespace, far: Namespace
) -> None:
    doomed = Cable(*veth_pair(launch, far, ("doomed", "grave")))
    switch_gro(doomed.far, on=True)
    count = 2000
    join(table, cable, count)
    people = list(addresses(count, network=89))
    with table.batch():
        slots = [table.add(doomed.hop(), *who, Rank.FIRST) for who in people]
    stop, reports = threading.Event(), []

    def publish() -> None:
        while not stop.is_set():
            run.restore()
            reports.append(run.send(bytes(RECORD)))

    worker = threading.Thread(target=publish)
    worker.start()
    try:
        until("a first publication", lambda: reports)
        launch.delete_link("doomed")
        until("a publication without it", lambda: reports[-1].transmitted == count)
    finally:
        stop.set()
        worker.join()
    assert {report.error for report in reports} == {0}
    assert all(report.transmitted + report.lost == 2 * count for report in reports)
    with pytest.raises(ValueError, match=f"{count} subscribers are reached by it"):
        table.forget_interface(doomed.near.index)
    with table.batch():
        for slot in slots:
            table.remove(slot)
    table.forget_interface(doomed.near.index)
    run.restore()
    assert run.send(bytes(RECORD)).lost == 0


def test_a_run_without_its_context_says_so_and_steps_down_at_once(launch: Namespace, bpf_loadable: None) -> None:
    with open_fanout(TIMEOUT_S * SLOWNESS) as fanout, FanoutTable(fanout.handover(), SOURCE_PORT) as table:
        names = launch.names()
        with FanoutRun(fanout.handover(), Sender.RELAY) as run:
            table.add(NextHop(1, bytes(6), bytes(6), US), US, 9, Rank.FIRST)
            for index in fanout.handover().contexts[:1]:
                launch.delete_link(socket.if_indextoname(index))
            report = run.send(bytes(RECORD))
            assert report.error != 0
            assert report.lost == 1
            assert run.step is Step.AF_XDP
            assert "parked link is gone" in (run.reason or "")
    with contextlib.suppress(OSError):
        assert launch.names() < names
