"""Log lines for people (`⚡ Turbo mode enabled: writeDeadline=500µs sharedMemory=true`) or for machines (JSON).

Everything goes to standard error, one line an event, so that `journalctl | grep` finds the lines by their words. Nothing
in the hot path logs: the engine logs a relay after the last delivery of it.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

LINE_LIMIT = 2_000
"""A peer's text can reach a log line; no line is longer."""


def configure(log_format: str) -> None:
    """Send log lines to standard error as `text` or `json`."""
    processors: list[Any] = [structlog.processors.add_log_level]
    if log_format == "json":
        processors += [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ]
    else:
        processors += [structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False), render_text]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def render_text(_logger: Any, _method: str, event: dict[str, Any]) -> str:
    """`time level words: key=value key=value`, one line whatever the values hold."""
    stamp, level, words = event.pop("timestamp", ""), event.pop("level", "info"), event.pop("event", "")
    values = " ".join(f"{name}={_value(value)}" for name, value in event.items())
    line = f"{stamp} {level:7} {words}" + (f": {values}" if values else "")
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line[:LINE_LIMIT])


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return f'"{text}"' if " " in text else text


def logger() -> Any:
    """The logger that configure() set up."""
    return structlog.get_logger()
