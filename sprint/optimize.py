"""OPTIMIZE_SYSTEM: what the calling process asks of the machine to be quick, and the undoing of each of it.

Optimizations owns what it changed and nothing else: undo() puts back what stood before, in reverse order, once. A step
that the machine refuses is a Step with applied=False whose detail names the remedy; it is no exception, stops no other
step, and is logged by the caller, never here. Steps that the plan doesn't ask for aren't listed.

Affinity, policy and timer slack belong to the calling thread: apply and undo from the main thread, apply before others
start. Those inherit affinity and slack, not the real-time policy. Memory locks don't outlive a fork. Whoever gives up
privileges does so before apply(): the kernel asks again at each allocation whether its memory may be locked.

A process that spins under SCHED_FIFO must not meet the kernel's real-time throttling. Up to Linux 6.11 that takes it
off its CPU for 50 ms of every second (sched_rt_runtime_us 950000), even when nobody else wants the CPU. From 6.12 on
the fair server lends at most as much, and only to tasks that are starving, so a CPU of one's own is all that is needed.
But a kernel built with CONFIG_RT_GROUP_SCHED throttles whatever its version (measured on 6.18: 48 ms a second on a CPU
without other work), and only its symbol table tells, to whoever asks.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from sprint.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

PR_SET_TIMERSLACK: Final = 29
PR_GET_TIMERSLACK: Final = 30
MCL_CURRENT: Final = 1
MCL_FUTURE: Final = 2
MCL_ONFAULT: Final = 4
"""<linux/prctl.h> and <asm-generic/mman.h>; x86-64 and arm64 share these values."""

SCHED_DEADLINE: Final = 6
CAP_SYS_NICE: Final = 23

FAIR_SERVER_SINCE: Final = (6, 12)
RT_GROUP_SYMBOL: Final = b"cpu_rt_runtime_write"
"""Handler of the cgroup file cpu.rt_runtime_us: compiled in exactly when CONFIG_RT_GROUP_SCHED is."""

MIN_CPUS_TO_SPIN: Final = 2
COLLECTION_INTERVAL_NS: Final = 1_000_000_000
COLLECTION_COUNTS: Final = (700, 10, 10)
"""New objects, then collections of the younger generation, before a generation is worth a pass: CPython's own figures
up to 3.12, which count on while the collector is switched off."""


@dataclass(frozen=True, slots=True)
class Step:
    """What became of one optimisation: done, or refused with the reason and the remedy in one line.

    The details fit the 160 bytes that the status block keeps of each.
    """

    name: str
    applied: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Which steps a process wants. The timer slack is always lowered."""

    cpus: frozenset[int] | None
    """Run on these only; None: wherever the kernel likes."""
    realtime_priority: int | None
    """SCHED_FIFO, 1 to 99; None: leave the policy."""
    lock_memory: bool
    freeze_gc: bool
    spin: bool
    """Whether the process means to poll without sleeping; Optimizations.spins says whether it may."""


def cpu_plan(usable: set[int]) -> tuple[frozenset[int] | None, frozenset[int] | None]:
    """(CPUs of the relay, CPUs of every other process): the highest-numbered alone, and the rest.

    The highest, because device interrupts and the kernel's housekeeping prefer CPU 0. With one CPU nobody is pinned.
    """
    if len(usable) < MIN_CPUS_TO_SPIN:
        return None, None
    relay = max(usable)
    return frozenset({relay}), frozenset(usable - {relay})


def throttling(release: str, runtime_us: int, period_us: int, group_scheduling: bool) -> str | None:
    """Why a spinning SCHED_FIFO process would be stopped again and again, and the remedy; None: it wouldn't be.

    `release` as uname has it; `runtime_us` and `period_us` are kernel.sched_rt_runtime_us and sched_rt_period_us;
    `group_scheduling`: whether the kernel was built with CONFIG_RT_GROUP_SCHED.
    """
    if runtime_us < 0 or runtime_us >= period_us:
        return None
    version = re.match(r"(\d+)\.(\d+)", release)
    older = version is None or (int(version[1]), int(version[2])) < FAIR_SERVER_SINCE
    if not older and not group_scheduling:
        return None
    stops = f"stops a spinning real-time process {(period_us - runtime_us) / period_us:.0%} of the time"
    if older:
        return f"Linux {release} {stops}: use 6.12+, or kernel.sched_rt_runtime_us=-1 (unguards that CPU's others)"
    return f"Linux {release} with CONFIG_RT_GROUP_SCHED {stops}: set kernel.sched_rt_runtime_us=-1"


def cpu_quota(root: str = "/") -> float | None:
    """How many CPUs' worth of time the control groups allow this process (cgroup v2 or v1); None: no limit."""
    allowed: list[float] = []
    for line in _read(f"{root}proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = f"{root}sys/fs/cgroup" + (f"/{controllers}" if controllers else "")
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            group = "/".join([base, *parts[:depth]])
            limit = (
                [_read(f"{group}/cpu.cfs_quota_us").strip(), _read(f"{group}/cpu.cfs_period_us").strip()]
                if controllers
                else _read(f"{group}/cpu.max").split()
            )
            if len(limit) == 2 and all(number.isdecimal() for number in limit) and int(limit[1]):
                allowed.append(int(limit[0]) / int(limit[1]))
    return min(allowed, default=None)


@final
class Optimizations:
    """The steps of one plan on the calling process: a context manager that applies on entry and undoes on exit."""

    __slots__ = ("_next_collection_ns", "_plan", "_undo", "spins", "steps")

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._undo: list[tuple[str, Callable[[], None]]] = []
        self._next_collection_ns: int | None = None
        self.steps: tuple[Step, ...] = ()
        self.spins = False
        """Whether the process was granted busy polling."""

    def apply(self) -> tuple[Step, ...]:
        """Take every step of the plan; a second call before undo() changes nothing. Returns all of them, in order."""
        if not self.steps:
            try:
                self.steps = tuple(self._take_steps())
            except BaseException:  # an interrupt in the middle must not leave half of it behind
                self.undo()
                raise
        return self.steps

    def undo(self) -> tuple[Step, ...]:
        """Put back what was changed, last first; again: nothing. Returns a Step for each that couldn't be put back."""
        stuck = []
        self.steps, self.spins, self._next_collection_ns = (), False, None
        while self._undo:
            name, put_back = self._undo.pop()
            try:
                put_back()
            except (OSError, HostError) as error:
                stuck.append(Step(name, False, f"not undone: {error}"))
        return tuple(stuck)

    def __enter__(self) -> Optimizations:
        self.apply()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def idle(self) -> None:
        """To be called when there is nothing to do; what collect_if_due() does, at the present time."""
        if self._next_collection_ns is not None:
            self.collect_if_due(time.monotonic_ns())

    def collect_if_due(self, now_ns: int) -> int | None:
        """Collect garbage if enough piled up, at most once a second.

        `now_ns`: a monotonic clock. Returns the generation that was collected, None when none was. Without the gc step
        it does nothing. The oldest generation has its turn as well, after ten passes over the middle one: it holds only
        what outlived the start, and a cycle that got there would otherwise stay for good.
        """
        if self._next_collection_ns is None or now_ns < self._next_collection_ns:
            return None
        counts = gc.get_count()
        if counts[0] < COLLECTION_COUNTS[0]:
            return None
        generation = max(g for g in range(3) if g == 0 or counts[g] >= COLLECTION_COUNTS[g])
        gc.collect(generation)
        self._next_collection_ns = now_ns + COLLECTION_INTERVAL_NS
        return generation

    def _take_steps(self) -> Iterator[Step]:
        plan = self._plan
        before = os.sched_getaffinity(0)
        if plan.cpus is not None:
            cpus = plan.cpus
            yield self._take("pinning", lambda: _pin(cpus, before))
        if plan.spin:
            step = self._take("spin", lambda: _may_spin(before | os.sched_getaffinity(0)))
            self.spins = step.applied
            yield step
        yield self._take("timer slack", _lower_timer_slack)
        if plan.freeze_gc:
            step = self._take("gc", _freeze_gc)
            self._next_collection_ns = 0
            yield step
        if plan.lock_memory:  # after the collection: garbage needs no locking
            yield self._take("memory", _lock_memory)
        if plan.realtime_priority is not None:  # last: a real-time process has no business populating memory
            priority, spins = plan.realtime_priority, self.spins
            yield self._take("realtime", lambda: _go_realtime(priority, spins))

    def _take(self, name: str, step: Callable[[], tuple[str, Callable[[], None]]]) -> Step:
        try:
            detail, put_back = step()
        except (OSError, HostError) as error:
            return Step(name, False, str(error))
        self._undo.append((name, put_back))
        return Step(name, True, detail)


def _pin(cpus: frozenset[int], before: set[int]) -> tuple[str, Callable[[], None]]:
    def put_back() -> None:
        os.sched_setaffinity(0, before)

    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        raise HostError(f"CPU {_listed(cpus)} refused ({error.strerror}): allow it in this process's cpuset") from error
    got = os.sched_getaffinity(0)
    if got != cpus:  # the kernel silently leaves out what is offline or outside the cpuset
        put_back()
        raise HostError(f"CPU {_listed(cpus)} asked for, {_listed(got)} usable: allow them in this process's cpuset")
    return f"on CPU {_listed(cpus)} only", put_back


def _may_spin(usable: set[int]) -> tuple[str, Callable[[], None]]:
    if len(usable) < MIN_CPUS_TO_SPIN:
        raise HostError(
            f"only {len(usable)} usable CPU: a spinning process would starve the others; give it at least "
            f"{MIN_CPUS_TO_SPIN}"
        )
    quota = cpu_quota()
    if quota is not None and quota < MIN_CPUS_TO_SPIN:
        raise HostError(
            f"the control group's CPU quota is {quota:g}: a spinning process would use it up and be stopped; raise it "
            f"to at least {MIN_CPUS_TO_SPIN} (cpu.max)"
        )
    return f"busy polling, {len(usable)} usable CPUs", _nothing


def _lower_timer_slack() -> tuple[str, Callable[[], None]]:
    before = _libc("prctl", PR_GET_TIMERSLACK, 0, 0, 0, 0)
    if before <= 1:  # 0: a real-time process has none
        return f"was {before} ns already", _nothing
    _libc("prctl", PR_SET_TIMERSLACK, 1, 0, 0, 0)
    return f"1 ns instead of {before}", lambda: _nothing(_libc("prctl", PR_SET_TIMERSLACK, before, 0, 0, 0))


def _freeze_gc() -> tuple[str, Callable[[], None]]:
    was_enabled = gc.isenabled()

    def put_back() -> None:
        gc.unfreeze()
        if was_enabled:
            gc.enable()

    gc.collect()
    gc.freeze()
    gc.disable()
    return f"{gc.get_freeze_count()} objects frozen, collected only when idle", put_back


def _lock_memory() -> tuple[str, Callable[[], None]]:
    """Everything mapped now is made resident, later mappings are locked page by page as they are touched.

    The first half also takes the copy-on-write faults that a forked process would meet one by one in its hot path (the
    reference counts of all it inherited). Populating later mappings at once would only add milliseconds to them: each
    thread's stack is 8 MB.

    A lock that counts against a finite RLIMIT_MEMLOCK is refused: with MCL_FUTURE every later allocation beyond it
    fails. Whether the limit counts is asked of the kernel itself, which with a limit of 0 serves none but the
    privileged; a capability read from /proc would mislead inside a user namespace.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    finite = soft != resource.RLIM_INFINITY
    if finite:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, hard))
    try:
        _libc("mlockall", MCL_CURRENT)
        try:
            _libc("mlockall", MCL_FUTURE | MCL_ONFAULT)
        except OSError:
            _libc("munlockall")
            raise
    except OSError as error:
        remedy = "run as root, grant CAP_IPC_LOCK, or set LimitMEMLOCK=infinity" if finite else "free some memory"
        limit = f" and RLIMIT_MEMLOCK is {soft} bytes" if finite else ""
        raise HostError(f"mlockall refused ({error.strerror}){limit}: {remedy}") from error
    finally:
        if finite:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
    locked = _status_field("VmLck").removesuffix(" kB")
    return f"{int(locked or 0) // 1024} MB locked, later pages when touched", lambda: _nothing(_libc("munlockall"))


def _go_realtime(priority: int, spins: bool) -> tuple[str, Callable[[], None]]:
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    if policy & ~os.SCHED_RESET_ON_FORK == SCHED_DEADLINE:
        raise HostError("the process is under SCHED_DEADLINE, which could not be restored: start it without")
    if spins:
        runtime_us = int(_read("/proc/sys/kernel/sched_rt_runtime_us") or 950_000)  # or else: the kernel's defaults
        period_us = int(_read("/proc/sys/kernel/sched_rt_period_us") or 1_000_000)
        why = throttling(os.uname().release, runtime_us, period_us, _rt_group())
        if why is not None:
            raise HostError(why)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    except PermissionError as error:
        if int(_status_field("CapEff") or "0", 16) >> CAP_SYS_NICE & 1:
            raise HostError(
                "SCHED_FIFO refused despite CAP_SYS_NICE: give its control group real-time runtime "
                "(cpu.rt_runtime_us), or run it in the root group"
            ) from error
        limit = resource.getrlimit(resource.RLIMIT_RTPRIO)[0]
        raise HostError(
            f"CAP_SYS_NICE is missing and RLIMIT_RTPRIO is {limit}: run as root, grant it, or set "
            f"LimitRTPRIO={priority}"
        ) from error
    except OSError as error:
        raise HostError(f"SCHED_FIFO {priority} refused ({error.strerror}): use a priority of 1 to 99") from error

    def put_back() -> None:
        try:
            os.sched_setscheduler(0, policy, parameters)
        except PermissionError as error:  # only the privileged may clear reset-on-fork
            os.sched_setscheduler(0, policy | os.SCHED_RESET_ON_FORK, parameters)
            raise HostError("SCHED_RESET_ON_FORK stays set, clearing it takes CAP_SYS_NICE") from error

    return f"SCHED_FIFO {priority}, not inherited by children", put_back


def _rt_group() -> bool:
    """Whether this kernel was built with CONFIG_RT_GROUP_SCHED; False (the default of most) if it hides its symbols."""
    try:
        with open("/proc/kallsyms", "rb") as symbols:
            return any(RT_GROUP_SYMBOL in line for line in symbols)
    except OSError:
        return False


def _libc(function: str, *arguments: int) -> int:
    """Call a C function of integers. Raises OSError."""
    result: int = ctypes.CDLL(None, use_errno=True)[function](*map(ctypes.c_ulong, arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _status_field(name: str) -> str:
    """A field of /proc/self/status; empty when it isn't there."""
    for line in _read("/proc/self/status").splitlines():
        field, _, value = line.partition(":")
        if field == name:
            return value.strip()
    return ""


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _listed(cpus: Iterable[int]) -> str:
    numbers = sorted(cpus)
    if len(numbers) > 8:  # the detail has to stay one short line
        return f"{numbers[0]} to {numbers[-1]} ({len(numbers)} of them)"
    return ", ".join(map(str, numbers)) or "none"


def _nothing(_: object = None) -> None:
    pass
