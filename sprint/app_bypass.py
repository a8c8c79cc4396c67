"""The process that holds the kernel bypass: compiles, attaches, proves, hands over, and mends what breaks.

It alone holds the BPF links, so that a relay can die and come back without them, and so that nothing stays on an
interface when it dies itself. What it holds is in one or more holdings (the capture's is in ingress); this module has
what they share: the loop, news of links, the status, and the lines by which others get descriptors (see bypass_line).
"""

from __future__ import annotations

import selectors
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from sprint.bypass_line import HoldingEnd
from sprint.composition import BYPASS_INACTIVE
from sprint.egress import FanoutHolding
from sprint.ingress import Ingress
from sprint.sources.capture import CaptureSource
from xdp.capture import Capture, Handover, close_handover
from xdp.interfaces import LinkMonitor
from xdp.links import clean
from xdp.segments import Backend

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from sprint.bitcoin.networks import Network
    from sprint.config import Config
    from sprint.status import StatusBlock
    from xdp.interfaces import LinkChange

TICK_S = 0.25
"""How old the counters in the status may be, and how long a link that was forced off stays so."""


class Holding(Protocol):
    """Something that is loaded, owned and handed over by this process."""

    kind: str
    """What it is asked for by, and what its hand-overs bear."""

    def descriptors(self) -> list[int]:
        """Which also wake the process, from its start to its end."""

    def hear(self, news: Sequence[LinkChange], now_ns: int) -> None:
        """Links have changed."""

    def tend(self, now_ns: int) -> bool:
        """Its turn, several times a second, for at most some seconds; True when its hand-over has changed."""

    def handover(self) -> tuple[dict[str, Any], list[int]] | None:
        """Facts fit for JSON, and descriptors, which stay its own; None: there is nothing now."""

    def said(self) -> dict[str, Any]:
        """Its keys of the status' `kernelBypass`."""

    def close(self) -> None:
        """Take everything off and away."""


class BypassProcess:
    """One process's work, from start to SIGTERM."""

    def __init__(self, config: Config, status: StatusBlock, controls: Sequence[socket.socket], log: Any) -> None:
        """`controls`: this end of each line; who is at the other matters not, only what is asked for."""
        self._status = status
        self._log = log
        self._lines = [HoldingEnd(control) for control in controls]
        self._holdings: list[Holding] = [Ingress(config, log), FanoutHolding(status, log)]
        self._stopping = False

    def run(self) -> None:
        """Attach, hand over, and watch until SIGTERM."""
        signal.signal(signal.SIGTERM, self._on_signal)
        try:
            self._clean()
            self._tell()
            with LinkMonitor() as monitor, selectors.DefaultSelector() as selector:
                selector.register(monitor, selectors.EVENT_READ)
                for line in self._lines:
                    selector.register(line, selectors.EVENT_READ, line)
                for holding in self._holdings:
                    for descriptor in holding.descriptors():
                        selector.register(descriptor, selectors.EVENT_READ)
                while not self._stopping:
                    self._tend()
                    self._tell()
                    ready = [key for key, _ in selector.select(TICK_S)]
                    for line in (key.data for key in ready if key.data is not None):
                        self._answer(line)
                    if any(key.fileobj is monitor for key in ready):
                        news, now_ns = monitor.poll(), time.monotonic_ns()
                        for holding in self._holdings:
                            holding.hear(news, now_ns)
        finally:
            for holding in self._holdings:
                with suppress(OSError):
                    holding.close()

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._stopping = True

    def _clean(self) -> None:
        try:
            for left in clean():
                self._log.warning("Removed what a killed run had left", what=str(left))
        except OSError as error:
            self._log.warning("What a killed run had left can't be removed", reason=str(error))

    def _tend(self) -> None:
        for holding in self._holdings:
            if holding.tend(time.monotonic_ns()):
                found = holding.handover()
                for line in self._lines:
                    if holding.kind in line.kinds:
                        line.hand_over(holding.kind, found)

    def _answer(self, line: HoldingEnd) -> None:
        kinds = line.asked()
        for holding in self._holdings:
            found = holding.handover() if holding.kind in kinds else None
            if found is not None:
                line.hand_over(holding.kind, found)

    def _tell(self) -> None:
        """The contract's kernelBypass object, as it is now."""
        said: dict[str, Any] = {**BYPASS_INACTIVE, "requested": True}
        for holding in self._holdings:
            said |= holding.said()
        self._status.bypass = said


def open_capture(facts: dict[str, Any], descriptors: list[int], network: Network, status: StatusBlock) -> CaptureSource:
    """The relay's half of what was handed over."""
    backends = frozenset(Backend(number) for number in facts["backends"])
    handover = Handover(**{**facts, "backends": backends}).with_fds(descriptors)
    return CaptureSource(_OwnedCapture(handover), network, status, sorted(backends))


class _OwnedCapture:
    """A capture, and the descriptors that were sent for it, which end together."""

    def __init__(self, handover: Handover) -> None:
        self._handover = handover
        self._capture = Capture(handover)
        self.fileno = self._capture.fileno
        self.poll = self._capture.poll
        self.deadline = self._capture.deadline
        self.counters = self._capture.counters

    def close(self) -> None:
        self._capture.close()
        close_handover(self._handover)
