"""Subscriber keys as the operator keeps them: a SQLite file that holds a hash of each key, its tier and its limits.

A key is 32 random bytes, shown once when it is made. The file holds its SHA-256 only: with so much chance in it there
is nothing to guess, so a slow password hash would add cost and no safety. A key's id, by which lists and `revoke` name
it, is the beginning of that hash. Every change raises `changed`, so that whoever serves reads what is new and no more.

KeyStore is the operator's side, `sprint keys`. What serves subscribers reads by KeyBook (sprint/key_book.py).
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import sqlite3
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sprint.errors import HostError, SprintError
from sprint.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from typing_extensions import Self

FILE_NAME: Final = "keys.sqlite"
PREFIX: Final = "spk_"
"""Says what it is to whoever finds one in a log or a repository, and to the scanners that look for such."""
KEY: Final = re.compile(PREFIX + "[0-9a-f]{64}")
MAX_NAME: Final = 64
MAX_CONNECTIONS: Final = 65_535
DEFAULT_CONNECTIONS: Final = 5
ID_DIGITS: Final = 12
NEVER: Final = 0

_VERSION: Final = 1
_BUSY_S: Final = 5.0
_SCHEMA: Final = """
    CREATE TABLE keys (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        hash BLOB NOT NULL UNIQUE CHECK (length(hash) = 32),
        name TEXT NOT NULL,
        tier TEXT NOT NULL,
        connections INTEGER NOT NULL,
        created_s INTEGER NOT NULL,
        expires_s INTEGER NOT NULL,
        revoked_s INTEGER NOT NULL,
        changed INTEGER NOT NULL
    );
    CREATE INDEX keys_changed ON keys (changed);
"""
_SELECT_ALL: Final = """
    SELECT number, hash, name, tier, connections, created_s, expires_s, revoked_s FROM keys ORDER BY number
"""
_SELECT_CHANGED: Final = """
    SELECT number, hash, name, tier, connections, created_s, expires_s, revoked_s FROM keys
    WHERE changed > ? AND changed <= ?
"""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What the operator keeps of one key. Times are seconds since the epoch."""

    number: int
    """Counts keys from 1."""
    hash: bytes
    """SHA-256 of the key's text."""
    name: str
    tier: Tier
    connections: int
    """How many subscriptions may stand at once by this key."""
    created_s: int
    expires_s: int
    """NEVER: it doesn't."""
    revoked_s: int
    """NEVER: it isn't."""

    @property
    def id(self) -> str:
        """By which the operator names it: it tells nothing of the key."""
        return self.hash.hex()[:ID_DIGITS]

    def is_valid(self, now_s: int) -> bool:
        """Neither revoked nor expired."""
        return self.revoked_s == NEVER and (self.expires_s == NEVER or now_s < self.expires_s)


class UnknownKeyError(SprintError):
    """No key of the store has that id or name, or more than one has."""


def hash_of(key: str) -> bytes:
    """What the store holds of a key: the SHA-256 of its text. Surrogates and the like hash to what no key has."""
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


class KeyStore:
    """The operator's keys, for making, listing and revoking; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it with mode 0600. Raises HostError when it can't be, or is something else."""
        self._path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            with self._changing():
                found = self._database.execute("PRAGMA user_version").fetchone()[0]
                if found == 0:
                    for statement in _SCHEMA.split(";"):
                        self._database.execute(statement)
                    self._database.execute(f"PRAGMA user_version = {_VERSION}")
            check_version(path, found or _VERSION)
        except (OSError, sqlite3.Error) as error:
            raise HostError(f"keys in {path}: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def create(self, name: str, tier: Tier, now_s: int, *, expires_s: int = NEVER, connections: int) -> str:
        """A new key's text, which is nowhere kept. Raises ValueError, saying what was expected, for a bad value."""
        if not (0 < len(name) <= MAX_NAME and name.isprintable() and name == name.strip()):
            raise ValueError(f"name {name[:MAX_NAME]!r}: expected 1 to {MAX_NAME} printable characters")
        if not 1 <= connections <= MAX_CONNECTIONS:
            raise ValueError(f"connections {connections}: expected 1 to {MAX_CONNECTIONS}")
        if expires_s != NEVER and expires_s <= now_s:
            raise ValueError("expires: expected a time to come")
        key = PREFIX + secrets.token_hex(32)
        with self._changing() as changed:
            self._database.execute(
                "INSERT INTO keys VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)",
                (hash_of(key), name, tier.label, connections, now_s, expires_s, NEVER, changed),
            )
        return key

    def list(self) -> list[KeyRecord]:
        """Every key there ever was, the oldest first."""
        with self._reporting():
            return [record_of(row) for row in self._database.execute(_SELECT_ALL)]

    def find(self, which: str) -> KeyRecord:
        """The key of that id (its first digits will do), or of that name. Raises UnknownKeyError."""
        matches = [key for key in self.list() if (which and key.id.startswith(which)) or key.name == which]
        if len(matches) != 1:
            what = "no key has" if not matches else f"{len(matches)} keys have"
            raise UnknownKeyError(f"{what} the id or name {which[:MAX_NAME]!r}: `sprint keys list` shows them")
        return matches[0]

    def find_text(self, key: str) -> KeyRecord:
        """The record of the key whose whole text this is. Raises UnknownKeyError."""
        return self.find(hash_of(key).hex()[:ID_DIGITS])

    def revoke(self, which: str, now_s: int) -> KeyRecord:
        """End that key, for good; sessions by it end within about a second. Raises UnknownKeyError."""
        key = self.find(which)
        with self._changing() as changed:
            self._database.execute(
                "UPDATE keys SET revoked_s = ?, changed = ? WHERE hash = ? AND revoked_s = ?",
                (now_s, changed, key.hash, NEVER),
            )
        return self.find(key.id)

    @contextmanager
    def _changing(self) -> Iterator[int]:
        """One transaction, and the number of the change that it makes."""
        with self._reporting():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                tables = self._database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'keys'").fetchone()[0]
                newest = self._database.execute("SELECT max(changed) FROM keys").fetchone()[0] if tables else None
                yield (newest or 0) + 1
                self._database.execute("COMMIT")
            except BaseException:
                self._database.execute("ROLLBACK")
                raise

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise HostError(f"keys in {self._path}: {error}") from None


def record_of(row: tuple[int, bytes, str, str, int, int, int, int]) -> KeyRecord:
    """What a row of the two selections says. Raises sqlite3.DatabaseError for a tier that Sprint doesn't know."""
    number, digest, name, label, *numbers = row
    try:
        tier = Tier.from_label(label)
    except KeyError:
        raise sqlite3.DatabaseError(f"tier {label!r} of key {digest.hex()[:ID_DIGITS]} is unknown") from None
    return KeyRecord(number, digest, name, tier, *numbers)


def check_version(path: Path, found: int) -> None:
    """Raises HostError for a file of another version of Sprint."""
    if found != _VERSION:
        raise HostError(f"keys in {path}: written by another version of Sprint ({found}; {_VERSION} expected)")


class Changes:
    """Reads a store's keys as they change, without ever making the operator or the caller wait."""

    def __init__(self, path: Path) -> None:
        """Raises sqlite3.Error when the file can't be opened."""
        self._path = path
        self._seen = 0
        self._newest = 0
        uri = f"{path.absolute().as_uri()}?mode=ro"
        self._database = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None)

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def read(self) -> list[KeyRecord]:
        """The keys that changed since the last read; all of them at first.

        Raises sqlite3.Error when it can't be read now, as it can't for the instant of a change; HostError when it never
        can be.
        """
        seen = self._one("PRAGMA data_version")  # of the pager: a change by anybody else makes it another
        if seen == self._seen:
            return []
        version = self._one("PRAGMA user_version")
        if version == 0:
            return []  # it is being made
        check_version(self._path, version)
        newest = self._one("SELECT max(changed) FROM keys")
        changed = [record_of(row) for row in self._database.execute(_SELECT_CHANGED, (self._newest, newest))]
        self._seen, self._newest = seen, newest
        return changed

    def _one(self, statement: str) -> int:
        return int(self._database.execute(statement).fetchone()[0] or 0)
