"""The ways out of the kernel, which are one for all interfaces: the ring buffer, and the mirror link to the socket.

The mirror is a private veth pair: tc on each interface clones marked packets into its near end, and native XDP at its
far end hands them to the AF_XDP socket. Clones of what GRO had joined are brought down to what is needed on their way
into it. A relay's Capture depends on this alone, so interfaces come and go (see
attachment) without its noticing.

`to_xsk` and `shorten` are attached by bpf_links, which end with us; the pair can outlive us, and links.clean() knows
it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, final

from xdp import kernel
from xdp.capture import Handover, ingest_counters, raw_counters
from xdp.interfaces import interface
from xdp.links import create_mirror
from xdp.segments import Backend

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from types import TracebackType

    from xdp.links import MirrorLink
    from xdp.loader import Loaded

BACKENDS = frozenset(Backend)


@final
class Outlet:
    """The ways out, open; a context manager that closes them. One of a Loaded at a time."""

    def __init__(self, loaded: Loaded, backends: Collection[Backend] = BACKENDS) -> None:
        """Make the mirror, if AF_XDP is among the backends, in the calling thread's network namespace.

        `loaded` stays the caller's, and open at least as long. Raises OSError, everything being taken back.
        """
        self.loaded = loaded
        self.backends = frozenset(backends)
        self.mirror: MirrorLink | None = None
        self.handed_over = False
        """Somebody may have the AF_XDP socket from now on."""
        self._links: list[int] = []
        self._baseline: Mapping[str, int] = {}
        with contextlib.ExitStack() as undo:
            loaded.configure(mirror_ifindex=0, express=int(Backend.RINGBUF in self.backends))
            if Backend.AF_XDP in self.backends:
                self.mirror = create_mirror()
                # Not as a context manager: leave_in_child() drops the stack, and a generator would run its end then.
                undo.callback(self.mirror.delete)
                far = self.mirror.far_index
                link = kernel.link_create(loaded.programs["to_xsk"], far, kernel.ATTACH_XDP, kernel.XDP_FLAGS_DRV_MODE)
                undo.callback(os.close, link)
                self._links.append(link)
                self._shorten_clones(undo)
                undo.callback(self._stop_mirroring)
                loaded.configure(mirror_ifindex=self.mirror.near_index)
            self.count_from_here()
            self._undo = undo.pop_all()

    def _shorten_clones(self, undo: contextlib.ExitStack) -> None:
        """Where the kernel has links for that; without, what GRO had joined fills the mirror with what nobody needs."""
        assert self.mirror is not None
        program = self.loaded.programs["shorten"]
        try:
            link = kernel.link_create(program, self.mirror.near_index, kernel.ATTACH_TCX_EGRESS)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel before 6.6 doesn't know this kind of link
                raise
        else:
            undo.callback(os.close, link)
            self._links.append(link)

    def count_from_here(self) -> None:
        """Counters start anew, for those to whom it is handed over after this."""
        self._baseline = self._raw_counters()

    def _raw_counters(self) -> dict[str, int]:
        return raw_counters(self.loaded.maps["counters"], 0 if self.mirror is None else self.mirror.far_index)

    def facts(self) -> Handover:
        """What stands in a hand-over."""
        maps, far = self.loaded.maps, 0 if self.mirror is None else self.mirror.far_index
        return Handover(self.backends, maps["express"], maps["xsks"], maps["counters"], far, self._baseline)

    def handover(self) -> Handover:
        """What a Capture needs, here, in a forked child, or, with its descriptors sent along, elsewhere."""
        self.handed_over = True
        return self.facts()

    def counters(self) -> dict[str, int]:
        """Of all interfaces, since the last count_from_here(). Raises OSError once `loaded` is closed.

        packets seen, announcements recognised, segments captured and those of them that were surplus, mirrored (the
        AF_XDP socket took them), mirrorLost on the way, socketDropped (no room in it), unmarked (no room for metadata),
        express (written to the ring buffer) and dropped (it was full), opaqueFlows. The self-test of a further
        interface counts as well, as one or two.
        """
        return ingest_counters(self._raw_counters(), self._baseline)

    def intact(self) -> bool:
        """Whether the mirror is still there; costs a system call."""
        return all(is_attached(link) for link in self._links)

    def carries(self) -> bool:
        """Whether the mirror is there, whole, and switched on at both ends: a look at the kernel's books."""
        if self.mirror is None:
            return True
        with contextlib.suppress(OSError):
            return self.intact() and interface(self.mirror.near).carrier
        return False

    def leave_in_child(self) -> None:
        """In a forked child: close its copies of the links' descriptors, which would keep the program attached.

        Nothing is detached, and close() does nothing here from now on.
        """
        for fd in self._links:
            os.close(fd)
        self._links.clear()
        self._undo.pop_all()

    def close(self) -> None:
        """Take the program off and delete the mirror, also when it is gone. Harmless if repeated."""
        self._links.clear()
        self._undo.close()

    def _stop_mirroring(self) -> None:
        with contextlib.suppress(ValueError):  # closed already: no program is left that reads it
            self.loaded.configure(mirror_ifindex=0)

    def __enter__(self) -> Outlet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_attached(link_fd: int) -> bool:
    """Whether a link of ours is still on an interface: neither has that gone, nor has anybody forced the link off."""
    return kernel.link_info(link_fd).ifindex != 0
