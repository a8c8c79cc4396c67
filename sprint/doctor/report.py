"""The findings as a person reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from sprint.doctor.findings import State, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sprint.doctor.findings import Finding

_STYLES = {State.OK: "green", State.DEGRADED: "yellow", State.MISSING: "bold red", State.UNKNOWN: "dim"}


def table(findings: Sequence[Finding]) -> Table:
    """A line each: mark, what was looked at, what was found; a second one for the remedy of what is not in order."""
    rows = Table(box=None, pad_edge=False, show_header=False)
    rows.add_column(no_wrap=True)
    rows.add_column(max_width=32)
    rows.add_column(overflow="fold")
    for each in findings:
        style = _STYLES[each.state]
        text = escape(printable(each.detail))
        if each.remedy:
            text += f"\n[{style}]→ {escape(printable(each.remedy))}[/]"
        rows.add_row(f"[{style}]{each.state.value}[/]", escape(printable(each.name)), text)
    return rows
