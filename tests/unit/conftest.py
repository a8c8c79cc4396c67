"""What the tests of single modules leave behind is put away after each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.unit.key_books import close_all

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _key_books_are_closed() -> Iterator[None]:
    yield
    close_all()
