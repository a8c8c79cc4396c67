"""Who is served at which tier: keys, their limits and their end, for every delivery alike.

The tier comes from the operator's record of the key and from nothing that a client says; without a key it is free. It
is never higher than the instance's. Whatever is wrong with a key, the answer is the same, `not accepted`, and it comes
later the more often that network was refused; a good key is admitted at once even then. A key that is revoked or that
expires while it is used ends its sessions at the next check, within about a second.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Final

from sprint.keys import NEVER
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
"""Networks whose failures are remembered. While all of them are recent, others are counted as one: who has many
addresses can't have any forgotten by using more."""
BUSY_NS: Final = 50 * NS_PER_MS
"""An operator's change keeps the file from being read for some milliseconds."""
ENDS_A_TURN: Final = 256
"""Sessions that one check ends, about 10 ms: a publication waits behind them."""

_OTHERS: Final = "others"


@dataclass(slots=True)
class Ticket:
    """One subscription's right to be served."""

    tier: Tier
    key: KeyRecord | None
    """None: without one."""
    end: Callable[[], None] | None = None
    """Called when the key has been revoked or has expired; whoever holds the ticket sets it. The ticket is given back
    by then."""


@dataclass(frozen=True, slots=True)
class Denial:
    """No, and how long to wait before saying so."""

    delay_ns: int
    full: bool = False
    """The key is good and its connections are all taken: worth another try."""
    undecided: bool = False
    """The keys are being changed at this instant, and this one may be new: ask again after the delay."""


class Admission:
    """One process's gate. Times are CLOCK_MONOTONIC ns where a name ends in _ns, and the wall clock's s in _s."""

    def __init__(self, highest: Tier, book: KeyBook, seats: Seats) -> None:
        """`highest` is the instance's tier."""
        self.denied = 0
        self._highest = highest
        self._book = book
        self.seats = seats
        self._tickets: dict[bytes, dict[int, Ticket]] = {}
        self._ending: deque[Ticket] = deque()
        self._checked_version = -1
        self._next_expiry_s: float = inf
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
        if found is None and self._book.busy:
            return Denial(BUSY_NS, undecided=True)
        if found is None:
            self.denied += 1
            return Denial(self._failed(network, now_ns))
        if not self.seats.take(of_key(found.number), found.connections):
            return Denial(0, full=True)
        if found.expires_s != NEVER:
            self._next_expiry_s = min(self._next_expiry_s, found.expires_s)
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
        """End what is served by keys that are valid no longer; returns how many.

        To be called each CHECK_NS, and at once when it has ended ENDS_A_TURN: there may be more.
        """
        self._book.refresh()
        if self._book.version != self._checked_version or now_s >= self._next_expiry_s:
            self._find_ending(now_s)
        ended = 0
        while self._ending and ended < ENDS_A_TURN:
            ticket = self._ending.popleft()
            if self._is_held(ticket):
                self.leave(ticket)  # first: one that can't be ended must not keep the others
                ended += 1
                if ticket.end is not None:
                    ticket.end()
        return ended

    def _find_ending(self, now_s: int) -> None:
        self._checked_version = self._book.version
        self._next_expiry_s = inf
        self._ending.clear()
        for digest, holders in self._tickets.items():
            key = self._book.valid(digest, now_s)
            if key is None:
                self._ending += holders.values()
            elif key.expires_s != NEVER:
                self._next_expiry_s = min(self._next_expiry_s, key.expires_s)

    def _is_held(self, ticket: Ticket) -> bool:
        return ticket.key is not None and id(ticket) in self._tickets.get(ticket.key.hash, {})

    def _failed(self, network: str, now_ns: int) -> int:
        """Note a refusal; the delay of its answer."""
        failures = self._failures
        while failures and now_ns - failures[oldest := next(iter(failures))][1] > FORGET_NS:
            del failures[oldest]
        if network not in failures and len(failures) >= MAX_NETWORKS:
            network = _OTHERS
        times, _ = failures.pop(network, (0, now_ns))
        failures[network] = (times + 1, now_ns)
        if times < FREE_FAILURES:
            return 0
        return min(LAST_DELAY_NS, FIRST_DELAY_NS << min(times - FREE_FAILURES, 16))
