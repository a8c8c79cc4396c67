"""What tests of the optimizations share: the real system calls, each in a forked child, and what the kernel says then.

Nothing of them reaches the test run itself.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from sprint import optimize
from sprint.optimize import Plan, Step

if TYPE_CHECKING:
    from collections.abc import Callable

RESET = os.SCHED_RESET_ON_FORK
USABLE = os.sched_getaffinity(0)
DETAIL_BYTES = 160
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: SCHED_FIFO, memory locks, giving up privileges")


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
