"""What the kernel bypass stands on: the kernel's features, tried; its settings; bcc, headers, its programs."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sprint.doctor.findings import Finding, Need, State
from sprint.doctor.host import read
from xdp.features import SINCE, Feature, Probe, probe_all
from xdp.links import leftovers
from xdp.loader import LoadError, load, missing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sprint.config import Config

PURPOSES: dict[Feature, tuple[str, Need | None]] = {
    Feature.XDP: ("hears announcements at the network card", Need.BYPASS),
    Feature.VETH: ("the mirror's private link, and the demo's wire", Need.BYPASS),
    Feature.XDP_LINK: ("comes off when Sprint is killed, and the mirror needs it", Need.BYPASS),
    Feature.RING_BUFFER: ("the express lane to the relay", Need.BYPASS),
    Feature.AF_XDP: ("the mirror of announcements that the relay reads", Need.BYPASS),
    Feature.LIVE_FRAMES: ("proves each step by a packet, and sends the UDP fan-out", Need.BYPASS),
    Feature.TCX: (
        "clones into the mirror; without, a clsact filter does, which outlives a killed run",
        None,
    ),
    Feature.DEVMAP: ("sends the UDP fan-out", None),
    Feature.NDO_XMIT: ("sends the UDP fan-out over veth", None),
    Feature.DEVMAP_XMIT: ("counts what the UDP fan-out really sent", None),
    Feature.DRIVER_FEATURES: ("forecasts each interface's mode; without, a list of drivers does", None),
    Feature.BTF: ("nothing of Sprint's needs it, but bpftool shows programs and maps by it", None),
}
"""What each is for, and what can't be had without it."""
BACKENDS = {"af_xdp": (Feature.AF_XDP, Feature.VETH), "ringbuf": (Feature.RING_BUFFER,)}


def kernel_version() -> list[Finding]:
    """A fact; what it can do is tried, not looked up."""
    return [Finding("kernel", "", State.OK, f"{platform.system()} {platform.release()} on {platform.machine()}")]


def features(config: Config) -> list[Finding]:
    """Every feature, tried."""
    unused = {feature for name, those in BACKENDS.items() if name not in config.capture for feature in those}
    return [judge_feature(probe, unused=probe.feature in unused) for probe in probe_all()]


def judge_feature(probe: Probe, *, unused: bool = False) -> Finding:
    """`unused`: CAPTURE does without it."""
    purpose, need = PURPOSES[probe.feature]
    if unused:
        need, purpose = None, f"{purpose}; CAPTURE leaves it out"
    subject, detail = probe.feature.value, f"{probe.detail}: {purpose}"
    if probe.available:
        return Finding("kernel feature", subject, State.OK, detail, need=need)
    since = ".".join(map(str, SINCE[probe.feature]))
    if probe.available is None:
        remedy = f"Linux {since} or later tells" if os.geteuid() == 0 else "run the doctor as root"
        return Finding("kernel feature", subject, State.UNKNOWN, detail, remedy, need)
    state = State.MISSING if need else State.DEGRADED
    return Finding(
        "kernel feature", subject, state, detail, f"a kernel of {since} or later that is built with it", need
    )


def unprivileged_bpf(root: Path) -> list[Finding]:
    """Sprint's own programs are loaded by root, whatever it says."""
    check, subject = "sysctl", "kernel.unprivileged_bpf_disabled"
    text = read(root / "proc/sys/kernel/unprivileged_bpf_disabled")
    if text is None:
        return [Finding(check, subject, State.UNKNOWN, "unreadable", "mount /proc")]
    if text == "0":
        detail = "0: any user may load BPF programs, which Sprint has no use for"
        return [Finding(check, subject, State.DEGRADED, detail, f"sysctl -w {subject}=1")]
    return [Finding(check, subject, State.OK, f"{text}: only the privileged load BPF programs, as Sprint does")]


def jit(root: Path) -> list[Finding]:
    """Compiled, a packet costs tens of nanoseconds."""
    check, subject = "sysctl", "net.core.bpf_jit_enable"
    text = read(root / "proc/sys/net/core/bpf_jit_enable")
    if text is None:
        return [Finding(check, subject, State.UNKNOWN, "unreadable", "run the doctor as root")]
    if text == "0":
        detail = "0: programs are interpreted, which costs several times as much a packet"
        return [Finding(check, subject, State.DEGRADED, detail, f"sysctl -w {subject}=1")]
    return [Finding(check, subject, State.OK, f"{text}: programs run as machine code")]


def lockdown(root: Path) -> list[Finding]:
    """Kernel lockdown, which Secure Boot may switch on."""
    check = "kernel lockdown"
    match = re.search(r"\[(\w+)\]", read(root / "sys/kernel/security/lockdown") or "")
    if match is None:
        return [Finding(check, "", State.OK, "none in force")]
    if match[1] == "confidentiality":
        detail = "confidentiality: tracing programs may be refused; capture and fan-out are not concerned"
        return [Finding(check, "", State.DEGRADED, detail, "boot with lockdown=integrity, or without")]
    return [Finding(check, "", State.OK, f"{match[1]}: refuses nothing that Sprint does")]


def compiler() -> list[Finding]:
    """bcc, found without being imported: importing costs over a second and 100 MB of LLVM."""
    remedy = "apt-get install python3-bpfcc, and a virtual environment made with --system-site-packages"
    try:
        spec = importlib.util.find_spec("bcc")
    except (ImportError, ValueError) as error:
        return [Finding("bcc", "", State.MISSING, f"can't be looked for: {error}", remedy, Need.BYPASS)]
    if spec is None:
        detail = "not importable: it compiles the bypass's programs"
        return [Finding("bcc", "", State.MISSING, detail, remedy, Need.BYPASS)]
    for place in map(Path, spec.submodule_search_locations or ()):
        if (place / "libbcc.py").is_file():
            version = re.search(r"__version__ = ['\"]([\w.+~-]{1,40})['\"]", read(place / "version.py") or "")
            return [Finding("bcc", "", State.OK, f"{version[1] if version else '?'} in {place}", need=Need.BYPASS)]
    detail = f"{spec.origin}: another package of that name"
    return [Finding("bcc", "", State.MISSING, detail, f"pip uninstall bcc; {remedy}", Need.BYPASS)]


def kernel_headers(root: Path, environ: Mapping[str, str]) -> list[Finding]:
    """Whether bcc finds both halves: the generated headers, and the ones programs share with the kernel (uapi)."""
    check, release = "kernel headers", platform.release()
    remedy = (
        f"apt-get install linux-headers-{release}; where there is no such package, another kernel's whole headers tree "
        "named by BCC_KERNEL_SOURCE serves"
    )
    named = environ.get("BCC_KERNEL_SOURCE")
    # Debian puts the generated half in `build` and the shared one in `source`.
    modules = root / "lib/modules" / release
    trees = [Path(named)] if named else [modules / "build", modules / "source"]
    shown = f"{named} (BCC_KERNEL_SOURCE)" if named else f"/lib/modules/{release}/build"
    if not any(tree.is_dir() for tree in trees):
        if not named and (root / "sys/kernel/kheaders.tar.xz").exists():
            detail = "/sys/kernel/kheaders.tar.xz, which bcc unpacks"
            return [Finding(check, "", State.OK, detail, need=Need.BYPASS)]
        return [Finding(check, "", State.MISSING, f"{shown}: no such directory", remedy, Need.BYPASS)]
    halves = ("include/generated", "include/uapi/linux")
    absent = [half for half in halves if not any((tree / half).is_dir() for tree in trees)]
    if absent:
        return [Finding(check, "", State.MISSING, f"{shown}: no {' and no '.join(absent)}", remedy, Need.BYPASS)]
    return [Finding(check, "", State.OK, shown, need=Need.BYPASS)]


def programs(config: Config, *, quick: bool) -> list[Finding]:
    """Whether the bypass's programs can be compiled and loaded: done, unless `quick`, and attached to nothing."""
    check, subject = "kernel bypass", "programs"
    reason = missing()
    if reason is not None:
        return [Finding(check, subject, State.MISSING, f"can't be loaded: {reason}", "see that reason", Need.BYPASS)]
    if quick:
        detail = "nothing known stands in their way; not tried (--quick)"
        return [Finding(check, subject, State.OK, detail, need=Need.BYPASS)]
    try:
        loaded = load(config.network.magic, [config.network.port])
    except (LoadError, OSError) as error:
        remedy = "the kernel's and bcc's versions are told above: another kernel, or a newer python3-bpfcc"
        return [Finding(check, subject, State.MISSING, f"could not be loaded: {error}", remedy, Need.BYPASS)]
    with loaded:
        names = ", ".join(loaded.programs)
    return [Finding(check, subject, State.OK, f"compiled, and accepted by the kernel: {names}", need=Need.BYPASS)]


def left_behind() -> list[Finding]:
    """Links and filters of the bypass whose owner is dead."""
    found: Sequence[object] = leftovers()
    if not found:
        return [Finding("leftovers", "", State.OK, "nothing of a killed run is left")]
    return [Finding("leftovers", "", State.DEGRADED, str(left), "sprint doctor --clean") for left in found]


SETTINGS: Mapping[str, Callable[[Path], list[Finding]]] = {
    "unprivileged BPF": unprivileged_bpf,
    "BPF compiler": jit,
    "kernel lockdown": lockdown,
}
"""What is read of /proc and /sys."""
