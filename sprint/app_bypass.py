"""The process that holds the kernel bypass: compiles, attaches, proves, hands over, and mends what breaks.

It alone holds the BPF links, so that a relay can die and come back without them, and so that nothing stays on the
interface when it dies itself. It tells its state to the status block, and hands descriptors to the relay through a
socket pair that both were forked with: when asked, and whenever it has attached anew.
"""

from __future__ import annotations

import json
import selectors
import signal
import socket
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sprint.composition import BYPASS_INACTIVE, LOADING
from sprint.sources.bypass import ASK
from sprint.sources.capture import CaptureSource
from sprint.tiers import NS_PER_S
from xdp.attachment import AttachError, Attachment, attach
from xdp.capture import Capture, Handover, close_handover
from xdp.interfaces import LinkMonitor, interface_towards
from xdp.links import clean
from xdp.loader import Loaded, LoadError, load
from xdp.segments import Backend

if TYPE_CHECKING:
    from sprint.bitcoin.networks import Network
    from sprint.config import Config
    from sprint.status import StatusBlock

TICK_S = 0.25
"""How old the counters in the status may be."""
FIRST_RETRY_NS, LAST_RETRY_NS = NS_PER_S, 60 * NS_PER_S
SOMEWHERE_ELSE = "203.0.113.1"
"""TEST-NET-3 (RFC 5737), which nobody has: the way there is the way to the internet."""
BACKENDS = {"af_xdp": Backend.AF_XDP, "ringbuf": Backend.RINGBUF}


class BypassProcess:
    """One process's work, from start to SIGTERM."""

    def __init__(self, config: Config, status: StatusBlock, control: socket.socket, log: Any) -> None:
        control.setblocking(False)
        self._config = config
        self._status = status
        self._control = control
        self._log = log
        self._attachment: Attachment | None = None
        self._loaded: Loaded | None = None
        self._reason: str | None = LOADING
        self._interface = config.interface
        """The one that was tried last, where none is configured."""
        self._retry_ns = 0
        self._pause_ns = FIRST_RETRY_NS
        self._stopping = False

    def run(self) -> None:
        """Attach, hand over, and watch until SIGTERM."""
        signal.signal(signal.SIGTERM, self._on_signal)
        for left in clean():
            self._log.warning("Removed what a killed run had left", what=str(left))
        self._tell()
        try:
            with LinkMonitor() as monitor, selectors.DefaultSelector() as selector:
                selector.register(monitor, selectors.EVENT_READ)
                selector.register(self._control, selectors.EVENT_READ)
                while not self._stopping:
                    if self._attachment is None and time.monotonic_ns() >= self._retry_ns:
                        self._try_to_attach()
                    self._tell()
                    for key, _ in selector.select(TICK_S):
                        if key.fileobj is self._control:
                            self._answer()
                        elif any(change.name == self._interface for change in monitor.poll()):
                            self._look_again()
        finally:
            self._detach()
            if self._loaded is not None:
                self._loaded.close()

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._stopping = True

    def _try_to_attach(self) -> None:
        before = self._reason
        try:
            if self._loaded is None:
                network = self._config.network
                ports = {network.port, *(upstream.port for upstream in self._config.upstreams)}
                self._loaded = load(network.magic, ports, every_magic=False)
            backends = {BACKENDS[name] for name in self._config.capture}
            self._interface = self._config.interface or default_interface(self._config.upstreams[0].host)
            self._attachment = attach(self._loaded, self._interface, backends=backends)
        except (AttachError, LoadError, OSError) as error:
            self._reason = str(error)
            # An attempt compiles, or makes links and waits for packets: not to be done all the time in vain.
            self._retry_ns = time.monotonic_ns() + self._pause_ns
            self._pause_ns = min(2 * self._pause_ns, LAST_RETRY_NS)
            if self._reason != before:
                self._log.warning("Kernel bypass inactive", reason=self._reason)
            return
        self._reason = self._attachment.reason
        self._pause_ns = FIRST_RETRY_NS
        self._log.info(
            "Kernel bypass active",
            interface=self._attachment.interface,
            mode=self._attachment.mode,
            reason=self._reason or "the first rung of the ladder",
        )
        self._hand_over()

    def _look_again(self) -> None:
        """The interface has changed: what was attached to it may be gone with it."""
        self._detach()
        self._reason = f"{self._interface} has changed: attaching anew"
        self._retry_ns, self._pause_ns = 0, FIRST_RETRY_NS
        with suppress(OSError):
            self._control.send(b"{}")

    def _detach(self) -> None:
        if self._attachment is not None:
            with suppress(OSError):
                self._attachment.close()
            self._attachment = None

    def _answer(self) -> None:
        try:
            asked = self._control.recv(64)
        except BlockingIOError:
            return
        if asked == ASK and self._attachment is not None:
            self._hand_over()

    def _hand_over(self) -> None:
        assert self._attachment is not None
        handover = self._attachment.handover()
        facts = asdict(handover) | {"backends": sorted(handover.backends), "baseline": dict(handover.baseline)}
        with suppress(OSError):
            socket.send_fds(self._control, [json.dumps(facts).encode()], handover.fds())

    def _tell(self) -> None:
        """The contract's kernelBypass object, as it is now."""
        said: dict[str, Any] = {**BYPASS_INACTIVE, "requested": True, "reason": self._reason}
        attachment = self._attachment
        if attachment is not None:
            counted = attachment.counters()
            said |= {"active": True, "mode": attachment.mode, "interfaces": [attachment.interface]}
            said["ingest"] = {name: counted.get(name, 0) for name in BYPASS_INACTIVE["ingest"]}
        self._status.bypass = said


def default_interface(host: str) -> str:
    """The interface that leads to that host; for a node on this very host, the one that leads to its peers.

    Raises OSError when the host has no address, or nothing leads there.
    """
    address = str(socket.getaddrinfo(host, None)[0][4][0])
    towards = interface_towards(address)
    return towards if towards != "lo" else interface_towards(SOMEWHERE_ELSE)


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
        self.counters = self._capture.counters

    def close(self) -> None:
        self._capture.close()
        close_handover(self._handover)
