"""Who is sent what is published, tier by tier, in turns that begin with somebody else each time."""

from __future__ import annotations

from itertools import chain, islice
from typing import TYPE_CHECKING

from sprint.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sprint.deliveries.subscriber import Subscriber


class Rosters:
    """A list a tier, kept without gaps: leaving moves the last one into the place that is free. Counts them, too."""

    def __init__(self) -> None:
        self._lists: tuple[list[Subscriber], ...] = tuple([] for _ in Tier)
        self._first = [0 for _ in Tier]

    def __iter__(self) -> Iterator[Subscriber]:
        return chain.from_iterable(self._lists)

    def has(self, tier: Tier) -> bool:
        """Whether anybody of that tier is there."""
        return bool(self._lists[tier])

    def turn(self, tier: Tier) -> Iterator[Subscriber]:
        """All of that tier, beginning one further than the last time."""
        roster = self._lists[tier]
        self._first[tier] = start = (self._first[tier] + 1) % max(1, len(roster))
        return chain(islice(roster, start, None), islice(roster, start))

    def add(self, subscriber: Subscriber) -> None:
        """It is sent what is published from now on."""
        roster = self._lists[subscriber.tier]
        subscriber.place = len(roster)
        roster.append(subscriber)
        subscriber.ledger.accounts.subscribers += 1

    def remove(self, subscriber: Subscriber) -> None:
        """It isn't any more."""
        roster = self._lists[subscriber.tier]
        last = roster.pop()
        if last is not subscriber:
            roster[subscriber.place] = last
            last.place = subscriber.place
        subscriber.ledger.accounts.subscribers -= 1
