"""The header chain: takes 80-byte headers, says which are proven, which chain is best, and what a change of it undid.

Proven means: hash below the header's own target, nBits as the network's difficulty rules demand at that height, version
allowed there, time above the median of the last eleven and at most two hours ahead, parent known, and a chain of at
least the tip's work less 144 blocks' worth (Bitcoin Core's bar against cheap forks, GetAntiDoSWorkThreshold). The best
chain is the one of most work; of equals the first seen.

Pure: the wall clock is an argument. What is kept is bounded: the best chain by the work in it, everything beside it by
MAX_SIDE_HEADERS. A branch that needs more than MAX_SIDE_HEADERS headers to overtake the tip is therefore refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from hashlib import sha256
from struct import Struct
from typing import TYPE_CHECKING

from sprint.bitcoin.block import HEADER_SIZE, double_sha256, target_of, work_of
from sprint.bitcoin.difficulty import (
    MAX_FUTURE_S,
    MEDIAN_SPAN,
    bits_depend_on_time,
    earliest_time,
    header_bits,
    header_time,
    median_time,
    minimum_version,
    regular_bits,
    required_bits,
    version_heights,
)
from sprint.header_tree import HeaderTree
from sprint.packed_chain import WORK_STRIDE
from sprint.side_branches import MAX_SIDE_HEADERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from sprint.bitcoin.networks import Network

_MAX_INVALID = 1024
"""Hashes remembered as broken beyond repair, to tell their children from strangers; the oldest make room."""
_NO_TIME_LIMIT = 1 << 32
_FIELDS = Struct("<i32s32xII4x")


class Reject(Enum):
    """Why a header was refused; the value is the label in metrics."""

    NO_WORK = "no_work"
    BAD_BITS = "bad_bits"
    BAD_VERSION = "bad_version"
    TIME_TOO_OLD = "time_too_old"
    TIME_TOO_NEW = "time_too_new"
    """The only one that passes with time."""
    UNKNOWN_PARENT = "unknown_parent"
    LOW_WORK = "low_work"
    KNOWN_INVALID = "known_invalid"
    """It builds on a header that was refused for good."""
    NOT_CONSECUTIVE = "not_consecutive"
    """In a batch, it doesn't build on the header before it."""

    @property
    def retriable(self) -> bool:
        """The same header may be accepted later."""
        return self is Reject.TIME_TOO_NEW


@dataclass(frozen=True, slots=True)
class Reorg:
    """A change of the best chain that undid part of it. Both lists go upwards in height, all hashes in wire order."""

    fork_height: int
    """The last height that both chains share."""
    disconnected: tuple[bytes, ...]
    connected: tuple[bytes, ...]
    """Up to the tip that the call left."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A proven header."""

    hash: bytes
    height: int
    best: bool
    """It is the tip now."""
    duplicate: bool
    """It was known before; nothing has changed."""
    reorg: Reorg | None


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What became of consecutive headers: `duplicates` known ones, `accepted` new ones, then perhaps a rejection."""

    duplicates: int
    accepted: int
    rejection: Reject | None
    """Of the header after those; whatever follows it was not looked at."""
    best: bool
    """The last new one is the tip now."""
    reorg: Reorg | None


@dataclass(frozen=True, slots=True)
class Restored:
    """What became of headers read back from storage."""

    kept: int
    end: int
    """How many of them end with the last that was of use."""
    rejection: Reject | None
    """Why reading stopped before the end."""


class HeaderChain(HeaderTree):
    """Every proven header of one network that is on the best chain, or lately competed with it."""

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self._invalid: dict[bytes, None] = {}
        self._time_dependent = bits_depend_on_time(network)
        self._highest_time = header_time(network.genesis_header)
        """No header of the best chain is later; above it, a time needs no median."""
        self._regular: int | None = None
        """What `regular_bits` says of the tip's child, where that matters and is known."""

    def accept(self, header: bytes, wall_s: float) -> Accepted | Reject:
        """Judges one header of 80 bytes by our clock, Unix seconds. Raises ValueError for another length."""
        if len(header) != HEADER_SIZE:
            raise ValueError(f"{len(header)} bytes instead of one header of {HEADER_SIZE}")
        limit_time = int(wall_s) + MAX_FUTURE_S
        if header[4:36] == self._best.tip_hash and self._grow(header, 0, 1, limit_time):
            return Accepted(self._best.tip_hash, self._best.tip_height, best=True, duplicate=False, reorg=None)
        outcome = self._place(header, double_sha256(header), limit_time)
        if (
            isinstance(outcome, Accepted)
            and not (outcome.best or outcome.duplicate)
            and not self._settle([outcome.hash])
        ):
            return Reject.LOW_WORK
        return outcome

    def extend(self, headers: bytes | memoryview, wall_s: float) -> BatchResult:
        """Judges n × 80 bytes of consecutive headers, a branch's work at its end; stops at the first bad one.

        Raises ValueError if the length is no multiple of 80.
        """
        count = _count(headers)
        limit_time = int(wall_s) + MAX_FUTURE_S
        at = duplicates = accepted = 0
        previous = b""
        aside: list[bytes] = []
        reorg: Reorg | None = None
        rejection: Reject | None = None
        while at < count and len(aside) <= MAX_SIDE_HEADERS:
            header = bytes(headers[at * HEADER_SIZE : (at + 1) * HEADER_SIZE])
            if at and header[4:36] != previous:
                rejection = Reject.NOT_CONSECUTIVE
                break
            if header[4:36] == self._best.tip_hash and (grown := self._grow(headers, at, count, limit_time)):
                at += grown
                accepted += grown
                previous = self._best.tip_hash
                continue
            previous = double_sha256(header)
            outcome = self._place(header, previous, limit_time)
            if isinstance(outcome, Reject):
                rejection = outcome
                break
            at += 1
            if outcome.duplicate:
                duplicates += 1
                continue
            accepted += 1
            reorg = outcome.reorg or reorg
            if outcome.best:
                aside.clear()
            else:
                aside.append(previous)
        if aside and not self._settle(aside):
            accepted -= len(aside)
            rejection = Reject.LOW_WORK
        if reorg is not None:
            connected = tuple(map(self._best.hash_at, range(reorg.fork_height + 1, self._best.tip_height + 1)))
            reorg = Reorg(reorg.fork_height, reorg.disconnected, connected)
        return BatchResult(duplicates, accepted, rejection, best=accepted > 0 and not aside, reorg=reorg)

    def restore(self, headers: bytes | memoryview) -> Restored:
        """Takes back headers accepted in an earlier life, in that order, branches among one another.

        Each is verified as ever, but neither our clock nor the tip's work is held against it: both were, then. A
        header whose parent has been evicted is passed over. Raises ValueError if the length is no multiple of 80.
        """
        count = _count(headers)
        at = kept = end = 0
        while at < count:
            header = bytes(headers[at * HEADER_SIZE : (at + 1) * HEADER_SIZE])
            if header[4:36] == self._best.tip_hash and (grown := self._grow(headers, at, count, _NO_TIME_LIMIT)):
                at += grown
                kept += grown
                end = at
                continue
            outcome = self._place(header, double_sha256(header), _NO_TIME_LIMIT)
            if isinstance(outcome, Reject) and outcome is not Reject.UNKNOWN_PARENT:
                return Restored(kept, end, outcome)
            at += 1
            if isinstance(outcome, Reject):
                continue
            if outcome.best or outcome.duplicate or self._settle([outcome.hash], bar=0):
                kept += not outcome.duplicate
                end = at
        return Restored(kept, end, None)

    def _grow(self, headers: bytes | memoryview, at: int, count: int, limit_time: int) -> int:
        """Appends headers[at:count] to the best chain, up to the first that isn't simply its good continuation.

        Returns how many. What stopped it, if anything, is for `_place` to say. Within one chunk height has no say:
        nBits, minimum version and index of work are those of its first header. About 3 µs a header, a third of it in
        SHA-256; 5 on the testnets, where a chunk is one header.
        """
        network = self.network
        best = self._best
        times = best.times_up_to(best.tip_height)
        highest = self._highest_time
        regular = self._regular
        first = at
        while at < count:
            height = best.tip_height + 1
            size = min(count - at, self._chunk(height))
            if not size:
                break
            chunk = bytes(headers[at * HEADER_SIZE : (at + size) * HEADER_SIZE])
            if self._time_dependent and regular is None:
                regular = regular_bits(network, height, best.header_at)
            bits = required_bits(network, height, header_time(chunk), best.header_at, regular)
            target = target_of(bits)
            least_version = minimum_version(network, height)
            previous = best.tip_hash
            hashes: list[int] = []
            start = 0
            for version, parent, time, stated_bits in _FIELDS.iter_unpack(chunk):
                if parent != previous or stated_bits != bits or version < least_version or time > limit_time:
                    break
                end = start + HEADER_SIZE
                digest = sha256(sha256(chunk[start:end]).digest()).digest()
                value = int.from_bytes(digest, "little")
                if value > target:
                    break
                if time > highest:
                    highest = time
                elif time <= median_time(times[-MEDIAN_SPAN:]):
                    break
                times.append(time)
                hashes.append(value)
                previous = digest
                start = end
            if hashes:
                best.headers += chunk[:start]
                best.commit(hashes, previous, bits)
                at += len(hashes)
                del times[:-MEDIAN_SPAN]
                if bits != network.pow_limit_bits or height % network.interval == 0:
                    regular = bits
            if len(hashes) < size:
                break
        self._highest_time = highest
        self._regular = regular
        return at - first

    def _chunk(self, height: int) -> int:
        """From `height` on, how many headers are under the same rules; 0 if that first one needs `_place`."""
        network = self.network
        if self._time_dependent:
            # Each header's time decides its nBits. BIP94 has a say of its own in a period's first.
            return 0 if network.bip94 and height % network.interval == 0 else 1
        size = min(WORK_STRIDE - (height - 1) % WORK_STRIDE, network.interval - height % network.interval)
        return min([size, *(change - height for change in version_heights(network) if change > height)])

    def _place(self, header: bytes, block_hash: bytes, limit_time: int) -> Accepted | Reject:
        """Judges one header by every rule but the bar of work, and puts it where it belongs."""
        best = self._best
        known = self.height_of(block_hash)
        if known is not None:
            return Accepted(block_hash, known, best=block_hash == best.tip_hash, duplicate=True, reorg=None)
        bits = header_bits(header)
        value = int.from_bytes(block_hash, "little")
        if target_of(bits) > self.network.pow_limit or not 0 < value <= target_of(bits):
            return Reject.NO_WORK
        parent = header[4:36]
        if parent in self._invalid:
            return self._refuse_for_good(block_hash, Reject.KNOWN_INVALID)
        parent_work = self.work_of(parent)
        parent_height = self.height_of(parent)
        if parent_work is None or parent_height is None:
            return Reject.UNKNOWN_PARENT
        height = parent_height + 1
        broken = self._broken_rule(header, height, self._ancestry(parent, parent_height))
        if broken is not None:
            return self._refuse_for_good(block_hash, broken)
        if header_time(header) > limit_time:
            return Reject.TIME_TOO_NEW
        if parent == best.tip_hash:
            self._append(header, block_hash)
            return Accepted(block_hash, height, best=True, duplicate=False, reorg=None)
        work = parent_work + work_of(bits)
        self._side.add(block_hash, header, height, work)
        reorg = self._reorganise(block_hash) if work > best.tip_work else None
        return Accepted(block_hash, height, best=reorg is not None, duplicate=False, reorg=reorg)

    def _broken_rule(self, header: bytes, height: int, ancestor: Callable[[int], bytes]) -> Reject | None:
        time = header_time(header)
        if header_bits(header) != required_bits(self.network, height, time, ancestor):
            return Reject.BAD_BITS
        median = median_time([header_time(ancestor(at)) for at in range(max(0, height - MEDIAN_SPAN), height)])
        if time <= median or time < earliest_time(self.network, height, header_time(ancestor(height - 1))):
            return Reject.TIME_TOO_OLD
        if int.from_bytes(header[:4], "little", signed=True) < minimum_version(self.network, height):
            return Reject.BAD_VERSION
        return None

    def _refuse_for_good(self, block_hash: bytes, reason: Reject) -> Reject:
        while len(self._invalid) >= _MAX_INVALID:
            del self._invalid[next(iter(self._invalid))]
        self._invalid[block_hash] = None
        return reason

    def _settle(self, aside: list[bytes], bar: int | None = None) -> bool:
        """Keeps new side headers, each the child of the one before, if the last has enough work; else drops them.

        A branch too long for the bound is dropped too.
        """
        end = self._side.get(aside[-1])
        assert end is not None
        enough = end.work >= (self.work_bar if bar is None else bar)
        crowded = len(self._side) > MAX_SIDE_HEADERS
        if enough and not (crowded and sum(1 for _ in self._side.branch(end.hash)) > MAX_SIDE_HEADERS):
            self._side.trim(end.hash)
            return True
        for block_hash in reversed(aside):
            self._side.remove(block_hash)
        return False

    def _append(self, header: bytes, block_hash: bytes) -> None:
        self._highest_time = max(self._highest_time, header_time(header))
        self._regular = None
        self._best.headers += header
        self._best.commit([int.from_bytes(block_hash, "little")], block_hash, header_bits(header))

    def _reorganise(self, block_hash: bytes) -> Reorg:
        """Makes the branch that ends in a side header the best chain, and the old one a side branch."""
        best = self._best
        branch = list(self._side.branch(block_hash))[::-1]
        fork_height = branch[0].height - 1
        undone = range(fork_height + 1, best.tip_height + 1)
        disconnected = tuple(map(best.hash_at, undone))
        # What can't stay within the bound isn't put there: of a longer branch the upper end is lost.
        headers = list(map(best.header_at, undone[:MAX_SIDE_HEADERS]))
        best.truncate(fork_height)
        work = best.tip_work
        for side in branch:
            self._side.remove(side.hash)
            self._append(side.header, side.hash)
        for height, lost_hash, header in zip(undone, disconnected, headers, strict=False):
            work += work_of(header_bits(header))
            self._side.add(lost_hash, header, height, work)
        self._side.trim(b"")
        return Reorg(fork_height, disconnected, tuple(side.hash for side in branch))


def _count(headers: bytes | memoryview) -> int:
    count, rest = divmod(len(headers), HEADER_SIZE)
    if rest:
        raise ValueError(f"{len(headers)} bytes are not a multiple of {HEADER_SIZE}")
    return count
