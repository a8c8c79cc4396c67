"""Two thousand subscribers of all tiers, some of whom never read: what the others get, how late, and what one costs.

The delivery runs in a process of its own, on a ring in shared memory that the test writes, as the engine does; each
subscriber is a real TCP connection. Latencies are printed, not judged: two cores carry the server, two thousand readers
and whatever else runs.
"""

from __future__ import annotations

import asyncio
import os
import resource
import select
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sprint.bench.percentiles import percentile
from sprint.channels import EventChannel
from sprint.deliveries.gate import OpenGate
from sprint.deliveries.stream import StreamDelivery
from sprint.events import Event, Source, State
from sprint.frames import FrameDecoder, Heartbeat
from sprint.record import SIZE, Record
from sprint.ring import Ring, RingWriter, size_for
from sprint.shared_memory import SharedMemory
from sprint.status import SIZE as STATUS_SIZE
from sprint.status import StatusBlock
from sprint.tiers import PROFILES, Tier
from tests.unit.shm_host import fork, killed, tier_of_key, until

if TYPE_CHECKING:
    from collections.abc import Iterator

SUBSCRIBERS = 2_000
STALLED = SUBSCRIBERS // 100
RECORDS = 40
RECORD_FRAME = 5 + SIZE
SLOTS = 4_096
SESSION = 0x5EED
FILLING = 600
"""Records that fill the buffers of whoever doesn't read: 32 KiB doubled on our side, and the least on theirs."""
PATIENCE_S = 30.0
DESCRIPTORS = SUBSCRIBERS + 200


@pytest.fixture(autouse=True)
def _enough_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < DESCRIPTORS:
        pytest.skip(f"a process may open {hard} files only, {DESCRIPTORS} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, DESCRIPTORS), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Subscriber:
    """A connection, and every piece that came over it with the time of its coming."""

    def __init__(self, address: tuple[str, int], tier: Tier, *, reads: bool) -> None:
        self.tier = tier
        self.pieces: list[tuple[int, bytes]] = []
        self.sock = socket.socket()
        if not reads:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(address)
        self.sock.sendall(b'{"key":"%s"}\n' % tier.label.encode())
        answer = b""
        while b"\n" not in answer:
            answer += self.sock.recv(4096)
        answer, _, self._rest = answer.partition(b"\n")
        assert tier.label.encode() in answer
        self.pieces.append((time.monotonic_ns(), self._rest))
        self.sock.setblocking(False)
        self.records = 0

    def read(self) -> None:
        data = self.sock.recv(1 << 16)
        assert data, f"a healthy subscriber of tier {self.tier.label} was disconnected"
        self.pieces.append((time.monotonic_ns(), data))
        rest = self._rest + data
        while len(rest) > 4 and len(rest) >= (size := 4 + int.from_bytes(rest[:4], "little")):
            self.records += size == RECORD_FRAME
            rest = rest[size:]
        self._rest = rest

    def told(self) -> list[tuple[int, int]]:
        """Sequence and latency (publication → read, ns) of each record, in the order of their coming."""
        decoder, told = FrameDecoder(), []
        for at_ns, data in self.pieces:
            for item in decoder.receive(data):
                assert isinstance(item, Record | Heartbeat), item
                if isinstance(item, Record):
                    told.append((item.sequence, at_ns - item.published_ns))
        return told


class Service:
    """The delivery's process, and the relay's side of it."""

    def __init__(self) -> None:
        self._memory = SharedMemory("test-ring", size_for(SLOTS))
        self.ring = Ring.create(self._memory.memory, SLOTS, SESSION)
        self._writer = RingWriter(self.ring)
        self._status_memory = SharedMemory("test-status", STATUS_SIZE)
        self._status = StatusBlock.create(SESSION, {}, self._status_memory.memory)
        self.accounts = self._status.delivery(0, "stream")
        self._channel = EventChannel()
        listener = StreamDelivery.listen("127.0.0.1", 0)
        self.address: tuple[str, int] = listener.getsockname()
        self.pid = fork(lambda: self._serve(listener))
        listener.close()
        self._poll = select.epoll()
        self._all: list[Subscriber] = []
        self._healthy: dict[int, Subscriber] = {}

    def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.new_event_loop()
        delivery = StreamDelivery(
            self.ring,
            self.accounts,
            network="regtest",
            gate=OpenGate(tier_of_key),
            write_deadline_ns={tier: PROFILES[tier].write_deadline_ns for tier in Tier},
            max_sessions=SUBSCRIBERS + 10,
        )
        delivery.serve(loop, listener)

        def wake() -> None:
            self._channel.drain()
            delivery.publish()

        loop.add_reader(self._channel.fileno(), wake)
        loop.run_forever()

    def close(self) -> None:
        killed(self.pid)
        for subscriber in self._all:
            subscriber.sock.close()
        self._poll.close()
        for descriptor in (self._memory.descriptor, self._status_memory.descriptor, self._channel.fileno()):
            os.close(descriptor)

    def join(self, tier: Tier, *, reads: bool = True) -> Subscriber:
        """One that reads whatever comes, from now on; or one that never will."""
        subscriber = Subscriber(self.address, tier, reads=reads)
        self._all.append(subscriber)
        if not reads:
            return subscriber
        self._healthy[subscriber.sock.fileno()] = subscriber
        self._poll.register(subscriber.sock, select.EPOLLIN)
        return subscriber

    def publish(self) -> int:
        sequence = self._writer.next_sequence
        now_ns = time.monotonic_ns()
        state = State.PROVEN | State.BEST
        self._writer.claim()[:] = Record(
            b"\xfa\xbf\xb5\xda", SESSION, sequence, Event.PROVEN, Source.P2P, state, sequence, 0, 0, 0, 0, 0,
            time.time_ns(), sequence.to_bytes(32, "little"), bytes(80), now_ns, now_ns,
        ).encode()  # fmt: skip
        self._writer.commit(best=True)
        self._channel.publish()
        return sequence

    def read_until_each_has(self, records: int) -> None:
        """Read whatever comes until each healthy subscriber has at least so many records."""
        waiting = {fd for fd, subscriber in self._healthy.items() if subscriber.records < records}
        deadline = time.monotonic() + PATIENCE_S
        while waiting:
            assert time.monotonic() < deadline, f"{len(waiting)} healthy subscribers wait in vain"
            for descriptor, _ in self._poll.poll(1):
                subscriber = self._healthy[descriptor]
                subscriber.read()
                if subscriber.records >= records:
                    waiting.discard(descriptor)


@contextmanager
def service() -> Iterator[Service]:
    served = Service()
    try:
        yield served
    finally:
        served.close()


def tiers(count: int) -> list[Tier]:
    """As many of each tier, mixed."""
    return [Tier(number % len(Tier)) for number in range(count)]


def latencies_with(stalled: int) -> list[int]:
    """Each healthy subscriber's latency for each record, ns, sorted, with so many others who never read a byte."""
    with service() as served:
        silent = [served.join(tier, reads=False) for tier in tiers(stalled)]
        if stalled:
            for _ in range(FILLING):
                served.publish()
            until(lambda: all(served.accounts.tiers[tier].overwritten for tier in (Tier.TURBO, Tier.ENTERPRISE)))
            until(lambda: all(served.accounts.tiers[tier].dropped for tier in (Tier.FREE, Tier.PRO, Tier.BUSINESS)))
        healthy = [served.join(tier) for tier in tiers(SUBSCRIBERS - stalled)]
        before = {tier: served.accounts.tiers[tier].subscribers for tier in Tier}
        assert sum(before.values()) == SUBSCRIBERS
        first = served.ring.tail + 1
        for number in range(1, RECORDS + 1):
            served.publish()
            if number % 4:  # every fourth is followed by the next at once
                served.read_until_each_has(number)
        served.read_until_each_has(RECORDS)
        expected = list(range(first, first + RECORDS))
        told = [subscriber.told() for subscriber in healthy]
        for subscriber, one in zip(healthy, told, strict=True):
            assert [sequence for sequence, _ in one] == expected, subscriber.tier
        assert {tier: served.accounts.tiers[tier].subscribers for tier in Tier} == before, "somebody was disconnected"
        for tier in Tier:
            accounts = served.accounts.tiers[tier]
            others = sum(one.tier is tier for one in silent)
            lost = accounts.dropped + accounts.overwritten
            assert lost <= others * (FILLING + RECORDS), "a healthy one lost something"
            assert bool(lost) is bool(others)
    return sorted(latency for one in told for _, latency in one)


def test_two_thousand_of_all_tiers_get_everything_in_order_whether_or_not_some_never_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    without, with_stalled = latencies_with(0), latencies_with(STALLED)
    shares = (50, 99, 99.9)
    with capsys.disabled():
        for name, values in (("nobody stalled", without), (f"{STALLED} stalled", with_stalled)):
            told = ", ".join(f"p{share:g} {percentile(values, share) / 1e6:.1f} ms" for share in shares)
            print(f"\n{SUBSCRIBERS} subscribers, {name}, publication to read: {told}", end="")


IDLE_SERVER = """
import asyncio, socket, sys
from sprint.deliveries.stream import StreamDelivery
from sprint.ring import Ring, size_for
from sprint.status import StatusBlock
from sprint.tiers import PROFILES, Tier
from sprint.deliveries.gate import OpenGate
from tests.unit.shm_host import tier_of_key

loop = asyncio.new_event_loop()
delivery = StreamDelivery(
    Ring.create(bytearray(size_for(64)), 64, 1), StatusBlock.create(1, {}).delivery(0, "stream"), network="regtest",
    gate=OpenGate(tier_of_key), write_deadline_ns={tier: PROFILES[tier].write_deadline_ns for tier in Tier},
    max_sessions=int(sys.argv[2]), heartbeat_ns=500_000_000,
)
delivery.serve(loop, socket.socket(fileno=int(sys.argv[1])))
loop.run_forever()
"""


def resident_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise AssertionError("the kernel tells no VmRSS")


def test_an_idle_subscriber_costs_less_than_ten_kilobytes(capsys: pytest.CaptureFixture[str]) -> None:
    """In a new process: a forked one has free memory left from the tests before."""
    joined: list[Subscriber] = []
    listener = StreamDelivery.listen("127.0.0.1", 0)
    descriptor = listener.fileno()
    command = [sys.executable, "-c", IDLE_SERVER, str(descriptor), str(SUBSCRIBERS)]
    with listener, subprocess.Popen(command, pass_fds=[descriptor], cwd=Path(__file__).parents[2]) as server:
        try:
            address: tuple[str, int] = listener.getsockname()
            joined += [Subscriber(address, tier, reads=True) for tier in tiers(20)]
            before_kb = resident_kb(server.pid)
            joined += [Subscriber(address, tier, reads=True) for tier in tiers(SUBSCRIBERS - 20)]
            last = joined[-1].sock  # it has waited for its heartbeat, and so have the others
            last.settimeout(PATIENCE_S)
            assert last.recv(1)
            each_kb = (resident_kb(server.pid) - before_kb) / (SUBSCRIBERS - 20)
        finally:
            server.kill()
            for subscriber in joined:
                subscriber.sock.close()
    with capsys.disabled():
        print(f"\nan idle subscriber: {each_kb:.2f} kB of the delivery's process", end="")
    assert 0.1 < each_kb < 10
