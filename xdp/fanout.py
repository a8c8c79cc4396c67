"""Egress: ten thousand subscribers in one system call. This is the part that holds the programs; the others use it.

    process   object        what it does
    bypass    Fanout        open_fanout(): compiles, loads, attaches; handover() for the others; ends with it
    udp       Egress        (egress) who is served by which rung: next hops, proofs, and the rungs below; holds the
              FanoutTable   (fanout_table) subscribers of the first rung: add, update, remove; takes microseconds
    relay     FanoutRun     (fanout_run) send(payload): one call; another in the udp worker for proofs and heartbeats

A Fanout owns the program, attached to one end of a parked veth pair (its other end stays down, so that no packet ever
comes in), the raw tracepoint that counts, and all maps. It sends nothing itself, and touches no other interface. Links
end with their last descriptor; the parked pairs can outlive a killed process: links.clean() knows them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from typing import TYPE_CHECKING, final

from xdp import kernel
from xdp.fanout_maps import MAPS, RUNS, FanoutHandover
from xdp.links import create_parked
from xdp.loader import TIMEOUT_S, load_in_child
from xdp.rings import require_strong_order

if TYPE_CHECKING:
    from types import TracebackType

PROGRAMS = {"fanout": "XDP", "count_sent": "RAW_TRACEPOINT"}
"""The functions of fanout.c and the kind of program that each is."""
_RAW_TRACEPOINT_OPEN = 17
_LOOPBACK = 1
"""Its index in every network namespace."""
_PAIRS = RUNS // 2
"""One end for the program to be attached to, the loopback and the other ends for the runs' contexts."""
_TRACEPOINT = b"xdp_devmap_xmit"


@final
class Fanout:
    """What is loaded and attached; a context manager that takes it off again. Made by open_fanout()."""

    def __init__(self, handover: FanoutHandover, links: list[int], undo: contextlib.ExitStack) -> None:
        self._handover, self._links, self._undo = handover, links, undo

    def handover(self) -> FanoutHandover:
        """What the others need, in a forked child, or, with its descriptors sent along, elsewhere."""
        return self._handover

    def leave_in_child(self) -> None:
        """In a forked child: close its copies of the links' descriptors, which would keep the programs attached."""
        for fd in self._links:
            os.close(fd)
        self._links.clear()
        self._undo.pop_all()

    def close(self) -> None:
        """Detach, and delete the parked link. Harmless if repeated."""
        self._links.clear()
        self._undo.close()

    def __enter__(self) -> Fanout:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_fanout(timeout_s: float = TIMEOUT_S) -> Fanout:
    """Load fanout.c and park it, in the calling thread's network namespace, where the senders must be as well.

    Takes seconds (a compiler runs, in a child). Raises LoadError, OSError, its message naming the step, and
    UnsupportedMachineError where memory shared with a program needs fences (see rings).
    """
    require_strong_order()
    with contextlib.ExitStack() as undo:
        pairs = []
        for _ in range(_PAIRS):
            pairs.append(create_parked())
            undo.callback(pairs[-1].delete)
        park, *ends = (index for pair in pairs for index in (pair.near_index, pair.far_index))
        contexts = (*ends, _LOOPBACK)
        defines = {f"CONTEXT_{number}": index for number, index in enumerate(contexts)}
        programs, maps = load_in_child("fanout.c", PROGRAMS, MAPS, defines, timeout_s)
        for fd in (*programs.values(), *maps.values()):
            undo.callback(os.close, fd)
        links = [kernel.link_create(programs["fanout"], park, kernel.ATTACH_XDP, kernel.XDP_FLAGS_DRV_MODE)]
        undo.callback(os.close, links[0])
        links.append(_open_raw_tracepoint(_TRACEPOINT, programs["count_sent"]))
        undo.callback(os.close, links[1])
        handover = FanoutHandover(
            program_fd=programs["fanout"], contexts=contexts, **{f"{name}_fd": maps[name] for name in MAPS}
        )
        return Fanout(handover, links, undo.pop_all())


def _open_raw_tracepoint(name: bytes, program_fd: int) -> int:
    """Attach; the program leaves the tracepoint with the last copy of the descriptor. Raises OSError."""
    text = ctypes.create_string_buffer(name)
    fd, _ = kernel.bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI4x", ctypes.addressof(text), program_fd))
    os.set_inheritable(fd, False)
    return fd
