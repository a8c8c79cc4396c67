"""How many subscriptions stand at once by one key or from one network, counted over all processes that serve.

A table of counters in memory that the supervisor shares before it forks: a row for each process, which alone writes it,
a column for each holder. Whoever takes a seat counts himself in first and looks at the sum after that, so two processes
may both refuse the last seat, but never both give it. A key has the column of its number, which is its own up to 65,536
keys. A network's comes from a hash with a random key: two may share one by chance, which makes their limit stricter,
and nobody can choose whom he shares it with.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

KEYS: Final = 1 << 16
NETWORKS: Final = 1 << 16
COLUMNS: Final = KEYS + NETWORKS


def size_for(rows: int) -> int:
    """Bytes of a table for so many processes."""
    return rows * COLUMNS * 4


class Seats:
    """One process's view of the table: all rows for reading, its own for writing."""

    def __init__(self, memory: memoryview, row: int, secret: bytes) -> None:
        """`memory` has size_for(rows) bytes; `secret`, up to 64 bytes, is the same in all processes.

        Clears the row: what a process of that row held went with it when it died.
        """
        table = memory.cast("B").cast("I")
        self._rows = [table[start : start + COLUMNS] for start in range(0, len(table), COLUMNS)]
        self._own = self._rows[row]
        self._secret = secret
        self._own[:] = memoryview(bytes(4 * COLUMNS)).cast("I")

    def of_network(self, network: str) -> int:
        """The column of a network."""
        digest = blake2b(network.encode(), digest_size=2, key=self._secret).digest()
        return KEYS + int.from_bytes(digest, "little")

    def take(self, column: int, limit: int) -> bool:
        """Take a seat for that column's holder; False, and nothing taken, when he has `limit` already."""
        self._own[column] += 1
        if self.taken(column) <= limit:
            return True
        self._own[column] -= 1
        return False

    def give_back(self, column: int) -> None:
        """A seat that was taken here is free."""
        self._own[column] -= 1

    def taken(self, column: int) -> int:
        """How many seats that column's holder has, over all processes."""
        return sum(row[column] for row in self._rows)


def of_key(number: int) -> int:
    """The column of a key, by its number in the store."""
    return number % KEYS


def private_seats(secret: bytes = b"") -> Seats:
    """A table for one process by itself."""
    return Seats(memoryview(bytearray(size_for(1))), 0, secret)
