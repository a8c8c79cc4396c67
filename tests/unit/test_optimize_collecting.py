"""Garbage is collected when the process is idle, each generation in its turn: in a forked child."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from sprint import optimize
from sprint.optimize import Optimizations
from tests.unit.optimized_child import in_child, plan


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
