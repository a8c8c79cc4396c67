"""Key books of a test's own, all closed when it ends: Python 3.13 warns of a database that nobody has closed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sprint.key_book import KeyBook

if TYPE_CHECKING:
    from pathlib import Path

_OPEN: list[KeyBook] = []


def open_book(path: Path) -> KeyBook:
    """The keys in that file; tests/unit/conftest.py closes it after the test."""
    book = KeyBook(path)
    _OPEN.append(book)
    return book


def close_all() -> None:
    while _OPEN:
        _OPEN.pop().close()
