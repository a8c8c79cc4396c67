"""Who may spin, and who may spin with a real-time policy: CPUs, quotas, and kernels that throttle."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from sprint import optimize
from sprint.optimize import Optimizations, cpu_quota, throttling
from tests.unit.optimized_child import DETAIL_BYTES, RESET, USABLE, in_child, named, plan, root

if TYPE_CHECKING:
    from pathlib import Path

two_cpus = pytest.mark.skipif(len(USABLE) < 2, reason="needs two usable CPUs")


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
