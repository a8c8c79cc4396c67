"""The process and the machine: privileges, limits, CPUs, clocks. Each check reads one thing and changes nothing.

`root` is where /proc and /sys are looked for. What can't be read is a finding.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import resource
import sys
from typing import TYPE_CHECKING

from sprint.doctor.findings import Finding, Need, State
from sprint.optimize import MIN_CPUS_TO_SPIN, RT_GROUP_SYMBOL, cpu_quota, throttling

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

NEWEST_PYTHON = (3, 13)
SUBSCRIBERS = 10_000
"""The guide's aim for one instance; each takes a descriptor."""
SPARE_FILES = 256
"""Descriptors for all else: upstreams, API, maps, logs."""
MIN_SOMAXCONN = 1_024
"""Subscribers that reconnect at the same moment wait in this queue."""
MIN_MEMORY = 512 << 20
"""A relay with main's headers has 114 MB, the compiler of the bypass 152 MB, beside workers and API."""
F_ADD_SEALS, F_SEAL_FUTURE_WRITE = 1033, 0x10  # linux/fcntl.h; the seal is of Linux 5.1
UNLIMITED_V1 = 1 << 62
"""cgroup v1 writes "no limit" as the largest number of whole pages."""

CAP_NET_ADMIN, CAP_NET_RAW, CAP_IPC_LOCK, CAP_SYS_ADMIN, CAP_SYS_NICE, CAP_PERFMON, CAP_BPF = 12, 13, 14, 21, 23, 38, 39
CAPABILITIES: tuple[tuple[str, tuple[int, ...], str, Need | None], ...] = (
    ("CAP_BPF", (CAP_BPF, CAP_SYS_ADMIN), "loads BPF programs", Need.BYPASS),
    ("CAP_NET_ADMIN", (CAP_NET_ADMIN,), "attaches XDP and tc programs, makes the mirror's link", Need.BYPASS),
    ("CAP_NET_RAW", (CAP_NET_RAW,), "opens AF_XDP sockets", Need.BYPASS),
    ("CAP_PERFMON", (CAP_PERFMON, CAP_SYS_ADMIN), "has the tracepoint tell what the UDP fan-out sent", None),
    ("CAP_SYS_ADMIN", (CAP_SYS_ADMIN,), "names others' XDP programs, makes the demo's network namespaces", None),
    ("CAP_SYS_NICE", (CAP_SYS_NICE,), "gives the relay real-time scheduling", None),
    ("CAP_IPC_LOCK", (CAP_IPC_LOCK,), "locks the relay's memory", None),
)
"""Name, the bits of linux/capability.h of which any will do, what it is for, and what can't be had without."""

FAST_CLOCKS = {"tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter"}
"""Read without a system call."""


def read(path: Path) -> str | None:
    """A small file's text without the space around it; None when it is absent or refused."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def python(_root: Path) -> list[Finding]:
    """The interpreter."""
    found = f"{platform.python_implementation()} {platform.python_version()}"
    if sys.version_info[:2] <= NEWEST_PYTHON:
        return [Finding("python", "", State.OK, found)]
    newest = ".".join(map(str, NEWEST_PYTHON))
    detail = f"{found}: tested up to {newest}"
    return [Finding("python", "", State.UNKNOWN, detail, f"if something fails, try Python {newest}")]


def user(_root: Path) -> list[Finding]:
    """Who runs this; what a user who isn't root lacks, the capabilities tell."""
    number = os.geteuid()
    detail = "root" if number == 0 else f"user {number}: enough for all but the kernel bypass, which wants root"
    return [Finding("user", "", State.OK, detail)]


def effective_capabilities(root: Path) -> int | None:
    """A bit mask; None when it can't be read."""
    match = re.search(r"^CapEff:\s*([0-9a-fA-F]{1,16})$", read(root / "proc/self/status") or "", re.MULTILINE)
    return int(match[1], 16) if match else None


def capabilities(root: Path) -> list[Finding]:
    """One finding each."""
    held = effective_capabilities(root)
    return [_capability(held, *each) for each in CAPABILITIES]


def _capability(held: int | None, name: str, bits: tuple[int, ...], purpose: str, need: Need | None) -> Finding:
    if held is None:
        detail = f"/proc/self/status tells no capabilities; it {purpose}"
        return Finding("capability", name, State.UNKNOWN, detail, "mount /proc", need)
    if any(held >> bit & 1 for bit in bits):
        by = "" if held >> bits[0] & 1 else " (CAP_SYS_ADMIN stands for it)"
        return Finding("capability", name, State.OK, f"held{by}: {purpose}", need=need)
    remedy = (
        f"grant {name}: --cap-add in a container, CapabilityBoundingSet in a unit"
        if os.geteuid() == 0
        else ("run as root" if need is Need.BYPASS else f"run as root, or AmbientCapabilities={name} in the unit")
    )
    state = State.MISSING if need else State.DEGRADED
    return Finding("capability", name, state, f"not held: it {purpose}", remedy, need)


def open_files(_root: Path) -> list[Finding]:
    """Sprint raises the soft limit to the hard one by itself, so the hard one counts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = SUBSCRIBERS + SPARE_FILES
    if hard == resource.RLIM_INFINITY or hard >= needed:
        return [Finding("open files", "", State.OK, f"{_limit(hard)} (soft {_limit(soft)}): one a TCP subscriber")]
    carries = max(0, hard - SPARE_FILES)
    detail = f"{hard} at most: about {carries} TCP subscribers, where {SUBSCRIBERS} are the aim"
    remedy = f"LimitNOFILE={needed} in the unit, or as root before the start: ulimit -Hn {needed}"
    return [Finding("open files", "", State.DEGRADED, detail, remedy)]


def locked_memory(root: Path) -> list[Finding]:
    """RLIMIT_MEMLOCK, which holds for who lacks CAP_IPC_LOCK."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = f"{_limit(soft)} bytes (hard limit {_limit(hard)})"
    held = effective_capabilities(root)
    if held is not None and held >> CAP_IPC_LOCK & 1:
        return [Finding("locked memory", "", State.OK, f"{found}, lifted by CAP_IPC_LOCK")]
    if soft == resource.RLIM_INFINITY:
        return [Finding("locked memory", "", State.OK, found)]
    detail = f"{found}: the relay's memory can't all be locked, an AF_XDP socket's 8 MiB may not fit"
    remedy = "LimitMEMLOCK=infinity in the unit, or before the start: ulimit -l unlimited"
    return [Finding("locked memory", "", State.DEGRADED, detail, remedy)]


def shared_memory(_root: Path) -> list[Finding]:
    """Tried: a sealed memfd is what the ring of the memory-optimised engine lies in."""
    check = "shared memory"
    try:
        fd = os.memfd_create("sprint-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
        finally:
            os.close(fd)
    except OSError as error:
        detail = f"no memfd that can be sealed: {error.strerror}: turbo and enterprise are served by one process"
        return [Finding(check, "", State.MISSING, detail, "Linux 5.1 or later, and room in memory", Need.MEMORY)]
    return [Finding(check, "", State.OK, "a sealed memfd was made: local readers can map the ring", need=Need.MEMORY)]


def cpus(root: Path) -> list[Finding]:
    """How many, and what the control groups leave of them."""
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count()
    quota = cpu_quota(f"{root}/".replace("//", "/"))
    isolated = read(root / "sys/devices/system/cpu/isolated")
    found = f"{usable} usable of {present}" + (f", {isolated} isolated from the scheduler" if isolated else "")
    why = "with OPTIMIZE_SYSTEM the relay polls on one of its own"
    if usable < MIN_CPUS_TO_SPIN:
        remedy = f"give it {MIN_CPUS_TO_SPIN} or more (CPUAffinity in the unit, cpuset of the container)"
        return [Finding("CPUs", "", State.DEGRADED, f"{found}: {why}", remedy)]
    if quota is not None and quota < MIN_CPUS_TO_SPIN:
        detail = f"{found}, but a quota of {quota:g}: {why}"
        return [Finding("CPUs", "", State.DEGRADED, detail, f"CPUQuota={MIN_CPUS_TO_SPIN}00% or none (cpu.max)")]
    return [Finding("CPUs", "", State.OK, found)]


def memory_limit(root: Path) -> list[Finding]:
    """The least that the control groups of this process allow (v2 and v1)."""
    check = "memory limit"
    limits = []
    for line in (read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            text = read(folder / ("memory.limit_in_bytes" if controllers else "memory.max"))
            if text and text.isdecimal() and int(text) < UNLIMITED_V1:
                limits.append(int(text))
            if folder == base:
                break
    least = min(limits, default=None)
    if least is None:
        return [Finding(check, "", State.OK, "none by control groups")]
    found = f"{least >> 20} MiB by control groups"
    if least >= MIN_MEMORY:
        return [Finding(check, "", State.OK, found)]
    detail = f"{found}: main's headers, the workers and the compiler of the bypass want {MIN_MEMORY >> 20}"
    return [Finding(check, "", State.DEGRADED, detail, f"MemoryMax={MIN_MEMORY >> 20}M or more in the unit")]


def real_time(root: Path) -> list[Finding]:
    """Whether a spinning real-time relay would be stopped again and again."""
    check = "real-time runtime"
    folder = root / "proc/sys/kernel"
    runtime, period = read(folder / "sched_rt_runtime_us"), read(folder / "sched_rt_period_us")
    if runtime is None or period is None or not runtime.lstrip("-").isdecimal() or not period.isdecimal():
        return [Finding(check, "", State.UNKNOWN, "/proc/sys/kernel tells none", "mount /proc")]
    why = throttling(platform.release(), int(runtime), int(period), _group_scheduling(root))
    if why is None:
        return [Finding(check, "", State.OK, f"{runtime} of {period} µs, which doesn't stop a relay on its own CPU")]
    detail = f"{why.partition(':')[0]}: OPTIMIZE_SYSTEM leaves the relay on the usual scheduler"
    remedy = "sysctl -w kernel.sched_rt_runtime_us=-1 (nothing then guards that CPU's other tasks)"
    return [Finding(check, "", State.DEGRADED, detail, remedy)]


def _group_scheduling(root: Path) -> bool:
    try:
        with (root / "proc/kallsyms").open("rb") as symbols:
            return any(RT_GROUP_SYMBOL in line for line in symbols)
    except OSError:
        return False


def clock_source(root: Path) -> list[Finding]:
    """Every sighting and delivery reads the clock."""
    check = "clock source"
    folder = root / "sys/devices/system/clocksource/clocksource0"
    current, available = read(folder / "current_clocksource"), read(folder / "available_clocksource") or ""
    if current is None:
        return [Finding(check, "", State.UNKNOWN, "/sys tells none", "mount /sys")]
    if current in FAST_CLOCKS:
        return [Finding(check, "", State.OK, current)]
    better = [name for name in available.split() if name in FAST_CLOCKS]
    remedy = f"boot with clocksource={better[0]}" if better else "none known: this machine offers no faster one"
    return [Finding(check, "", State.DEGRADED, f"{current}: each reading may be a system call", remedy)]


def accept_queue(root: Path) -> list[Finding]:
    """Subscribers that come back at once wait there."""
    check, subject = "sysctl", "net.core.somaxconn"
    text = read(root / "proc/sys/net/core/somaxconn")
    if text is None or not text.isdecimal():
        return [Finding(check, subject, State.UNKNOWN, "unreadable", "mount /proc")]
    if int(text) >= MIN_SOMAXCONN:
        return [Finding(check, subject, State.OK, text)]
    detail = f"{text}: of subscribers that reconnect all at once some are refused"
    return [Finding(check, subject, State.DEGRADED, detail, f"sysctl -w {subject}=4096")]


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


CHECKS: Mapping[str, Callable[[Path], list[Finding]]] = {
    "python": python,
    "user": user,
    "capabilities": capabilities,
    "open files": open_files,
    "locked memory": locked_memory,
    "shared memory": shared_memory,
    "CPUs": cpus,
    "memory limit": memory_limit,
    "real-time runtime": real_time,
    "clock source": clock_source,
    "accept queue": accept_queue,
}
"""In the order they are shown."""
