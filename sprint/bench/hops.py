"""Ways for a record of 192 bytes to get from one process into another: ours, and what else a Python program would use.

A hop is made before the fork. Its writer's end is a function that takes a record; its reader's end is a function that
waits for the next one, spinning or sleeping, and returns its bytes. Each way is used as its own documentation shows it
or quicker, and whatever can be bound beforehand is: what is compared is the way, not how well each one is called.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import select
import shutil
import socket
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any, Protocol

from sprint.channels import EventChannel
from sprint.record import SIZE
from sprint.ring import Ring, RingReader, RingWriter, size_for
from sprint.shared_memory import SharedMemory, map_read_only
from sprint.tiers import PROFILES, Tier

if TYPE_CHECKING:
    from collections.abc import Callable

SLOTS = PROFILES[Tier.TURBO].ring_slots
Buffer = bytes | bytearray


class Hop(Protocol):
    """One way, as both processes see it."""

    name: str

    def writer(self) -> Callable[[Buffer], object]:
        """Open the writer's end, in the writer's process: hands over one record."""

    def reader(self) -> Callable[[], bytes]:
        """Open the reader's end, in the reader's process: waits for the next record."""

    def close(self) -> None:
        """Let go of what was made before the fork, once both processes have ended."""


class RingHop:
    """Our ring in sealed shared memory, as the memory-optimised engine sets it up; its reader spins."""

    name = "sprint_busy"

    def __init__(self) -> None:
        self._shared = SharedMemory("sprint-bench-ring", size_for(SLOTS))
        Ring.create(self._shared.memory, SLOTS, session=1)

    def ring_writer(self) -> RingWriter:
        """The ring's one writer."""
        return RingWriter(Ring.attach(self._shared.memory))

    def ring_reader(self) -> RingReader:
        """A reader, from the next record on, whose mapping can't be written."""
        return RingReader(Ring.attach(map_read_only(self._shared.descriptor)))

    def writer(self) -> Callable[[Buffer], object]:
        """Claim, fill, commit."""
        ring = self.ring_writer()

        def hand_over(record: Buffer) -> None:
            ring.claim()[:] = record
            ring.commit(best=False)

        return hand_over

    def reader(self) -> Callable[[], bytes]:
        """Read until there is one."""
        read = self.ring_reader().read

        def receive() -> bytes:
            while True:
                record = read()
                if record is not None and isinstance(record, bytes):
                    return record

        return receive

    def close(self) -> None:
        """Close the memory's descriptor."""
        os.close(self._shared.descriptor)


class BlockingRingHop(RingHop):
    """The same ring; its reader sleeps until an eventfd wakes it."""

    name = "sprint_blocking"

    def __init__(self) -> None:
        super().__init__()
        self._channel = EventChannel()

    def writer(self) -> Callable[[Buffer], object]:
        """Commit, then signal."""
        write, wake = super().writer(), self._channel.publish

        def hand_over(record: Buffer) -> None:
            write(record)
            wake()

        return hand_over

    def reader(self) -> Callable[[], bytes]:
        """Look, and sleep only when there is nothing."""
        channel, read = self._channel, self.ring_reader().read
        poller = select.poll()
        poller.register(channel.fileno(), select.POLLIN)

        def receive() -> bytes:
            while True:
                record = read()
                if record is None:
                    poller.poll()
                    channel.drain()
                elif isinstance(record, bytes):
                    return record

        return receive

    def close(self) -> None:
        """Close both descriptors."""
        super().close()
        os.close(self._channel.fileno())


class QueueHop:
    """multiprocessing.Queue: pickled, and sent through a pipe by a thread of the writer's process."""

    name = "multiprocessing_queue"

    def __init__(self) -> None:
        self._queue: multiprocessing.Queue[bytes] = multiprocessing.get_context("fork").Queue()

    def writer(self) -> Callable[[Buffer], object]:
        """put() keeps the object until its thread gets to it, so it gets a copy."""
        put = self._queue.put
        return lambda record: put(bytes(record))

    def reader(self) -> Callable[[], bytes]:
        """get() sleeps."""
        return self._queue.get

    def close(self) -> None:
        """Close it; in a process that has put something in, wait until its thread has sent it."""
        self._queue.close()
        self._queue.join_thread()


class PipeHop:
    """A pipe; its reader sleeps. A record is shorter than PIPE_BUF, so each write and each read is a whole one."""

    name = "pipe"

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def writer(self) -> Callable[[Buffer], object]:
        """write(2)."""
        write, descriptor = os.write, self._write
        return lambda record: write(descriptor, record)

    def reader(self) -> Callable[[], bytes]:
        """read(2)."""
        read, descriptor = os.read, self._read
        return lambda: read(descriptor, SIZE)

    def close(self) -> None:
        """Close both ends."""
        os.close(self._read)
        os.close(self._write)


class DatagramHop:
    """A pair of Unix datagram sockets; its reader sleeps."""

    name = "unix_datagram"

    def __init__(self) -> None:
        self._sending, self._receiving = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def writer(self) -> Callable[[Buffer], object]:
        """send(2)."""
        return self._sending.send

    def reader(self) -> Callable[[], bytes]:
        """recv(2)."""
        receive = self._receiving.recv
        return lambda: receive(SIZE)

    def close(self) -> None:
        """Close both ends."""
        self._sending.close()
        self._receiving.close()


class _Payload(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint8 * SIZE),)


class IceoryxHop:
    """iceoryx2's publish-subscribe through its Python package; its reader spins.

    Both ends go by the payload's address, which its documentation shows and which is quicker than its ctypes objects.
    Its files live in a folder and under a prefix of this run alone, and close() removes them.
    """

    name = "iceoryx2"

    def __init__(self) -> None:
        self._prefix = f"sprint_bench_{os.getpid()}_"
        self._folder = Path(gettempdir()) / f"sprint-bench-{os.getpid()}"

    @staticmethod
    def installed() -> bool:
        """Whether the package can be imported."""
        return find_spec("iceoryx2") is not None

    def _service(self) -> tuple[Any, Any]:
        # By name, for the package has no types, and what is optional here may be missing.
        iox: Any = import_module("iceoryx2")
        iox.set_log_level(iox.LogLevel.Error)
        settings = iox.config.default()
        settings.global_cfg.prefix = iox.FileName.new(self._prefix)
        settings.global_cfg.root_path = iox.Path.new(str(self._folder))
        builder = iox.NodeBuilder.new().config(settings).signal_handling_mode(iox.SignalHandlingMode.Disabled)
        node = builder.create(iox.ServiceType.Ipc)
        service = node.service_builder(iox.ServiceName.new("sprint/bench")).publish_subscribe(_Payload)
        # Room for as many records as a busy machine may keep the reader from its CPU: none is to be lost.
        return node, service.subscriber_max_buffer_size(64).open_or_create()

    def writer(self) -> Callable[[Buffer], object]:
        """Loan a sample, fill it, send it."""
        node, service = self._service()
        publisher = service.publisher_builder().create()
        memmove, source = ctypes.memmove, (ctypes.c_uint8 * SIZE).from_buffer

        def hand_over(record: Buffer, _keep: object = node) -> None:
            sample = publisher.loan_uninit()
            memmove(sample.payload_ptr, source(record), SIZE)
            sample.assume_init().send()

        return hand_over

    def reader(self) -> Callable[[], bytes]:
        """Ask for a sample until there is one, and copy it."""
        node, service = self._service()
        take, string_at = service.subscriber_builder().create().receive, ctypes.string_at

        def receive(_keep: object = node) -> bytes:
            while True:
                sample = take()
                if sample is not None:
                    return string_at(sample.payload_ptr, SIZE)

        return receive

    def close(self) -> None:
        """Remove what its nodes left behind."""
        shutil.rmtree(self._folder, ignore_errors=True)
        for left in Path("/dev/shm").glob(f"{self._prefix}*"):  # noqa: S108 - where it keeps its segments
            left.unlink(missing_ok=True)
