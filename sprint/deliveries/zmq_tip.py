"""What a node's tip did, as Bitcoin Core's publisher would tell it: which blocks it left, and which it took. Pure.

The blocks of the feed come one by one and not all in a node's order: of a branch that wins, the lower blocks are known
as validated before the block that makes it win. As in Core the tip moves only to a block with more work than the tip
has, and all that lies between is told then.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from sprint.bitcoin.block import work_of

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_BLOCKS: Final = 4_096
"""As many as the relay remembers."""


@dataclass(frozen=True, slots=True)
class TipChange:
    """The tip moved; hashes in wire order."""

    disconnected: tuple[bytes, ...]
    """From the old tip downwards."""
    connected: tuple[bytes, ...]
    """Upwards, the new tip last."""


class _Block(NamedTuple):
    parent: bytes
    height: int
    work: int
    best: bool


class NodeTip:
    """Follows one tip through the blocks that it is told of."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self.hash: bytes | None = None
        """The tip; None: not told yet."""
        self._max_blocks = max_blocks
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()

    def learn(self, block_hash: bytes, header: bytes, height: int, *, best: bool) -> None:
        """A block exists: its place in the tree, from its 80 bytes; `best`: it is on the best chain as we know it."""
        known = self._blocks.get(block_hash)
        if known is not None:
            if known.best != best:
                self._blocks[block_hash] = known._replace(best=best)
            return
        work = work_of(int.from_bytes(header[72:76], "little"))
        self._blocks[block_hash] = _Block(header[4:36], height, work, best)
        if len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)

    def knows(self, block_hash: bytes) -> bool:
        """Whether we have learnt of a block, and not forgotten it."""
        return block_hash in self._blocks

    def ancestors_among(self, candidates: Iterable[bytes], block_hash: bytes) -> list[bytes]:
        """Those of `candidates`, in their order, that are the block or below it; `candidates` are few."""
        heights = {one: self._blocks[one].height for one in candidates if one in self._blocks}
        lowest = min(heights.values(), default=0)
        line: set[bytes] = set()
        at = block_hash
        while (block := self._blocks.get(at)) is not None and block.height >= lowest:
            line.add(at)
            at = block.parent
        return [one for one in heights if one in line]

    def advance(self, block_hash: bytes) -> TipChange | None:
        """A block that we have learnt of counts from now on; None: the tip stays where it is."""
        old, new = self.hash, block_hash
        if block_hash not in self._blocks or old == new:
            return None
        left: list[bytes] = []
        taken: list[bytes] = []
        if old is None:
            # The tip was there before anything was told: whatever competes with it is no news.
            if not self._blocks[new].best:
                return None
            taken = [new]
        elif (fork := self._fork(old, new)) is None:
            # What joins them was never told: all that can be said is which is higher.
            if old in self._blocks and self._blocks[new].height <= self._blocks[old].height:
                return None
            taken = [new]
        else:
            left, taken = self._down_to(fork, old), self._down_to(fork, new)[::-1]
            if self._work(taken) <= self._work(left):
                return None
        self.hash = new
        return TipChange(tuple(left), tuple(taken))

    def _fork(self, one: bytes, other: bytes) -> bytes | None:
        """The last block that both chains share; its parent may be unknown."""
        blocks = self._blocks
        while one != other:
            first, second = blocks.get(one), blocks.get(other)
            if second is not None and (first is None or second.height > first.height):
                other = second.parent
            elif first is not None:
                one = first.parent
            else:
                return None
        return one

    def _down_to(self, fork: bytes, block_hash: bytes) -> list[bytes]:
        path = []
        while block_hash != fork:
            path.append(block_hash)
            block_hash = self._blocks[block_hash].parent
        return path

    def _work(self, path: list[bytes]) -> int:
        return sum(self._blocks[one].work for one in path)
