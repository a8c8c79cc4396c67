"""What it takes to tell 1, 100, 1,000 and 10,000 TCP subscribers of one record, beside nothing but send() in a loop.

The sending process holds the real StreamDelivery on an event loop; the subscribers connect over loopback from two
processes that do nothing but read and stamp. A publication goes out by publish(); beside it, in the same process, over
the very same sockets, a bare loop sends a frame of the same length. The two take turns, and take turns at being first.
The ratio is the median of publications' times to the bare rounds' beside them.

Times begin where publish() is called, or the bare loop begun. "Sent" is when the last send() has returned.
"""

from __future__ import annotations

import asyncio
import os
import resource
import secrets
import statistics
import time
from array import array
from dataclasses import dataclass, field
from operator import truediv
from typing import TYPE_CHECKING, Any

from sprint.bench.apart import Helper, be_apart, run_apart
from sprint.bench.percentiles import median, percentile
from sprint.bench.receivers import Receiver
from sprint.deliveries.gate import OpenGate
from sprint.deliveries.stream import StreamDelivery
from sprint.errors import HostError
from sprint.events import Event, Source, State
from sprint.frames import Format, record_frame
from sprint.record import Record
from sprint.ring import Ring, RingWriter, size_for
from sprint.status import StatusBlock
from sprint.tiers import NS_PER_MS, NS_PER_S, PROFILES, Tier

if TYPE_CHECKING:
    from collections.abc import Callable

    from sprint.bench.apart import Progress

SIZES = (1, 100, 1_000, 10_000)
TIER = Tier.ENTERPRISE
"""Of every subscriber: the tier decides the order and what happens to a slow one, not what a send costs."""
WARM_UP = 3
"""Pairs of rounds that aren't counted."""
SETTLE_S = 0.02
"""Between two rounds, so that acknowledgements of the last one don't fall into the next."""
SPARE_DESCRIPTORS = 64
_ROUNDS = ((10, 200), (500, 100), (5_000, 100))
_ROUNDS_OF_MANY = 60
_BARE = 1 << 63
"""Sequences of the bare loop's frames begin here: no ring will ever get so far."""
_HOST = "127.0.0.1"


def rounds_for(subscribers: int) -> int:
    """How many pairs of rounds are measured: the fewer sends a round has, the more rounds."""
    return next((rounds for most, rounds in _ROUNDS if subscribers <= most), _ROUNDS_OF_MANY)


def measure_stream(progress: Progress, subscribers: int = SIZES[-1], rounds: int | None = None) -> dict[str, Any]:
    """Results and ratios, for `subscribers` and for each of SIZES below that; `rounds` for each, None: rounds_for().

    Raises HostError when this machine doesn't allow a process as many descriptors, naming how many it does.
    """
    return run_apart("sprint.bench.stream", {"subscribers": subscribers, "rounds": rounds}, progress)


def measure(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """measure_stream()'s work, in this process, which must have one thread only."""
    most, rounds = settings["subscribers"], settings["rounds"]
    _allow_descriptors(most)
    load_before = os.getloadavg()[0]
    usable = sorted(os.sched_getaffinity(0))
    # The receivers' CPUs are never the sender's; of more than two, each receiver has its own.
    cpus = (usable[-1], usable[0], usable[-2 if len(usable) > 2 else 0]) if len(usable) > 1 else (None, None, None)
    receivers = [Helper(lambda control: Receiver(control).serve(), cpu) for cpu in cpus[1:]]
    if cpus[0] is not None:
        os.sched_setaffinity(0, {cpus[0]})
    try:
        sizes = [
            asyncio.run(_measure_size(size, rounds or rounds_for(size), receivers, progress))
            for size in (*(size for size in SIZES if size < most), most)
        ]
    finally:
        for receiver in receivers:
            receiver.close()
        os.sched_setaffinity(0, usable)
    largest = sizes[-1]
    a_send_ns = largest["sprint"]["sent_ms"] * NS_PER_MS / most
    return {
        "results": {
            "sizes": sizes,
            "us_a_send": round(a_send_ns / 1_000, 2),
            "bare_us_a_send": round(largest["bare"]["sent_ms"] * 1_000 / most, 2),
            "subscribers_within_relay_target": {
                tier.label: int(PROFILES[tier].relay_target_ns / a_send_ns) for tier in sorted(Tier, reverse=True)
            },
            "sender_cpu": cpus[0],
            "receiver_cpus": cpus[1:],
            "load_average": {"before": load_before, "after": os.getloadavg()[0]},
        },
        "ratios": {"vs_bare_send_loop": largest["vs_bare_send_loop"]},
    }


@dataclass(slots=True)
class Rounds:
    """What one way of sending has cost, nanoseconds a round."""

    sent: list[int] = field(default_factory=list)
    cpu: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    median: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Of each, the median round and the 90th percentile of rounds, in milliseconds."""
        named = {"first": self.first, "median": self.median, "last": self.last, "sent": self.sent, "cpu": self.cpu}
        middle = {f"{name}_ms": median(times) / NS_PER_MS for name, times in named.items()}
        slow = {f"{name}_p90_ms": percentile(sorted(times), 90) / NS_PER_MS for name, times in named.items()}
        return {**middle, **slow}


async def _measure_size(size: int, rounds: int, receivers: list[Helper], progress: Progress) -> dict[str, Any]:
    step = f"{size:,} subscribers"
    progress(step, 0, rounds)
    sender = _Sender(size)
    try:
        half = size // 2
        shares = [(receiver, count) for receiver, count in zip(receivers, (half, size - half), strict=True) if count]
        for receiver, count in shares:
            receiver.tell("connect", *sender.address, count)
        for receiver, _ in shares:
            await _answer(receiver)
        ours, bare = Rounds(), Rounds()
        audience = [receiver for receiver, _ in shares]
        for number in range(-WARM_UP, rounds):
            turns = [(ours, sender.publication), (bare, sender.bare_loop)]
            for way, prepared in turns if number % 2 else reversed(turns):
                await asyncio.sleep(SETTLE_S)
                await _round(way if number >= 0 else Rounds(), *prepared(), audience)
            progress(step, max(0, number + 1), rounds)
        for receiver in audience:
            receiver.ask("close")
        sender.check(rounds + WARM_UP)
    finally:
        sender.close()
    return {
        "subscribers": size,
        "rounds": rounds,
        # Each round against the one beside it: what else the machine did then fell on both.
        "vs_bare_send_loop": round(statistics.median(map(truediv, ours.sent, bare.sent)), 4),
        "sprint": ours.figures(),
        "bare": bare.figures(),
    }


async def _round(way: Rounds, sequence: int, send: Callable[[], None], audience: list[Helper]) -> None:
    cpu = time.process_time_ns()
    begun = time.monotonic_ns()
    send()
    ended = time.monotonic_ns()
    cpu = time.process_time_ns() - cpu
    arrivals: array[int] = array("q")
    for receiver in audience:
        received, stamps = await _answer(receiver)
        if received != sequence:
            raise RuntimeError(f"subscribers received frame {received} where {sequence} was sent, or not all the same")
        arrivals.frombytes(stamps)
    ordered = sorted(arrivals)
    way.sent.append(ended - begun)
    way.cpu.append(cpu)
    way.first.append(ordered[0] - begun)
    way.median.append(percentile(ordered, 50) - begun)
    way.last.append(ordered[-1] - begun)


async def _answer(receiver: Helper) -> Any:
    """The receiver's answer, while the loop goes on: it has a server on it."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(receiver.control.fileno(), arrived.set)
    try:
        await arrived.wait()
    finally:
        loop.remove_reader(receiver.control.fileno())
    return receiver.answer()


class _Sender:
    """The delivery, its ring, and the same sockets for the bare loop."""

    def __init__(self, size: int) -> None:
        slots = PROFILES[TIER].ring_slots
        ring = Ring.create(bytearray(size_for(slots)), slots, session=secrets.randbits(64))
        self._writer = RingWriter(ring)
        self._size = size
        self._accounts = StatusBlock.create(ring.session, {}).delivery(0, "stream")
        self._delivery = StreamDelivery(
            ring,
            self._accounts,
            network="regtest",
            gate=OpenGate(lambda _: TIER),
            write_deadline_ns={tier: PROFILES[tier].write_deadline_ns for tier in Tier},
            max_sessions=size,
            heartbeat_ns=3_600 * NS_PER_S,  # a heartbeat in the middle of a round would be taken for its frame
        )
        self.address = self._delivery.start(asyncio.get_running_loop(), _HOST, 0)
        self._bare_sequence = _BARE

    def publication(self) -> tuple[int, Callable[[], None]]:
        """A new record stands in the ring: its sequence, and what sends it to everybody."""
        sequence = self._writer.next_sequence
        self._writer.claim()[:] = _record(sequence)
        self._writer.commit(best=True)
        return sequence, self._delivery.publish

    def bare_loop(self) -> tuple[int, Callable[[], None]]:
        """A frame of the same length: its sequence, and what sends it to everybody."""
        self._bare_sequence += 1
        frame = record_frame(_record(self._bare_sequence), Format.BINARY)
        # No public way leads to the sockets, and sockets of our own would not be the very same.
        sockets = [subscriber.sock for subscriber in self._delivery._rosters]  # noqa: SLF001

        def send_to_all() -> None:
            for sock in sockets:
                sock.send(frame)

        return self._bare_sequence, send_to_all

    def check(self, publications: int) -> None:
        """Raises RuntimeError unless the delivery sent every record to everybody straight away."""
        accounts = self._accounts.tiers[TIER]
        sent = accounts.on_time + accounts.late
        if sent != publications * self._size:
            raise RuntimeError(f"the delivery counted {sent} sends of {publications} records to {self._size}")

    def close(self) -> None:
        """End every connection."""
        self._delivery.close()


def _record(sequence: int) -> bytes:
    return Record(
        network=b"bnch",
        session=0,
        sequence=sequence,
        event=Event.PROVEN,
        source=Source.P2P,
        state=State.PROVEN | State.BEST,
        height=800_000,
        fork_height=0,
        next_bits=0,
        median_time_past=0,
        transactions=0,
        size=0,
        wall_ns=time.time_ns(),
        hash=secrets.token_bytes(32),
        header=secrets.token_bytes(80),
        seen_ns=time.monotonic_ns(),
        published_ns=time.monotonic_ns(),
    ).encode()


def _allow_descriptors(subscribers: int) -> None:
    """Raise this process's limit, which the receivers inherit, as far as may be needed."""
    needed = subscribers + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        most = hard - SPARE_DESCRIPTORS
        raise HostError(
            f"{subscribers} subscribers need {needed} file descriptors and a process gets {hard}: "
            f"raise that (ulimit -Hn), or ask for --subscribers {most}"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


if __name__ == "__main__":
    be_apart(measure)
