"""What this host can do for Sprint, and the remedy in one line for what it can't.

Each check reads one thing and changes nothing. A file that is absent or refused is a finding, never an exception. What
a check can't judge (an interface, a file that isn't there to be read) has `ok` None.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import resource
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdp.links import clean
from xdp.loader import missing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sprint.addresses import Address

NEWEST_PYTHON = (3, 13)
CONNECT_TIMEOUT_S = 2.0
SUBSCRIBERS = 10_000
"""The guide's aim for one instance; each takes a descriptor."""
SPARE_FILES = 256
"""Descriptors for all else: upstreams, API, maps, logs."""
MIN_SOMAXCONN = 1_024
"""Subscribers that reconnect at the same moment wait in this queue."""
MAX_XDP_MTU = 3_498
"""A frame has to fit one 4 KiB page beside headroom and shared info where programs don't know fragments (bcc's)."""

CAPABILITIES = {
    "CAP_NET_ADMIN": (12, "attaching XDP and tc programs"),
    "CAP_NET_RAW": (13, "AF_XDP sockets"),
    "CAP_IPC_LOCK": (14, "locking the relay's memory"),
    "CAP_SYS_NICE": (23, "real-time scheduling of the relay"),
}
"""Name → bit (linux/capability.h) and what wants it. Loading programs stands apart: either of two allows it."""
CAP_SYS_ADMIN, CAP_BPF = 21, 39

FAST_CLOCKS = {"tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter"}
"""Read without a system call."""
LOOPBACK = "772"
"""ARPHRD_LOOPBACK in /sys/class/net/*/type."""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding."""

    name: str
    ok: bool | None
    """None: told, not judged."""
    found: str
    remedy: str = ""
    """One line; empty unless something can be done."""


def examine(
    nodes: Sequence[Address] = (), *, root: Path = Path("/"), environ: Mapping[str, str] = os.environ
) -> list[Check]:
    """Every check on this host, and whether each of `nodes` takes a TCP connection (all together at most 2 s).

    `root` is where /proc, /sys and /lib are looked for. Raises nothing.
    """
    release = platform.release()
    capabilities = _capabilities(root)
    return [
        _python(),
        _user(),
        *_capability_checks(capabilities),
        *_kernel(release),
        _btf(root),
        _bcc(),
        _kernel_headers(root, release, environ),
        _kernel_bypass(),
        _open_files(),
        _locked_memory(capabilities),
        _cpus(),
        _clock_source(root),
        _somaxconn(root),
        *_interfaces(root),
        *_nodes(nodes),
    ]


def remove_leftovers() -> list[str]:
    """Remove links and filters of the kernel bypass whose owner is dead; returns a line for each."""
    return [str(left) for left in clean()]


def as_dicts(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """The checks for JSON: `name`, `ok` (true, false, null), `found`, `remedy`."""
    return [asdict(check) for check in checks]


def _python() -> Check:
    found = f"{platform.python_implementation()} {platform.python_version()}"
    if sys.version_info[:2] <= NEWEST_PYTHON:
        return Check("python", True, found)
    newest = ".".join(map(str, NEWEST_PYTHON))
    return Check("python", None, f"{found}: tested up to {newest}", f"if something fails, try Python {newest}")


def _user() -> Check:
    """Not judged: what a user who isn't root lacks, the capabilities tell."""
    user = os.geteuid()
    return Check("user", None if user else True, f"runs as user {user}" if user else "runs as root")


def _capabilities(root: Path) -> int | None:
    """The effective set as a bit mask; None when it can't be read."""
    status = _read(root / "proc/self/status") or ""
    match = re.search(r"^CapEff:\s*([0-9a-fA-F]{1,16})$", status, re.MULTILINE)
    return int(match[1], 16) if match else None


def _capability_checks(held: int | None) -> list[Check]:
    wanted = [(name, 1 << bit, purpose) for name, (bit, purpose) in CAPABILITIES.items()]
    wanted.insert(1, ("CAP_BPF or CAP_SYS_ADMIN", 1 << CAP_BPF | 1 << CAP_SYS_ADMIN, "loading BPF programs"))
    checks = []
    for name, mask, purpose in wanted:
        if held is None:
            checks.append(Check(name, None, "/proc/self/status tells no capabilities", "mount /proc"))
        elif held & mask:
            checks.append(Check(name, True, f"held, for {purpose}"))
        else:
            first = name.split()[0]
            checks.append(
                Check(
                    name, False, f"missing, for {purpose}", f"run as root, or AmbientCapabilities={first} in the unit"
                )
            )
    return checks


def _kernel(release: str) -> list[Check]:
    match = re.match(r"(\d+)\.(\d+)", release)
    version = (int(match[1]), int(match[2])) if match else None
    checks = []
    for needed, name in (
        ((5, 18), "kernel for live frames (UDP fan-out)"),
        ((6, 6), "kernel for TCX (mirror without leftovers)"),
    ):
        ok = None if version is None else version >= needed
        remedy = "" if ok else f"run a kernel of {needed[0]}.{needed[1]} or later"
        checks.append(Check(name, ok, f"Linux {release}", remedy))
    return checks


def _btf(root: Path) -> Check:
    path = "/sys/kernel/btf/vmlinux"
    try:
        size = (root / path[1:]).stat().st_size
    except OSError as error:
        return Check("BTF", False, f"{path}: {error.strerror}", "run a kernel built with CONFIG_DEBUG_INFO_BTF=y")
    return Check("BTF", True, f"{path}, {size} bytes")


def _bcc() -> Check:
    """Found without being imported: importing costs over a second and 100 MB of LLVM."""
    remedy = "apt-get install python3-bpfcc, and a virtual environment made with --system-site-packages"
    try:
        spec = importlib.util.find_spec("bcc")
    except (ImportError, ValueError) as error:
        return Check("bcc", False, f"can't be looked for: {error}", remedy)
    if spec is None:
        return Check("bcc", False, "not importable", remedy)
    places = list(spec.submodule_search_locations or ())
    if any((Path(place) / "libbcc.py").is_file() for place in places):
        return Check("bcc", True, places[0])
    return Check("bcc", False, f"{spec.origin}: another package of that name", f"pip uninstall bcc; {remedy}")


def _kernel_headers(root: Path, release: str, environ: Mapping[str, str]) -> Check:
    """Whether bcc finds both halves: the generated headers, and the ones programs share with the kernel (uapi)."""
    name = "kernel headers"
    remedy = (
        f"apt-get install linux-headers-{release}; where there is no such package, another kernel's whole headers tree "
        "named by BCC_KERNEL_SOURCE serves"
    )
    named = environ.get("BCC_KERNEL_SOURCE")
    # Debian puts the generated half in `build` and the shared one in `source`.
    modules = root / "lib/modules" / release
    trees = [Path(named)] if named else [modules / "build", modules / "source"]
    shown = named or f"/lib/modules/{release}/build"
    if not any(tree.is_dir() for tree in trees):
        if not named and (root / "sys/kernel/kheaders.tar.xz").exists():
            return Check(name, True, "/sys/kernel/kheaders.tar.xz, which bcc unpacks")
        return Check(name, False, f"{shown}: no such directory", remedy)
    halves = ("include/generated", "include/uapi/linux")
    missing = [half for half in halves if not any((tree / half).is_dir() for tree in trees)]
    if missing:
        return Check(name, False, f"{shown}: no {' and no '.join(missing)} in it", remedy)
    return Check(name, True, shown)


def _kernel_bypass() -> Check:
    reason = missing()
    if reason is None:
        return Check("kernel bypass", True, "its programs can be compiled and loaded here")
    return Check("kernel bypass", False, "its programs can't be loaded here", reason)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = SUBSCRIBERS + SPARE_FILES
    found = f"{_limit(soft)} (hard limit {_limit(hard)}) for {SUBSCRIBERS} subscribers"
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return Check("open files", True, found)
    return Check(
        "open files", False, found, f"ulimit -n {needed} before the start, or LimitNOFILE={needed} in the unit"
    )


def _locked_memory(capabilities: int | None) -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = f"{_limit(soft)} bytes (hard limit {_limit(hard)})"
    if capabilities is not None and capabilities & 1 << CAPABILITIES["CAP_IPC_LOCK"][0]:
        return Check("locked memory", True, f"{found}, lifted by CAP_IPC_LOCK")
    if soft == resource.RLIM_INFINITY:
        return Check("locked memory", True, found)
    return Check(
        "locked memory", False, found, "ulimit -l unlimited before the start, or LimitMEMLOCK=infinity in the unit"
    )


def _cpus() -> Check:
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count()
    found = f"{usable} usable of {present}"
    if usable >= 2:
        return Check("CPUs", True, found)
    return Check("CPUs", False, found, "give two or more, so that the relay has one to itself")


def _clock_source(root: Path) -> Check:
    folder = root / "sys/devices/system/clocksource/clocksource0"
    current, available = _read(folder / "current_clocksource"), _read(folder / "available_clocksource") or ""
    if current is None:
        return Check("clock source", None, "/sys tells none")
    if current in FAST_CLOCKS:
        return Check("clock source", True, current)
    better = [name for name in available.split() if name in FAST_CLOCKS]
    remedy = f"boot with clocksource={better[0]}" if better else "none known: this machine offers no faster one"
    return Check("clock source", False, f"{current}: each reading may be a system call", remedy)


def _somaxconn(root: Path) -> Check:
    name = "net.core.somaxconn"
    text = _read(root / "proc/sys/net/core/somaxconn")
    if text is None or not text.isdigit():
        return Check(name, None, f"/proc/sys/net/core/somaxconn: {'unreadable' if text is None else text[:20]}")
    if int(text) >= MIN_SOMAXCONN:
        return Check(name, True, text)
    return Check(name, False, text, f"sysctl -w {name}=4096")


def _interfaces(root: Path) -> list[Check]:
    folder = root / "sys/class/net"
    try:
        # Not everything in there is an interface: bonding_masters is a file.
        interfaces = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    except OSError as error:
        return [Check("interfaces", None, f"/sys/class/net: {error.strerror}", "mount /sys")]
    return [_interface(interface) for interface in interfaces]


def _interface(folder: Path) -> Check:
    name = f"interface {folder.name}"
    driver = folder / "device/driver"
    kind = driver.resolve().name if driver.exists() else "virtual"
    mtu, state = _read(folder / "mtu") or "?", _read(folder / "operstate") or "?"
    try:
        queues = [queue.name[:2] for queue in (folder / "queues").iterdir()]
    except OSError:
        queues = []
    found = f"{kind}, MTU {mtu}, queues {queues.count('rx')} in, {queues.count('tx')} out, state {state}"
    if _read(folder / "type") == LOOPBACK:
        return Check(name, None, f"{found}: never attached to, it refuses native XDP")
    if mtu.isdigit() and int(mtu) > MAX_XDP_MTU:
        return Check(name, False, found, f"ip link set {folder.name} mtu {MAX_XDP_MTU} or less, for native XDP")
    return Check(name, None, found)


def _nodes(nodes: Sequence[Address]) -> list[Check]:
    """Connect to all at once; a name that doesn't resolve holds nobody up beyond the time-out."""
    findings: dict[Address, Check] = {}

    def connect(node: Address) -> None:
        findings[node] = _node(node)

    threads = [threading.Thread(target=connect, args=(node,), daemon=True) for node in nodes]
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [findings.get(node) or _unreachable(node, f"no answer within {CONNECT_TIMEOUT_S:g} s") for node in nodes]


def _node(node: Address) -> Check:
    begun = time.monotonic()
    try:
        with socket.create_connection(node, timeout=CONNECT_TIMEOUT_S):
            took_ms = (time.monotonic() - begun) * 1_000
    except TimeoutError:
        return _unreachable(node, f"no answer within {CONNECT_TIMEOUT_S:g} s")
    except (OSError, UnicodeError, OverflowError) as error:
        return _unreachable(node, getattr(error, "strerror", None) or str(error))
    return Check(f"node {node}", True, f"takes TCP connections, {took_ms:.1f} ms")


def _unreachable(node: Address, why: str) -> Check:
    return Check(
        f"node {node}",
        False,
        why,
        "start the node, or name a reachable one in BITCOIN_NODE; open its port in the firewall",
    )


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _read(path: Path) -> str | None:
    """A small file's text without the space around it; None when it is absent or refused."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
