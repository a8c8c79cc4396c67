"""What this kernel can do for us, found out by doing it: each feature is tried with the least that shows it.

Nothing of the host is changed. What needs an interface is tried on a veth pair in a network namespace of its own, which
belongs to a thread that ends with the trial: nothing is left of it, even when we are killed. What needs a program gets
one of two instructions, without bcc. The exceptions are the kernel's own module for veth, which may be loaded by that,
and the tracepoint, which is the whole kernel's: a program that does nothing hangs there for a moment.

A trial that we lack the rights for says nothing about the kernel: then it is None, with the kernel's version as a hint.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from xdp import kernel
from xdp.interfaces import rtnetlink
from xdp.netdev import XdpFeature, xdp_features
from xdp.xsk import Geometry, Xsk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_MAP_CREATE, _PROG_LOAD, _RAW_TRACEPOINT_OPEN = 0, 5, 17  # linux/bpf.h
_COMMAND_NAMES = {0: "BPF_MAP_CREATE", 5: "BPF_PROG_LOAD", 17: "BPF_RAW_TRACEPOINT_OPEN"}
_DEVMAP, _XSKMAP, _RINGBUF = 14, 17, 27
_XDP, _SCHED_CLS, _RAW_TRACEPOINT = 6, 3, 17
_DROP, _TC_OK, _NOTHING = 1, 0, 0
_CLONE_NEWNET = 0x40000000
_UNTRIED = {errno.EPERM, errno.EACCES, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE}
"""Refusals that say nothing about the kernel."""
_FRAME = bytes(64)
TRIAL_S = 5.0
"""For all that is tried in the namespace of its own; it takes some 50 ms."""
BTF_FILE = Path("/sys/kernel/btf/vmlinux")

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)


class Feature(Enum):
    """What the kernel bypass is made of."""

    XDP = "XDP programs"
    VETH = "veth pairs"
    XDP_LINK = "native XDP by a link"
    RING_BUFFER = "BPF ring buffer"
    AF_XDP = "AF_XDP sockets"
    LIVE_FRAMES = "live frames"
    TCX = "TCX"
    DEVMAP = "DEVMAP"
    NDO_XMIT = "sending by veth"
    DEVMAP_XMIT = "tracepoint xdp_devmap_xmit"
    DRIVER_FEATURES = "drivers' XDP features"
    BTF = "BTF"


SINCE: dict[Feature, tuple[int, int]] = {
    Feature.XDP: (4, 8),
    Feature.VETH: (4, 19),  # with native XDP
    Feature.XDP_LINK: (5, 9),
    Feature.RING_BUFFER: (5, 8),
    Feature.AF_XDP: (4, 18),
    Feature.LIVE_FRAMES: (5, 18),
    Feature.TCX: (6, 6),
    Feature.DEVMAP: (4, 14),
    Feature.NDO_XMIT: (6, 3),  # that tells of it
    Feature.DEVMAP_XMIT: (4, 17),
    Feature.DRIVER_FEATURES: (6, 3),
    Feature.BTF: (5, 4),
}
"""The kernel that got it; a distribution may have built it without."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a trial showed."""

    feature: Feature
    available: bool | None
    """None: it could not be tried."""
    detail: str
    """What was tried, or what the kernel said; one line."""


class UntriedError(Exception):
    """A trial could not be made, whatever the kernel can do."""


def release_number(release: str) -> tuple[int, int] | None:
    """(6, 1) of "6.1.0-37-amd64"; None of what doesn't begin so."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})", release)
    return (int(match[1]), int(match[2])) if match else None


def probe(feature: Feature) -> Probe:
    """Try one; what both need is tried with it. Raises nothing of the kernel's."""
    return probe_all([feature])[0]


def probe_all(features: Iterable[Feature] = Feature) -> list[Probe]:
    """Try these, in their order; about 0.1 s for all. For use outside of a running event loop."""
    wanted = list(features)
    found: dict[Feature, Probe] = {}
    for feature in wanted:
        if feature in _ALONE:
            found[feature] = _tried(feature, _ALONE[feature])
    on_a_link = [feature for feature in wanted if feature in _ON_A_LINK]
    if on_a_link:
        try:
            found |= in_own_namespace(lambda: _try_on_a_link(on_a_link))
        except OSError as error:
            found |= {feature: _judged(feature, error) for feature in on_a_link}
    return [found[feature] for feature in wanted]


def live_frames() -> bool | None:
    """Whether BPF_PROG_TEST_RUN can send real frames; None if we may not try."""
    return probe(Feature.LIVE_FRAMES).available


def devmap_xmit_tracepoint() -> bool | None:
    """Whether a program can be attached to the raw tracepoint xdp_devmap_xmit; None if we may not try."""
    return probe(Feature.DEVMAP_XMIT).available


def can_be_redirected_to(index: int) -> bool | None:
    """Whether frames that a program redirects to that interface are sent, as it is set up at the moment.

    None: the kernel doesn't tell (before 6.3). Raises OSError (ENODEV).
    """
    features = xdp_features(index)
    return None if features is None else XdpFeature.NDO_XMIT in features


def _tried(feature: Feature, trial: Callable[[], str]) -> Probe:
    try:
        return Probe(feature, True, trial())
    except (OSError, UntriedError) as error:
        return _judged(feature, error)


def _judged(feature: Feature, error: Exception) -> Probe:
    said = getattr(error, "strerror", None) or str(error)
    if isinstance(error, UntriedError):
        return Probe(feature, None, f"not tried ({said})")
    if getattr(error, "errno", None) not in _UNTRIED:
        return Probe(feature, False, said)
    release = os.uname().release
    number, since = release_number(release), SINCE[feature]
    hint = f"Linux {release}, which "
    hint += "should have it" if number and number >= since else "is too old for it" if number else "tells no version"
    return Probe(feature, None, f"not tried ({said}); {hint} (since {since[0]}.{since[1]})")


def _bpf(command: int, attributes: bytes) -> int:
    try:
        return kernel.bpf(command, attributes)[0]
    except OSError as error:
        if error.errno is None:  # an unknown machine
            raise
        raise OSError(error.errno, f"{_COMMAND_NAMES[command]}: {os.strerror(error.errno)}") from None


# ── trials that need no interface ──


@contextlib.contextmanager
def tiny_program(kind: int, answer: int) -> Iterator[int]:
    """The descriptor of a program that returns `answer` and does nothing else."""
    code = struct.pack("<BBhiBBhi", 0xB7, 0, 0, answer, 0x95, 0, 0, 0)  # r0 = answer; exit
    instructions, license_ = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "=IIQQIIQII16s",
        *(kind, len(code) // 8, ctypes.addressof(instructions), ctypes.addressof(license_)),
        *(0, 0, 0, 0, 0, b"sprint_probe"),
    )
    with _descriptor(_bpf(_PROG_LOAD, attributes.ljust(120, b"\0"))) as fd:
        yield fd


@contextlib.contextmanager
def _descriptor(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _make_map(kind: int, key: int, value: int, entries: int) -> None:
    with _descriptor(_bpf(_MAP_CREATE, struct.pack("=5I", kind, key, value, entries, 0).ljust(72, b"\0"))):
        pass


def _try_xdp() -> str:
    with tiny_program(_XDP, _DROP) as program:
        if kernel.run_program(program, _FRAME).verdict != _DROP:
            raise OSError(errno.EPROTO, "a program that drops returned something else")
    return "a program was loaded and run"


def _try_ring_buffer() -> str:
    _make_map(_RINGBUF, 0, 0, 4096)
    return "one was made"


def _try_devmap() -> str:
    _make_map(_DEVMAP, 4, 4, 1)
    return "one was made"


def _try_live_frames() -> str:
    # One frame, which is dropped at once. A signal may end the call before it.
    with tiny_program(_XDP, _DROP) as program, contextlib.suppress(InterruptedError):
        kernel.run_program(program, _FRAME, flags=kernel.LIVE_FRAMES, batch=1)
    return "one was run, and dropped"


def _try_devmap_xmit() -> str:
    name = ctypes.create_string_buffer(b"xdp_devmap_xmit")
    with tiny_program(_RAW_TRACEPOINT, _NOTHING) as program:
        os.close(_bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI4x", ctypes.addressof(name), program)))
    return "a program was attached and taken off"


def _try_driver_features() -> str:
    if xdp_features(socket.if_nametoindex("lo")) is None:
        raise OSError(errno.EOPNOTSUPP, "the kernel has no netlink family netdev")
    return "the kernel tells what each driver can do"


def _try_btf() -> str:
    return f"{BTF_FILE}, {BTF_FILE.stat().st_size} bytes"


_ALONE: dict[Feature, Callable[[], str]] = {
    Feature.XDP: _try_xdp,
    Feature.RING_BUFFER: _try_ring_buffer,
    Feature.DEVMAP: _try_devmap,
    Feature.LIVE_FRAMES: _try_live_frames,
    Feature.DEVMAP_XMIT: _try_devmap_xmit,
    Feature.DRIVER_FEATURES: _try_driver_features,
    Feature.BTF: _try_btf,
}

# ── trials on a veth pair in a namespace of their own ──


def in_own_namespace(work: Callable[[], T], timeout_s: float = TRIAL_S) -> T:
    """What `work` returns, called in a thread that has a new network namespace, and leaves nothing of it.

    Raises OSError: EPERM without CAP_SYS_ADMIN, ETIMEDOUT, and what `work` raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if _libc.unshare(_CLONE_NEWNET):
                number = ctypes.get_errno()
                raise OSError(number, f"a network namespace: {os.strerror(number)}")
            results.append(work())
        except BaseException as error:  # raised again below, in the thread that asked
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not results:
        raise OSError(errno.ETIMEDOUT, f"no end within {timeout_s:g} s")
    return results[0]


def _try_on_a_link(features: Iterable[Feature]) -> dict[Feature, Probe]:
    """What can't be tried without a veth pair isn't judged where there is none."""
    try:
        with rtnetlink("a veth pair") as route:
            route.link("add", ifname="near", kind="veth", peer={"ifname": "far"})
            index, far_index = socket.if_nametoindex("near"), socket.if_nametoindex("far")
            for end in (index, far_index):
                route.link("set", index=end, state="up")
    except OSError as error:
        untried = UntriedError(error.strerror or str(error))
        return {each: _judged(each, error if each is Feature.VETH else untried) for each in features}
    return {each: _tried(each, partial(_ON_A_LINK[each], index, far_index)) for each in features}


def _try_veth(_index: int, _peer: int) -> str:
    return "one was made"


def _try_link(index: int, _peer: int) -> str:
    with tiny_program(_XDP, _DROP) as program, _native(program, index):
        return "attached to a veth and taken off"


def _native(program: int, index: int) -> contextlib.AbstractContextManager[int]:
    return _descriptor(kernel.link_create(program, index, kernel.ATTACH_XDP, kernel.XDP_FLAGS_DRV_MODE))


def _try_tcx(index: int, _peer: int) -> str:
    with tiny_program(_SCHED_CLS, _TC_OK) as program:
        try:
            fd = kernel.link_create(program, index, kernel.ATTACH_TCX_INGRESS)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise OSError(error.errno, "the kernel doesn't know this kind of link") from None
            raise
        os.close(fd)
    return "attached to a veth and taken off"


def _try_af_xdp(index: int, _peer: int) -> str:
    _make_map(_XSKMAP, 4, 4, 1)
    with tiny_program(_XDP, _DROP) as program, _native(program, index):
        Xsk(index, geometry=Geometry(chunks=8, rx_entries=8)).close()
    return "a socket was bound to a veth"


def _try_ndo_xmit(index: int, peer: int) -> str:
    """What the DEVMAP sends to one end of a veth arrives only where the other end runs XDP natively."""
    with tiny_program(_XDP, _DROP) as program, _native(program, peer):
        can = can_be_redirected_to(index)
    if can is None:
        raise UntriedError("the kernel doesn't tell of drivers' XDP features")
    if not can:
        raise OSError(errno.EOPNOTSUPP, "veth takes no redirected frames, its peer running XDP")
    return "veth takes redirected frames while its peer runs XDP"


_ON_A_LINK: dict[Feature, Callable[[int, int], str]] = {
    Feature.VETH: _try_veth,
    Feature.XDP_LINK: _try_link,
    Feature.TCX: _try_tcx,
    Feature.AF_XDP: _try_af_xdp,
    Feature.NDO_XMIT: _try_ndo_xmit,
}
