"""The relay process's log: lines through a pipe to the supervisor, who writes them; a full pipe loses lines, not time.

Whoever reads the service's log may stall; the relay must not.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import Any

_MAX_LINE = 2048
"""Less than PIPE_BUF (4096, pipe(7)): a line is written whole or not at all."""
_MAX_VALUE = 100
"""What is left of each value in a line that would be longer."""
_READ = 1 << 16


class PipeLog:
    """Both ends, made before the fork: the child calls info(), warning(), error(); the supervisor forward()."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._rest = b""
        self._lost = 0

    def fileno(self) -> int:
        """The supervisor's end."""
        return self._reading

    def info(self, event: str, **values: Any) -> None:
        """Something worth telling."""
        self._write("info", event, values)

    def warning(self, event: str, **values: Any) -> None:
        """Something that may need attention."""
        self._write("warning", event, values)

    def error(self, event: str, **values: Any) -> None:
        """Something that needs attention."""
        self._write("error", event, values)

    def forward(self, log: Any) -> None:
        """Hand every line that has come to the real log."""
        with suppress(BlockingIOError):
            self._rest += os.read(self._reading, _READ)
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            with suppress(ValueError):
                level, event, values = json.loads(line)
                getattr(log, level)(event, **values)

    def _write(self, level: str, event: str, values: dict[str, Any]) -> None:
        if self._lost and self._put(_line("warning", "Log lines lost", {"count": self._lost})):
            self._lost = 0
        self._lost += not self._put(_line(level, event, values))

    def _put(self, line: bytes) -> bool:
        try:
            os.write(self._writing, line)
        except BlockingIOError:
            return False
        return True


def _line(level: str, event: str, values: dict[str, Any]) -> bytes:
    """One line of JSON, whatever the values are; where they are too long, or no JSON, the beginning of each."""
    with suppress(TypeError, ValueError, RecursionError):
        line = json.dumps([level, event, values], default=str)
        if len(line) < _MAX_LINE:
            return line.encode() + b"\n"
    cut: dict[str, Any] = {name: repr(value)[:_MAX_VALUE] for name, value in values.items()}
    while len(line := json.dumps([level, event[:_MAX_VALUE], cut])) >= _MAX_LINE:
        cut.popitem()  # escaped, a letter takes up to twelve
    return line.encode() + b"\n"
