"""Keys as they are served: what a changed file does to it, and that an answer's time tells nothing."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import statistics
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprint.key_book import KeyBook
from sprint.keys import FILE_NAME, KeyStore, hash_of
from sprint.tiers import Tier
from tests.unit.key_books import open_book

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NOW = 1_800_000_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / FILE_NAME


def test_without_a_file_no_key_is_known_and_one_made_later_is(path: Path) -> None:
    book = open_book(path)
    assert book.look_up("spk_" + 64 * "0", NOW) is None
    assert book.reason is None

    with KeyStore(path) as store:
        key = store.create("acme", Tier.TURBO, NOW, connections=1)
    assert book.look_up(key, NOW) is None
    assert book.refresh()

    found = book.look_up(key, NOW)
    assert found is not None
    assert (found.name, found.tier) == ("acme", Tier.TURBO)
    assert not book.refresh()


def test_a_key_is_unknown_once_it_is_revoked_or_has_expired(path: Path) -> None:
    with KeyStore(path) as store:
        revoked = store.create("revoked", Tier.TURBO, NOW, connections=1)
        expiring = store.create("expiring", Tier.TURBO, NOW, expires_s=NOW + 10, connections=1)
        book = open_book(path)
        assert book.look_up(expiring, NOW + 9) is not None
        assert book.look_up(expiring, NOW + 10) is None
        assert book.valid(hash_of(revoked), NOW) is not None

        store.revoke("revoked", NOW)
        assert book.refresh()

    assert book.look_up(revoked, NOW) is None
    assert book.valid(hash_of(revoked), NOW) is None


def test_of_ten_thousand_keys_each_is_found_and_no_change_is_missed(path: Path) -> None:
    with KeyStore(path) as store:
        first = store.create("first", Tier.TURBO, NOW, connections=1)
    with sqlite3.connect(path) as database:
        rows = [
            (hash_of(f"key {n}"), f"name {n}", "pro", 3, NOW, 0, 0, 2 + n)  # a second each would take a minute
            for n in range(10_000)
        ]
        database.executemany("INSERT INTO keys VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    database.close()
    book = open_book(path)

    assert len(book) == 10_001
    assert all(book.look_up(f"key {n}", NOW) is not None for n in range(10_000))
    with KeyStore(path) as store:
        store.revoke("name 9999", NOW)
        store.revoke("first", NOW)
    book.refresh()
    assert book.look_up("key 9999", NOW) is None
    assert book.look_up(first, NOW) is None
    assert book.look_up("key 9998", NOW) is not None


def test_a_file_that_can_not_be_read_leaves_what_was_known_and_says_so(path: Path) -> None:
    with KeyStore(path) as store:
        key = store.create("acme", Tier.TURBO, NOW, connections=1)
    book = open_book(path)
    holder = sqlite3.connect(path, isolation_level=None)
    try:
        holder.execute("BEGIN EXCLUSIVE")

        assert not book.refresh()

        assert book.reason is not None
        assert "locked" in book.reason
        assert book.look_up(key, NOW) is not None
    finally:
        holder.execute("ROLLBACK")
        holder.close()
    book.refresh()
    assert book.reason is None


def test_a_removed_file_ends_every_key_and_another_in_its_place_counts(path: Path, tmp_path: Path) -> None:
    with KeyStore(path) as store:
        old = store.create("old", Tier.TURBO, NOW, connections=1)
    book = open_book(path)
    with KeyStore(tmp_path / "other") as store:
        new = store.create("new", Tier.TURBO, NOW, connections=1)
    os.replace(tmp_path / "other", path)

    book.refresh()
    assert book.look_up(old, NOW) is None
    assert book.look_up(new, NOW) is not None

    path.unlink()
    book.refresh()
    assert book.look_up(new, NOW) is None


def test_an_older_file_that_is_copied_over_this_one_counts_as_it_is(path: Path) -> None:
    with KeyStore(path) as store:
        old = store.create("old", Tier.TURBO, NOW, connections=1)
    backup = path.read_bytes()
    with KeyStore(path) as store:
        new = store.create("new", Tier.TURBO, NOW, connections=1)
    book = open_book(path)
    assert book.look_up(new, NOW) is not None

    path.write_bytes(backup)

    assert book.refresh()
    assert book.look_up(new, NOW) is None
    assert book.look_up(old, NOW) is not None
    with KeyStore(path) as store:
        again = store.create("again", Tier.TURBO, NOW, connections=1)
    book.refresh()
    assert book.look_up(again, NOW) is not None


def test_a_file_that_was_damaged_and_mended_in_place_is_read_again(path: Path) -> None:
    with KeyStore(path) as store:
        key = store.create("acme", Tier.TURBO, NOW, connections=1)
    good = path.read_bytes()
    book = open_book(path)
    for damaged in (b"no database" * 400, good[:5_000]):
        path.write_bytes(damaged)
        book.refresh()
        assert book.reason is not None
        assert book.look_up(key, NOW) is not None
        assert len(open_book(path)) == 0
        path.write_bytes(good)
        book.refresh()
        assert book.reason is None


def test_an_operator_who_is_killed_in_mid_change_keeps_nobody_out(path: Path) -> None:
    with KeyStore(path) as store:
        key = store.create("acme", Tier.TURBO, NOW, connections=1)
    child = os.fork()
    if not child:
        with suppress(BaseException):
            database = sqlite3.connect(path, isolation_level=None)
            database.execute("PRAGMA cache_size = 1")  # so that half a change gets to the file
            database.execute("BEGIN IMMEDIATE")
            database.execute("UPDATE keys SET revoked_s = 1, changed = changed + 1")
            database.execute("CREATE TABLE filling (x)")
            for _ in range(100):
                database.execute("INSERT INTO filling VALUES (randomblob(3000))")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert path.with_name(f"{FILE_NAME}-journal").stat().st_size

    book = open_book(path)

    assert book.reason is None
    assert book.look_up(key, NOW) is not None


@given(st.text() | st.text(alphabet="0123456789abcdef", min_size=64, max_size=64).map("spk_{}".format))
def test_no_text_but_a_key_is_accepted(text: str) -> None:
    book = KeyBook.__new__(KeyBook)
    book._keys = {}
    assert book.look_up(text, NOW) is None


def test_forged_truncated_and_huge_keys_are_refused(path: Path) -> None:
    with KeyStore(path) as store:
        key = store.create("acme", Tier.TURBO, NOW, connections=1)
    book = open_book(path)
    flipped = key[:-1] + ("0" if key[-1] != "0" else "1")
    for forged in (flipped, key[:-1], key + "0", key.upper(), f" {key}", key + "\n", "", key * 15_000, "\ud800"):
        assert book.look_up(forged, NOW) is None
    assert book.look_up(key, NOW) is not None


def slowness(look_up: Callable[[str], object], some: list[str], others: list[str], rounds: int = 60) -> float:
    """How many times longer `others` take than `some`: interleaved, the least of several runs each."""
    ratios = []
    for _ in range(rounds):
        times = []
        for texts in random.sample([some, others], 2):
            best = min(timed(look_up, texts) for _ in range(3))
            times.append((texts is others, best))
        by_kind = dict(times)
        ratios.append(by_kind[True] / by_kind[False])
    return statistics.median(ratios)


def timed(look_up: Callable[[str], object], texts: list[str]) -> int:
    began = time.perf_counter_ns()
    for text in texts:
        look_up(text)
    return time.perf_counter_ns() - began


def test_the_time_of_a_refusal_does_not_tell_whether_the_key_exists(path: Path) -> None:
    count = 200
    with KeyStore(path) as store:
        revoked = [store.create(f"n{n}", Tier.TURBO, NOW, connections=1) for n in range(count)]
        for n in range(count):
            store.revoke(f"n{n}", NOW)
        expired = [store.create("x", Tier.TURBO, NOW - 2, expires_s=NOW - 1, connections=1) for _ in range(count)]
    unknown = [f"spk_{random.randbytes(32).hex()}" for _ in range(count)]
    book = open_book(path)

    def naive(text: str) -> bool:
        """As one would write it first: what is unknown is refused before anything is computed."""
        if text not in known:
            return False
        return hash_of(text) == known[text]

    known = {key: hash_of(key) for key in revoked}

    # The same measure finds the naive one out, so it can fail.
    assert slowness(naive, unknown, revoked) > 1.5
    for existing in (revoked, expired):
        assert 0.8 < slowness(lambda text: book.look_up(text, NOW), unknown, existing) < 1.25
