"""The operator's key file: what it holds, what it refuses, and what changes under several hands."""

from __future__ import annotations

import os
import sqlite3
import stat
from typing import TYPE_CHECKING

import pytest

from sprint.errors import HostError
from sprint.keys import (
    FILE_NAME,
    KEY,
    MAX_CONNECTIONS,
    MAX_NAME,
    MIN_ID_DIGITS,
    NEVER,
    KeyStore,
    UnknownKeyError,
    hash_of,
)
from sprint.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NOW = 1_800_000_000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    with KeyStore(tmp_path / FILE_NAME) as opened:
        yield opened


def test_a_key_is_shown_once_and_only_its_hash_is_kept(store: KeyStore, tmp_path: Path) -> None:
    key = store.create("acme", Tier.TURBO, NOW, connections=5)

    assert KEY.fullmatch(key)
    kept = (tmp_path / FILE_NAME).read_bytes()
    assert hash_of(key) in kept
    assert key.encode() not in kept
    assert bytes.fromhex(key[4:]) not in kept


def test_the_file_is_its_owners_alone(store: KeyStore, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600


def test_a_key_keeps_what_it_was_made_with(store: KeyStore) -> None:
    key = store.create("acme", Tier.PRO, NOW, expires_s=NOW + 60, connections=7)

    (kept,) = store.list()

    assert (kept.hash, kept.name, kept.tier, kept.connections) == (hash_of(key), "acme", Tier.PRO, 7)
    assert (kept.created_s, kept.expires_s, kept.revoked_s) == (NOW, NOW + 60, NEVER)
    assert store.find_text(key) == store.find("acme") == store.find(kept.id[:6]) == kept


def test_a_key_ends_when_it_expires_or_is_revoked(store: KeyStore) -> None:
    store.create("expiring", Tier.PRO, NOW, expires_s=NOW + 60, connections=1)
    store.create("revoked", Tier.PRO, NOW, connections=1)
    expiring, revoked = store.find("expiring"), store.find("revoked")

    assert expiring.is_valid(NOW + 59)
    assert not expiring.is_valid(NOW + 60)
    assert revoked.is_valid(NOW + 10**9)
    assert not store.revoke("revoked", NOW + 1).is_valid(NOW)


def test_revoking_again_changes_nothing(store: KeyStore) -> None:
    store.create("acme", Tier.PRO, NOW, connections=1)
    assert store.revoke("acme", NOW + 1) == store.revoke("acme", NOW + 99)


@pytest.mark.parametrize("name", ["", " acme", "a\nb", "\x1b[31m", "a" * (MAX_NAME + 1), "\u202e"])
def test_a_name_that_can_not_be_shown_is_refused(store: KeyStore, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        store.create(name, Tier.PRO, NOW, connections=1)


@pytest.mark.parametrize("connections", [-1, 0, MAX_CONNECTIONS + 1])
def test_a_number_of_connections_that_can_not_be_is_refused(store: KeyStore, connections: int) -> None:
    with pytest.raises(ValueError, match="connections"):
        store.create("acme", Tier.PRO, NOW, connections=connections)


def test_a_key_that_would_have_ended_already_is_refused(store: KeyStore) -> None:
    with pytest.raises(ValueError, match="expires"):
        store.create("acme", Tier.PRO, NOW, expires_s=NOW, connections=1)


def test_an_ambiguous_or_unknown_name_is_refused(store: KeyStore) -> None:
    for _ in range(2):
        store.create("acme", Tier.PRO, NOW, connections=1)

    for which in ("acme", "nobody", "", "%", "' OR 1=1 --"):
        with pytest.raises(UnknownKeyError):
            store.revoke(which, NOW)
    assert all(key.is_valid(NOW) for key in store.list())


def test_a_name_goes_before_an_id_and_a_slip_of_few_letters_names_nobody(store: KeyStore) -> None:
    store.create("acme", Tier.PRO, NOW, connections=1)
    first = store.find("acme")
    store.create(first.id[:6], Tier.PRO, NOW, connections=1)

    assert store.find(first.id[:6]).name == first.id[:6]
    assert store.find(first.id[:7]) == first
    for few in range(MIN_ID_DIGITS):
        with pytest.raises(UnknownKeyError):
            store.find(first.id[:few])


def test_a_key_that_is_named_as_another_ones_id_is_still_shown_when_it_is_made(store: KeyStore) -> None:
    first = store.create("acme", Tier.PRO, NOW, connections=1)
    second = store.create(store.find_text(first).id, Tier.TURBO, NOW, connections=1)
    assert store.find_text(second).tier is Tier.TURBO
    with pytest.raises(UnknownKeyError):
        store.find_text(first[:-1])


def test_a_key_that_is_given_where_an_id_was_expected_is_not_repeated(store: KeyStore) -> None:
    key = store.create("acme", Tier.PRO, NOW, connections=1)
    with pytest.raises(UnknownKeyError) as error:
        store.find(key)
    assert key[4:12] not in str(error.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a file of another user's")
def test_a_file_that_root_makes_belongs_to_the_folders_owner(tmp_path: Path) -> None:
    folder = tmp_path / "service"
    folder.mkdir()
    os.chown(folder, 4_321, 5_432)
    with KeyStore(folder / FILE_NAME) as store:
        store.create("acme", Tier.PRO, NOW, connections=1)
    for file in folder.iterdir():
        assert (file.stat().st_uid, file.stat().st_gid, stat.S_IMODE(file.stat().st_mode)) == (4_321, 5_432, 0o600)


def test_a_row_that_is_damaged_is_told(store: KeyStore, tmp_path: Path) -> None:
    store.create("acme", Tier.PRO, NOW, connections=1)
    for damage in ("expires_s = 'x'", "tier = 'gold'", "hash = '0123456789abcdef0123456789abcdef'"):
        with sqlite3.connect(tmp_path / FILE_NAME) as database:
            database.execute(f"UPDATE keys SET {damage}")
        database.close()
        with pytest.raises(HostError, match="key"):
            store.list()


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(HostError, match=FILE_NAME):
        KeyStore(path)
    assert path.read_bytes() == b"not a database at all" * 100


def test_a_file_of_another_version_is_refused(store: KeyStore, tmp_path: Path) -> None:
    store.close()
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.execute("PRAGMA user_version = 2")
    database.close()
    with pytest.raises(HostError, match="another version"):
        KeyStore(tmp_path / FILE_NAME)


def test_several_operators_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    operators = []
    for who in range(4):  # processes, as they are: a file's locks are held by processes
        child = os.fork()
        if not child:
            status = 1
            try:
                operate(path, who)
                status = 0
            finally:
                os._exit(status)
        operators.append(child)
    assert [os.waitpid(child, 0)[1] for child in operators] == [0] * 4

    with KeyStore(path) as store:
        keys = store.list()
    assert len(keys) == 80
    assert sum(key.is_valid(NOW) for key in keys) == 40


def operate(path: Path, who: int) -> None:
    with KeyStore(path) as store:
        for number in range(20):
            store.create(f"{who}-{number}", Tier.PRO, NOW, connections=1)
            if number % 2:
                store.revoke(f"{who}-{number}", NOW)
