"""`sprint doctor`: what this host can do for the configuration, and the remedy for what it can't.

Nothing of the host is changed, no interface is attached to, every check is bounded, and one that fails is a line.
findings.py has the words, examination.py runs the checks of the other modules, report.py shows them.
"""

from __future__ import annotations

from sprint.doctor.examination import examine
from sprint.doctor.findings import Finding, Need, State, as_dicts, exit_code
from sprint.errors import HostError
from xdp.links import clean

__all__ = ["Finding", "Need", "State", "as_dicts", "examine", "exit_code", "remove_leftovers"]


def remove_leftovers() -> list[str]:
    """Remove links and filters of the kernel bypass whose owner is dead; returns a line for each. Raises HostError."""
    try:
        return [str(left) for left in clean()]
    except OSError as error:
        raise HostError(f"doctor --clean: {error.strerror or error}: run it as root") from None
