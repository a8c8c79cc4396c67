"""The API behind waitress, in a daemon thread of its own.

The address is bound when ApiServer is made, so that a taken port stops the start and not a request; threads begin with
start(), behind any fork. TCP only.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final, final

from waitress import wasyncore
from waitress.server import create_server

from sprint.addresses import Address
from sprint.binding import listening

if TYPE_CHECKING:
    from types import TracebackType

    from flask import Flask

LIMITS: Final[dict[str, Any]] = {
    "threads": 4,
    # One operator's browsers and scrapers; waitress counts its own two descriptors in.
    "connection_limit": 128,
    # An idle or half-sent request holds one of those connections no longer than this, in seconds.
    "channel_timeout": 30,
    "cleanup_interval": 5,
    # No request has a body, and none needs more header than a browser sends.
    "max_request_body_size": 4_096,
    "max_request_header_size": 16_384,
    "backlog": 128,
    "ident": "bitcoin-sprint",
}
STOP_TIMEOUT_S = 10
"""Waitress waits up to 5 s for requests under way."""


@final
class ApiServer:
    """One listening address of the API; also a context manager that starts and stops it."""

    def __init__(self, app: Flask, address: Address) -> None:
        """Bind the address; port 0 takes a free one. Raises HostError when it can't be bound."""
        self._app = app
        self._socket = listening("API_BIND", address, LIMITS["backlog"])
        host, port = self._socket.getsockname()[:2]
        self.address = Address(host, port)
        """What is bound in fact."""
        self._map: dict[int, Any] = {}
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    def start(self) -> None:
        """Serve from now on."""
        self._server = create_server(self._app, map=self._map, sockets=[self._socket], **LIMITS)
        self._thread = threading.Thread(target=self._run, name="sprint-api", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish the requests under way, close every connection and the address. A second call does nothing."""
        if self._thread is None:
            self._socket.close()
            return
        self._stopping.set()
        if self._thread.is_alive():
            self._server.pull_trigger()
            self._thread.join(STOP_TIMEOUT_S)

    def __enter__(self) -> ApiServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        # poll(), for select() fails beyond descriptor 1,023, and the relay's process may hold thousands. A turn at a
        # time, because waitress's own loop can't be ended from outside.
        try:
            while not self._stopping.is_set():
                wasyncore.loop(timeout=1, use_poll=True, map=self._map, count=1)
        finally:
            self._server.task_dispatcher.shutdown()
            wasyncore.close_all(self._map)
