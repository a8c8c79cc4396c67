"""The doctor's findings about process and machine, on made-up hosts."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import platform
import resource
from typing import TYPE_CHECKING

import pytest

from sprint.doctor import Finding, Need, State, bypass, host
from xdp.features import Feature, Probe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RELEASE = "6.1.0-37-amd64"
ALL_CAPABILITIES = (1 << 41) - 1


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a made-up host on which everything is there: a Debian 12."""
    monkeypatch.setattr(platform, "release", lambda: RELEASE)
    write(tmp_path, "proc/self/status", f"Name:\tpython\nCapPrm:\t0\nCapEff:\t{ALL_CAPABILITIES:016x}\n")
    write(tmp_path, "proc/sys/net/core/somaxconn", "4096\n")
    write(tmp_path, "sys/devices/system/clocksource/clocksource0/current_clocksource", "tsc\n")
    write(tmp_path, "sys/devices/system/clocksource/clocksource0/available_clocksource", "tsc hpet acpi_pm\n")
    (tmp_path / f"lib/modules/{RELEASE}/build/include/generated").mkdir(parents=True)
    (tmp_path / f"lib/modules/{RELEASE}/source/include/uapi/linux").mkdir(parents=True)
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


# ── privileges and limits ──


def test_all_capabilities_are_held_by_who_has_them(root: Path) -> None:
    assert {each.state for each in host.capabilities(root)} == {State.OK}


@pytest.mark.parametrize("uid", [0, 1000])
def test_a_missing_capability_is_named_with_what_it_is_for(
    root: Path, monkeypatch: pytest.MonkeyPatch, uid: int
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    write(root, "proc/self/status", f"CapEff:\t{1 << host.CAP_NET_ADMIN | 1 << host.CAP_BPF:016x}\n")
    found = {each.subject: each for each in host.capabilities(root)}
    assert {name for name, each in found.items() if each.state is State.OK} == {"CAP_BPF", "CAP_NET_ADMIN"}
    assert (found["CAP_NET_RAW"].state, found["CAP_NET_RAW"].need) == (State.MISSING, Need.BYPASS)
    nice = found["CAP_SYS_NICE"]
    assert (nice.state, nice.need) == (State.DEGRADED, None)
    assert "scheduling" in nice.detail
    assert ("--cap-add" in nice.remedy) == (uid == 0)


def test_the_old_capability_stands_for_the_new_ones(root: Path) -> None:
    write(root, "proc/self/status", f"CapEff:\t{1 << host.CAP_SYS_ADMIN:016x}\n")
    found = {each.subject: each for each in host.capabilities(root)}
    assert (found["CAP_BPF"].state, found["CAP_PERFMON"].state) == (State.OK, State.OK)
    assert "CAP_SYS_ADMIN stands for it" in found["CAP_BPF"].detail


@pytest.mark.parametrize(
    ("soft", "hard", "state"),
    [
        (1_024, 1_024, State.DEGRADED),
        (10_255, 10_255, State.DEGRADED),
        (1_024, 10_256, State.OK),  # Sprint raises the soft one
        (1_024, resource.RLIM_INFINITY, State.OK),
    ],
)
def test_open_files_are_held_against_ten_thousand_subscribers(
    root: Path, monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, state: State
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    assert only(host.open_files(root)).state is state


def test_locked_memory_needs_no_limit_or_the_capability(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [8 << 20, 8 << 20]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    assert only(host.locked_memory(root)).state is State.OK
    write(root, "proc/self/status", "CapEff:\t0000000000000000\n")
    assert only(host.locked_memory(root)).state is State.DEGRADED
    limits[0] = resource.RLIM_INFINITY
    assert only(host.locked_memory(root)).state is State.OK


def test_memory_that_can_not_be_sealed_leaves_no_memory_engine(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(host.shared_memory(root)).state is State.OK
    monkeypatch.setattr(host, "F_SEAL_FUTURE_WRITE", 1 << 30)
    refused = only(host.shared_memory(root))
    assert (refused.state, refused.need) == (State.MISSING, Need.MEMORY)
    assert "Invalid argument" in refused.detail


@pytest.mark.parametrize(
    ("controllers", "group", "files", "state"),
    [
        ("", "/a.slice/b", {"a.slice/memory.max": "max", "a.slice/b/memory.max": str(2 << 30)}, State.OK),
        ("", "/a.slice/b", {"a.slice/memory.max": str(64 << 20), "a.slice/b/memory.max": "max"}, State.DEGRADED),
        ("memory", "/c", {"memory/c/memory.limit_in_bytes": str(100 << 20)}, State.DEGRADED),
        ("memory", "/c", {"memory/c/memory.limit_in_bytes": "9223372036854771712"}, State.OK),
        ("cpu", "/c", {"cpu/c/memory.limit_in_bytes": "1"}, State.OK),
        ("", "", {}, State.OK),
    ],
)
def test_the_least_of_the_control_groups_memory_counts(
    root: Path, controllers: str, group: str, files: dict[str, str], state: State
) -> None:
    write(root, "proc/self/cgroup", f"1:{controllers}:{group}\n\nnonsense\n")
    for name, text in files.items():
        write(root, f"sys/fs/cgroup/{name}", f"{text}\n")
    assert only(host.memory_limit(root)).state is state


def test_one_cpu_is_too_few(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert only(host.cpus(root)).state is State.DEGRADED


def test_a_quota_below_two_cpus_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    write(root, "sys/devices/system/cpu/isolated", "2\n")
    assert "2 isolated" in only(host.cpus(root)).detail
    write(root, "proc/self/cgroup", "0::/box\n")
    write(root, "sys/fs/cgroup/box/cpu.max", "150000 100000\n")
    found = only(host.cpus(root))
    assert (found.state, "1.5" in found.detail) == (State.DEGRADED, True)


@pytest.mark.parametrize(
    ("release", "runtime", "symbols", "state"),
    [
        ("6.1.0", "950000", "", State.DEGRADED),
        ("6.1.0", "-1", "", State.OK),
        ("6.12.1", "950000", "", State.OK),
        ("6.12.1", "950000", "ffff t cpu_rt_runtime_write\n", State.DEGRADED),
        ("6.12.1", "many", "", State.UNKNOWN),
    ],
)
def test_real_time_throttling_is_told_with_its_setting(
    root: Path, monkeypatch: pytest.MonkeyPatch, release: str, runtime: str, symbols: str, state: State
) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)
    write(root, "proc/sys/kernel/sched_rt_runtime_us", runtime)
    write(root, "proc/sys/kernel/sched_rt_period_us", "1000000")
    write(root, "proc/kallsyms", symbols)
    found = only(host.real_time(root))
    assert found.state is state
    assert ("sched_rt_runtime_us=-1" in found.remedy) == (state is State.DEGRADED)


def test_a_slow_clock_source_names_the_faster_one_that_is_there(root: Path) -> None:
    folder = root / "sys/devices/system/clocksource/clocksource0"
    assert only(host.clock_source(root)) == Finding("clock source", "", State.OK, "tsc")
    (folder / "current_clocksource").write_text("hpet\n")
    assert only(host.clock_source(root)).remedy == "boot with clocksource=tsc"
    (folder / "available_clocksource").unlink()
    assert only(host.clock_source(root)).state is State.DEGRADED


def test_a_short_accept_queue_is_a_finding(root: Path) -> None:
    assert only(host.accept_queue(root)).state is State.OK
    write(root, "proc/sys/net/core/somaxconn", "128\n")
    short = only(host.accept_queue(root))
    assert (short.state, short.remedy) == (State.DEGRADED, "sysctl -w net.core.somaxconn=4096")


def test_files_of_the_wrong_kind_are_findings_too(root: Path) -> None:
    for name in ("proc/self/status", "proc/sys/net/core/somaxconn"):
        (root / name).unlink()
        (root / name).mkdir()
    assert {each.state for each in host.capabilities(root)} == {State.UNKNOWN}
    assert only(host.accept_queue(root)).state is State.UNKNOWN


def test_python_newer_than_tested_is_told_and_not_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "NEWEST_PYTHON", (3, 9))
    assert only(host.python(root)).state is State.UNKNOWN


# ── what the bypass stands on ──


@pytest.mark.parametrize(
    ("name", "question", "states"),
    [
        (
            *("proc/sys/kernel/unprivileged_bpf_disabled", bypass.unprivileged_bpf),
            {"0": State.DEGRADED, "1": State.OK, "2": State.OK, None: State.UNKNOWN},
        ),
        (
            *("proc/sys/net/core/bpf_jit_enable", bypass.jit),
            {"0": State.DEGRADED, "1": State.OK, "2": State.OK, None: State.UNKNOWN},
        ),
        (
            *("sys/kernel/security/lockdown", bypass.lockdown),
            {
                "[none] integrity confidentiality": State.OK,
                "none [integrity] confidentiality": State.OK,
                "none integrity [confidentiality]": State.DEGRADED,
                None: State.OK,
            },
        ),
    ],
)
def test_the_kernels_settings_are_judged(
    root: Path, name: str, question: Callable[[Path], list[Finding]], states: dict[str | None, State]
) -> None:
    for text, state in states.items():
        (root / name).unlink(missing_ok=True)
        if text is not None:
            write(root, name, f"{text}\n")
        found = only(question(root))
        assert found.state is state, text
        assert bool(found.remedy) == (state is not State.OK)


@pytest.mark.parametrize("feature", Feature)
def test_each_feature_is_told_with_what_it_is_for(feature: Feature, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    purpose, need = bypass.PURPOSES[feature]
    there, gone, untried = (bypass.judge_feature(Probe(feature, could, "so")) for could in (True, False, None))
    assert (there.state, there.remedy) == (State.OK, "")
    assert gone.state is (State.MISSING if need else State.DEGRADED)
    assert "a kernel" in gone.remedy
    assert (untried.state, untried.remedy) == (State.UNKNOWN, "run the doctor as root")
    for each in (there, gone, untried):
        assert purpose in each.detail


def test_a_backend_that_capture_leaves_out_is_not_needed() -> None:
    gone = bypass.judge_feature(Probe(Feature.AF_XDP, False, "so"), unused=True)
    assert (gone.state, gone.need) == (State.DEGRADED, None)


def test_headers_in_two_halves_are_whole(root: Path) -> None:
    found = only(bypass.kernel_headers(root, {}))
    assert (found.state, found.detail) == (State.OK, f"/lib/modules/{RELEASE}/build")


def test_one_half_of_the_headers_is_not_enough(root: Path) -> None:
    (root / f"lib/modules/{RELEASE}/source/include/uapi/linux").rmdir()
    found = only(bypass.kernel_headers(root, {}))
    assert (found.state, found.need) == (State.MISSING, Need.BYPASS)
    assert "include/uapi/linux" in found.detail


def test_a_named_headers_tree_counts_alone(root: Path) -> None:
    tree = root / "tree"
    (tree / "include/generated").mkdir(parents=True)
    environ = {"BCC_KERNEL_SOURCE": str(tree)}
    assert only(bypass.kernel_headers(root, environ)).state is State.MISSING
    (tree / "include/uapi/linux").mkdir(parents=True)
    found = only(bypass.kernel_headers(root, environ))
    assert (found.state, found.detail) == (State.OK, f"{tree} (BCC_KERNEL_SOURCE)")


def test_headers_that_the_kernel_carries_serve_when_there_is_no_package(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "release", lambda: "6.9.9-custom")
    found = only(bypass.kernel_headers(root, {}))
    assert found.state is State.MISSING
    assert "linux-headers-6.9.9-custom" in found.remedy
    (root / "sys/kernel").mkdir(parents=True)
    (root / "sys/kernel/kheaders.tar.xz").touch()
    assert only(bypass.kernel_headers(root, {})).state is State.OK


def test_only_the_real_bcc_is_bcc(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = root / "site" / "bcc"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda _: importlib.machinery.PathFinder.find_spec("bcc", [str(package.parent)])
    )
    other = only(bypass.compiler())
    assert (other.state, "another package" in other.detail) == (State.MISSING, True)
    (package / "libbcc.py").touch()
    assert only(bypass.compiler()).detail == f"? in {package}"
    (package / "version.py").write_text("__version__ = '0.31.0+ds'\n")
    assert only(bypass.compiler()).detail == f"0.31.0+ds in {package}"


def test_no_bcc_at_all_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    found = only(bypass.compiler())
    assert (found.state, found.need) == (State.MISSING, Need.BYPASS)
    assert "python3-bpfcc" in found.remedy
