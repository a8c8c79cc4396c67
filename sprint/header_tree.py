"""What is known of a network's headers: the best chain, the branches beside it, and all that may be asked of them.

Reading only; `chain` decides what comes in. A header's own branch is the path from it down to genesis, which leaves
the side branches where it meets the best chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sprint.bitcoin.block import HEADER_SIZE, work_of
from sprint.bitcoin.difficulty import MEDIAN_SPAN, header_bits, header_time, median_time, required_bits
from sprint.packed_chain import PackedChain
from sprint.side_branches import SideBranches

if TYPE_CHECKING:
    from collections.abc import Callable

    from sprint.bitcoin.networks import Network

LOW_WORK_BLOCKS = 144
"""A day's blocks: how much work, at the tip's difficulty, a branch may lack and still be taken in (Core)."""
MAX_HEADERS = 2000
"""Of one `headers` message."""


@dataclass(frozen=True, slots=True)
class ChainTip:
    """The end of a branch."""

    hash: bytes
    height: int
    work: int
    fork_height: int
    """The last height it shares with the best chain; its own if it is the best."""


class HeaderTree:
    """The headers of one network. Hashes are in wire order."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._best = PackedChain(network.genesis_header, network.genesis_hash)
        self._side = SideBranches()

    @property
    def tip_hash(self) -> bytes:
        return self._best.tip_hash

    @property
    def tip_height(self) -> int:
        return self._best.tip_height

    @property
    def tip_work(self) -> int:
        """Expected hashes behind the whole best chain."""
        return self._best.tip_work

    @property
    def tip_time(self) -> int:
        """What the tip's header states, Unix seconds."""
        return header_time(self._best.header_at(self._best.tip_height))

    @property
    def work_bar(self) -> int:
        """The least work of a chain whose header is taken in."""
        tip_bits = header_bits(self._best.header_at(self._best.tip_height))
        return max(0, self._best.tip_work - LOW_WORK_BLOCKS * work_of(tip_bits))

    def knows(self, block_hash: bytes) -> bool:
        """Whether that header was accepted and is still kept."""
        return self.height_of(block_hash) is not None

    def height_of(self, block_hash: bytes) -> int | None:
        """The header's height, on whichever branch; None if it is unknown."""
        side = self._side.get(block_hash)
        return self._best.height_of(block_hash) if side is None else side.height

    def work_of(self, block_hash: bytes) -> int | None:
        """The work of the chain that ends in that header; None if it is unknown."""
        side = self._side.get(block_hash)
        if side is not None:
            return side.work
        height = self._best.height_of(block_hash)
        return None if height is None else self._best.work_at(height)

    def header_of(self, block_hash: bytes) -> bytes | None:
        """Its 80 bytes; None if it is unknown."""
        side = self._side.get(block_hash)
        if side is not None:
            return side.header
        height = self._best.height_of(block_hash)
        return None if height is None else self._best.header_at(height)

    def is_best(self, block_hash: bytes) -> bool:
        """Whether that header is on the best chain."""
        return self._best.height_of(block_hash) is not None

    def header_at(self, height: int) -> bytes:
        """The best chain's header there. Raises IndexError beyond the tip."""
        return self._best.header_at(height)

    def hash_at(self, height: int) -> bytes:
        """The best chain's hash there. Raises IndexError beyond the tip."""
        return self._best.hash_at(height)

    def fork_height(self, block_hash: bytes) -> int | None:
        """The last height that header's branch shares with the best chain; None if it is unknown."""
        lowest = None
        for side in self._side.branch(block_hash):
            lowest = side.height
        return self._best.height_of(block_hash) if lowest is None else lowest - 1

    def median_time_past(self, where: bytes | int) -> int:
        """The median time that the child of a header has to exceed; by hash, or by height on the best chain.

        Raises KeyError for an unknown hash, IndexError for a height beyond the tip.
        """
        block_hash = self._best.hash_at(where) if isinstance(where, int) else where
        height = self._known_height(block_hash)
        ancestor = self._ancestry(block_hash, height)
        return median_time([header_time(ancestor(at)) for at in range(max(0, height + 1 - MEDIAN_SPAN), height + 1)])

    def next_bits(self, block_hash: bytes) -> int:
        """nBits that the child of a header must carry; 0 where its own time decides. Raises KeyError if unknown."""
        height = self._known_height(block_hash)
        return required_bits(self.network, height + 1, None, self._ancestry(block_hash, height))

    def tips(self) -> tuple[ChainTip, ...]:
        """The best tip, then the competing ones by falling work."""
        sides = sorted(self._side.tips(), key=lambda side: (-side.work, side.order))
        best = ChainTip(self.tip_hash, self.tip_height, self.tip_work, self.tip_height)
        return best, *(ChainTip(s.hash, s.height, s.work, self.fork_height(s.hash) or 0) for s in sides)

    def locator(self) -> list[bytes]:
        """Hashes from the tip down to genesis: eleven steps of one, then they double. About 30 of a million headers."""
        return self.locator_from(self.tip_hash)

    def locator_from(self, block_hash: bytes) -> list[bytes]:
        """The same from any known header; what a getheaders carries. Raises KeyError if it is unknown."""
        height = self._known_height(block_hash)
        aside = {side.height: side.hash for side in self._side.branch(block_hash)}
        hashes = []
        step = 1
        while True:
            hashes.append(aside.get(height) or self._best.hash_at(height))
            if height == 0:
                return hashes
            height = max(0, height - step)
            if len(hashes) > 10:
                step *= 2

    def headers_after(self, locator: list[bytes], stop: bytes, limit: int = MAX_HEADERS) -> bytes:
        """The answer to a getheaders: up to `limit` headers of the best chain after the locator's first hash on it.

        Ends with `stop`. From genesis on if no hash is known; without any hash, the header of `stop` alone.
        """
        if not locator:
            return self.header_of(stop) or b""
        heights = (self._best.height_of(block_hash) for block_hash in locator)
        start = next((height for height in heights if height is not None), 0)
        last = min(self.tip_height, start + limit)
        stop_height = self._best.height_of(stop)
        if stop_height is not None and stop_height > start:
            last = min(last, stop_height)
        return bytes(self._best.headers[(start + 1) * HEADER_SIZE : (last + 1) * HEADER_SIZE])

    def _known_height(self, block_hash: bytes) -> int:
        height = self.height_of(block_hash)
        if height is None:
            raise KeyError(f"no header {block_hash[::-1].hex()}")
        return height

    def _ancestry(self, block_hash: bytes, height: int) -> Callable[[int], bytes]:
        """For a known header: height → header on its own branch, at its height or below."""
        if block_hash not in self._side:
            return self._best.header_at
        branch = self._side.branch(block_hash)
        walked: list[bytes] = []

        def ancestor(at: int) -> bytes:
            while len(walked) <= height - at:
                side = next(branch, None)
                if side is None:
                    return self._best.header_at(at)
                walked.append(side.header)
            return walked[height - at]

        return ancestor
