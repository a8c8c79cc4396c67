"""Interfaces, programs and a mirror made of paper, for tests of what is done with them when."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from xdp.attachment import AttachError
from xdp.capture import Handover
from xdp.interfaces import Interface
from xdp.links import MirrorLink
from xdp.loader import LoadError
from xdp.segments import Backend

NIC = Interface(7, "", None, "igc", 1500, "", True, True, False, 1, 1, False, False, ())
COUNTED = {"packets": 9, "announcements": 3, "mirrored": 2, "express": 3, "dropped": 0, "opaqueFlows": 0, "surplus": 5}


@dataclass
class PaperHook:
    interface: str
    index: int
    mode: str = "native"
    reason: str | None = None
    there: bool = True
    works: bool = True
    proofs: int = 0
    closed: bool = False

    def intact(self) -> bool:
        return self.there

    def prove(self) -> None:
        self.proofs += 1
        if not self.works:
            raise OSError("the self-test packet did not come out")

    def close(self) -> None:
        self.closed = True


class PaperKernel:
    """Stands for the interfaces, the loader, the outlet and climb()."""

    def __init__(self) -> None:
        self.nics: dict[str, Interface] = {}
        self.hooks: list[PaperHook] = []
        self.refusals: dict[str, str] = {}
        """Interface → why nothing can be attached to it."""
        self.rungs: dict[str, tuple[str, str | None]] = {}
        self.load_error: str | None = None
        self.outlet_error: str | None = None
        self.mirror = MirrorLink("spr1-0a", 90, "spr1-0b", 91, 1500)
        self.mirror_there = True
        self.outlets = 0
        self.climbs: list[str] = []
        self.log: list[tuple[str, dict[str, Any]]] = []

    def add(self, name: str, index: int, **facts: Any) -> None:
        self.nics[name] = replace(NIC, name=name, index=index, **facts)

    # as ingress calls them

    def interface(self, name: str) -> Interface:
        if name not in self.nics:
            raise OSError(19, "No such device")
        return self.nics[name]

    def load(self, *_arguments: object, **_options: object) -> PaperKernel:
        if self.load_error:
            raise LoadError(self.load_error)
        return self

    def make_outlet(self, *_arguments: object) -> PaperKernel:
        if self.outlet_error:
            raise OSError(self.outlet_error)
        self.outlets += 1
        self.mirror_there = True
        return self

    def climb(self, _outlet: object, name: str) -> PaperHook:
        self.climbs.append(name)
        if name in self.refusals:
            raise AttachError(self.refusals[name])
        self.hooks.append(PaperHook(name, self.nics[name].index, *self.rungs.get(name, ())))
        return self.hooks[-1]

    # as the outlet and what was loaded

    def intact(self) -> bool:
        return self.mirror_there

    def carries(self) -> bool:
        return self.mirror_there

    def count_from_here(self) -> None:
        pass

    def facts(self) -> Handover:
        return Handover(frozenset(Backend), 3, 4, 5, self.outlets, {"packets": 1})

    handover = facts

    def counters(self) -> dict[str, int]:
        return COUNTED

    def close(self) -> None:
        pass

    # as the log

    def info(self, event: str, **values: Any) -> None:
        self.log.append((event, values))

    warning = info
