"""Steps that are refused for want of privileges or limits, and the limits that suffice: each in a forked child."""

from __future__ import annotations

import mmap
import os
import resource
from typing import Any

import pytest

from sprint import optimize
from sprint.optimize import Optimizations
from tests.unit.optimized_child import (
    DETAIL_BYTES,
    RESET,
    USABLE,
    everything,
    in_child,
    locked_kb,
    named,
    plan,
    root,
    state,
    status,
)

NOBODY = 65534
CAP_SYS_RESOURCE = 24


def may_raise_limits() -> bool:
    return bool(int(optimize._status_field("CapEff"), 16) >> CAP_SYS_RESOURCE & 1)


raises_limits = pytest.mark.skipif(not may_raise_limits(), reason="needs CAP_SYS_RESOURCE to raise a hard limit")


def without_privileges() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


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
