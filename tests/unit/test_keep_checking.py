"""The check that recurs: what it says of a key file, and that nothing stops it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sprint.admission import CHECK_NS, ENDS_A_TURN, Admission, Ticket
from sprint.composition import keep_checking
from sprint.keys import FILE_NAME, KeyStore
from sprint.seats import private_seats
from sprint.tiers import NS_PER_S, Tier
from tests.unit.key_books import open_book

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MADE_S = 1_000_000_000


class Loop:
    """Keeps what is to be called later, for the test to call; all of a loop that keep_checking() needs."""

    def __init__(self) -> None:
        self.pause_s = -1.0
        self._next: tuple[Callable[..., object], tuple[Any, ...]]

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> None:
        self.pause_s = delay
        self._next = callback, args

    def call_next(self) -> None:
        callback, args = self._next
        callback(*args)


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warning(self, words: str, **_: object) -> None:
        self.lines.append(words)

    info = warning


@pytest.fixture
def loop() -> Any:
    return Loop()


def gate_of(tmp_path: Path) -> Admission:
    return Admission(Tier.TURBO, open_book(tmp_path / FILE_NAME), private_seats())


def test_a_file_that_can_not_be_read_is_told_once_and_so_is_that_it_can_again(tmp_path: Path, loop: Any) -> None:
    path, log = tmp_path / FILE_NAME, Log()
    with KeyStore(path):
        good = path.read_bytes()
    keep_checking(loop, gate_of(tmp_path), log)
    for content, said in (
        (good, []),
        (b"no database" * 400, ["Keys can't be read"]),
        (good, ["Keys can't be read", "Keys can be read again"]),
    ):
        path.write_bytes(content)
        for _ in range(4):
            loop.call_next()
        assert log.lines == said


def test_an_instants_trouble_is_not_told(tmp_path: Path, loop: Any) -> None:
    path, log = tmp_path / FILE_NAME, Log()
    with KeyStore(path):
        good = path.read_bytes()
    keep_checking(loop, gate_of(tmp_path), log)
    path.write_bytes(b"no database" * 400)
    loop.call_next()
    path.write_bytes(good)
    loop.call_next()
    assert log.lines == []


def test_a_check_that_fails_is_followed_by_the_next_one(tmp_path: Path, loop: Any) -> None:
    gate = gate_of(tmp_path)
    ended: list[str] = []

    def fail() -> None:
        raise OSError("a bug")

    with KeyStore(tmp_path / FILE_NAME) as store:
        key = store.create("acme", Tier.TURBO, MADE_S, connections=2)
        for end in (fail, lambda: ended.append("other")):
            ticket = gate.admit(key, "192.0.2.1", 0, MADE_S)
            assert isinstance(ticket, Ticket)
            ticket.end = end
        store.revoke("acme", MADE_S)
    with pytest.raises(OSError, match="a bug"):
        keep_checking(loop, gate, None)
    assert loop.pause_s == CHECK_NS / NS_PER_S
    loop.call_next()
    assert ended == ["other"]


def test_while_there_is_more_to_end_the_next_check_comes_at_once(tmp_path: Path, loop: Any) -> None:
    gate = gate_of(tmp_path)
    with KeyStore(tmp_path / FILE_NAME) as store:
        key = store.create("acme", Tier.TURBO, MADE_S, connections=2 * ENDS_A_TURN)
        for _ in range(ENDS_A_TURN + 1):
            gate.admit(key, "192.0.2.1", 0, MADE_S)
        keep_checking(loop, gate, None)
        assert loop.pause_s > 0
        store.revoke("acme", MADE_S)
    loop.call_next()
    assert loop.pause_s == 0
    loop.call_next()
    assert loop.pause_s > 0
    assert gate.seats.taken(1) == 0
