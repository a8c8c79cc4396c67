"""A pytest plugin for the machine: each test's outcome as a line of the report, on descriptor 3 of guest.sh."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vagrant import reports

if TYPE_CHECKING:
    import pytest

MAX_TEXT = 6_000
"""Characters of why a test failed, the last: a frame's local variables can be of any size."""
_OUTPUT = 3
_FIRST = "test_virtio"


def _say(**facts: Any) -> None:
    rest = f"\n{reports.line(**facts)}\n".encode()  # pytest may be in the middle of a line
    while rest:
        rest = rest[os.write(_OUTPUT, rest) :]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What records the table's facts comes first: they are of use even if the machine is stopped."""
    items.sort(key=lambda item: _FIRST not in item.nodeid)


def pytest_collection_finish(session: pytest.Session) -> None:
    """How many there are."""
    _say(collected=len(session.items))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test has passed when its call has; it fails, or is skipped, in its beginning too, and fails in its end."""
    if report.when == "call" and report.user_properties:
        _say(facts=dict(report.user_properties))
    facts: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1)}
    if report.failed:
        _say(**facts, text=report.longreprtext[-MAX_TEXT:])
    elif report.skipped:
        where = report.longrepr
        reason = str(where[2]) if isinstance(where, tuple) else "no reason"
        _say(**facts, reason=reason.removeprefix("Skipped: "))
    elif report.when == "call":
        _say(**facts)
