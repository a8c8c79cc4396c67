"""Which keys are valid, as the processes that serve subscribers know it: in memory, brought up to date once a second.

A refresh that finds nothing new costs microseconds, and a look-up touches no file, so that no subscriber's hello makes
the loop that publishes blocks wait. The time a look-up takes doesn't tell whether a key exists: every text is hashed,
the hash is looked up, and what is found, or a stand-in, is compared and judged in the same steps.
"""

from __future__ import annotations

import sqlite3
from hmac import compare_digest
from typing import TYPE_CHECKING, Final

from sprint.errors import HostError
from sprint.keys import NEVER, Changes, KeyRecord, hash_of
from sprint.tiers import Tier

if TYPE_CHECKING:
    from pathlib import Path

_STAND_IN: Final = KeyRecord(0, bytes(32), "", Tier.FREE, 0, 0, NEVER, revoked_s=1)
"""What an unknown key is judged by; its hash is nobody's, and it has been revoked."""


class KeyBook:
    """A read-only view of the operator's key file."""

    def __init__(self, path: Path) -> None:
        """An absent file is an empty one, and may come later."""
        self.reason: str | None = None
        """Why the file could not be read when last tried; what was known before still counts."""
        self.busy = False
        """Somebody was changing the file when it was last tried: there may be more keys than are known."""
        self.version = 0
        """Another one whenever what is known has changed."""
        self._path = path
        self._keys: dict[bytes, KeyRecord] = {}
        self._changes: Changes | None = None
        self._identity: tuple[int, int] | None = None
        self.refresh()

    def __len__(self) -> int:
        return len(self._keys)

    def refresh(self) -> bool:
        """Read what has changed, if anything has: microseconds when nothing has. Whether something had."""
        try:
            identity = self._file()
            if identity != self._identity:
                self.close()
                self._keys = {}  # another file has taken its place, or none
                self._identity = identity
                self.version += 1
            if identity is None:
                self.reason, self.busy = None, False
                return False
            if self._changes is None:
                self._changes = Changes(self._path)
            changed, afresh = self._changes.read()
        except (sqlite3.Error, HostError, OSError) as error:
            self.reason = f"keys in {self._path}: {error}"
            self.busy = isinstance(error, sqlite3.OperationalError) and "locked" in str(error)
            return False
        self.reason, self.busy = None, False
        if not (changed or afresh):
            return False
        if afresh:
            self._keys = {}
        self._keys.update((key.hash, key) for key in changed)
        self.version += 1
        return True

    def close(self) -> None:
        """Let go of the file."""
        if self._changes is not None:
            self._changes.close()
            self._changes = None

    def look_up(self, key: str, now_s: int) -> KeyRecord | None:
        """The key's record if it is valid now; None for every other text."""
        digest = hash_of(key)
        found = self._keys.get(digest, _STAND_IN)
        same = compare_digest(found.hash, digest)
        return found if found.is_valid(now_s) & same else None

    def valid(self, digest: bytes, now_s: int) -> KeyRecord | None:
        """The record of the key of that hash, if it may still be served."""
        found = self._keys.get(digest)
        return found if found is not None and found.is_valid(now_s) else None

    def _file(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino
