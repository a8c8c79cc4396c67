"""The steps taken in a forked child: what the kernel sees of them, what is left after undo, pinning and policy."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st

from sprint import optimize
from sprint.optimize import Optimizations, cpu_plan
from tests.unit.optimized_child import (
    DETAIL_BYTES,
    RESET,
    USABLE,
    everything,
    in_child,
    named,
    plan,
    root,
    slack_ns,
    state,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest


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
