"""The real system calls, each in a forked child, so that nothing of it reaches the test run itself."""

from __future__ import annotations

import gc
import json
import mmap
import os
import resource
import sys
import traceback
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprint import optimize
from sprint.optimize import Optimizations, Plan, Step, cpu_plan, cpu_quota, throttling

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NOBODY = 65534
RESET = os.SCHED_RESET_ON_FORK
USABLE = os.sched_getaffinity(0)

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: SCHED_FIFO, memory locks, giving up privileges")
CAP_SYS_RESOURCE = 24
DETAIL_BYTES = 160
two_cpus = pytest.mark.skipif(len(USABLE) < 2, reason="needs two usable CPUs")


def may_raise_limits() -> bool:
    return bool(int(optimize._status_field("CapEff"), 16) >> CAP_SYS_RESOURCE & 1)


raises_limits = pytest.mark.skipif(not may_raise_limits(), reason="needs CAP_SYS_RESOURCE to raise a hard limit")


def plan(
    cpus: frozenset[int] | None = None,
    realtime_priority: int | None = None,
    lock_memory: bool = False,
    freeze_gc: bool = False,
    spin: bool = False,
) -> Plan:
    return Plan(cpus, realtime_priority, lock_memory, freeze_gc, spin)


def everything() -> Plan:
    """All steps; never with spin, whose grant depends on the kernel."""
    return plan(frozenset({max(USABLE)}), realtime_priority=2, lock_memory=True, freeze_gc=True)


def in_child(body: Callable[[], Any]) -> Any:
    """What `body` returns (anything JSON can say) when it runs in a child of its own; its exceptions fail the test."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = {"value": body()}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        with os.fdopen(writing, "w") as pipe:
            json.dump(answer, pipe)
        sys.stdout.flush()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    assert said, "the child died without an answer"
    answer = json.loads(said)
    assert "error" not in answer, answer["error"]
    return answer["value"]


def status(field: str) -> str:
    with open("/proc/self/status", encoding="ascii") as lines:
        return dict(line.rstrip("\n").split(":\t", 1) for line in lines if ":\t" in line)[field].strip()


def locked_kb() -> int:
    return int(status("VmLck").removesuffix(" kB"))


def slack_ns() -> int:
    return optimize._libc("prctl", optimize.PR_GET_TIMERSLACK, 0, 0, 0, 0)


def state() -> list[object]:
    """All that the steps may change, as the kernel and the interpreter report it."""
    return [
        status("Cpus_allowed_list"),
        os.sched_getscheduler(0),
        os.sched_getparam(0).sched_priority,
        locked_kb(),
        slack_ns(),
        gc.isenabled(),
        gc.get_freeze_count() > 1000,
        list(resource.getrlimit(resource.RLIMIT_MEMLOCK)),
    ]


def named(steps: tuple[Step, ...]) -> dict[str, list[object]]:
    return {step.name: [step.applied, step.detail] for step in steps}


def without_privileges() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


# ---------------------------------------------------------------- all of it


@root
def test_every_step_is_seen_by_the_kernel_and_gone_after_undo() -> None:
    def body() -> Any:
        before = state()
        with Optimizations(everything()) as optimizations:
            steps, during = optimizations.steps, state()
        return named(steps), before, during, state()

    steps, before, during, after = in_child(body)
    assert list(steps) == ["pinning", "timer slack", "gc", "memory", "realtime"]
    assert all(applied for applied, _ in steps.values()), steps
    allowed, policy, priority, locked, _, gc_enabled, frozen, limit = during
    assert allowed == str(max(USABLE))
    assert (policy, priority) == (os.SCHED_FIFO | RESET, 2)
    assert locked > 5_000
    assert not gc_enabled
    assert frozen
    assert limit == before[-1]
    assert after == before


@root
def test_apply_and_undo_may_be_called_again() -> None:
    def body() -> Any:
        before = state()
        optimizations = Optimizations(everything())
        same = optimizations.apply() is optimizations.apply()
        once = state()
        stuck = [optimizations.undo(), optimizations.undo()]
        undone = state()
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        optimizations.undo()
        untouched = os.sched_getscheduler(0) == os.SCHED_BATCH
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        optimizations.apply()
        again = state()
        optimizations.undo()
        return same, stuck, before == undone == state(), once == again or [once, again], untouched

    same, stuck, restored, again, untouched = in_child(body)
    assert same
    assert stuck == [[], []]
    assert restored
    assert untouched
    assert again is True or [*again[0][:3], *again[0][4:]] == [*again[1][:3], *again[1][4:]]  # sizes may differ


@root
def test_an_interrupt_in_the_middle_of_apply_undoes_what_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> tuple[str, Callable[[], None]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(optimize, "_lock_memory", interrupted)

    def body() -> Any:
        before = state()
        try:
            Optimizations(everything()).apply()
        except KeyboardInterrupt:
            return before, state()
        return "not interrupted"

    before, after = in_child(body)
    assert after == before


def test_a_step_that_is_not_planned_is_neither_taken_nor_listed() -> None:
    def body() -> Any:
        before = state()
        optimizations = Optimizations(plan())
        steps = optimizations.apply()
        after = state()
        after[4] = before[4]
        collected = optimizations.collect_if_due(1 << 60)
        return [step.name for step in steps], before == after, collected, optimizations.spins

    assert in_child(body) == [["timer slack"], True, None, False]


def test_the_timer_slack_is_one_nanosecond_and_then_what_it_was() -> None:
    def body() -> Any:
        optimize._libc("prctl", optimize.PR_SET_TIMERSLACK, 7_000, 0, 0, 0)
        with Optimizations(plan()) as optimizations:
            return optimizations.steps[0].detail, slack_ns(), optimizations.undo(), slack_ns()

    assert in_child(body) == ["1 ns instead of 7000", 1, [], 7_000]


@root
def test_the_timer_slack_comes_back_after_a_real_time_policy_that_has_none() -> None:
    def body() -> Any:
        optimize._libc("prctl", optimize.PR_SET_TIMERSLACK, 7_000, 0, 0, 0)
        with Optimizations(plan(realtime_priority=2)):
            pass
        return slack_ns()

    assert in_child(body) == 7_000


# ---------------------------------------------------------------- refusals


@root
def test_without_privileges_the_refused_steps_name_the_remedy_and_the_others_are_applied() -> None:
    def body() -> Any:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))
        resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0))
        without_privileges()
        before = state()
        optimizations = Optimizations(everything())
        steps, during = named(optimizations.apply()), state()
        return steps, before, during, optimizations.undo(), state()

    steps, before, during, stuck, after = in_child(body)
    assert {name for name, (applied, _) in steps.items() if applied} == {"pinning", "timer slack", "gc"}
    assert "CAP_SYS_NICE is missing and RLIMIT_RTPRIO is 0" in steps["realtime"][1]
    assert "CAP_IPC_LOCK" in steps["memory"][1]
    assert "RLIMIT_MEMLOCK is 8388608 bytes" in steps["memory"][1]
    assert all("\n" not in detail and len(detail.encode()) <= DETAIL_BYTES for _, detail in steps.values())
    assert during[0] == str(max(USABLE))
    assert during[1:4] == before[1:4]
    assert during[7] == before[7]
    assert stuck == []
    assert after == before


@pytest.mark.parametrize("capable", [False, True])
def test_the_kernel_is_asked_with_a_limit_of_zero_whether_the_finite_one_counts(
    monkeypatch: pytest.MonkeyPatch, capable: bool
) -> None:
    """The kernel's own rule in its place: a limit of 0 serves only the capable, any other limit everybody."""
    calls = []

    def kernel(function: str, *arguments: int) -> int:
        if function == "mlockall":
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            calls.append([arguments[0], limit])
            if limit == 0 and not capable:
                raise PermissionError(1, "Operation not permitted")
        return 0

    monkeypatch.setattr(optimize, "_libc", kernel)

    def body() -> Any:
        hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        enough = 4 << 20 if hard == resource.RLIM_INFINITY else hard
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (enough, hard))
        step = named(Optimizations(plan(lock_memory=True)).apply())["memory"]
        return step[0], calls, resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == enough

    everything_now, later_on_fault = [optimize.MCL_CURRENT, 0], [optimize.MCL_FUTURE | optimize.MCL_ONFAULT, 0]
    expected = [everything_now, later_on_fault] if capable else [everything_now]
    assert in_child(body) == [capable, expected, True]


@root
@raises_limits
def test_a_limit_that_is_large_but_finite_is_refused_because_later_allocations_would_fail() -> None:
    def body() -> Any:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 40, 1 << 40))
        without_privileges()
        return named(Optimizations(plan(lock_memory=True)).apply())["memory"], locked_kb()

    (applied, detail), locked = in_child(body)
    assert not applied
    assert "LimitMEMLOCK=infinity" in detail
    assert locked == 0


@root
@raises_limits
def test_an_infinite_limit_lets_an_unprivileged_process_lock_its_memory() -> None:
    def body() -> Any:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        without_privileges()
        optimizations = Optimizations(plan(lock_memory=True))
        applied = named(optimizations.apply())["memory"][0]
        return applied, locked_kb(), optimizations.undo(), locked_kb()

    applied, locked, stuck, after = in_child(body)
    assert applied
    assert locked > 5_000
    assert (stuck, after) == ([], 0)


@root
def test_later_mappings_are_locked_but_not_made_resident_before_they_are_touched() -> None:
    def body() -> Any:
        def resident_kb() -> int:
            return int(status("VmRSS").removesuffix(" kB"))

        size = 64 << 20
        with Optimizations(plan(lock_memory=True)):
            locked, resident = locked_kb(), resident_kb()
            with mmap.mmap(-1, size) as memory:
                more_locked, untouched = locked_kb() - locked, resident_kb() - resident
                memory[: size // 2 : mmap.PAGESIZE] = b"x" * (size // 2 // mmap.PAGESIZE)
                touched = resident_kb() - resident
        return size >> 10, more_locked, untouched, touched

    size_kb, more_locked, untouched, touched = in_child(body)
    assert more_locked >= size_kb
    assert untouched < size_kb // 4 < touched < size_kb


@root
@raises_limits
def test_a_real_time_limit_suffices_without_privileges() -> None:
    def body() -> Any:
        resource.setrlimit(resource.RLIMIT_RTPRIO, (5, 5))
        without_privileges()
        return named(Optimizations(plan(realtime_priority=5)).apply())["realtime"][0], os.sched_getscheduler(0)

    assert in_child(body) == [True, os.SCHED_FIFO | RESET]


@root
def test_what_undo_may_not_clear_is_reported_once_and_the_rest_is_undone() -> None:
    def body() -> Any:
        optimizations = Optimizations(everything())
        steps = named(optimizations.apply())
        without_privileges()
        during = os.sched_getscheduler(0)
        stuck = named(optimizations.undo())
        return steps["realtime"][0], during, stuck, os.sched_getscheduler(0), locked_kb(), optimizations.undo()

    applied, during, stuck, after, locked, again = in_child(body)
    assert applied
    assert during == os.SCHED_FIFO | RESET
    assert list(stuck) == ["realtime"]
    assert locked == 0
    assert "CAP_SYS_NICE" in stuck["realtime"][1]
    assert after == os.SCHED_OTHER | RESET
    assert again == []


@root
@raises_limits
def test_a_priority_above_the_allowed_one_is_refused_with_the_limit_that_would_allow_it() -> None:
    def body() -> Any:
        resource.setrlimit(resource.RLIMIT_RTPRIO, (5, 5))
        without_privileges()
        return named(Optimizations(plan(realtime_priority=6)).apply())["realtime"], os.sched_getscheduler(0)

    (applied, detail), policy = in_child(body)
    assert not applied
    assert "RLIMIT_RTPRIO is 5" in detail
    assert "LimitRTPRIO=6" in detail
    assert policy == os.SCHED_OTHER


@root
def test_a_priority_that_the_kernel_does_not_know_is_refused() -> None:
    applied, detail = in_child(lambda: named(Optimizations(plan(realtime_priority=100)).apply())["realtime"])
    assert not applied
    assert "1 to 99" in detail


# ---------------------------------------------------------------- pinning and policy


@root
def test_the_policy_and_priority_that_stood_before_come_back() -> None:
    def body() -> Any:
        seen = []
        for policy, priority in ((os.SCHED_RR, 3), (os.SCHED_FIFO | RESET, 9), (os.SCHED_BATCH, 0)):
            os.sched_setscheduler(0, policy, os.sched_param(priority))
            with Optimizations(plan(realtime_priority=2)):
                during = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
            seen.append((*during, os.sched_getscheduler(0), os.sched_getparam(0).sched_priority))
        return seen

    fifo = [os.SCHED_FIFO | RESET, 2]
    assert in_child(body) == [
        [*fifo, os.SCHED_RR, 3],
        [*fifo, os.SCHED_FIFO | RESET, 9],
        [*fifo, os.SCHED_BATCH, 0],
    ]


@root
def test_a_child_of_a_real_time_process_starts_with_the_ordinary_policy() -> None:
    def body() -> Any:
        with Optimizations(plan(realtime_priority=2)):
            return in_child(lambda: os.sched_getscheduler(0))

    assert in_child(body) == os.SCHED_OTHER


def test_cpus_that_are_not_there_are_refused_and_the_mask_stays() -> None:
    missing = max(USABLE) + 900

    def body() -> Any:
        before = os.sched_getaffinity(0)
        answers = []
        for cpus in (frozenset({missing}), frozenset({missing, max(USABLE)}), frozenset({*range(900), missing})):
            optimizations = Optimizations(plan(cpus))
            answers.append((*named(optimizations.apply())["pinning"], os.sched_getaffinity(0) == before))
            optimizations.undo()
        return answers

    for applied, detail, unchanged in in_child(body):
        assert not applied
        assert str(missing) in detail
        assert "cpuset" in detail
        assert len(detail.encode()) <= DETAIL_BYTES
        assert unchanged


@given(st.sets(st.integers(0, 1023)))
def test_the_relay_gets_the_highest_cpu_alone_and_the_others_all_the_rest(usable: set[int]) -> None:
    relay, others = cpu_plan(usable)
    if len(usable) < 2:
        assert relay is None
        assert others is None
    else:
        assert relay == frozenset({max(usable)})
        assert others == frozenset(usable - {max(usable)})


# ---------------------------------------------------------------- spinning


@two_cpus
def test_a_process_pinned_to_one_of_two_cpus_may_spin() -> None:
    def body() -> Any:
        with Optimizations(plan(frozenset({max(USABLE)}), spin=True)) as optimizations:
            granted = optimizations.spins, named(optimizations.steps)["spin"][0]
        return *granted, optimizations.spins

    quota = cpu_quota()
    may = quota is None or quota >= 2
    assert in_child(body) == [may, may, False]


def test_with_one_usable_cpu_spinning_is_refused() -> None:
    def body() -> Any:
        os.sched_setaffinity(0, {min(USABLE)})
        optimizations = Optimizations(plan(frozenset({min(USABLE)}), spin=True))
        return named(optimizations.apply())["spin"], optimizations.spins

    (applied, detail), spins = in_child(body)
    assert not applied
    assert not spins
    assert "only 1 usable CPU" in detail


@two_cpus
def test_a_quota_below_two_cpus_refuses_spinning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "cpu_quota", lambda: 1.5)
    applied, detail = in_child(lambda: named(Optimizations(plan(spin=True)).apply())["spin"])
    assert not applied
    assert "quota is 1.5" in detail


@root
@two_cpus
@pytest.mark.parametrize("spin", [True, False])
def test_on_a_throttling_kernel_only_a_spinning_process_is_refused_real_time(
    monkeypatch: pytest.MonkeyPatch, spin: bool
) -> None:
    monkeypatch.setattr(optimize, "throttling", lambda *_: "it throttles")
    monkeypatch.setattr(optimize, "cpu_quota", lambda: None)

    def body() -> Any:
        with Optimizations(plan(realtime_priority=2, spin=spin)) as optimizations:
            return named(optimizations.steps), os.sched_getscheduler(0)

    steps, policy = in_child(body)
    assert policy == (os.SCHED_OTHER if spin else os.SCHED_FIFO | RESET)
    assert steps["realtime"][0] is not spin
    assert not spin or steps["realtime"][1] == "it throttles"


@root
def test_a_process_that_was_refused_spinning_is_not_refused_real_time_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "throttling", lambda *_: "it throttles")

    def body() -> Any:
        os.sched_setaffinity(0, {min(USABLE)})
        return {name: step[0] for name, step in named(Optimizations(plan(None, 2, spin=True)).apply()).items()}

    assert in_child(body) == {"spin": False, "timer slack": True, "realtime": True}


@root
@two_cpus
def test_on_a_kernel_that_does_not_throttle_a_spinning_process_goes_real_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "throttling", lambda *_: None)
    monkeypatch.setattr(optimize, "cpu_quota", lambda: None)
    steps = in_child(lambda: named(Optimizations(plan(realtime_priority=2, spin=True)).apply()))
    assert steps["spin"][0]
    assert steps["realtime"][0]


@pytest.mark.parametrize(
    ("release", "runtime_us", "group_scheduling", "remedy"),
    [
        ("5.14.0-503.40.1.el9_5.x86_64", 950_000, False, "6.12"),
        ("6.1.0-30-amd64", 950_000, False, "6.12"),
        ("6.11.11", 950_000, True, "6.12"),
        ("5.15", 950_000, False, "6.12"),
        ("6.1.0", 1_000_000, False, None),
        ("6.1.0", -1, True, None),
        ("6.12.0-rc1", 950_000, False, None),
        ("6.12+", 950_000, False, None),
        ("7.0.1", 950_000, False, None),
        ("10.2", 950_000, False, None),
        ("6.18.4", 950_000, True, "CONFIG_RT_GROUP_SCHED"),
        ("6.18.4", -1, True, None),
        ("unheard of", 950_000, False, "6.12"),
    ],
)
def test_throttling_depends_on_version_build_and_setting(
    release: str, runtime_us: int, group_scheduling: bool, remedy: str | None
) -> None:
    why = throttling(release, runtime_us, 1_000_000, group_scheduling)
    if remedy is None:
        assert why is None
    else:
        assert why is not None
        assert remedy in why
        assert "kernel.sched_rt_runtime_us=-1" in why
        assert "5% of the time" in why
        assert len(why.encode()) <= DETAIL_BYTES


@pytest.mark.parametrize(
    ("own_groups", "limits", "quota"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "50000 100000\n"}, 0.5),
        (
            "4:memory:/\n3:cpu,cpuacct:/x\n1:name=systemd:/\n0::/\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
            3.0,
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("0::/../../elsewhere\n", {"cpu.max": "100000 0\n"}, None),
    ],
)
def test_the_tightest_quota_on_the_way_to_the_root_group_counts(
    tmp_path: Path, own_groups: str, limits: dict[str, str], quota: float | None
) -> None:
    for name, content in {
        "proc/self/cgroup": own_groups,
        **{f"sys/fs/cgroup/{n}": c for n, c in limits.items()},
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="ascii")
    assert cpu_quota(f"{tmp_path}/") == quota


# ---------------------------------------------------------------- collecting when idle


class Knot:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.myself = self


def collected_in_order(passes: int) -> list[int | None]:
    second = optimize.COLLECTION_INTERVAL_NS
    with Optimizations(plan(freeze_gc=True)) as optimizations:
        answers = []
        for now_s in range(passes):
            kept = [Knot() for _ in range(1000)]
            answers.append(optimizations.collect_if_due(now_s * second))
            kept.clear()
        return answers


def test_garbage_is_collected_only_when_idle_and_at_most_once_a_second() -> None:
    def body() -> Any:
        second = optimize.COLLECTION_INTERVAL_NS
        with Optimizations(plan(freeze_gc=True)) as optimizations:
            knots = weakref.WeakSet(Knot() for _ in range(3000))
            piled_up = len(knots)
            first = optimizations.collect_if_due(5 * second), len(knots)
            for _ in range(1000):
                knots.add(Knot())
            too_early = optimizations.collect_if_due(6 * second - 1), len(knots)
            in_time = optimizations.collect_if_due(6 * second), len(knots)
            nothing = optimizations.collect_if_due(60 * second)
        return piled_up, first, too_early, in_time, nothing, gc.isenabled()

    assert in_child(body) == [3000, [0, 0], [None, 1000], [0, 0], None, True]


def test_idle_collects_by_itself_with_the_gc_step_and_never_without() -> None:
    def body() -> Any:
        gc.disable()
        left = []
        for frozen in (False, True):
            with Optimizations(plan(freeze_gc=frozen)) as optimizations:
                knots = weakref.WeakSet(Knot() for _ in range(1000))
                optimizations.idle()
                left.append(len(knots))
        return left

    assert in_child(body) == [1000, 0]


def test_older_generations_have_their_turn_after_ten_of_the_younger() -> None:
    answers = in_child(lambda: collected_in_order(130))
    assert answers[:11] == [0] * 10 + [1]
    assert answers.index(2) == 110
    assert answers[:110].count(1) == 10
    assert None not in answers


def test_a_cycle_that_grew_old_is_freed_in_the_end() -> None:
    def body() -> Any:
        second = optimize.COLLECTION_INTERVAL_NS
        with Optimizations(plan(freeze_gc=True)) as optimizations:
            knot = Knot()
            gc.collect()  # into the oldest generation
            trace = weakref.ref(knot)
            del knot
            for now_s in range(200):
                kept = [Knot() for _ in range(1000)]
                optimizations.collect_if_due(now_s * second)
                del kept
                if trace() is None:
                    return now_s
        return "never freed"

    assert isinstance(in_child(body), int)


def test_a_collector_that_was_off_stays_off_after_undo() -> None:
    def body() -> Any:
        gc.disable()
        with Optimizations(plan(freeze_gc=True)):
            pass
        return gc.isenabled()

    assert in_child(body) is False
