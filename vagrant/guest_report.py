"""A pytest plugin for the machine: each test's outcome as a line of the report, on descriptor 3 of guest.sh."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vagrant import reports

if TYPE_CHECKING:
    import pytest

_OUTPUT = 3


def _say(text: str) -> None:
    os.write(_OUTPUT, f"\n{text}\n".encode())  # pytest may be in the middle of a line


def pytest_collection_finish(session: pytest.Session) -> None:
    """How many there are."""
    _say(reports.line(collected=len(session.items)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test has passed when its call has; it fails, or is skipped, in its beginning too, and fails in its end."""
    if report.failed:
        _say(reports.line(test=report.nodeid, outcome="failed", when=report.when, seconds=round(report.duration, 1)))
    elif report.skipped:
        where = report.longrepr
        reason = str(where[2]) if isinstance(where, tuple) else "no reason"
        _say(reports.line(test=report.nodeid, outcome="skipped", reason=reason.removeprefix("Skipped: ")))
    elif report.when == "call":
        _say(reports.line(test=report.nodeid, outcome="passed", seconds=round(report.duration, 1)))
