"""What the bypass holds for the way out: the fan-out's programs and maps, loaded once, handed to relay and UDP worker.

It sends nothing and touches no interface but a parked pair of its own; which subscribers it serves is the UDP worker's
business, and each publication the relay's. If the parked pair is deleted, or loading fails, it is tried again at pauses
that grow from a second to a minute. Single-threaded; loading takes some seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sprint.bypass_line import EGRESS
from sprint.ingress import Pauses
from xdp.fanout import Fanout, open_fanout
from xdp.interfaces import LinkState
from xdp.loader import LoadError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sprint.status import StatusBlock
    from xdp.interfaces import LinkChange


class FanoutHolding:
    """The egress' half of the bypass process: see app_bypass.Holding."""

    kind = EGRESS

    def __init__(self, status: StatusBlock, log: Any) -> None:
        """Of `status` only the counters of others are read."""
        self._status = status
        self._log = log
        self._fanout: Fanout | None = None
        self._pauses = Pauses()
        self._reason: str | None = None

    def descriptors(self) -> list[int]:
        """None: it has nothing to wait for."""
        return []

    def hear(self, news: Sequence[LinkChange], now_ns: int) -> None:  # noqa: ARG002 - Holding's
        """A parked link that somebody has deleted takes the program with it."""
        if self._fanout is None:
            return
        parked = set(self._fanout.handover().contexts)
        if any(change.state is LinkState.GONE and change.index in parked for change in news):
            self._close()
            self._pauses.reset()

    def tend(self, now_ns: int) -> bool:
        """Load it, if it is time for that."""
        if self._fanout is not None or now_ns < self._pauses.due_ns:
            return False
        try:
            self._fanout = open_fanout()
        except (LoadError, OSError) as error:
            self._pauses.failed(now_ns)
            if str(error) != self._reason:
                self._reason = str(error)
                self._log.warning("Fan-out not loaded: datagrams go out by plain sockets", reason=self._reason)
            return False
        self._reason = None
        self._log.info("Fan-out loaded")
        return True

    def handover(self) -> tuple[dict[str, Any], list[int]] | None:
        """What relay and UDP worker need."""
        if self._fanout is None:
            return None
        handover = self._fanout.handover()
        return {"contexts": list(handover.contexts)}, handover.fds()

    def said(self) -> dict[str, Any]:
        """Who is served this way, and what became of their datagrams."""
        udp, egress = self._status.layout.udp, self._status.layout.egress
        return {
            "egress": {
                "subscribers": int(udp.fanout_turbo + udp.fanout_enterprise),
                "sent": int(egress.sent),
                "dropped": int(egress.dropped),
            }
        }

    def close(self) -> None:
        """Take it off."""
        self._close()

    def _close(self) -> None:
        if self._fanout is not None:
            self._fanout.close()
            self._fanout = None
