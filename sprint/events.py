"""What the parts of Sprint tell each other: sightings come in from sources, blocks go out to deliveries.

Everything here is immutable and knows no socket, no event loop and no clock. Hashes and headers are in wire order
(the reverse of what block explorers print). Times are CLOCK_MONOTONIC nanoseconds unless a name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import NamedTuple


class Source(IntEnum):
    """Who was first with a block; the numbers stand in the record."""

    CAPTURE = 1
    P2P = 2
    ZMQ = 3
    SPRINT = 4


class Announcement(IntEnum):
    """The message that carried a sighting."""

    INV = 1
    HEADERS = 2
    CMPCTBLOCK = 3
    BLOCK = 4
    HASHBLOCK = 5
    RAWBLOCK = 6


class Event(IntEnum):
    """What a record reports; the numbers stand in the record."""

    PROVEN = 1
    REBUILT = 2
    VALIDATED = 3
    STALE = 4
    INVALID = 5


class State(IntFlag):
    """All that is known of a block, cumulative: the five events, then three properties."""

    PROVEN = 1 << 0
    REBUILT = 1 << 1
    VALIDATED = 1 << 2
    STALE = 1 << 3
    INVALID = 1 << 4
    BEST = 1 << 5
    REORG = 1 << 6
    CATCHUP = 1 << 7


class Sighting(NamedTuple):
    """One peer's claim that one block exists. Nothing about it is proven yet.

    A named tuple, because making a frozen dataclass of nine fields takes a tenth of the time from packet to hash.
    """

    source: Source
    peer: str
    """The peer's configured name, `host:port`, the same over reconnects."""
    announcement: Announcement
    hash: bytes
    """32 bytes, wire order."""
    header: bytes | None
    """80 bytes; None where the announcement is a hash only (inv, hashblock)."""
    seen_ns: int
    """When the announcement's bytes arrived."""
    transactions: int = 0
    """0: unknown."""
    size: int = 0
    """Bytes of the whole block; 0: unknown."""
    validated: bool = False
    """The peer says by this announcement that it has connected the block (BIP130 headers, inv, hashblock)."""


@dataclass(frozen=True, slots=True)
class HeaderRun:
    """The answer to a getheaders: consecutive headers of a peer's best chain, perhaps none."""

    source: Source
    peer: str
    headers: bytes
    """n × 80 bytes, 0 ≤ n ≤ 2000."""
    seen_ns: int
    complete: bool
    """The peer has no more to give: fewer than 2,000 headers came."""


@dataclass(frozen=True, slots=True)
class PeerReady:
    """A peer has finished its handshake and can be asked for headers."""

    source: Source
    peer: str
    height: int
    """What it claimed in its version message."""


@dataclass(frozen=True, slots=True)
class PeerGone:
    """A peer that was ready no longer is."""

    source: Source
    peer: str


@dataclass(frozen=True, slots=True)
class MessagesMissed:
    """A peer said something that didn't reach us, as a gap in its numbers or a new connection tells."""

    source: Source
    peer: str


@dataclass(frozen=True, slots=True)
class BlockRebuilt:
    """A whole block is at hand: its merkle root and its witness commitment have been checked."""

    hash: bytes
    """32 bytes, wire order."""
    transactions: int
    size: int
    """Bytes of the whole block, witnesses included."""


@dataclass(frozen=True, slots=True)
class Want:
    """Ask this peer for the headers that follow the first hash in `locator` which it has on its best chain."""

    source: Source
    peer: str
    locator: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """One event in the life of a proven block, ready to be encoded as a record."""

    event: Event
    state: State
    source: Source
    peer: str
    hash: bytes
    header: bytes
    height: int
    fork_height: int
    """The last height that the old and the new best chain share; 0 unless state has REORG."""
    next_bits: int
    """nBits that the block after this one must carry; 0 where that depends on its time."""
    median_time_past: int
    transactions: int
    size: int
    wall_ns: int
    seen_ns: int


@dataclass(frozen=True, slots=True)
class Lapped:
    """The writer overtook a reader: `lost` records, from sequence `first` on, are gone from the ring."""

    first: int
    lost: int
