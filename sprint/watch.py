"""`sprint watch`: the subscriber's view of a stream, as a live table, or as a line an event where nobody looks at it.

What stands in the way of hearing the stream goes to standard error, once for as long as it stays the same.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from sprint.client import Subscribed, events
from sprint.events import Lapped
from sprint.record import Record, state_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from sprint.frames import Item

ROWS = 20


def watch(address: str, *, as_json: bool, key: str | None, since: int | None, count: int | None) -> None:
    """Show what the stream at `address` says until `count` events came, or for ever. Raises SprintError on refusal.

    Without `as_json` it is a table on a terminal that can be drawn on, and else a line of words an event.
    """
    console = Console()
    if as_json:
        _print_lines(_as_json, address, key, since, count)
    elif console.is_terminal and not console.is_dumb_terminal:
        _show_table(console, address, key, since, count)
    else:
        _print_lines(_in_words, address, key, since, count)


class _Trouble:
    """What keeps us from hearing the stream, in words."""

    def __init__(self, address: str, tell: Callable[[str], None]) -> None:
        self._address = address
        self._tell = tell
        self._told = ""

    def __call__(self, error: Exception) -> None:
        """Told by the client; tells on what wasn't told last."""
        reason = getattr(error, "strerror", None) or str(error) or "nothing came for too long"
        words = f"{self._address}: {reason}; trying again"
        if words != self._told:
            self._told = words
            self._tell(words)

    def over(self) -> None:
        """The stream is heard."""
        self._told = ""


def _complain(words: str) -> None:
    print(f"sprint: {words}", file=sys.stderr)


def _print_lines(
    line_of: Callable[[Item], str | None], address: str, key: str | None, since: int | None, count: int | None
) -> None:
    trouble = _Trouble(address, _complain)
    shown = 0
    for item in events(address, key=key, since=since, on_trouble=trouble):
        trouble.over()
        line = None if isinstance(item, Subscribed) else line_of(item)
        if line is not None:
            print(line, flush=True)
            shown += 1
        if shown == count:
            return


def _as_json(item: Item) -> str | None:
    if isinstance(item, Record):
        return json.dumps(item.as_dict(), separators=(",", ":"))
    if isinstance(item, Lapped):
        return json.dumps({"event": "lost", "first": item.first, "lost": item.lost}, separators=(",", ":"))
    return None


def _in_words(item: Item) -> str | None:
    if isinstance(item, Lapped):
        return f"{item.first} lost: {item.lost} records"
    if not isinstance(item, Record):
        return None
    *words, after = _row(item)
    return " ".join(words) + (f", {after} µs after seen" if after else "")


def _show_table(console: Console, address: str, key: str | None, since: int | None, count: int | None) -> None:
    rows: deque[tuple[str, ...]] = deque(maxlen=ROWS)
    title = f"connecting to {escape(address)}"
    shown = 0
    with Live(_table(title, rows), console=console, auto_refresh=False) as live:

        def complain(words: str) -> None:
            live.update(_table(escape(words), rows), refresh=True)

        trouble = _Trouble(address, complain)
        for item in events(address, key=key, since=since, on_trouble=trouble):
            trouble.over()
            if isinstance(item, Subscribed):
                told = f"{address}: {item.network}, tier {item.tier}, write deadline {item.write_deadline}"
                title = escape(told)
            elif isinstance(item, Record | Lapped):
                rows.append(_lost_row(item) if isinstance(item, Lapped) else _row(item))
                shown += 1
            live.update(_table(title, rows), refresh=True)
            if shown == count:
                return


def _lost_row(lost: Lapped) -> tuple[str, ...]:
    return (str(lost.first), "[red]lost[/]", "", f"{lost.lost} records", "", "")


def _row(record: Record) -> tuple[str, ...]:
    after_us = (time.monotonic_ns() - record.seen_ns) / 1e3
    here = 0 <= after_us < 1e9  # seen_ns means nothing off the relay's host
    return (
        str(record.sequence),
        record.event.name.lower(),
        str(record.height),
        record.hash[::-1].hex(),
        " ".join(state_names(record.state)),
        f"{after_us:,.0f}" if here else "",
    )


def _table(title: str, rows: deque[tuple[str, ...]]) -> Table:
    table = Table("seq", "event", "height", "hash", "state", "µs after seen", title=title, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table
