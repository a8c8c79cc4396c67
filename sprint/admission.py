"""Who is served at which tier: keys, their limits and their end, for every delivery alike.

The tier comes from the operator's record of the key and from nothing that a client says; without a key it is free. It
is never higher than the instance's. Whatever is wrong with a key, the answer is the same, `not accepted`, and it comes
later the more often that network was refused; a good key is admitted at once even then. A key that is revoked or that
expires while it is used ends its sessions at the next check, within about a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sprint.seats import of_key
from sprint.tiers import NS_PER_MS, NS_PER_S, Tier

if TYPE_CHECKING:
    from collections.abc import Callable

    from sprint.key_book import KeyBook
    from sprint.keys import KeyRecord
    from sprint.seats import Seats

CHECK_NS: Final = NS_PER_S // 2
"""How often sessions are held against the keys: revoking takes effect within a second."""
FREE_FAILURES: Final = 3
"""Refusals of one network that are answered at once: a misspelt key, an old one."""
FIRST_DELAY_NS: Final = 250 * NS_PER_MS
LAST_DELAY_NS: Final = 4 * NS_PER_S
"""Less than what a connection has for its hello."""
FORGET_NS: Final = 60 * NS_PER_S
MAX_NETWORKS: Final = 4_096
"""Networks whose failures are remembered; of more, the one that failed longest ago is forgotten."""


@dataclass(slots=True)
class Ticket:
    """One subscription's right to be served."""

    tier: Tier
    key: KeyRecord | None
    """None: without one."""
    end: Callable[[], None] | None = None
    """Called when the key has been revoked or has expired; whoever holds the ticket sets it."""


@dataclass(frozen=True, slots=True)
class Denial:
    """No, and how long to wait before saying so."""

    delay_ns: int
    full: bool = False
    """The key is good and its connections are all taken: worth another try."""


class Admission:
    """One process's gate. Times are CLOCK_MONOTONIC ns where a name ends in _ns, and the wall clock's s in _s."""

    def __init__(self, highest: Tier, book: KeyBook, seats: Seats) -> None:
        """`highest` is the instance's tier."""
        self.denied = 0
        self._highest = highest
        self._book = book
        self.seats = seats
        self._tickets: dict[bytes, dict[int, Ticket]] = {}
        self._failures: dict[str, tuple[int, int]] = {}  # network → how often, and when last

    @property
    def reason(self) -> str | None:
        """Why the keys can't be read; None: they can. Those that were read before still count."""
        return self._book.reason

    def admit(self, key: str | None, network: str, now_ns: int, now_s: int) -> Ticket | Denial:
        """Judge a hello from that network. A ticket has to be given back by leave()."""
        if key is None:
            return Ticket(Tier.FREE, None)
        self._book.refresh()  # a key works from the moment it was made
        found = self._book.look_up(key, now_s)
        if found is None:
            self.denied += 1
            return Denial(self._failed(network, now_ns))
        if not self.seats.take(of_key(found.number), found.connections):
            return Denial(0, full=True)
        ticket = Ticket(min(found.tier, self._highest), found)
        self._tickets.setdefault(found.hash, {})[id(ticket)] = ticket
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """That subscription has ended."""
        if ticket.key is None:
            return
        holders = self._tickets.get(ticket.key.hash, {})
        if holders.pop(id(ticket), None) is not None:
            self.seats.give_back(of_key(ticket.key.number))
        if not holders:
            self._tickets.pop(ticket.key.hash, None)

    def check(self, now_s: int) -> int:
        """End what is served by keys that are valid no longer; returns how many. To be called each CHECK_NS."""
        self._book.refresh()
        ended = 0
        for key in [key for key in self._tickets if not self._book.is_valid(key, now_s)]:
            for ticket in list(self._tickets.get(key, {}).values()):
                if ticket.end is not None:
                    ticket.end()
                self.leave(ticket)
                ended += 1
        return ended

    def _failed(self, network: str, now_ns: int) -> int:
        """Note a refusal; the delay of its answer."""
        times, last_ns = self._failures.pop(network, (0, now_ns))
        if now_ns - last_ns > FORGET_NS:
            times = 0
        if len(self._failures) >= MAX_NETWORKS:
            del self._failures[next(iter(self._failures))]
        self._failures[network] = (times + 1, now_ns)
        if times < FREE_FAILURES:
            return 0
        return min(LAST_DELAY_NS, FIRST_DELAY_NS << min(times - FREE_FAILURES, 16))
