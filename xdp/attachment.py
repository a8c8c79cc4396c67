"""The supervisor's half of the capture: holds the programs on an interface, on the highest rung that is proven to work.

Rungs are native XDP, generic XDP, and classification in tc alone. Each is tried with a self-test packet before it is
called active: a live frame (BPF_PROG_TEST_RUN, Linux 5.18) that enters the interface's own receive path and has to come
out of the ring buffer and of the AF_XDP socket. It has documentation addresses (RFC 5737), a multicast MAC address, TTL
1 and wrong checksums: nothing forwards it, and no TCP socket gets it.

Programs are attached by bpf_links, which end with the last copy of their descriptor: SIGKILL leaves none. The mirror's
veth pair, and before Linux 6.6 a clsact filter, can outlive us: links.clean() knows them. Somebody else's XDP program
is never replaced. What the self-test can't show: that the driver calls its native hook. That is the kernel's word.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import struct
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, final

from xdp import kernel
from xdp.capture import SELF_TEST_SOURCE, Handover, ingest_counters, open_mirror, raw_counters
from xdp.interfaces import interface as facts_of
from xdp.links import add_ingress_filter, create_mirror
from xdp.loader import COMMON
from xdp.ringbuf import RingBuffer
from xdp.segments import Backend

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from types import TracebackType

    from xdp.loader import Loaded

Mode = Literal["native", "generic", "tc"]
MODES: tuple[Mode, ...] = ("native", "generic", "tc")
BACKENDS = frozenset(Backend)
SELF_TEST_S = 1.0
LOOK_S = 0.005
"""Between two looks into the ring buffer, whose wake-ups may be switched off."""
MAX_RECORDS = 1 << 16
"""Of one look: more than a ring buffer of the usual size holds."""
_XDP_FLAGS = {"native": kernel.XDP_FLAGS_DRV_MODE, "generic": kernel.XDP_FLAGS_SKB_MODE}
_BEFORE_OTHERS = 1 << 3  # BPF_F_BEFORE: a TCX program of somebody else's may accept, and ours would never run
_MAX_INTERRUPTIONS = 10
_MAPPED = bytes(10) + b"\xff\xff"
_SOURCE, _DESTINATION = SELF_TEST_SOURCE[12:], bytes((192, 0, 2, 82))


class AttachError(Exception):
    """Nothing is attached; the message is one line with the reason of each rung."""


@final
class Attachment:
    """What is attached, proven; a context manager that takes it off again. Made by attach()."""

    def __init__(
        self, mode: Mode, reason: str | None, handover: Handover, links: list[int], undo: contextlib.ExitStack
    ) -> None:
        self._handover, self._links, self._undo = handover, links, undo
        self.interface = handover.interface
        self.mode = mode
        self.reason = reason
        """Why it is no higher rung; None on the highest that was asked for."""
        self.backends = handover.backends

    def handover(self) -> Handover:
        """What a Capture needs, here, in a forked child, or, with its descriptors sent along, elsewhere."""
        return self._handover

    def counters(self) -> dict[str, int]:
        """Since the attachment was proven. Raises OSError once `loaded` is closed.

        packets seen on the interface, announcements recognised, segments captured and those of them that were
        surplus, mirrored to the AF_XDP socket, mirrorLost on the way, unmarked (no room for metadata), express
        (written to the ring buffer) and dropped (it was full), opaqueFlows.
        """
        return ingest_counters(self._handover.counters_fd, self._handover.baseline)

    def leave_in_child(self) -> None:
        """In a forked child: close its copies of the links' descriptors, which would keep the programs attached.

        Nothing is detached, and close() does nothing here from now on.
        """
        for fd in self._links:
            os.close(fd)
        self._links.clear()
        self._undo.pop_all()

    def close(self) -> None:
        """Take the programs off and delete the mirror, also when the interface is gone. Harmless if repeated."""
        self._links.clear()
        self._undo.close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def attach(
    loaded: Loaded,
    interface: str,
    *,
    backends: Collection[Backend] = BACKENDS,
    modes: Sequence[Mode] = MODES,
) -> Attachment:
    """Attach to an interface of the calling thread's network namespace, on the first of `modes` that is proven.

    `loaded` stays the caller's, and open at least as long. One attachment of it at a time; a Capture of an earlier one
    may still be there. Takes up to SELF_TEST_S a rung. Raises AttachError.
    """
    if not backends or not modes:
        raise ValueError(f"backends={backends!r}, modes={modes!r}: at least one of each is expected")
    try:
        facts = facts_of(interface)
    except OSError as error:
        raise AttachError(str(error.strerror or error)) from None
    if facts.loopback:
        raise AttachError(f"interface {interface} is the loopback: an interface that peers are reached by is expected")
    _refuse_foreign(interface, modes)
    reasons: list[str] = []
    for mode in modes:
        try:
            return _attach(loaded, interface, facts.index, frozenset(backends), mode, "; ".join(reasons) or None)
        except OSError as error:  # noqa: PERF203 - a rung takes tens of milliseconds
            if error.errno in {errno.EBUSY, errno.EEXIST}:
                _refuse_foreign(interface, modes)
            reasons.append(f"{mode}: {error.strerror or error}")
    raise AttachError(f"interface {interface}: {'; '.join(reasons)}")


def _refuse_foreign(interface: str, modes: Sequence[Mode]) -> None:
    with contextlib.suppress(OSError):
        for program in facts_of(interface).xdp:
            if set(modes) & set(_XDP_FLAGS):
                raise AttachError(f"interface {interface} has {program} already: it is not replaced")


def _attach(
    loaded: Loaded, interface: str, index: int, backends: frozenset[Backend], mode: Mode, reason: str | None
) -> Attachment:
    """One rung. Raises OSError, everything being taken back."""
    programs, maps = loaded.programs, loaded.maps
    links: list[int] = []
    with contextlib.ExitStack() as undo:

        def link(program: str, where: int, kind: int, flags: int) -> None:
            fd = kernel.link_create(programs[program], where, kind, flags)
            undo.callback(os.close, fd)
            links.append(fd)

        far_index = 0
        loaded.configure(mirror_ifindex=0, express=1)
        if Backend.AF_XDP in backends:
            mirror = create_mirror()
            # Not as a context manager: leave_in_child() drops the stack, and a generator would run its end then.
            undo.callback(mirror.delete)
            far_index = mirror.far_index
            link("to_xsk", far_index, kernel.ATTACH_XDP, kernel.XDP_FLAGS_DRV_MODE)
            undo.callback(_stop_mirroring, loaded)
            loaded.configure(mirror_ifindex=mirror.near_index)
        if Backend.AF_XDP in backends or mode == "tc":
            program = "classify_tc" if mode == "tc" else "mirror"
            try:
                link(program, index, kernel.ATTACH_TCX_INGRESS, _BEFORE_OTHERS)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a kernel before 6.6 doesn't know this kind of link
                    raise
                undo.callback(add_ingress_filter(index, programs[program]).remove)
        if mode != "tc":
            link("classify", index, kernel.ATTACH_XDP, _XDP_FLAGS[mode])
        handover = Handover(interface, mode, backends, maps["express"], maps["xsks"], maps["counters"], far_index, {})
        _prove(loaded, handover, index)
        loaded.configure(express=int(Backend.RINGBUF in backends))
        handover = replace(handover, baseline=raw_counters(maps["counters"]))
        return Attachment(mode, reason, handover, links, undo.pop_all())


def _stop_mirroring(loaded: Loaded) -> None:
    with contextlib.suppress(ValueError):  # closed already: no program is left that reads it
        loaded.configure(mirror_ifindex=0)


# ── the self-test ──


def _prove(loaded: Loaded, handover: Handover, index: int) -> None:
    """Send the self-test packet, and wait for it at each backend. Raises OSError (ETIMEDOUT if it doesn't come).

    The live frame itself is run through `classify`, which stands for the driver's hook in native mode. Generic XDP and
    tc then see it as any other packet, and capture it a second time: on these rungs both times are waited for.

    In the ring buffer we only look, and release nothing: a relay may be reading it.
    """
    port, token = _watched_port(loaded), os.urandom(32)
    packet = self_test_packet(_magic(loaded), port, token)
    context = kernel.XDP_MD.pack(0, len(packet), 0, index, 0, 0)
    missing = {Backend.RINGBUF: 1 if handover.mode == "native" else 2}
    with contextlib.ExitStack() as stack:
        ring = stack.enter_context(RingBuffer.open(handover.express_fd))
        xsk = None
        if Backend.AF_XDP in handover.backends:
            xsk = stack.enter_context(open_mirror(handover))
            missing[Backend.AF_XDP] = 1
        stack.callback(kernel.map_delete, loaded.maps["flows"], _flow_key(port))
        _send(loaded.programs["classify"], packet, context)
        give_up = time.monotonic() + SELF_TEST_S
        while True:
            missing[Backend.RINGBUF] -= sum(token in bytes(record) for record in ring.poll(MAX_RECORDS))
            if xsk is not None:
                missing[Backend.AF_XDP] -= sum(token in bytes(frame) for frame in xsk.peek())
                xsk.release()
            if all(count <= 0 for count in missing.values()):
                return
            if time.monotonic() > give_up:
                names = ", ".join(backend.name.lower() for backend, count in missing.items() if count > 0)
                raise OSError(errno.ETIMEDOUT, f"the self-test packet did not come out of {names}")
            select.select([] if xsk is None else [xsk], [], [], LOOK_S)


def _send(program_fd: int, packet: bytes, context: bytes) -> None:
    for _ in range(_MAX_INTERRUPTIONS):
        try:
            kernel.run_program(program_fd, packet, context=context, flags=kernel.LIVE_FRAMES, batch=1)
        except InterruptedError:  # by a signal, before the only frame
            continue
        except OSError as error:
            raise OSError(error.errno, f"self-test (live frames, Linux 5.18): {error.strerror}") from None
        return


def self_test_packet(magic: bytes, port: int, token: bytes) -> bytes:
    """An Ethernet frame with a `headers` message from that port, which bears the token; no socket can receive it."""
    body = b"\x01" + token.ljust(80, b"\0") + b"\0"
    payload = magic + b"headers".ljust(12, b"\0") + struct.pack("<I", len(body)) + bytes(4) + body
    tcp = struct.pack("!HHIIBBHHH", port, port, int.from_bytes(token[:4], "big"), 0, 0x50, 0x10, 0, 0, 0)
    # Checksums zero, which is wrong; TTL 1.
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp) + len(payload), 0, 0, 1, 6, 0) + _SOURCE + _DESTINATION
    # To the address of LLDP (IEEE 802.1AB), which is nobody's own, and which no bridge forwards.
    ethernet = bytes.fromhex("0180c200000e025350520001") + b"\x08\x00"
    return ethernet + ip + tcp + payload


def _flow_key(port: int) -> bytes:
    return COMMON.layouts["flow_key"].packing.pack(_MAPPED + _SOURCE, _MAPPED + _DESTINATION, port, port)


def _magic(loaded: Loaded) -> bytes:
    layout = COMMON.layouts["config"]
    config = kernel.map_lookup(loaded.maps["config"], bytes(4), layout.size)
    at = layout.offset("magic")
    return (config or bytes(layout.size))[at : at + 4]


def _watched_port(loaded: Loaded) -> int:
    """The lowest; 0 if none is watched, and then the self-test fails."""
    with contextlib.closing(mmap.mmap(loaded.maps["ports"], 8192, prot=mmap.PROT_READ)) as area:
        bits = int.from_bytes(area[:], "little")
    return max((bits & -bits).bit_length() - 1, 0)
