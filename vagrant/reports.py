"""What a machine says and what is made of it: lines on its standard output, a result for each kernel, the table.

Pure. A line of a report is MARK and one JSON object; whatever else the machine prints is for whoever looks on. A result
is green only if the tests were all run, at least one passed, and none failed: a machine that stopped on its way isn't.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

MARK = "@@sprint-vm "
COLUMNS = ("kernel", "passed", "skipped", "failed", "veth", "virtio_net", "live frames", "TCX", "ring buffer", "time")
_UNKNOWN = "?"


def line(**facts: Any) -> str:
    """A report's line, as the machine prints it."""
    return MARK + json.dumps(facts)


def parse(text: str) -> dict[str, Any] | None:
    """The object of a report's line, None for any other line. The serial console may leave a carriage return."""
    _, mark, rest = text.partition(MARK)
    if not mark:
        return None
    try:
        said = json.loads(rest)
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


@dataclass(slots=True)
class Result:
    """One kernel's, gathered line by line."""

    asked: str
    release: str | None = None
    collected: int | None = None
    passed: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Tests by the reason."""
    failed: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """What the product can do there: see guest_facts."""
    pytest_status: int | None = None
    seconds: float = 0.0
    error: str | None = None
    """Why there is no result, or only part of one."""

    def take(self, said: dict[str, Any]) -> None:
        """One line of the report."""
        match said:
            case {"collected": int(count)}:
                self.collected = count
            case {"test": str(name), "outcome": "failed"}:
                if name not in self.failed:  # once in its call and once more in its end
                    self.failed.append(name)
            case {"outcome": "skipped", "reason": str(reason)}:
                self.skipped[reason] = self.skipped.get(reason, 0) + 1
            case {"outcome": "passed"}:
                self.passed += 1
            case {"facts": dict(facts)}:
                self.facts |= facts
            case {"ended": int(status)}:
                self.pytest_status = status

    @property
    def green(self) -> bool:
        """Whether everything was run and nothing failed."""
        return self.error is None and self.pytest_status == 0 and self.passed > 0 and not self.failed

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "green": self.green}

    def row(self) -> tuple[str, ...]:
        """In the order of COLUMNS."""
        tests = (str(self.passed), str(sum(self.skipped.values())), str(len(self.failed)))
        minutes, seconds = divmod(round(self.seconds), 60)
        return (
            self.release or self.asked,
            *(tests if self.error is None else (*tests[:2], f"{tests[2]}, not all were run")),
            *(self._fact(name) for name in ("veth", "virtio_net", "live_frames", "tcx", "ring_buffer")),
            f"{minutes}:{seconds:02}",
        )

    def _fact(self, name: str) -> str:
        fact = self.facts.get(name, _UNKNOWN)
        return {True: "yes", False: "no"}[fact] if isinstance(fact, bool) else str(fact)


def table(results: list[Result]) -> str:
    """In Markdown, as docs/kernel-bypass.md has it."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(result.row() for result in results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
