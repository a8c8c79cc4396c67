"""One sender's runs: a payload to every subscriber in one system call. Nothing here locks, compiles or asks netlink.

What was sent is what drivers took, by the kernel's tracepoint; the rest is in the report, and repaired by others. A
machine that refuses never raises here: the report says so, and after a few times on end the sender steps down from the
ladder's first rung, says why, and sends nothing more. Others (see egress) serve on the rungs below.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING, NamedTuple, final

from xdp.fanout_lane import Helper, Lane, LaneResult
from xdp.fanout_maps import (
    BATCH,
    EGRESS,
    ENTRIES,
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
    from collections.abc import Callable
    from types import TracebackType

AGAIN_NS = 5_000_000
"""For so long frames that a driver had no room for are tried again, a little longer than the scheduler lets others have
a CPU for; then subscribers have it repaired over TCP."""
_AGAIN_PAUSE_S = 20e-6
CONSIDERATE_BURST = 512
"""Frames a call where others may want to go first: about 0.15 ms."""
SHORT_SHARE = 0.01
"""Frames missing from which a run counts as short: one now and then is lost for want of a place in a ring."""
SHORT_RUNS = 3
"""On end, until the sender steps down; and good ones, until it is as if it had never done so."""
FIRST_PAUSE_NS, LAST_PAUSE_NS = 30_000_000_000, 600_000_000_000
"""Until it may be back when it has stepped down for the second time; doubled each further time up to the last."""
_SNAPSHOT = EGRESS.layouts["snapshot"]
_SNAPSHOT_WORDS = _SNAPSHOT.size // 4
_SNAPSHOT_COUNT, _SNAPSHOT_FIRST, _SNAPSHOT_IPV6, _SNAPSHOT_INTERFACES = (
    word("snapshot", name) for name in ("count", "first", "with_ipv6", "interfaces")
)
_VERSION, _GAP = long("directory", "version"), long("directory", "gap_ps")
_BURST, _PROOFS, _NARROW, _CHANGES = (word("directory", name) for name in ("burst", "proofs", "narrow", "changes"))
_PROBE_PAYLOAD = b"bitcoin-sprint: can this interface send?"
_ENOTSUPP = 524
_HOPELESS = {errno.EINVAL, errno.ENODEV, errno.EBADF, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, _ENOTSUPP}
_REFUSALS = {
    errno.EINVAL: "live frames are refused: the parked link is gone, or the kernel is older than 5.18",
    errno.ENODEV: "the parked link is gone",
    errno.EPERM: "CAP_SYS_ADMIN is needed",
}


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
class FanoutRun:
    """One sender, in one thread of one process; a context manager."""

    def __init__(self, handover: FanoutHandover, sender: Sender, *, cpus: tuple[int, ...] = ()) -> None:
        """Map the shared memory.

        `cpus` names a second CPU, which sends half of each order at the same time from a thread of its own, as long as
        the table's owner doesn't say that an interface has one queue only. The caller's own thread should be pinned to
        another. Raises OSError.
        """
        if len(cpus) >= RUN_CPUS:
            raise ValueError(f"cpus={cpus}: at most {RUN_CPUS - 1} beside the caller's is expected")
        self.step = Step.LIVE_FRAMES
        self.reason: str | None = None
        """Why the step is none above; None on the first."""
        self.sent = self.lost = 0
        """Frames, of all runs."""
        self._short = self._good = self._proofs = self._changes = 0
        self._due_ns = self._pause_ns = 0
        """When it may be back, and for how long it waits the next time."""
        with contextlib.ExitStack() as undo:

            def mapped(fd: int, entry_bytes: int, entries: int) -> MappedArray:
                area = MappedArray(fd, entry_bytes, entries)
                undo.callback(area.close)
                return area

            self._directory = mapped(handover.directory_fd, EGRESS.layouts["directory"].size, 1)
            self._snapshots = mapped(handover.snapshots_fd, _SNAPSHOT.size, SNAPSHOTS)
            runs = mapped(handover.runs_fd, EGRESS.layouts["run"].size, RUNS)
            self._lanes = []
            for number in range(RUN_CPUS):
                lane = Lane(handover, runs, sender * RUN_CPUS + number)
                undo.callback(lane.close)
                self._lanes.append(lane)
            self._helper = Helper(self._lanes[1], cpus[0]) if cpus else None
            if self._helper is not None:
                undo.callback(self._helper.close)
            self._undo = undo.pop_all()
        self.restore()

    def send(self, payload: bytes | memoryview, *, go_on: Callable[[], bool] | None = None) -> RunReport:
        """To every subscriber of the table as it stands now, the first rank first; nothing once stepped down.

        Up again by restore(), or by itself after FanoutTable.vouch(). With `go_on` it is sent by this CPU alone, in
        calls of CONSIDERATE_BURST; that is asked between them, and False ends the run: those whose turn didn't come are
        not lost.

        `payload` is of 1 to PAYLOAD_LIMIT bytes. Raises ValueError for another size, and nothing for what the machine
        refuses: that is in the report.
        """
        if not 0 < len(payload) <= PAYLOAD_LIMIT:
            raise ValueError(f"a payload of {len(payload)} bytes: 1 to {PAYLOAD_LIMIT} are expected")
        started = time.monotonic_ns()
        if self.step is not Step.LIVE_FRAMES:
            self.recover()
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
            if go_on is not None:
                lane.prepare(payload, place=place, stride=1, count=count, first=first, ipv6=ipv6)
                lane.run(min(burst or CONSIDERATE_BURST, CONSIDERATE_BURST), gap, go_on)
                results = [lane.result()]
                if not lane.error:
                    count = lane.visited
            elif self._helper is None or count < 2 * BATCH or self._directory.words[_NARROW]:
                lane.prepare(payload, place=place, stride=1, count=count, first=first, ipv6=ipv6)
                lane.run(burst, gap)
                results = [lane.result()]
                if lane.losses and not lane.error and words[base + _SNAPSHOT_INTERFACES] == 1:
                    results = [self._send_again(lane, payload, place, results[0], (burst, gap), ipv6=ipv6)]
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

    @staticmethod
    def _send_again(
        lane: Lane, payload: bytes | memoryview, place: int, result: LaneResult, pace: tuple[int, int], *, ipv6: bool
    ) -> LaneResult:
        """What the driver had no room for, while the order is still held: what came of the run in the end.

        A veth's ring overflows when its other end is being polled by another CPU, which had something of its own to
        send there, and that CPU is busy or taken away for a moment: then thousands are lost at once.
        """
        lost, pause_s, give_up_ns = lane.lost(), _AGAIN_PAUSE_S, time.monotonic_ns() + AGAIN_NS
        while lost and not lane.error and time.monotonic_ns() < give_up_ns:
            time.sleep(pause_s)
            pause_s *= 2
            left: list[tuple[int, int]] = []
            for start, count in lost:
                lane.prepare(payload, place=place + start, stride=1, count=count, first=0, ipv6=ipv6)
                lane.run(*pace)
                again = lane.result()
                ended_ns = max(result.ended_ns, again.ended_ns)
                result = result._replace(transmitted=result.transmitted + again.transmitted, ended_ns=ended_ns)
                left += [(start + first, length) for first, length in lane.lost()]
            lost = left
        return result

    def prove(self, entry: int) -> str | None:
        """Send one frame to an entry of FanoutTable.probe(): None if the driver took it, else why it is not proven.

        Works on every step of the ladder, and changes none.
        """
        lane = self._lanes[0]
        lane.prepare(_PROBE_PAYLOAD, place=0, stride=1, count=1, first=0, ipv6=False, direct=entry + 1)
        lane.run(0, 0)
        result = lane.result()
        if lane.error:
            return refusal(lane.error)
        if result.transmitted:
            return None
        if result.attempted:
            return (
                "the driver took no live frame: it has no ndo_xdp_xmit, or its peer neither XDP nor GRO, or it is down"
            )
        return "the program made no frame"

    def recover(self) -> bool:
        """Back to live frames if the table has vouched for its interfaces since the step down; whether that is so.

        A proof is one frame. Where many are lost all the same, the sender would be up and down all the time, and its
        subscribers lose a few records each time: so it waits longer after each relapse, if no link has changed.
        """
        words = self._directory.words
        if self.step is Step.LIVE_FRAMES or words[_PROOFS] == self._proofs:
            return False
        if time.monotonic_ns() < self._due_ns and words[_CHANGES] == self._changes:
            return False
        self.restore()
        return True

    def rehearse(self) -> None:
        """Go the way of a publication and send nothing: one frame to an entry that there isn't, which is dropped.

        That alone decides how soon the first frame leaves after a pause. Changes no step, and no count.
        """
        lane = self._lanes[0]
        lane.prepare(_PROBE_PAYLOAD, place=0, stride=1, count=1, first=0, ipv6=False, direct=ENTRIES + 1)
        lane.run(0, 0)
        lane.result()

    def restore(self) -> None:
        """Back to live frames, after what had failed was mended."""
        self._short = self._good = 0
        self._set_step(Step.LIVE_FRAMES, None)

    def _pin(self, lane: Lane) -> int:
        current = self._directory.longs
        while True:
            version = current[_VERSION]
            lane.pin(version)
            if current[_VERSION] == version:
                return version

    def _report(self, started: int, count: int, results: list[LaneResult]) -> RunReport:
        attempted = sum(result.attempted for result in results)
        transmitted = sum(result.transmitted for result in results)
        due = count - sum(result.skipped for result in results)
        error = next((lane.error for lane in self._lanes[: len(results)] if lane.error), 0)
        lost = max(due - transmitted, 0)
        self.sent += transmitted
        self.lost += lost
        self._judge(due, lost, error)
        began = min((result.began_ns for result in results if result.began_ns), default=0)
        first_ended = max(result.first_rank_ended_ns for result in results)
        ended = max(result.ended_ns for result in results) or time.monotonic_ns()
        return RunReport(attempted, transmitted, lost, started, began, first_ended, ended, error)

    def _judge(self, due: int, lost: int, error: int) -> None:
        if lost <= due * SHORT_SHARE and not error:
            self._short = 0
            self._good += 1
            if self._good >= SHORT_RUNS:
                self._pause_ns = 0
            return
        self._short += 1
        self._good = 0
        if error in _HOPELESS or self._short >= SHORT_RUNS:
            why = refusal(error) if error else f"drivers took {due - lost} of {due} live frames"
            self._set_step(Step.AF_XDP, why if error in _HOPELESS else f"{self._short} times on end: {why}")
            self._due_ns = time.monotonic_ns() + self._pause_ns
            self._pause_ns = min(max(2 * self._pause_ns, FIRST_PAUSE_NS), LAST_PAUSE_NS)

    def _set_step(self, step: Step, reason: str | None) -> None:
        self._proofs, self._changes = self._directory.words[_PROOFS], self._directory.words[_CHANGES]
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
