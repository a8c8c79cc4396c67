"""What tests of shared memory share: the memory that a supervisor makes, and a worker forked from it that serves it.

The test's own process is the relay: it writes the ring and signals the channel. The worker is composed as the product
composes it, and is killed and started again like it.
"""

from __future__ import annotations

import array
import asyncio
import json
import mmap
import os
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from sprint.channels import EventChannel
from sprint.deliveries.gate import OpenGate
from sprint.deliveries.shm import ShmDelivery
from sprint.events import Event, Lapped, Source, State
from sprint.record import SIZE, Record
from sprint.ring import Ring, RingWriter, size_for
from sprint.shared_memory import SharedMemory
from sprint.status import SIZE as STATUS_SIZE
from sprint.status import StatusBlock
from sprint.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

    from sprint.shared_reader import SharedReader
    from sprint.status import Delivery

SESSION = 0xFEED_BEEF_0123_4567
PATIENCE_S = 60.0


def tier_of_key(key: str | None) -> Tier | None:
    """A key is its tier's name; without one, free."""
    return Tier.FREE if key is None else {tier.label: tier for tier in Tier}.get(key)


def record_of(sequence: int, *, best: bool = True, seen_ns: int | None = None) -> bytes:
    now = time.monotonic_ns()
    state = State.PROVEN | State.BEST if best else State.PROVEN
    return Record(
        b"\xfa\xbf\xb5\xda", SESSION, sequence, Event.PROVEN, Source.P2P, state, sequence, 0, 0, 0, 0, 0,
        time.time_ns(), sequence.to_bytes(32, "little"), bytes(80), now if seen_ns is None else seen_ns, now,
    ).encode()  # fmt: skip


def fork(life: Callable[[], object]) -> int:
    """A process that lives this life, and nothing of the test's."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # Python 3.12 warns of threads that other tests may have left; the child touches nothing of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        life()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def killed(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def ended(pid: int) -> int:
    """The exit code of a process that ends by itself; a signal's number, negative, if one ended it."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    killed(pid)
    raise TimeoutError(f"process {pid} did not end")


class Host:
    """The ring's memory, its writer, the accounts, and the workers that were started."""

    def __init__(self, path: Path, slots: int = 64, session: int = SESSION) -> None:
        self.path = path
        self.memory = SharedMemory("test-ring", size_for(slots))
        self.ring = Ring.create(self.memory.memory, slots, session)
        self.writer = RingWriter(self.ring)
        self.channel = EventChannel()
        self.status = StatusBlock.create(session, {}, memoryview(mmap.mmap(-1, STATUS_SIZE)))
        self.accounts: Delivery = self.status.delivery(0, "shm")
        self.worker = 0

    def delivery(self, **options: Any) -> ShmDelivery:
        arguments: dict[str, Any] = {
            "network": "regtest",
            "gate": OpenGate(tier_of_key),
            "max_readers": 1000,
            **options,
        }
        return ShmDelivery(self.memory, self.ring, self.accounts, **arguments)

    def serve(self, **options: Any) -> None:
        """Fork a worker, and return when it listens."""
        listening, listens = os.pipe()

        def life() -> None:
            loop = asyncio.new_event_loop()
            delivery = self.delivery(**options)
            delivery.start(loop, self.path)
            loop.add_reader(self.channel.fileno(), self._publish, delivery)
            os.write(listens, b"!")
            loop.run_forever()

        self.worker = fork(life)
        os.close(listens)
        with os.fdopen(listening, "rb") as pipe:
            assert pipe.read(1) == b"!", "the worker did not start"

    def _publish(self, delivery: ShmDelivery) -> None:
        self.channel.drain()
        delivery.publish()

    def kill_worker(self) -> None:
        if self.worker:
            killed(self.worker)
            self.worker = 0

    def write(self, record: bytes, *, best: bool = False) -> int:
        assert len(record) == SIZE
        self.writer.claim()[:] = record
        sequence = self.writer.commit(best=best)
        self.channel.publish()
        return sequence

    def put(self, count: int = 1, *, best: bool = True) -> int:
        """Publish records; the last one's sequence."""
        for _ in range(count):
            sequence = self.writer.next_sequence
            self.write(record_of(sequence, best=best), best=best)
        return sequence


@contextmanager
def serving(path: Path, slots: int = 64, **options: Any) -> Iterator[Host]:
    """A host with a worker."""
    host = Host(path, slots)
    try:
        host.serve(**options)
        yield host
    finally:
        host.kill_worker()
        os.close(host.memory.descriptor)
        os.close(host.channel.fileno())


def until(holds: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Wait for something that only other processes do."""
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.001)


def read_all(reader: SharedReader) -> list[int | Lapped]:
    """Everything there is: the sequence of each record, once its copy is found right, and each loss."""
    outcomes: list[int | Lapped] = []
    while (found := reader.read()) is not None:
        if isinstance(found, Lapped):
            outcomes.append(found)
        else:
            record = reader.copy()
            assert record is not None
            assert int.from_bytes(record[64:96], "little") == reader.sequence
            outcomes.append(reader.sequence)
    return outcomes


class Client:
    """A reader by hand: says its hello and takes what it is given."""

    def __init__(self, path: Path, hello: bytes = b'{"key":"turbo"}\n') -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(os.fspath(path))
        with suppress(BrokenPipeError):  # of a hello that is refused before its end
            self.sock.sendall(hello)
        self.descriptors: list[int] = []

    def answer(self) -> dict[str, Any]:
        data, control, flags, _ = self.sock.recvmsg(4096, socket.CMSG_SPACE(64), socket.MSG_CMSG_CLOEXEC)
        assert not flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC)
        for level, kind, content in control:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            self.descriptors += array.array("i", content)
        assert data.endswith(b"\n")
        answer: dict[str, Any] = json.loads(data)
        return answer

    def woken(self, timeout_s: float = 0) -> bool:
        """Whether it was woken since it was last asked."""
        _, wake = self.descriptors
        with select.epoll.fromfd(os.dup(wake)) as waiting:
            return bool(waiting.poll(timeout_s))

    def closed(self) -> bool:
        """Whether the server hangs up, saying nothing more."""
        with suppress(ConnectionResetError):
            return self.sock.recv(1) == b""
        return True

    def close(self) -> None:
        self.sock.close()
        while self.descriptors:
            os.close(self.descriptors.pop())


@contextmanager
def reader(path: Path, hello: bytes = b'{"key":"turbo"}\n') -> Iterator[Client]:
    with closing(Client(path, hello)) as client:
        assert "error" not in client.answer()
        yield client


def refusal(path: Path, hello: bytes) -> dict[str, Any]:
    with closing(Client(path, hello)) as client:
        answer = client.answer()
        assert client.descriptors == []
        assert client.closed()
        return answer


class Local:
    """A delivery on the test's own loop."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.host = Host(path)
        self.path = path
        self.delivery = self.host.delivery(**options)

    def start(self) -> None:
        self.delivery.start(asyncio.get_running_loop(), self.path)

    async def client(self, tier: str) -> Client:
        client = Client(self.path, json.dumps({"key": tier}).encode() + b"\n")
        waiting = select.poll()
        waiting.register(client.sock, select.POLLIN)
        while not waiting.poll(0):
            await asyncio.sleep(0.001)
        return client

    def close(self) -> None:
        self.delivery.close()
        os.close(self.host.memory.descriptor)
        os.close(self.host.channel.fileno())


def on_a_loop(path: Path, test: Callable[[Local], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def run() -> None:
        local = Local(path, **options)
        local.start()
        try:
            await asyncio.wait_for(test(local), PATIENCE_S)
        finally:
            local.close()

    asyncio.run(run())
