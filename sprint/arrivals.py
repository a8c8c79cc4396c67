"""Which records have come, where they may come in any order: a watermark, and a bounded set above it. Pure.

A sequence is settled once it came or is told as lost. Everything up to `settled` is; above it, single ones. `known` is
the newest sequence that is known to exist.
"""

from __future__ import annotations

from typing import Final

from sprint.errors import RemoteProtocolError
from sprint.events import Lapped

MAX_SPAN: Final = 1 << 16
"""Between the watermark and the newest: a client that is further behind starts anew from its watermark."""


class Arrivals:
    """One numbering's sequences, as they come in."""

    def __init__(self, settled: int) -> None:
        self.settled = settled
        """This one and all before it came, or are told as lost."""
        self.known = settled
        self._above: set[int] = set()

    def take(self, sequence: int) -> bool:
        """A record of that sequence is here; False: it had come before, or was told as lost.

        Raises RemoteProtocolError, as expect() does, where it is too far ahead.
        """
        if sequence <= self.settled or sequence in self._above:
            return False
        self.expect(sequence)
        self._above.add(sequence)
        self._advance()
        return True

    def expect(self, sequence: int) -> None:
        """A record of that sequence exists. Raises RemoteProtocolError if that leaves more than MAX_SPAN open."""
        if sequence - self.settled > MAX_SPAN:
            raise RemoteProtocolError(f"record {sequence}: {self.settled} was the last that came without a gap")
        self.known = max(self.known, sequence)

    def doubt(self, sequence: int) -> None:
        """Nothing above `sequence` is known to exist after all, except what came."""
        self.known = max([sequence, self.settled, *self._above])

    def lose(self, first: int, count: int) -> list[Lapped]:
        """These won't come: the runs of them that haven't, each told once.

        Raises RemoteProtocolError as expect(), unless they follow the watermark: then there may be any number.
        """
        end = first + count
        if first > self.settled + 1:
            self.expect(end - 1)
        runs = []
        start = max(first, self.settled + 1)
        for came in [*sorted(one for one in self._above if start <= one < end), end]:
            if came > start:
                runs.append(Lapped(start, came - start))
            start = max(start, came + 1)
        if first <= self.settled + 1 and end > self.settled + 1:
            self.settled = end - 1
            self._above = {one for one in self._above if one > self.settled}
        else:
            for run in runs:
                self._above.update(range(run.first, run.first + run.lost))
        self.known = max(self.known, end - 1)
        self._advance()
        return runs

    def missing(self, limit: int) -> Lapped | None:
        """The oldest sequences that are known to exist and haven't come, at most `limit` in a span; None: there are
        none. What lies between the first and the last of the span may have come."""
        if self.known <= self.settled:
            return None
        first = self.settled + 1
        last = min(self.known, first + limit - 1)
        while last in self._above:
            last -= 1
        return Lapped(first, last - first + 1)

    def _advance(self) -> None:
        while self.settled + 1 in self._above:
            self.settled += 1
            self._above.discard(self.settled)
        self.known = max(self.known, self.settled)
