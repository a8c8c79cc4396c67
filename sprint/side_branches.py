"""Valid headers beside the best chain: competing tips and what they stand on, bounded in number.

Proof of work makes such headers dear on main and free on regtest, so whoever adds one may push another out: the leaf
of least work goes first, among equals the oldest. Only leaves go, so a header's ancestors are always at hand, here or
on the best chain. What went can be fetched again.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_SIDE_HEADERS = 4096
"""Two full `headers` messages: the longest branch that one message brings fits, beside as much again. About 2 MB."""


@dataclass(frozen=True, slots=True)
class SideHeader:
    """A header that is not on the best chain."""

    hash: bytes
    header: bytes
    height: int
    work: int
    """Of the whole chain up to and with this header."""
    order: int
    """Counts up: an older header has a smaller one."""

    @property
    def previous(self) -> bytes:
        """The parent's hash; the parent is a side header too, or on the best chain."""
        return self.header[4:36]


class SideBranches:
    """All side headers, by hash."""

    def __init__(self, limit: int = MAX_SIDE_HEADERS) -> None:
        self._limit = limit
        self._headers: dict[bytes, SideHeader] = {}
        self._children: dict[bytes, int] = {}
        # Leaves by (work, order); entries of headers that have gone or got children are skipped when met.
        self._leaves: list[tuple[int, int, bytes]] = []
        self._order = 0

    def __len__(self) -> int:
        return len(self._headers)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._headers

    def get(self, block_hash: bytes) -> SideHeader | None:
        """The side header of that hash."""
        return self._headers.get(block_hash)

    def add(self, block_hash: bytes, header: bytes, height: int, work: int) -> SideHeader:
        """Takes in a header whose parent is here or on the best chain. Call `trim` when its place is settled."""
        self._order += 1
        side = SideHeader(block_hash, header, height, work, self._order)
        self._headers[block_hash] = side
        self._children[side.previous] = self._children.get(side.previous, 0) + 1
        if block_hash not in self._children:
            self._push(side)
        return side

    def remove(self, block_hash: bytes) -> None:
        """Forgets a header: one without children, or one that joins the best chain together with its ancestors."""
        side = self._headers.pop(block_hash)
        count = self._children[side.previous] - 1
        if count:
            self._children[side.previous] = count
            return
        del self._children[side.previous]
        parent = self._headers.get(side.previous)
        if parent is not None:
            self._push(parent)

    def trim(self, keep: bytes) -> None:
        """Evicts leaves until the bound holds, sparing `keep`, whose own branch must be within the bound."""
        spared = None
        while len(self._headers) > self._limit:
            entry = heappop(self._leaves)
            if not self._is_leaf(entry):
                continue
            if entry[2] == keep:
                spared = entry
                continue
            self.remove(entry[2])
        if spared is not None:
            heappush(self._leaves, spared)

    def branch(self, block_hash: bytes) -> Iterator[SideHeader]:
        """From that header down to the last one above the best chain; nothing if it isn't a side header."""
        side = self._headers.get(block_hash)
        while side is not None:
            yield side
            side = self._headers.get(side.previous)

    def tips(self) -> list[SideHeader]:
        """The leaves, in no particular order."""
        return [side for side in self._headers.values() if side.hash not in self._children]

    def _is_leaf(self, entry: tuple[int, int, bytes]) -> bool:
        side = self._headers.get(entry[2])
        return side is not None and side.order == entry[1] and side.hash not in self._children

    def _push(self, side: SideHeader) -> None:
        if len(self._leaves) > 2 * self._limit + 16:
            self._leaves = [entry for entry in set(self._leaves) if self._is_leaf(entry)]
            heapify(self._leaves)
        heappush(self._leaves, (side.work, side.order, side.hash))
