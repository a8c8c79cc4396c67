"""Sprint itself as the demo runs it: the real command in a process of its own, configured by its environment."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any

from sprint.addresses import parse_address
from sprint.errors import HostError
from sprint.inquiry import NoAnswerError, ask

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1
_LOG_LINES = 40


class RelayProcess:
    """`sprint run` as a child; its log is read, and it ends with us."""

    def __init__(self, settings: dict[str, str]) -> None:
        """`settings` go on top of our own environment."""
        libc = ctypes.CDLL(None)

        def die_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

        self.log: deque[str] = deque(maxlen=_LOG_LINES)
        self._listening: dict[str, Any] | None = None
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sprint", "run"],
            env={**os.environ, **settings, "LOG_FORMAT": "json"},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the demo, which ends us in good order
            preexec_fn=die_with_parent,  # noqa: PLW1509 - no thread of ours holds a lock yet
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def wait_until_healthy(self) -> tuple[str, str]:
        """The addresses of the API and of the stream, once blocks can be relayed.

        Raises HostError, the end of its log being on standard error.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        with self._changed:
            while self._listening is None and self._process.poll() is None and time.monotonic() < deadline:
                self._changed.wait(0.1)
        while self._listening is not None and self._process.poll() is None and time.monotonic() < deadline:
            with suppress(NoAnswerError):
                if self.ask("health")["status"] == "ok":
                    return str(self._listening["api"]), str(self._listening["stream"])
            time.sleep(0.02)
        if self._process.poll() is not None:
            self._reader.join(STOP_TIMEOUT_S)  # it has said why
        sys.stderr.writelines(f"{line}\n" for line in list(self.log))
        raise HostError("Sprint, as the demo runs it, did not become healthy: the end of its log stands above")

    @property
    def shm_socket(self) -> str | None:
        """Where the ring itself is handed out; None where it isn't (the standard engine)."""
        return None if self._listening is None else self._listening.get("shm")

    def ask(self, name: str) -> Any:
        """One answer of the API, a 503's included. Raises NoAnswerError."""
        assert self._listening is not None
        return ask(parse_address(self._listening["api"]), name)

    def stop(self) -> None:
        """End it in good order, or else by force."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join(STOP_TIMEOUT_S)
        if self._process.stderr is not None:
            self._process.stderr.close()

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            try:
                entry = json.loads(line)
            except ValueError:
                entry = {"event": line.rstrip()}
            self.log.append(f"{entry.pop('timestamp', '')} {entry.pop('event', '')} {entry or ''}".strip())
            if "Listening" in line and "stream" in entry:
                with self._changed:
                    self._listening = entry
                    self._changed.notify_all()
