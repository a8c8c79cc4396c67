"""Our own TCP stream in `bench fanout`: the real delivery over a real ring, in a process of its own."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from typing import TYPE_CHECKING

from sprint.bench.detect_wire import NEAR_ADDRESS
from sprint.bench.fanout_figures import Sent
from sprint.bench.fanout_receivers import Greeting
from sprint.deliveries.gate import OpenGate
from sprint.deliveries.stream import StreamDelivery
from sprint.frames import HEAD
from sprint.record import SEQUENCE_OFFSET, SIZE
from sprint.ring import Ring, RingWriter, size_for
from sprint.status import StatusBlock
from sprint.tiers import NS_PER_S, PROFILES, Tier

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PORT = 20_000
GREETING = Greeting(((b"{}\n", b"\n"),))
FRAME_SIZE = HEAD.size + SIZE
_TIER = Tier.ENTERPRISE


def be_stream_publisher(control: Connection, subscribers: int) -> None:
    """The process: serves the stream, and publishes what it is told to."""
    asyncio.run(_serve(control, subscribers))


async def _serve(control: Connection, subscribers: int) -> None:
    loop = asyncio.get_running_loop()
    slots = PROFILES[_TIER].ring_slots
    ring = Ring.create(bytearray(size_for(slots)), slots, session=secrets.randbits(64))
    writer = RingWriter(ring)
    delivery = StreamDelivery(
        ring,
        StatusBlock.create(ring.session, {}).delivery(0, "stream"),
        network="regtest",
        gate=OpenGate(lambda _: _TIER),
        write_deadline_ns={tier: PROFILES[tier].write_deadline_ns for tier in Tier},
        max_sessions=subscribers,
        heartbeat_ns=3_600 * NS_PER_S,  # a heartbeat in the middle of a round would be taken for its frame
    )
    delivery.start(loop, NEAR_ADDRESS, PORT)
    control.send(os.getpid())

    def obey() -> None:
        _, payload = control.recv()
        sequence = writer.next_sequence
        behind = SEQUENCE_OFFSET + 8
        record = payload[:SEQUENCE_OFFSET] + sequence.to_bytes(8, "little") + payload[behind:]
        writer.claim()[:] = record
        writer.commit(best=True)
        begun = time.monotonic_ns()
        delivery.publish()
        control.send(Sent(begun, time.monotonic_ns(), None, None, record))

    loop.add_reader(control.fileno(), obey)
    await asyncio.Event().wait()
