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
from typing import TYPE_CHECKING, Any, Final

from sprint.errors import HostError, SprintError
from sprint.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
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
MIN_ID_DIGITS: Final = 4
"""Of an id, to name a key by: a slip of one or two letters must not end somebody's key."""
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
_SELECT_ONE: Final = """
    SELECT number, hash, name, tier, connections, created_s, expires_s, revoked_s FROM keys WHERE number = ?
"""
_SELECT_NEWEST: Final = "SELECT max(changed), count(*) FROM keys"
_SELECT_CHANGED: Final = """
    SELECT changed, number, hash, name, tier, connections, created_s, expires_s, revoked_s FROM keys WHERE changed > ?
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
        """Neither revoked nor expired; found out in the same steps for every key."""
        return (self.revoked_s == NEVER) & ((self.expires_s == NEVER) | (now_s < self.expires_s))


class UnknownKeyError(SprintError):
    """No key of the store has that id or name, or more than one has."""


def hash_of(key: str) -> bytes:
    """What the store holds of a key: the SHA-256 of its text. Surrogates and the like hash to what no key has."""
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


class KeyStore:
    """The operator's keys, for making, listing and revoking; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it with mode 0600. Raises HostError when it can't be, or is something else."""
        self.path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            make_file(path)
            self._database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise HostError(f"keys in {path}: {getattr(error, 'strerror', None) or error}") from None
        try:
            self._prepare()
        except BaseException:
            self._database.close()
            raise

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
            return [record_of(row) for row in self._database.execute(_SELECT_ALL).fetchall()]

    def find(self, which: str) -> KeyRecord:
        """The key of that name, or else of that id, whose first digits will do. Raises UnknownKeyError."""
        keys = self.list()
        matches = [key for key in keys if which in (key.id, key.name)]
        if not matches and len(which) >= MIN_ID_DIGITS:
            matches = [key for key in keys if key.id.startswith(which)]
        if len(matches) != 1:
            what = "no key has" if not matches else f"{len(matches)} keys have"
            said = f"{PREFIX}…" if which.startswith(PREFIX) else which[:MAX_NAME]  # a key isn't repeated
            raise UnknownKeyError(f"{what} the id or name {said!r}: `sprint keys list` shows them")
        return matches[0]

    def find_text(self, key: str) -> KeyRecord:
        """The record of the key whose whole text this is. Raises UnknownKeyError."""
        digest = hash_of(key)
        for found in self.list():
            if found.hash == digest:
                return found
        raise UnknownKeyError("no key has that text")

    def revoke(self, which: str, now_s: int) -> KeyRecord:
        """End that key, for good; sessions by it end within about a second. Raises UnknownKeyError."""
        key = self.find(which)
        with self._changing() as changed:
            self._database.execute(
                "UPDATE keys SET revoked_s = ?, changed = ? WHERE hash = ? AND revoked_s = ?",
                (now_s, changed, key.hash, NEVER),
            )
            row = self._database.execute(_SELECT_ONE, (key.number,)).fetchone()
            return record_of(row)

    def _prepare(self) -> None:
        """Make the table of a new file. Raises HostError for the file of another version, or of something else."""
        with self._changing():
            found = self._database.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                for statement in _SCHEMA.split(";"):
                    self._database.execute(statement)
                self._database.execute(f"PRAGMA user_version = {_VERSION}")
        check_version(self.path, found or _VERSION)

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
                if self._database.in_transaction:  # a full disk has ended it already
                    self._database.execute("ROLLBACK")
                raise

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise HostError(f"keys in {self.path}: {error}") from None


def make_file(path: Path) -> None:
    """An empty file of mode 0600, unless there is one. Raises OSError.

    One that root makes belongs to the folder's owner: it is he whose service reads it.
    """
    try:
        made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    try:
        if os.geteuid() == 0:
            folder = path.parent.stat()
            os.fchown(made, folder.st_uid, folder.st_gid)
    finally:
        os.close(made)


def record_of(row: Sequence[Any]) -> KeyRecord:
    """What a row of the selections says. Raises sqlite3.DatabaseError for what Sprint never writes."""
    number, digest, name, label, *numbers = row
    if not (isinstance(digest, bytes) and all(type(value) is int for value in (number, *numbers))):
        raise sqlite3.DatabaseError(f"key number {number} is damaged")
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
        self._count = 0
        # Not mode=ro: after an operator who was killed in mid-change, a file that may only be read can't be read at
        # all. Opened so, SQLite takes the half of a change back by itself, where it has the right to.
        uri = f"{path.absolute().as_uri()}?mode=rw"
        self._database = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None)
        self._database.execute("PRAGMA query_only = ON")

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def read(self) -> tuple[list[KeyRecord], bool]:
        """The keys that changed since the last read, and whether these are all there are: at first, and when an older
        file was copied over this one.

        Raises sqlite3.Error when it can't be read now, as it can't for the instant of a change; HostError when it never
        can be.
        """
        seen = self._one("PRAGMA data_version")  # of the pager: a change by anybody else makes it another
        if seen == self._seen:
            return [], False
        version = self._one("PRAGMA user_version")
        if version == 0:
            return [], False  # it is being made
        check_version(self._path, version)
        newest, count = self._database.execute(_SELECT_NEWEST).fetchone()
        afresh = not self._newest or (newest or 0) < self._newest or count < self._count
        after = 0 if afresh else self._newest
        rows = self._database.execute(_SELECT_CHANGED, (after,)).fetchall()  # one statement sees one state of the file
        changed = [record_of(row) for _, *row in rows]
        self._seen, self._newest, self._count = seen, max([after, *(row[0] for row in rows)]), count
        return changed, afresh

    def _one(self, statement: str) -> int:
        return int(self._database.execute(statement).fetchone()[0] or 0)
