"""Which interfaces peers are reached by, where the operator names none: those that lead to the nodes and the internet.

Owns the resolver of the nodes' names, which works in threads, since a dead name server takes its time. A node on this
very host is reached by `lo`, which is no interface to capture on: its peers are behind the one that leads to the
internet. Rule: an interface that once led somewhere stays in the list while it exists, so that a failing route doesn't
take the capture off what will carry the traffic again.
"""

from __future__ import annotations

import select
import socket
import time
from typing import TYPE_CHECKING

from sprint.settings import MAX_INTERFACES
from sprint.sources.resolver import Resolver, numeric
from sprint.tiers import NS_PER_S
from xdp.interfaces import interface_towards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sprint.addresses import Address
    from sprint.sources.resolver import SocketAddress

SOMEWHERE_ELSE = ("203.0.113.1", "2001:db8::1")
"""Documentation addresses (RFC 5737, RFC 3849), which nobody has: the way there is the way to the internet."""
FIRST_LOOK_NS, LAST_LOOK_NS = NS_PER_S // 4, 10 * NS_PER_S
"""Routes change without a word about any link, and mostly a moment after one."""
RESOLVE_NS = 60 * NS_PER_S


class Uplinks:
    """The list, as it is now."""

    def __init__(self, upstreams: Sequence[Address]) -> None:
        self.names: tuple[str, ...] = ()
        """At most MAX_INTERFACES; those to the nodes first, in the order of BITCOIN_NODE."""
        self.problems: tuple[str, ...] = ()
        """One line for each node that can't be resolved, or that nothing leads to."""
        self._upstreams = tuple(upstreams)
        self._resolver = Resolver()
        self._addresses: dict[Address, list[SocketAddress]] = {}
        self._unresolved: dict[Address, str] = {}
        self._asked: set[Address] = set()
        self._resolve_ns = self._look_ns = 0
        self._pause_ns = FIRST_LOOK_NS
        for upstream in self._upstreams:
            found = numeric(upstream)
            if found is not None:
                self._addresses[upstream] = [found]

    def fileno(self) -> int:
        """Readable when a name has been resolved."""
        return self._resolver.fileno()

    def look(self, now_ns: int) -> None:
        """Bring `names` and `problems` up to date, if it is time to."""
        answers = self._resolver.results()
        for upstream, found, problem in answers:
            self._asked.discard(upstream)
            if found:
                self._addresses[upstream] = found
                self._unresolved.pop(upstream, None)
            else:
                self._unresolved[upstream] = problem
        if now_ns >= self._resolve_ns:
            self._resolve_ns = now_ns + RESOLVE_NS
            for upstream in self._upstreams:
                if numeric(upstream) is None and upstream not in self._asked:
                    self._asked.add(upstream)
                    self._resolver.submit(upstream)
        if answers or now_ns >= self._look_ns:
            self._look_ns = now_ns + self._pause_ns
            self._pause_ns = min(2 * self._pause_ns, LAST_LOOK_NS)
            self._follow_routes()

    def look_soon(self, now_ns: int) -> None:
        """Something has changed: routes will."""
        self._pause_ns = FIRST_LOOK_NS
        self._look_ns = min(self._look_ns, now_ns + FIRST_LOOK_NS)

    def _follow_routes(self) -> None:
        problems = {upstream: why for upstream, why in self._unresolved.items() if upstream not in self._addresses}
        leading: dict[str, None] = {}
        for upstream, found in self._addresses.items():
            towards, why = _towards([_text(address) for address in found])
            leading |= dict.fromkeys(towards)
            if not towards:
                problems[upstream] = f"nothing leads to {upstream.host}: {why}"
        for address in SOMEWHERE_ELSE:
            towards, _ = _towards([address])
            leading |= dict.fromkeys(towards)
        leading.pop("lo", None)
        there = {name for _, name in socket.if_nameindex()}
        # What is gone is awaited while something is missing: it may be made again under the same name.
        awaited = bool(problems) or not leading
        leading |= dict.fromkeys(name for name in self.names if name in there or awaited)
        # Where there are too many, what is gone makes room first.
        ordered = sorted(leading, key=lambda name: name not in there)
        self.names = tuple(ordered[:MAX_INTERFACES])
        self.problems = tuple(problems[upstream] for upstream in self._upstreams if upstream in problems)

    def wait(self, timeout_s: float) -> None:
        """Until every name has its answer, then look() once more, for one who has nothing else to do."""
        give_up = time.monotonic() + timeout_s
        self.look(time.monotonic_ns())
        while self._asked and (left_s := give_up - time.monotonic()) > 0:
            select.select([self], [], [], left_s)
            self.look(time.monotonic_ns())

    def close(self) -> None:
        """Give up what is being resolved."""
        self._resolver.close()


def default_interfaces(upstreams: Sequence[Address], timeout_s: float = 5.0) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What Uplinks would say now: names and problems. Waits for name servers."""
    uplinks = Uplinks(upstreams)
    try:
        uplinks.wait(timeout_s)
    finally:
        uplinks.close()
    return uplinks.names, uplinks.problems


def _towards(addresses: Sequence[str]) -> tuple[list[str], str]:
    """The interfaces that lead to any of these, and, where none does, why."""
    names, why = [], ""
    for address in addresses:
        try:
            names.append(interface_towards(address))
        except OSError as error:  # noqa: PERF203 - a look at a route takes milliseconds
            why = error.strerror or str(error)
    return names, why


def _text(address: SocketAddress) -> str:
    """As interface_towards() takes it: a link-local one with its interface."""
    host, scope = str(address[1][0]), address[1][3] if len(address[1]) > 3 else 0
    return f"{host.partition('%')[0]}%{scope}" if scope else host
