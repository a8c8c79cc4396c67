"""Heartbeats to everybody at once: who gets them by which way, and that a record goes first."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from sprint.addresses import Address
from sprint.datagrams import Beat, from_server
from sprint.deliveries.udp_beats import Beats
from sprint.deliveries.udp_sender import BATCH, Batches, Target
from sprint.ring import Ring, RingWriter, size_for
from sprint.tiers import NS_PER_MS
from tests.unit.test_client import SESSION, record

if TYPE_CHECKING:
    from collections.abc import Callable

PERIOD_NS = 20 * NS_PER_MS
PATIENCE_S = 10.0


class Desk:
    """Two who are served by frames, as many by a socket, and what is sent to them."""

    def __init__(self, stack: ExitStack, by_frames: Callable[[bytes, Callable[[], bool]], int | None]) -> None:
        def sock() -> socket.socket:
            made = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            made.bind(("127.0.0.1", 0))
            made.setblocking(False)
            return made

        self.ring = Ring.create(bytearray(size_for(8)), 8, SESSION)
        sender = sock()
        self.framed, self.others = (Batches(sender, time.monotonic_ns) for _ in range(2))
        self.sockets = {batches: [sock() for _ in range(2)] for batches in (self.framed, self.others)}
        for batches, theirs in self.sockets.items():
            for one in theirs:
                batches.add(Target(Address(*one.getsockname())))
        self.sent = 0
        self.beats = Beats(
            asyncio.get_running_loop(),
            PERIOD_NS,
            self.ring,
            by_frames=by_frames,
            framed=self.framed,
            others=[self.others],
            sent=self._count,
        )
        stack.callback(self.beats.close)

    def _count(self, count: int, size: int) -> None:
        assert size == 28
        self.sent += count

    async def sent_at_least(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.sent < count:
            assert time.monotonic() < deadline, f"{self.sent} of {count} heartbeats"
            await asyncio.sleep(PERIOD_NS / 1e9)

    def came(self, batches: Batches) -> list[Beat]:
        """The first datagram of each who has one."""
        found = []
        for one in self.sockets[batches]:
            try:
                said = from_server(one.recv(2048))
            except BlockingIOError:
                continue
            assert isinstance(said, Beat)
            found.append(said)
        return found


def test_whom_frames_reach_gets_none_by_the_socket_and_everybody_else_does() -> None:
    async def scene() -> None:
        with ExitStack() as stack:
            desk = Desk(stack, lambda _beat, _go_on: 3)
            await desk.sent_at_least(3 + 2)
            assert [(beat.session, beat.sequence) for beat in desk.came(desk.others)] == [(SESSION, 0)] * 2
            assert desk.came(desk.framed) == []

    asyncio.run(scene())


def test_where_frames_don_t_lead_any_more_the_socket_sends_to_all() -> None:
    async def scene() -> None:
        with ExitStack() as stack:
            desk = Desk(stack, lambda _beat, _go_on: None)
            await desk.sent_at_least(4)
            assert len(desk.came(desk.others)) == len(desk.came(desk.framed)) == 2

    asyncio.run(scene())


def test_a_run_is_told_to_stop_when_a_record_is_published_and_the_next_heartbeat_tells_of_it() -> None:
    async def scene() -> None:
        with ExitStack() as stack:
            answers: list[bool] = []

            def by_frames(_beat: bytes, go_on: Callable[[], bool]) -> int:
                answers.append(go_on())
                if len(answers) == 1:
                    writer = RingWriter(desk.ring)
                    writer.claim()[:] = record(writer.next_sequence).encode()
                    writer.commit(best=True)
                    answers.append(go_on())
                return 0

            desk = Desk(stack, by_frames)
            await desk.sent_at_least(4)
            assert answers[:3] == [True, False, True]
            assert [beat.sequence for beat in desk.came(desk.others) + desk.came(desk.others)] == [0, 0, 1, 1]

    asyncio.run(scene())


def test_between_two_batches_others_have_their_turn_and_may_leave() -> None:
    async def scene() -> None:
        with ExitStack() as stack:
            desk = Desk(stack, lambda _beat, _go_on: 0)
            place = Address(*desk.sockets[desk.others][0].getsockname())
            many = [Target(place) for _ in range(3 * BATCH)]
            for one in many:
                desk.others.add(one)
            parts = desk.others.parts(b"x")
            first = next(parts)
            assert first.sent + first.failed == BATCH
            for one in many:
                desk.others.remove(one)
            assert list(parts) == []

    asyncio.run(scene())
