"""Source bypass: the capture as the relay has it, from the moment it is proven and for as long as it lasts.

The process that holds the programs hands descriptors over a Unix socket: at once to a relay that asks, and again
whenever the way out of the kernel is another one. Interfaces come and go without that. Until then, and in between, this
source says nothing, and the plain sockets serve.
"""

from __future__ import annotations

import select
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sprint.bypass_line import CAPTURE, AskingEnd, close_all

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from sprint.events import Want
    from sprint.sources import Heard
    from sprint.sources.capture import CaptureSource

LOOK_NS = 100_000_000
"""How often a polling loop looks whether something new was handed over: it costs a system call."""
RETRY_NS = 1_000_000_000
"""After a capture that could not be opened: its socket's place may be held by what is left of a killed relay."""


class BypassSource:
    """A capture source that comes and goes."""

    def __init__(
        self, control: socket.socket, open_capture: Callable[[dict[str, Any], list[int]], CaptureSource], log: Any
    ) -> None:
        """`open_capture` makes a capture of what was handed over: facts and descriptors, which are its own then."""
        self._line = AskingEnd(control, CAPTURE)
        self._open_capture = open_capture
        self._log = log
        self._capture: CaptureSource | None = None
        self._captured = -1
        self._look_ns = 0
        self._retry_ns: int | None = None
        self._epoll = select.epoll()
        self._epoll.register(control.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        """Readable when the capture has something, or something is handed over."""
        return self._epoll.fileno()

    def poll(self, now_ns: int) -> list[Heard]:
        """What the capture hears."""
        heard = [] if self._capture is None else self._capture.poll(now_ns)
        if not heard and self._retry_ns is not None and now_ns >= self._retry_ns:
            self._retry_ns = None
            self._line.ask()
        elif not heard and now_ns >= self._look_ns:
            self._look_ns = now_ns + LOOK_NS
            self._take_over(now_ns)
        return heard

    def deadline(self) -> int | None:
        """The capture's, or when one that could not be opened is asked for again."""
        return self._retry_ns if self._capture is None else self._capture.deadline()

    def want(self, want: Want, now_ns: int) -> None:
        """A capture can't ask anybody."""

    def account(self) -> None:
        """Bring the capture's rows of the status up to date."""
        self._look_ns = 0
        if self._capture is not None:
            self._capture.account()

    def close(self) -> None:
        """Let go of the capture."""
        self._drop()
        self._epoll.close()

    def _take_over(self, now_ns: int) -> None:
        handed_over = self._line.take()
        if handed_over is None:
            return
        self._drop()
        self._retry_ns = None
        facts, descriptors = handed_over
        if facts is None:
            close_all(descriptors)
            return
        try:
            self._capture = self._open_capture(facts, descriptors)
        except OSError as error:
            self._log.warning("Capture can't be opened", reason=str(error))
            close_all(descriptors)
            self._retry_ns = now_ns + RETRY_NS
            return
        self._captured = self._capture.fileno()
        self._epoll.register(self._captured, select.EPOLLIN)
        self._log.info("Capture at work")

    def _drop(self) -> None:
        if self._capture is not None:
            with suppress(OSError):
                self._epoll.unregister(self._captured)
            self._capture.close()
            self._capture = None
