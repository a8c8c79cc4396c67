"""`sprint keys`: who is served at which tier.

Works on the key file in DATA_DIR directly, whether Sprint runs or not; a running one follows within about a second.
"""

from __future__ import annotations

import re
import sys
import time
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sprint import config
from sprint.cli_reporting import UsageError, print_json, reporting
from sprint.keys import DEFAULT_CONNECTIONS, FILE_NAME, MAX_CONNECTIONS, NEVER, KeyRecord, KeyStore
from sprint.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer(
    help="Make, list and revoke subscribers' keys.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_PERIODS: Final = {"m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_PERIOD: Final = re.compile(r"([1-9][0-9]{0,4})([mhdw])")
_TIERS: Final = ", ".join(tier.label for tier in Tier)
_COLUMNS: Final = ("id", "name", "tier", "state", "connections", "expires")
_Which = Annotated[
    str, typer.Argument(metavar="ID|NAME", help="The key's name, its id, or four or more first digits of it.")
]
_Json = Annotated[bool, typer.Option("--json", help="As JSON.")]


@contextmanager
def _store() -> Iterator[KeyStore]:
    """The key file; a value that it refuses is wrong usage."""
    with reporting(), KeyStore(config.load().data_dir / FILE_NAME) as store:
        try:
            yield store
        except ValueError as error:
            raise UsageError(str(error)) from None


@app.command()
def create(
    tier: Annotated[str, typer.Option(help=f"What it gives: {_TIERS}.")],
    name: Annotated[str, typer.Option(help="Whose it is.")],
    expires: Annotated[str, typer.Option(metavar="30d", help="When it ends: 90m, 12h, 30d, 52w. Default: never.")] = "",
    connections: Annotated[
        int, typer.Option(min=1, max=MAX_CONNECTIONS, help="How many subscriptions may stand at once.")
    ] = DEFAULT_CONNECTIONS,
    as_json: _Json = False,
) -> None:
    """Make a key and show it.

    It is shown this once: only its hash is kept.
    """
    now_s = int(time.time())
    with _store() as store:
        try:
            asked = Tier.from_label(tier)
        except KeyError:
            raise UsageError(f"--tier {tier[:32]!r}: expected one of {_TIERS}") from None
        expires_s = now_s + period_s(expires) if expires else NEVER
        key = store.create(name, asked, now_s, expires_s=expires_s, connections=connections)
        made = store.find_text(key)
        try:
            if as_json:
                print_json({"key": key, **as_dict(made, now_s)})
            else:
                print(key)
            sys.stdout.flush()
        except OSError:  # nobody has seen it, and nobody ever will
            store.revoke(made.id, now_s)
            raise
        if not as_json:
            print(f"sprint: key {made.id} of {made.name}, {made.tier.label}: it is not shown again", file=sys.stderr)
            print(f"sprint: valid for the Sprint with DATA_DIR={store.path.parent}", file=sys.stderr)


@app.command("list")
def list_keys(as_json: _Json = False) -> None:
    """Show every key's id, name, tier and state; never a key."""
    now_s = int(time.time())
    with _store() as store:
        keys = store.list()
        if as_json:
            print_json([as_dict(key, now_s) for key in keys], indent=2)
        elif keys:
            Console(soft_wrap=True).print(_table(keys, now_s))
        else:
            print(f"sprint: no keys in {store.path}", file=sys.stderr)


@app.command()
def show(which: _Which, as_json: _Json = False) -> None:
    """Show one key's facts; never the key."""
    with _store() as store:
        facts = as_dict(store.find(which), int(time.time()))
        if as_json:
            print_json(facts)
            return
        for name, value in facts.items():
            print(f"{name:12} {'never' if value is None else value}")


@app.command()
def revoke(which: _Which) -> None:
    """End a key for good: sessions by it end within about a second."""
    with _store() as store:
        key = store.revoke(which, int(time.time()))
        print(f"sprint: key {key.id} of {key.name} is revoked", file=sys.stderr)


def _table(keys: list[KeyRecord], now_s: int) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, no_wrap=True)
    for key in keys:
        shown = as_dict(key, now_s)
        table.add_row(*(escape(str(shown[column] or "never")) for column in _COLUMNS))
    return table


def period_s(text: str) -> int:
    """Seconds of `30d`. Raises UsageError."""
    match = _PERIOD.fullmatch(text)
    if match is None:
        raise UsageError(f"--expires {text[:32]!r}: expected a number and one of m, h, d, w, such as 30d")
    return int(match[1]) * _PERIODS[match[2]]


def as_dict(key: KeyRecord, now_s: int) -> dict[str, Any]:
    """A key's facts as they are shown; times in UTC, None for never."""
    state = "revoked" if key.revoked_s != NEVER else "valid" if key.is_valid(now_s) else "expired"
    return {
        "id": key.id,
        "name": key.name,
        "tier": key.tier.label,
        "state": state,
        "connections": key.connections,
        "created": _time(key.created_s),
        "expires": _time(key.expires_s),
        "revoked": _time(key.revoked_s),
    }


def _time(seconds: int) -> str | None:
    return None if seconds == NEVER else f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
