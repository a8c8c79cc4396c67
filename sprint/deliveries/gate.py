"""What a delivery asks before it serves somebody: the gate, whoever keeps it.

In the product it is sprint.admission.Admission, which knows the operator's keys. OpenGate is for benchmarks, and for
those who embed a delivery in something with an authentication of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from sprint.admission import Denial, Ticket
from sprint.deliveries.hello import FULL, NOT_ACCEPTED, Refusal
from sprint.tiers import NS_PER_S, Tier

if TYPE_CHECKING:
    from collections.abc import Callable


class Gate(Protocol):
    """Tells who is served at which tier."""

    def admit(self, key: str | None, network: str, now_ns: int, now_s: int) -> Ticket | Denial:
        """Judge a hello with that key, or none, from that network. A ticket is given back by leave()."""

    def leave(self, ticket: Ticket) -> None:
        """That subscription has ended."""


class OpenGate:
    """Lets in whom `tier_of_key` gives a tier; None keeps somebody out."""

    def __init__(self, tier_of_key: Callable[[str | None], Tier | None]) -> None:
        self._tier_of_key = tier_of_key

    def admit(self, key: str | None, network: str, now_ns: int, now_s: int) -> Ticket | Denial:  # noqa: ARG002 - Gate's
        """As the function says."""
        tier = self._tier_of_key(key)
        return Denial(0) if tier is None else Ticket(tier, None)

    def leave(self, ticket: Ticket) -> None:
        """Nothing was counted."""


def admit(gate: Gate, key: str | None, network: str, now_ns: int, wall_ns: int) -> Ticket | Refusal:
    """The gate's answer, a denial in the words that a client gets; both clocks in ns."""
    answer = gate.admit(key, network, now_ns, wall_ns // NS_PER_S)
    if isinstance(answer, Ticket):
        return answer
    if answer.full:
        return Refusal(FULL, retry=True)
    return Refusal(NOT_ACCEPTED, delay_ns=answer.delay_ns, undecided=answer.undecided)
