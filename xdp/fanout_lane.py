"""One CPU's part of a run: its words in shared memory, and the system call that is ready to be made.

A lane is one `struct run` of bpf/egress.h. Whoever holds it prepares it, calls run(), and reads the result; one at a
time. The second CPU's lane is run by a thread of its own (Helper), for which the call lets go of the GIL.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import struct
import threading
import time
from typing import TYPE_CHECKING, NamedTuple, final

from xdp import kernel
from xdp.datagrams import IPV4_HEADERS, IPV6_HEADERS, word_sum
from xdp.fanout_maps import BATCH, EGRESS, PAYLOAD_LIMIT, FanoutHandover, MappedArray, Step, long, word

if TYPE_CHECKING:
    from collections.abc import Callable

LOSSES = EGRESS.constants["LOSSES"]
_RUN = EGRESS.layouts["run"]
_RUN_WORDS, _RUN_LONGS = _RUN.size // 4, _RUN.size // 8
_PAYLOAD = _RUN.offset("payload")
_PINNED, _STEP, _DIRECT = long("run", "pinned"), word("run", "step"), word("run", "direct")
_PLACE, _STRIDE, _COUNT, _FIRST = (word("run", name) for name in ("place", "stride", "count", "first"))
_LENGTH, _SUM, _FRAME, _CURSOR = (word("run", name) for name in ("length", "payload_sum", "frame", "cursor"))
_SKIPPED, _ATTEMPTED, _TRANSMITTED, _DROPPED = (
    word("run", name) for name in ("skipped", "attempted", "transmitted", "dropped")
)
_LOSSES, _LOST_END, _LOST_COUNT = (word("run", name) for name in ("losses", "lost_end[0]", "lost_count[0]"))
_BEGAN, _FIRST_ENDED, _ENDED = (long("run", name) for name in ("began_ns", "first_ended_ns", "ended_ns"))
_SLEEP_NS = 100_000
"""What a sleep may be late by."""
_ATTRIBUTES = struct.Struct("=IIIIQQIIIIQQIII4x")
_SIZE_IN, _SIZE_OUT, _REPEAT = 8, 12, 32
"""Where they lie in the attributes of BPF_PROG_TEST_RUN."""
_MAX_INTERRUPTIONS = 1000
_libc = ctypes.CDLL(None, use_errno=True)  # lets go of the GIL for the time of each call
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_long]


class LaneResult(NamedTuple):
    """What the kernel counted; times are CLOCK_MONOTONIC, 0 for what has not come to pass."""

    attempted: int
    transmitted: int
    skipped: int
    began_ns: int
    first_rank_ended_ns: int
    ended_ns: int


@final
class Lane:
    """A run of one CPU: its words in shared memory, and a call that is ready to be made."""

    def __init__(self, handover: FanoutHandover, area: MappedArray, number: int) -> None:
        self.number = number
        self._words = area.words[number * _RUN_WORDS : (number + 1) * _RUN_WORDS]
        self._longs = area.longs[number * _RUN_LONGS : (number + 1) * _RUN_LONGS]
        self._payload = area.bytes[number * _RUN.size + _PAYLOAD : number * _RUN.size + _PAYLOAD + PAYLOAD_LIMIT]
        self._context_index = handover.contexts[number]
        # What is in it is never sent: the program writes every byte.
        self._frame = ctypes.create_string_buffer(IPV6_HEADERS + PAYLOAD_LIMIT)
        self._context = ctypes.create_string_buffer(kernel.XDP_MD.size)
        self._attributes = ctypes.create_string_buffer(_ATTRIBUTES.size)
        _ATTRIBUTES.pack_into(
            self._attributes,
            0,
            *(handover.program_fd, 0, 0, 0, ctypes.addressof(self._frame), 0, 0, 0),
            *(kernel.XDP_MD.size, 0, ctypes.addressof(self._context), 0, kernel.LIVE_FRAMES, 0, BATCH),
        )
        self._call = (kernel.SYSTEM_CALLS[os.uname().machine], kernel.PROG_TEST_RUN)
        self._call_at = ctypes.addressof(self._attributes)
        self._size = 0
        self.error = 0
        self.say_step(None)
        self.unpin()

    def pin(self, version: int) -> None:
        """Hold a snapshot: its order and entries aren't written again until unpin()."""
        self._longs[_PINNED] = version

    def unpin(self) -> None:
        """Let go of it."""
        self._longs[_PINNED] = 0

    def say_step(self, step: Step | None) -> None:
        """For others to read; None: nobody sends by it."""
        self._words[_STEP] = 0 if step is None else 1 + step

    def prepare(
        self,
        payload: bytes | memoryview,
        *,
        place: int,
        stride: int,
        count: int,
        first: int,
        ipv6: bool,
        direct: int = 0,
    ) -> None:
        """Everything that run() needs; `place` and `stride` are of positions in the orders, `direct` as in egress.h."""
        words, longs = self._words, self._longs
        length = len(payload)
        words[_PLACE], words[_STRIDE], words[_COUNT], words[_FIRST] = place, stride, count, first
        words[_LENGTH], words[_SUM], words[_DIRECT] = length, word_sum(payload), direct
        words[_CURSOR] = words[_SKIPPED] = words[_ATTEMPTED] = words[_TRANSMITTED] = words[_DROPPED] = 0
        words[_LOSSES] = 0
        longs[_BEGAN] = longs[_FIRST_ENDED] = longs[_ENDED] = 0
        self._payload[:length] = payload
        size = length + (IPV6_HEADERS if ipv6 else IPV4_HEADERS)
        if size != self._size:
            struct.pack_into("=I", self._attributes, _SIZE_IN, size)
            kernel.XDP_MD.pack_into(self._context, 0, 0, size, 0, self._context_index, 0, 0)
            self._size = words[_FRAME] = size
        self.error = 0

    @property
    def visited(self) -> int:
        """How many have had their turn in the last run."""
        return self._words[_CURSOR]

    def run(self, burst: int, gap_ps: int, go_on: Callable[[], bool] | None = None) -> None:
        """Calls until the cursor is at the end; `error` says what else ended it. `go_on` is asked between two calls."""
        words, attributes, count = self._words, self._attributes, self._words[_COUNT]
        due, at, interruptions = time.monotonic_ns(), 0, 0
        while at < count:
            repeat = min(burst, count - at) if burst else count - at
            struct.pack_into("=I", attributes, _REPEAT, repeat)
            # The kernel leaves the frame's size here, and takes it for the room that we have next time.
            struct.pack_into("=I", attributes, _SIZE_OUT, 0)
            error = ctypes.get_errno() if _syscall(*self._call, self._call_at, _ATTRIBUTES.size) < 0 else 0
            before, at = at, words[_CURSOR]
            if error == errno.EINTR and interruptions < _MAX_INTERRUPTIONS:
                # A signal, partway: Python's handler runs before the next call, which goes on at the cursor.
                interruptions += 1
            elif error or at == before:
                self.error = error or errno.ESTALE  # the program isn't ours, or doesn't know this lane's context
                break
            if go_on is not None and at < count and not go_on():
                break
            if gap_ps and at < count:
                due += (at - before) * gap_ps // 1000
                _wait_until(due)

    def result(self) -> LaneResult:
        """Of the last run."""
        words, longs = self._words, self._longs
        return LaneResult(
            *(words[_ATTEMPTED], words[_TRANSMITTED], words[_SKIPPED]),
            *(longs[_BEGAN], longs[_FIRST_ENDED], longs[_ENDED]),
        )

    @property
    def losses(self) -> int:
        """Stretches of the last run that a driver refused; see lost()."""
        return self._words[_LOSSES]

    def lost(self) -> list[tuple[int, int]]:
        """First turn and length of each stretch of the last run that a driver refused, as far as they are noted."""
        words, count = self._words, self._words[_COUNT]
        noted = range(min(words[_LOSSES], LOSSES))
        stretches = [(words[_LOST_END + n] - words[_LOST_COUNT + n], words[_LOST_COUNT + n]) for n in noted]
        return [(first, length) for first, length in stretches if first >= 0 and 0 < length <= count - first]

    def close(self) -> None:
        """Before the memory is unmapped."""
        self.say_step(None)
        self.unpin()
        for view in (self._words, self._longs, self._payload):
            view.release()


def _wait_until(due_ns: int) -> None:
    """Sleep for the most of it, as long as a sleep is worth its wake-up, then spin."""
    while (left := due_ns - time.monotonic_ns()) > 0:
        if left > _SLEEP_NS:
            time.sleep((left - _SLEEP_NS) / 1e9)


@final
class Helper:
    """The second CPU's thread: waits in the kernel, runs its lane, tells. It takes no signal.

    The order to go is a token that one of two takes: where this thread isn't given its CPU, the caller takes it back,
    and runs the lane itself.
    """

    def __init__(self, lane: Lane, cpu: int) -> None:
        self._lane, self._cpu = lane, cpu
        self._order: tuple[int, int] | None = None
        self._go = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._done = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name=f"fan-out on CPU {cpu}", daemon=True)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # a CPU that isn't ours: then wherever there is room
            os.sched_setaffinity(0, {self._cpu})
        going = select.poll()
        going.register(self._go, select.POLLIN)
        while True:
            going.poll()
            if not self._take():
                continue
            if self._order is None:
                return
            self._lane.run(*self._order)
            os.eventfd_write(self._done, 1)

    def _take(self) -> bool:
        try:
            os.eventfd_read(self._go)
        except BlockingIOError:
            return False
        return True

    def start(self, burst: int, gap_ps: int) -> None:
        """Have the lane run, which is prepared."""
        self._order = (burst, gap_ps)
        os.eventfd_write(self._go, 1)

    def finish(self) -> None:
        """Until the lane has been run, by whomever."""
        if self._order is not None and self._take():
            self._lane.run(*self._order)
        else:
            os.eventfd_read(self._done)

    def close(self) -> None:
        """End the thread."""
        self._order = None
        os.eventfd_write(self._go, 1)
        self._thread.join()
        os.close(self._go)
        os.close(self._done)
