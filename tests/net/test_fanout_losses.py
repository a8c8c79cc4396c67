"""What a driver has no room for is sent again at once, to those whom it was for and nobody else."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections import Counter
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest

from tests.net.subscribers import SOURCE_PORT, Cable, Collector, addresses, join, until
from tests.net.tiny_bpf import EXIT, XDP, XDP_PASS, attach_xdp, load_program, mov
from xdp import fanout_run
from xdp.fanout_maps import Rank

if TYPE_CHECKING:
    from tests.net.netns import Namespace
    from xdp.fanout_run import FanoutRun
    from xdp.fanout_table import FanoutTable

PEOPLE, PUBLICATIONS = 4_000, 20
NATIVE = 4
_SENT_TO = struct.Struct("!26x8s2xH4x8s")
"""Of a frame: both addresses, the port, and the payload's beginning."""


def deliveries(collector: Collector, count: int) -> Counter[tuple[bytes, bytes]]:
    """To whom which payload came, how often; until there are so many, or no more."""
    found: Counter[tuple[bytes, bytes]] = Counter()

    def came() -> bool:
        for frame in collector.rest():
            if frame[12:14] == b"\x08\x00" and frame[23] == 17 and frame[34:36] == SOURCE_PORT.to_bytes(2, "big"):
                both, _, payload = _SENT_TO.unpack_from(frame)
                found[both[4:], payload] += 1
        return found.total() >= count

    until(f"{count} datagrams", came)
    return found


def payload(number: int) -> bytes:
    return number.to_bytes(8, "big") + bytes(184)


def test_a_far_end_that_takes_nothing_for_a_moment_gets_each_frame_once(
    table: FanoutTable, run: FanoutRun, cable: Cable, far: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    join(table, cable, 300, first=100)
    far.set_link("far", state="down")
    collectors: list[Collector] = []

    def mend(_pause_s: float) -> None:
        """In the place of the pause before frames are sent again."""
        if not collectors:
            far.set_link("far", state="up")
            collectors.append(Collector(cable.far))

    with monkeypatch.context() as patched:
        patched.setattr(fanout_run, "AGAIN_NS", 5_000_000_000)
        patched.setattr("xdp.fanout_run.time.sleep", mend)
        report = run.send(payload(1))
    with collectors[0] as collector:
        assert (report.attempted, report.transmitted, report.lost, report.error) == (300, 300, 0, 0)
        assert report.ended_ns > report.started_ns
        assert deliveries(collector, 300) == {(address, payload(1)[:8]): 1 for address, _ in addresses(300)}
        assert (run.sent, run.lost) == (300, 0)


def test_a_far_end_that_takes_nothing_at_all_is_given_up_soon_and_its_frames_counted(
    table: FanoutTable, run: FanoutRun, cable: Cable, far: Namespace
) -> None:
    join(table, cable, 300)
    far.set_link("far", state="down")
    report = run.send(payload(1))
    assert (report.attempted, report.transmitted, report.lost) == (300, 0, 300)


def test_behind_two_interfaces_nothing_is_sent_again_for_it_can_t_be_told_to_whom(
    table: FanoutTable, run: FanoutRun, cable: Cable, second: Cable, far: Namespace
) -> None:
    join(table, cable, 100)
    join(table, second, 100, network=89)
    far.set_link("far2", state="down")
    with Collector(cable.far) as collector:
        assert run.send(payload(1)).lost == 100
        assert deliveries(collector, 100) == {(address, payload(1)[:8]): 1 for address, _ in addresses(100)}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a second CPU, to poll the far end's queue")
def test_whatever_another_cpu_sends_by_the_same_link_each_subscriber_gets_each_record_once(
    table: FanoutTable, run: FanoutRun, cable: Cable, far: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the polling of the far end's queue with it, and where it is slow the queue overflows."""
    ours, theirs, *_ = sorted(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    over = threading.Event()

    def disturb() -> None:
        os.sched_setaffinity(0, {theirs})
        frame = cable.far.mac + cable.near.mac + b"\x88\xb5" + bytes(100)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind((cable.near.name, 0))
            while not over.is_set():
                with suppress(OSError):  # the queue is full
                    raw.send(frame)

    join(table, cable, PEOPLE)
    table.add(cable.hop(), bytes((10, 87, 0, 1)), 9, Rank.FIRST)
    monkeypatch.setattr(fanout_run, "AGAIN_NS", 5_000_000_000)
    came: Counter[tuple[bytes, bytes]] = Counter()
    with ExitStack() as stack:
        collector = stack.enter_context(Collector(cable.far))
        with far.entered():  # with a program there, whoever sends has the queue polled, as is usual for a NIC's
            program = stack.enter_context(load_program(XDP, mov(0, XDP_PASS), EXIT))
            stack.enter_context(attach_xdp(program, cable.far.index, NATIVE))
        disturber = threading.Thread(target=disturb)
        disturber.start()
        try:
            os.sched_setaffinity(0, {ours})
            for number in range(PUBLICATIONS):
                report = run.send(payload(number))
                assert (report.attempted, report.lost) == (PEOPLE + 1, 0)
                came += deliveries(collector, PEOPLE + 1)  # now: the disturber's frames fill the collector, too
        finally:
            over.set()
            disturber.join()
            os.sched_setaffinity(0, before)
        came += deliveries(collector, 0)
    assert set(came.values()) == {1}
    assert Counter(record for _, record in came) == {payload(number)[:8]: PEOPLE + 1 for number in range(PUBLICATIONS)}
