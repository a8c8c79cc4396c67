"""A node by others as tests run it: its process, its ports, its folder and its log, whoever wrote it.

Rules: nothing here is of the product (standard library only), so that it can disagree with it; and what a node's class
starts here never outlives its test.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from typing_extensions import Self

HOST = "127.0.0.1"
RPC_TIMEOUT_S = 60.0  # mining thousands of blocks is one call
POLL_INTERVAL_S = 0.02
LOG_TAIL_LINES = 60


class NodeError(Exception):
    """The node could not be started, ended by itself, or did not reach what was awaited. The text holds its log."""


class NodeProcess:
    """A node on free loopback ports in a private folder, as a context manager that starts and ends it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.host = HOST
        self.rpc_port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._cleanup = ExitStack()
        self._folder = Path()

    def __enter__(self) -> Self:
        try:
            folder = tempfile.TemporaryDirectory(prefix=f"sprint-{self.name}-", ignore_cleanup_errors=True)
            self._folder = Path(self._cleanup.enter_context(folder))
            self._cleanup.callback(self.kill)
            self.start()
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    @property
    def pid(self) -> int:
        """Of the running node; NodeError when it isn't running."""
        if self._process is None:
            raise NodeError(f"{self.name} is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and wait until it answers. Raises NodeError with its log."""
        raise NotImplementedError

    def kill(self) -> None:
        """SIGKILL, as a power cut would: connections are reset, nothing is flushed."""
        if self._process is not None:
            self._process.kill()
            self._reap()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """While this lasts it is stopped (SIGSTOP): it says nothing, its connections stay open."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def log_tail(self) -> str:
        """The last lines of what the node logged."""
        try:
            lines = self._log.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return "(no log)"
        return "\n".join(lines[-LOG_TAIL_LINES:])

    @property
    def _log(self) -> Path:
        return self._folder / "node.log"

    def _post(self, user: str, password: str, method: str, params: tuple[object, ...]) -> tuple[int, bytes]:
        """Status and body of one JSON-RPC call; OSError if the node isn't there, or ended in mid-answer."""
        connection = http.client.HTTPConnection(self.host, self.rpc_port, timeout=RPC_TIMEOUT_S)
        try:
            credentials = base64.b64encode(f"{user}:{password}".encode()).decode()
            body = json.dumps({"method": method, "params": params, "id": 1})
            connection.request("POST", "/", body, {"Authorization": f"Basic {credentials}"})
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:
            raise ConnectionError(f"{self.name}: {method}: {error!r}") from error
        finally:
            connection.close()

    def _wait_for_end(self) -> None:
        """Until it has ended by itself, as it was asked to; NodeError, and SIGKILL, when it doesn't."""
        if self._process is None:
            return
        try:
            self._process.wait(RPC_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise NodeError(f"{self.name} did not stop in {RPC_TIMEOUT_S:g} s\n{self.log_tail()}") from None
        self._reap()

    def _reap(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.stdin is not None:
                process.stdin.close()
            process.wait()


def free_ports() -> tuple[int, int]:
    """Two TCP ports of the loopback that are free now; somebody else may take one before the node does."""
    with socket.socket() as first, socket.socket() as second:
        first.bind((HOST, 0))
        second.bind((HOST, 0))
        return first.getsockname()[1], second.getsockname()[1]
