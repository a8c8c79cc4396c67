"""The bypass's half of the capture: holds the programs on interfaces, on the highest rung that is proven to work.

Rungs are native XDP, generic XDP, and classification in tc alone. Each interface climbs by itself, and each rung is
tried with a self-test packet (see selftest) before it is called active. One set of programs, loaded once, serves them
all, and what they capture leaves by one outlet.

Programs are attached by bpf_links, which end with the last copy of their descriptor: SIGKILL leaves none. Before Linux
6.6 a clsact filter can outlive us: links.clean() knows it. Somebody else's XDP program is never replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Literal, final

from xdp import kernel
from xdp.interfaces import interface as facts_of
from xdp.links import add_ingress_filter
from xdp.outlet import BACKENDS, Outlet, is_attached
from xdp.selftest import prove, self_test_packet

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from types import TracebackType

    from xdp.capture import Handover
    from xdp.loader import Loaded
    from xdp.segments import Backend

__all__ = ["BACKENDS", "MODES", "AttachError", "Attachment", "Hook", "Mode", "attach", "climb", "self_test_packet"]

Mode = Literal["native", "generic", "tc"]
MODES: tuple[Mode, ...] = ("native", "generic", "tc")
"""From the best down."""
SELF_TEST_S = 1.0
_XDP_FLAGS = {"native": kernel.XDP_FLAGS_DRV_MODE, "generic": kernel.XDP_FLAGS_SKB_MODE}
_BEFORE_OTHERS = 1 << 3  # BPF_F_BEFORE: a TCX program of somebody else's may accept, and ours would never run


class AttachError(Exception):
    """Nothing is attached; the message is one line with the reason of each rung."""


@final
class Hook:
    """The programs on one interface, proven; a context manager that takes them off again. Made by climb()."""

    def __init__(
        self, outlet: Outlet, name: str, index: int, mode: Mode, links: list[int], undo: contextlib.ExitStack
    ) -> None:
        self._outlet, self._links, self._undo = outlet, links, undo
        self.interface = name
        """Its name when they were attached; they stay where they are when it is renamed."""
        self.index = index
        self.mode = mode
        self.reason: str | None = None
        """Why it is no higher rung; None on the highest that was asked for."""

    def intact(self) -> bool:
        """Whether the programs are still there, as far as links tell; costs a system call or two."""
        return all(is_attached(link) for link in self._links)

    def prove(self) -> None:
        """The self-test once more. Raises OSError."""
        if not self.intact():
            raise OSError(errno.ENOENT, f"a program of ours was forced off {self.interface}")
        prove(self._outlet, self.index, self.mode, SELF_TEST_S)

    def leave_in_child(self) -> None:
        """In a forked child: close its copies of the links' descriptors, which would keep the programs attached.

        Nothing is detached, and close() does nothing here from now on.
        """
        for fd in self._links:
            os.close(fd)
        self._links.clear()
        self._undo.pop_all()

    def close(self) -> None:
        """Take the programs off, also when the interface is gone. Harmless if repeated."""
        self._links.clear()
        self._undo.close()

    def __enter__(self) -> Hook:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def climb(outlet: Outlet, interface: str, modes: Sequence[Mode] = MODES) -> Hook:
    """Attach to an interface of the calling thread's network namespace, on the first of `modes` that is proven.

    `outlet` stays the caller's, and open at least as long. Takes up to SELF_TEST_S a rung. Raises AttachError.
    """
    if not modes:
        raise ValueError("modes: at least one is expected")
    try:
        facts = facts_of(interface)
    except OSError as error:
        raise AttachError(str(error.strerror or error)) from None
    if facts.loopback:
        raise AttachError(f"interface {interface} is the loopback: an interface that peers are reached by is expected")
    if not facts.ethernet:
        raise AttachError(f"interface {interface} carries no Ethernet frames: such packets can't be read")
    _refuse_foreign(interface, modes)
    reasons: list[str] = []
    for mode in modes:
        try:
            hook = _attach(outlet, interface, facts.index, mode)
        except OSError as error:  # noqa: PERF203 - a rung takes tens of milliseconds
            if error.errno in {errno.EBUSY, errno.EEXIST}:
                _refuse_foreign(interface, modes)
            reasons.append(f"{mode}: {error.strerror or error}")
        else:
            hook.reason = "; ".join(reasons) or None
            return hook
    raise AttachError(f"interface {interface}: {'; '.join(reasons)}")


def _refuse_foreign(interface: str, modes: Sequence[Mode]) -> None:
    with contextlib.suppress(OSError):
        for program in facts_of(interface).xdp:
            if set(modes) & set(_XDP_FLAGS):
                raise AttachError(f"interface {interface} has {program} already: it is not replaced")


def _attach(outlet: Outlet, interface: str, index: int, mode: Mode) -> Hook:
    """One rung. Raises OSError, everything being taken back."""
    programs = outlet.loaded.programs
    links: list[int] = []
    with contextlib.ExitStack() as undo:

        def link(program: str, kind: int, flags: int) -> None:
            fd = kernel.link_create(programs[program], index, kind, flags)
            undo.callback(os.close, fd)
            links.append(fd)

        if outlet.mirror is not None or mode == "tc":
            program = "classify_tc" if mode == "tc" else "mirror"
            try:
                link(program, kernel.ATTACH_TCX_INGRESS, _BEFORE_OTHERS)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a kernel before 6.6 doesn't know this kind of link
                    raise
                undo.callback(add_ingress_filter(index, programs[program]).remove)
        if mode != "tc":
            link("classify", kernel.ATTACH_XDP, _XDP_FLAGS[mode])
        prove(outlet, index, mode, SELF_TEST_S)
        return Hook(outlet, interface, index, mode, links, undo.pop_all())


# ── one interface by itself ──


@final
class Attachment:
    """An outlet of its own and one interface; a context manager that takes everything off again. Made by attach()."""

    def __init__(self, outlet: Outlet, hook: Hook) -> None:
        self._outlet, self._hook = outlet, hook
        self.interface = hook.interface
        self.mode = hook.mode
        self.reason = hook.reason
        """Why it is no higher rung; None on the highest that was asked for."""
        self.backends = outlet.backends

    def handover(self) -> Handover:
        """What a Capture needs: see Outlet.handover()."""
        return self._outlet.handover()

    def counters(self) -> dict[str, int]:
        """Since the attachment was proven: see Outlet.counters()."""
        return self._outlet.counters()

    def leave_in_child(self) -> None:
        """In a forked child: see Hook.leave_in_child()."""
        self._hook.leave_in_child()
        self._outlet.leave_in_child()

    def close(self) -> None:
        """Take the programs off and delete the mirror, also when the interface is gone. Harmless if repeated."""
        try:
            self._hook.close()
        finally:
            self._outlet.close()

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
    """climb() on one interface with an outlet for it alone.

    `loaded` stays the caller's, and open at least as long. One attachment of it at a time; a Capture of an earlier one
    may still be there. Raises AttachError.
    """
    if not backends or not modes:
        raise ValueError(f"backends={backends!r}, modes={modes!r}: at least one of each is expected")
    with contextlib.ExitStack() as undo:
        try:
            outlet = undo.enter_context(Outlet(loaded, backends))
        except OSError as error:
            raise AttachError(str(error.strerror or error)) from None
        hook = climb(outlet, interface, modes)
        outlet.count_from_here()
        undo.pop_all()
    return Attachment(outlet, hook)
