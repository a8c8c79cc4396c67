"""What the UDP delivery asks of a fan-out: who is served by which rung, and to send by the rungs above its socket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from sprint.addresses import Address
    from sprint.deliveries.udp_sender import Rung
    from sprint.tiers import Tier


class Fanout(Protocol):
    """The one that serves many at once, as this delivery sees it. Subscribers are known by their tokens."""

    @property
    def step(self) -> str:
        """The best rung that there is."""

    @property
    def reason(self) -> str | None:
        """Why somebody isn't on the first."""

    def fileno(self) -> int:
        """Readable when look() has something to do."""

    def join(self, key: bytes, address: Address, tier: Tier) -> Rung:
        """Serve this one from the next publication on, by that rung."""

    def leave(self, key: bytes) -> None:
        """Not any more."""

    def transmit(self, payload: bytes) -> int:
        """To everybody on the second rung, enterprise first: how many the kernel took."""

    def beat(self, payload: bytes, go_on: Callable[[], bool]) -> int | None:
        """To everybody on the first rung, asking now and then whether to go on: how many drivers took it; None: it
        can't."""

    def look(self, now_ns: int) -> list[tuple[bytes, Rung]]:
        """Who is served by another rung than before; to be called each second, too."""

    def close(self) -> None:
        """Serve nobody."""
