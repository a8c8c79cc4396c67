"""`sprint watch`: the subscriber's view of a stream, as a live table or as a line of JSON an event."""

from __future__ import annotations

import json
import time
from collections import deque
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

from sprint.client import Subscribed, events
from sprint.events import Lapped
from sprint.record import Record, state_names

if TYPE_CHECKING:
    from sprint.frames import Item

ROWS = 20


def watch(address: str, *, as_json: bool, key: str | None, since: int | None, count: int | None) -> None:
    """Show what the stream at `address` says until `count` events came, or for ever. Raises SprintError on refusal."""
    if as_json:
        _print_lines(address, key, since, count)
    else:
        _show_table(address, key, since, count)


def _print_lines(address: str, key: str | None, since: int | None, count: int | None) -> None:
    shown = 0
    for item in events(address, key=key, since=since):
        if isinstance(item, Record):
            line = item.as_dict()
        elif isinstance(item, Lapped):
            line = {"event": "lost", "first": item.first, "lost": item.lost}
        else:
            continue
        print(json.dumps(line, separators=(",", ":")), flush=True)
        shown += 1
        if shown == count:
            return


def _show_table(address: str, key: str | None, since: int | None, count: int | None) -> None:
    rows: deque[tuple[str, ...]] = deque(maxlen=ROWS)
    title = f"connecting to {address}"
    shown = 0
    with Live(_table(title, rows), console=Console(), auto_refresh=False) as live:
        for item in events(address, key=key, since=since):
            if isinstance(item, Subscribed):
                title = f"{address}: {item.network}, tier {item.tier}, write deadline {item.write_deadline}"
            row = _row(item)
            if row is not None:
                rows.append(row)
                shown += 1
            live.update(_table(title, rows), refresh=True)
            if shown == count:
                return


def _row(item: Item | Subscribed) -> tuple[str, ...] | None:
    if isinstance(item, Lapped):
        return (str(item.first), "[red]lost[/]", "", f"{item.lost} records", "", "")
    if not isinstance(item, Record):
        return None
    after_us = (time.monotonic_ns() - item.seen_ns) / 1e3
    here = 0 <= after_us < 1e9  # seen_ns means nothing off the relay's host
    return (
        str(item.sequence),
        item.event.name.lower(),
        str(item.height),
        item.hash[::-1].hex(),
        " ".join(state_names(item.state)),
        f"{after_us:,.0f}" if here else "",
    )


def _table(title: str, rows: deque[tuple[str, ...]]) -> Table:
    table = Table("seq", "event", "height", "hash", "state", "µs after seen", title=title, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table
