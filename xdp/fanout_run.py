"""One sender's runs: a payload to every subscriber in one system call. Nothing here locks, compiles or asks netlink.

What was sent is what drivers took, by the kernel's tracepoint; the rest is in the report, and repaired by others. A
machine that refuses never raises here: the report says so, and after a few times on end the sender steps down from the
ladder's first rung, says why, and sends nothing more. Others (see egress) serve on the rungs below.
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
from xdp.fanout_maps import (
    BATCH,
    EGRESS,
    PAYLOAD_LIMIT,
    RUN_CPUS,
    RUNS,
    SNAPSHOTS,
    SUBSCRIBERS,
    FanoutHandover,
    MappedArray,
    Sender,
    Step,
    long,
    word,
)

if TYPE_CHECKING:
    from types import TracebackType

SHORT_SHARE = 0.01
"""Frames missing from which a run counts as short: one now and then is lost for want of a place in a ring."""
SHORT_RUNS = 3
"""On end, until the sender steps down."""
_RUN = EGRESS.layouts["run"]
_RUN_WORDS, _RUN_LONGS = _RUN.size // 4, _RUN.size // 8
_PAYLOAD = _RUN.offset("payload")
_PINNED, _STEP, _DIRECT = (
    long("run", "pinned"),
    word("run", "step"),
    word("run", "direct"),
)
_PLACE, _STRIDE, _COUNT, _FIRST = (word("run", name) for name in ("place", "stride", "count", "first"))
_LENGTH, _SUM, _FRAME, _CURSOR = (word("run", name) for name in ("length", "payload_sum", "frame", "cursor"))
_SKIPPED, _ATTEMPTED, _TRANSMITTED, _DROPPED = (
    word("run", name) for name in ("skipped", "attempted", "transmitted", "dropped")
)
_BEGAN, _FIRST_ENDED, _ENDED = (long("run", name) for name in ("began_ns", "first_ended_ns", "ended_ns"))
_SNAPSHOT = EGRESS.layouts["snapshot"]
_SNAPSHOT_WORDS = _SNAPSHOT.size // 4
_SNAPSHOT_COUNT, _SNAPSHOT_FIRST, _SNAPSHOT_IPV6 = (word("snapshot", name) for name in ("count", "first", "with_ipv6"))
_VERSION, _GAP, _BURST = long("directory", "version"), long("directory", "gap_ps"), word("directory", "burst")
_PROBE_PAYLOAD = b"bitcoin-sprint: can this interface send?"
_SLEEP_NS = 100_000
"""What a sleep may be late by."""
_ATTRIBUTES = struct.Struct("=IIIIQQIIIIQQIII4x")
_SIZE_IN, _SIZE_OUT, _REPEAT = 8, 12, 32
"""Where they lie in the attributes of BPF_PROG_TEST_RUN."""
_MAX_INTERRUPTIONS = 1000
_ENOTSUPP = 524
_HOPELESS = {errno.EINVAL, errno.ENODEV, errno.EBADF, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, _ENOTSUPP}
_REFUSALS = {
    errno.EINVAL: "live frames are refused: the parked link is gone, or the kernel is older than 5.18",
    errno.ENODEV: "the parked link is gone",
    errno.EPERM: "CAP_SYS_ADMIN is needed",
}

_libc = ctypes.CDLL(None, use_errno=True)  # lets go of the GIL for the time of each call
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_long]


class RunReport(NamedTuple):
    """What became of one payload; times are CLOCK_MONOTONIC."""

    attempted: int
    """Frames handed to drivers, those of subscribers who had left meanwhile not counted."""
    transmitted: int
    """Taken by them."""
    lost: int
    """Not: attempted less transmitted, and those whose turn never came."""
    started_ns: int
    first_frame_ns: int
    """The first frame's turn; 0 if none had one."""
    first_rank_ended_ns: int
    """The last frame of the first rank was taken or refused; 0 if there is none of it."""
    ended_ns: int
    error: int
    """The errno that ended it before its time, or 0."""


@final
class _Lane:
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
        self._words[_STEP] = 0
        self.unpin()

    def pin(self, version: int) -> None:
        self._longs[_PINNED] = version

    def unpin(self) -> None:
        self._longs[_PINNED] = 0

    def say_step(self, step: Step) -> None:
        self._words[_STEP] = step

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
        words, longs = self._words, self._longs
        length = len(payload)
        words[_PLACE], words[_STRIDE], words[_COUNT], words[_FIRST] = place, stride, count, first
        words[_LENGTH], words[_SUM], words[_DIRECT] = length, word_sum(payload), direct
        words[_CURSOR] = words[_SKIPPED] = words[_ATTEMPTED] = words[_TRANSMITTED] = words[_DROPPED] = 0
        longs[_BEGAN] = longs[_FIRST_ENDED] = longs[_ENDED] = 0
        self._payload[:length] = payload
        size = length + (IPV6_HEADERS if ipv6 else IPV4_HEADERS)
        if size != self._size:
            struct.pack_into("=I", self._attributes, _SIZE_IN, size)
            kernel.XDP_MD.pack_into(self._context, 0, 0, size, 0, self._context_index, 0, 0)
            self._size = words[_FRAME] = size
        self.error = 0

    def run(self, burst: int, gap_ps: int) -> None:
        """Calls until the cursor is at the end; `error` says what else ended it."""
        words, attributes, count = self._words, self._attributes, self._words[_COUNT]
        due, at = time.monotonic_ns(), 0
        interruptions = 0
        while at < count:
            repeat = min(burst, count - at) if burst else count - at
            struct.pack_into("=I", attributes, _REPEAT, repeat)
            # The kernel leaves the frame's size here, and takes it for the room that we have next time.
            struct.pack_into("=I", attributes, _SIZE_OUT, 0)
            if _syscall(*self._call, self._call_at, _ATTRIBUTES.size) < 0:
                self.error = ctypes.get_errno()
                interruptions += 1
                # A signal, partway: Python's handler runs before the next call, which goes on at the cursor.
                if self.error != errno.EINTR or interruptions > _MAX_INTERRUPTIONS:
                    break
                self.error = 0
            before, at = at, words[_CURSOR]
            if before == at and not interruptions:
                self.error = errno.ESTALE
                break
            if gap_ps and at < count:
                due += (at - before) * gap_ps // 1000
                _wait_until(due)

    def result(self) -> tuple[int, ...]:
        """attempted, transmitted, skipped, began, first rank ended, ended."""
        words, longs = self._words, self._longs
        return (
            *(words[_ATTEMPTED], words[_TRANSMITTED], words[_SKIPPED]),
            *(longs[_BEGAN], longs[_FIRST_ENDED], longs[_ENDED]),
        )

    def close(self) -> None:
        self.unpin()
        for view in (self._words, self._longs, self._payload):
            view.release()


def _wait_until(due_ns: int) -> None:
    """Sleep for the most of it, as long as a sleep is worth its wake-up, then spin."""
    while (left := due_ns - time.monotonic_ns()) > 0:
        if left > _SLEEP_NS:
            time.sleep((left - _SLEEP_NS) / 1e9)


@final
class FanoutRun:
    """One sender, in one thread of one process; a context manager."""

    def __init__(self, handover: FanoutHandover, sender: Sender, *, cpus: tuple[int, ...] = ()) -> None:
        """Map the shared memory.

        `cpus` names a second CPU, which sends half of each order at the same time from a thread of its own; worth it
        where interfaces have a queue for each. Raises OSError.
        """
        if len(cpus) >= RUN_CPUS:
            raise ValueError(f"cpus={cpus}: at most {RUN_CPUS - 1} beside the caller's is expected")
        self.step = Step.LIVE_FRAMES
        self.reason: str | None = None
        """Why the step is none above; None on the first."""
        self.sent = self.lost = 0
        """Frames, of all runs."""
        self._short = 0
        with contextlib.ExitStack() as undo:

            def mapped(fd: int, entry_bytes: int, entries: int) -> MappedArray:
                area = MappedArray(fd, entry_bytes, entries)
                undo.callback(area.close)
                return area

            self._directory = mapped(handover.directory_fd, EGRESS.layouts["directory"].size, 1)
            self._snapshots = mapped(handover.snapshots_fd, _SNAPSHOT.size, SNAPSHOTS)
            runs = mapped(handover.runs_fd, _RUN.size, RUNS)
            self._lanes = []
            for number in range(RUN_CPUS):
                lane = _Lane(handover, runs, sender * RUN_CPUS + number)
                undo.callback(lane.close)
                self._lanes.append(lane)
            self._helper = _Helper(self._lanes[1], cpus[0]) if cpus else None
            if self._helper is not None:
                undo.callback(self._helper.close)
            self._undo = undo.pop_all()

    def send(self, payload: bytes | memoryview) -> RunReport:
        """To every subscriber of the table as it stands now, the first rank first; nothing once stepped down.

        `payload` is of 1 to PAYLOAD_LIMIT bytes. Raises ValueError for another size, and nothing for what the machine
        refuses: that is in the report.
        """
        if not 0 < len(payload) <= PAYLOAD_LIMIT:
            raise ValueError(f"a payload of {len(payload)} bytes: 1 to {PAYLOAD_LIMIT} are expected")
        started = time.monotonic_ns()
        if self.step is not Step.LIVE_FRAMES:
            return RunReport(0, 0, 0, started, 0, 0, started, 0)
        lane = self._lanes[0]
        try:
            version = self._pin(lane)
            number = version % SNAPSHOTS
            words, base = self._snapshots.words, number * _SNAPSHOT_WORDS
            count, first = words[base + _SNAPSHOT_COUNT], words[base + _SNAPSHOT_FIRST]
            ipv6 = bool(words[base + _SNAPSHOT_IPV6])
            if count == 0:
                return RunReport(0, 0, 0, started, 0, 0, started, 0)
            burst, gap = self._directory.words[_BURST], self._directory.longs[_GAP]
            place = number * SUBSCRIBERS
            if self._helper is None or count < 2 * BATCH:
                lane.prepare(payload, place=place, stride=1, count=count, first=first, ipv6=ipv6)
                lane.run(burst, gap)
                results = [lane.result()]
            else:
                other = self._lanes[1]
                other.prepare(payload, place=place + 1, stride=2, count=count // 2, first=first // 2, ipv6=ipv6)
                self._helper.start(burst, 2 * gap)
                half, first_half = count - count // 2, first - first // 2
                lane.prepare(payload, place=place, stride=2, count=half, first=first_half, ipv6=ipv6)
                lane.run(burst, 2 * gap)
                self._helper.finish()
                results = [lane.result(), other.result()]
        finally:
            lane.unpin()
        return self._report(started, count, results)

    def prove(self, entry: int) -> str | None:
        """Send one frame to an entry of FanoutTable.probe(): None if the driver took it, else why it is not proven.

        Works on every step of the ladder, and changes none.
        """
        lane = self._lanes[0]
        lane.prepare(_PROBE_PAYLOAD, place=0, stride=1, count=1, first=0, ipv6=False, direct=entry + 1)
        lane.run(0, 0)
        attempted, transmitted, *_ = lane.result()
        if lane.error:
            return refusal(lane.error)
        if transmitted:
            return None
        if attempted:
            return (
                "the driver took no live frame: it has no ndo_xdp_xmit, or its peer neither XDP nor GRO, or it is down"
            )
        return "the program made no frame"

    def restore(self) -> None:
        """Back to live frames, after what had failed was mended."""
        self._short = 0
        self._set_step(Step.LIVE_FRAMES, None)

    def _pin(self, lane: _Lane) -> int:
        current = self._directory.longs
        while True:
            version = current[_VERSION]
            lane.pin(version)
            if current[_VERSION] == version:
                return version

    def _report(self, started: int, count: int, results: list[tuple[int, ...]]) -> RunReport:
        attempted, transmitted, skipped = (sum(result[at] for result in results) for at in range(3))
        began = min((result[3] for result in results if result[3]), default=0)
        error = next((lane.error for lane in self._lanes if lane.error), 0)
        lost = max(count - skipped - transmitted, 0)
        self.sent += transmitted
        self.lost += lost
        ended = max(*(result[5] for result in results), started) if transmitted else time.monotonic_ns()
        self._judge(count - skipped, lost, error)
        first_ended = max(result[4] for result in results)
        return RunReport(attempted, transmitted, lost, started, began, first_ended, ended, error)

    def _judge(self, due: int, lost: int, error: int) -> None:
        if lost <= due * SHORT_SHARE and not error:
            self._short = 0
            return
        self._short += 1
        if error in _HOPELESS or self._short >= SHORT_RUNS:
            why = refusal(error) if error else f"drivers took {due - lost} of {due} live frames"
            self._set_step(Step.AF_XDP, why if error in _HOPELESS else f"{self._short} times on end: {why}")

    def _set_step(self, step: Step, reason: str | None) -> None:
        self.step, self.reason = step, reason
        for lane in self._lanes:
            lane.say_step(step)

    def close(self) -> None:
        """Unmap; the handover's descriptors stay open. Harmless if repeated."""
        self._undo.close()

    def __enter__(self) -> FanoutRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def refusal(error: int) -> str:
    """An errno of a run in words."""
    name = _REFUSALS.get(error) or ("live frames are not supported" if error == _ENOTSUPP else os.strerror(error))
    return f"{name} (errno {error})"


@final
class _Helper:
    """The second CPU's thread: waits in the kernel, runs its lane, tells. It takes no signal.

    The order to go is a token that one of two takes: where this thread isn't given its CPU, the caller takes it back,
    and runs the lane itself.
    """

    def __init__(self, lane: _Lane, cpu: int) -> None:
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
        self._order = (burst, gap_ps)
        os.eventfd_write(self._go, 1)

    def finish(self) -> None:
        """Until the lane has been run, by whomever."""
        if self._order is not None and self._take():
            self._lane.run(*self._order)
        else:
            os.eventfd_read(self._done)

    def close(self) -> None:
        self._order = None
        os.eventfd_write(self._go, 1)
        self._thread.join()
        os.close(self._go)
        os.close(self._done)
