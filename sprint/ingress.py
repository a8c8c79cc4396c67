"""What the bypass holds for the capture: programs loaded once, an outlet, and a hook on each interface that is wanted.

Owns when what is tried: at once when an interface appears, comes up or has changed, and after a failure at pauses that
grow from a second to a minute, each interface by itself. One on a lower rung climbs again at pauses that grow from half
a minute to ten, and at once when it has changed: it is without programs meanwhile, mostly for some 30 ms, in which the
plain sockets serve. A relay's capture depends on the outlet alone, so no interface's coming or going disturbs what is
heard on the others. Single-threaded; a try takes some 30 ms, one that fails up to three seconds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sprint.bypass_line import CAPTURE
from sprint.composition import BYPASS_INACTIVE, LOADING
from sprint.tiers import NS_PER_S
from sprint.uplinks import Uplinks
from xdp.attachment import MODES, AttachError, Hook, climb
from xdp.interfaces import LinkState, interface
from xdp.loader import Loaded, LoadError, load
from xdp.netdev import XdpFeature, xdp_features
from xdp.outlet import Outlet
from xdp.segments import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sprint.config import Config
    from xdp.interfaces import Interface, LinkChange

FIRST_PAUSE_NS, LAST_PAUSE_NS = NS_PER_S, 60 * NS_PER_S
FIRST_CLIMB_NS, LAST_CLIMB_NS = 30 * NS_PER_S, 600 * NS_PER_S
"""On a lower rung, until the upper ones are tried again."""
SETTLE_NS = 10 * NS_PER_S
"""After a try, in which an interface's changes may be the try's own: some drivers take the link down for a program."""
BACKENDS = {"af_xdp": Backend.AF_XDP, "ringbuf": Backend.RINGBUF}
MAX_REASON, MAX_REASONS = 160, 480
"""Letters of one interface's reason, and of all together: the status block has room for eight."""


@dataclass(slots=True)
class Pauses:
    """When something that failed may be tried again."""

    due_ns: int = 0
    next_ns: int = FIRST_PAUSE_NS
    _tried_ns: int = -FIRST_PAUSE_NS

    def failed(self, now_ns: int) -> None:
        """It was tried in vain: not to be done all the time, since an attempt compiles, or waits for packets."""
        self._tried_ns = now_ns
        self.due_ns = now_ns + self.next_ns
        self.next_ns = min(2 * self.next_ns, LAST_PAUSE_NS)

    def reset(self) -> None:
        """Things are different now: at once, but for what an attempt may itself have stirred up within the second."""
        self.next_ns = FIRST_PAUSE_NS
        self.due_ns = min(self.due_ns, self._tried_ns + FIRST_PAUSE_NS)


@dataclass(slots=True)
class Climbs:
    """When one on a lower rung is to try the upper ones again."""

    due_ns: int = 0
    next_ns: int = FIRST_CLIMB_NS
    _tried_ns: int | None = None

    def tried(self, now_ns: int) -> None:
        """It got no higher."""
        self._tried_ns = now_ns
        self.due_ns = now_ns + self.next_ns
        self.next_ns = min(2 * self.next_ns, LAST_CLIMB_NS)

    def changed(self, now_ns: int) -> None:
        """The interface did: what failed may be over. Not if it may be a try that has done it."""
        if self._tried_ns is not None and now_ns - self._tried_ns >= SETTLE_NS:
            self.due_ns, self.next_ns = now_ns, FIRST_CLIMB_NS


@dataclass(slots=True)
class Place:
    """One interface that is wanted, and how it stands with it."""

    name: str
    hook: Hook | None = None
    reason: str | None = None
    """Why it isn't active, or not on the first rung."""
    facts: tuple[int, bool, bool, int] | None = None
    """Index, up, carrier and MTU when it was last looked at; None when it wasn't there."""
    stale: bool = True
    """To be looked at."""
    pauses: Pauses = field(default_factory=Pauses)
    climbs: Climbs = field(default_factory=Climbs)

    @property
    def active(self) -> bool:
        """Whether packets of it are captured."""
        return self.hook is not None and self.facts is not None and self.facts[1] and self.facts[2]


class Ingress:
    """The capture's half of the bypass process: see app_bypass.Holding."""

    kind = CAPTURE

    def __init__(self, config: Config, log: Any) -> None:
        self._config = config
        self._log = log
        self._uplinks = None if config.interfaces else Uplinks(config.upstreams)
        self._places: dict[str, Place] = {}
        self._loaded: Loaded | None = None
        self._outlet: Outlet | None = None
        self._proven = False
        """An interface was proven since the outlet was made: from then on it is handed over."""
        self._last: dict[str, Any] | None = None
        """What there was to hand over when tend() last said."""
        self._reason: str | None = LOADING
        """Why nothing at all can be attached."""
        self._pauses = Pauses()

    def descriptors(self) -> list[int]:
        """To wait for, besides news of links."""
        return [] if self._uplinks is None else [self._uplinks.fileno()]

    def hear(self, news: Sequence[LinkChange], now_ns: int) -> None:
        """What became of links; tend() sees to it."""
        missed = any(change.state is LinkState.MISSED for change in news)
        names = {change.name for change in news}
        gone = {change.index for change in news if change.state is LinkState.GONE}
        indices = {change.index for change in news}
        for place in self._places.values():
            index = 0 if place.hook is None else place.hook.index
            place.stale |= missed or place.name in names or index in indices
            if index in gone:  # another may have its number by now
                self._let_go(place)
        mirror = None if self._outlet is None else self._outlet.mirror
        touched = mirror is not None and (missed or {mirror.near, mirror.far} & names)
        if touched and self._outlet is not None and not self._outlet.carries():
            self._close_outlet("the mirror link was switched off or taken away: attaching anew")
        if self._uplinks is not None:
            self._uplinks.look_soon(now_ns)

    def tend(self, now_ns: int) -> bool:
        """Attach what is due and mend what broke; True when there is something else to hand over than before."""
        self._follow_wishes(now_ns)
        if self._outlet is not None and not self._outlet.intact():
            self._close_outlet("the mirror link was taken away: attaching anew")
        for place in self._places.values():
            if place.hook is not None and not place.hook.intact():
                self._let_go(place)
                place.stale = True
            if place.stale:
                self._look(place, now_ns)
            if place.active and place.hook is not None and place.hook.reason and now_ns >= place.climbs.due_ns:
                self._climb_again(place, now_ns)
                break  # as below
            due = now_ns >= place.pauses.due_ns and place.facts is not None and place.facts[1]
            if place.hook is None and due and not self._try(place, now_ns):
                break  # it may have taken three seconds: let the caller see to other things first
        before, self._last = self._last, self.handover_facts()
        return self._last != before

    # ── which interfaces, and how they are ──

    def _follow_wishes(self, now_ns: int) -> None:
        if self._uplinks is not None:
            self._uplinks.look(now_ns)
        wanted = self._config.interfaces or (() if self._uplinks is None else self._uplinks.names)
        if tuple(self._places) == wanted:
            return
        places = {name: self._places.get(name) or Place(name) for name in wanted}
        for name, place in self._places.items():
            if name not in places:
                self._let_go(place)
        self._places = places

    def _look(self, place: Place, now_ns: int) -> None:
        place.stale = False
        facts = _facts(place.name)
        before, place.facts = place.facts, None if facts is None else (facts.index, facts.up, facts.carrier, facts.mtu)
        if place.facts != before:
            place.pauses.reset()
            place.climbs.changed(now_ns)
        if facts is None or (place.hook is not None and place.hook.index != facts.index):
            self._let_go(place)
        if place.hook is not None and before is not None and place.facts is not None:
            moved = place.hook.mode != MODES[0] and before[3] != place.facts[3]  # an MTU that native may be fine with
            back = place.active and not (before[1] and before[2])
            if moved or (back and not self._still_works(place.hook)):
                self._let_go(place)
        if facts is None:
            self._say(place, f"interface {place.name}: No such device")
        elif not facts.up:
            self._say(place, f"interface {place.name} is down")
        elif place.hook is not None:
            lower = place.hook.reason and f"interface {place.name}: {place.hook.reason}"
            self._say(place, lower if facts.carrier else f"interface {place.name} has no carrier")

    @staticmethod
    def _still_works(hook: Hook) -> bool:
        try:
            hook.prove()
        except OSError:
            return False
        return True

    def _climb_again(self, place: Place, now_ns: int) -> None:
        """From a lower rung, where a higher one may be had by now; in vain where the driver says that it can't."""
        assert place.hook is not None
        if place.hook.mode == MODES[1] and not _may_have_native(place.hook.index):
            place.climbs.tried(now_ns)
            return
        before = place.hook.mode, place.hook.reason
        self._let_go(place)
        self._try(place, now_ns, before)

    def _try(self, place: Place, now_ns: int, before: tuple[str, str | None] | None = None) -> bool:
        outlet = self._prepared(now_ns)
        if outlet is None:
            return False
        try:
            place.hook = climb(outlet, place.name)
        except AttachError as error:
            place.pauses.failed(now_ns)
            self._say(place, str(error))
            return False
        if not self._proven:
            outlet.count_from_here()
            self._proven = True
        place.pauses = Pauses()
        place.reason = None
        if place.hook.reason is None:
            place.climbs = Climbs()
        else:
            place.climbs.tried(now_ns)
        if before != (place.hook.mode, place.hook.reason):
            self._log.info(
                "Kernel bypass active",
                interface=place.name,
                mode=place.hook.mode,
                reason=place.hook.reason or "the first rung of the ladder",
            )
        self._look(place, now_ns)
        return True

    def _say(self, place: Place, reason: str | None) -> None:
        if reason is not None and reason != place.reason and not place.active:
            self._log.warning("Kernel bypass inactive", interface=place.name, reason=reason)
        place.reason = reason

    def _let_go(self, place: Place) -> None:
        if place.hook is not None:
            try:
                place.hook.close()
            except OSError as error:
                self._log.warning("Not taken off in good order", interface=place.name, reason=str(error))
            place.hook = None
            place.reason = f"interface {place.name} has changed: attaching anew"

    # ── what all interfaces share ──

    def _prepared(self, now_ns: int) -> Outlet | None:
        """The outlet, made if need be, and first what it needs; None when that is not to be had now."""
        if self._outlet is not None or now_ns < self._pauses.due_ns:
            return self._outlet
        before = self._reason
        try:
            if self._loaded is None:
                network = self._config.network
                ports = {network.port, *(upstream.port for upstream in self._config.upstreams)}
                self._loaded = load(network.magic, ports, every_magic=False)
            self._outlet = Outlet(self._loaded, {BACKENDS[name] for name in self._config.capture})
        except (LoadError, OSError) as error:
            self._pauses.failed(now_ns)
            self._reason = str(error)
            if self._reason != before:
                self._log.warning("Kernel bypass inactive", reason=self._reason)
        else:
            self._reason, self._pauses = None, Pauses()
        return self._outlet

    def _close_outlet(self, reason: str) -> None:
        for place in self._places.values():
            self._let_go(place)
        if self._outlet is not None:
            try:
                self._outlet.close()
            except OSError as error:
                self._log.warning("Not taken away in good order", reason=str(error))
            self._log.warning("Kernel bypass inactive", reason=reason)
        self._outlet, self._proven = None, False

    # ── what is handed over, and told ──

    def handover_facts(self) -> dict[str, Any] | None:
        """What a Capture is opened by, fit for JSON; None before anything is proven."""
        if self._outlet is None or not self._proven:
            return None
        facts = self._outlet.facts()
        return asdict(facts) | {"backends": sorted(facts.backends), "baseline": dict(facts.baseline)}

    def handover(self) -> tuple[dict[str, Any], list[int]] | None:
        """Facts and descriptors for a relay; from now on it may have the socket."""
        facts = self.handover_facts()
        if facts is None or self._outlet is None:
            return None
        return facts, self._outlet.handover().fds()

    def said(self) -> dict[str, Any]:
        """The capture's part of `kernelBypass`: the mode is the worst of those that are active."""
        places = list(self._places.values())
        active = [place for place in places if place.active]
        modes = [place.hook.mode for place in active if place.hook is not None]
        problems = list(self._uplinks.problems) if self._uplinks is not None else []
        if not places and self._uplinks is not None:
            problems.insert(0, "no interface leads to the internet or to a node")
        counted = self._outlet.counters() if self._outlet is not None and self._proven else None
        if counted is not None and counted.get("unmarked"):
            problems.append(f"{counted['unmarked']} packets not mirrored: their driver leaves no room for XDP metadata")
        reasons = [place.reason for place in places if place.reason is not None] + problems
        if self._reason is not None and (self._reason != LOADING or not reasons):
            reasons = [self._reason]
        said: dict[str, Any] = {
            "active": bool(active),
            "mode": max(modes, key=MODES.index) if modes else None,
            "interfaces": [place.name for place in active],
            "reason": _printable("; ".join(reasons) or None, MAX_REASONS),
            "attached": [
                {
                    "interface": place.name,
                    "mode": None if place.hook is None else place.hook.mode,
                    "active": place.active,
                    "reason": _printable(place.reason or (self._reason if place.hook is None else None), MAX_REASON),
                }
                for place in places
            ],
        }
        if counted is not None:
            said["ingest"] = {name: counted.get(name, 0) for name in BYPASS_INACTIVE["ingest"]}
            # By either way. What comes while no relay has a socket there is not: the ring buffer keeps it for the next.
            said["ingest"]["dropped"] += counted.get("socketDropped", 0)
        return said

    def close(self) -> None:
        """Take everything off."""
        for place in self._places.values():
            self._let_go(place)
        if self._outlet is not None:
            self._outlet.close()
            self._outlet = None
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None
        if self._uplinks is not None:
            self._uplinks.close()


def _may_have_native(index: int) -> bool:
    """Unless the driver says that it can't."""
    try:
        told = xdp_features(index)
    except OSError:
        return True
    return told is None or bool(told & XdpFeature.BASIC)


def _facts(name: str) -> Interface | None:
    try:
        return interface(name)
    except OSError:
        return None


def _printable(text: str | None, most: int) -> str | None:
    """In ASCII, which is as long in JSON as it looks: a program that is named here may be called anything."""
    if text is None:
        return None
    shown = "".join(letter if " " <= letter <= "~" and letter not in '"\\' else "?" for letter in text)
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."
