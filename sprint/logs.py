"""Log lines for people (`⚡ Turbo mode enabled: writeDeadline=500µs sharedMemory=true`) or for machines (JSON).

Everything goes to standard error, one line an event, so that `journalctl | grep` finds the lines by their words.
Nothing in the hot path logs: the engine logs a relay after the last delivery of it. A line that can't be written (the
disk is full, the reader has gone) is lost, and stops nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from typing import Any

import structlog

LINE_LIMIT = 2_000
"""A peer's text can reach a log line: no line of text is longer, and no value of a JSON line."""


def configure(log_format: str) -> None:
    """Send log lines to standard error as `text` or `json`."""
    processors: list[Any] = [structlog.processors.add_log_level]
    if log_format == "json":
        processors += [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            render_json,
        ]
    else:
        processors += [structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False), render_text]
    file = sys.stderr
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=lambda *_: _Lines(file),
        cache_logger_on_first_use=False,
    )


def render_text(_logger: Any, _method: str, event: dict[str, Any]) -> str:
    """`time level words: key=value key=value`, one line whatever the values hold."""
    stamp, level, words = event.pop("timestamp", ""), event.pop("level", "info"), event.pop("event", "")
    values = " ".join(f"{name}={_value(value)}" for name, value in event.items())
    line = f"{stamp} {level:7} {words}" + (f": {values}" if values else "")
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line[:LINE_LIMIT])


def render_json(_logger: Any, _method: str, event: dict[str, Any]) -> str:
    """One object on one line; what a terminal would act on is escaped, letters and signs are not."""
    cut = {name: value[:LINE_LIMIT] if isinstance(value, str) else value for name, value in event.items()}
    line = json.dumps(cut, ensure_ascii=False, default=lambda value: str(value)[:LINE_LIMIT])
    return "".join(letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in line)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return f'"{text}"' if " " in text else text


class _Lines(structlog.PrintLogger):
    """Writes each line at once; one that can't be written is lost."""

    def msg(self, message: str) -> None:
        with contextlib.suppress(OSError):
            super().msg(message)

    log = debug = info = warn = warning = fatal = failure = err = error = critical = exception = msg


def logger() -> Any:
    """The logger that configure() set up."""
    return structlog.get_logger()
