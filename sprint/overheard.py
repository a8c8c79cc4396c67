"""What an overheard message announces: from the bytes of a captured P2P message to sightings, each told once.

Owns which messages announce blocks, how much of each is needed, and what it has to prove before anything is told: `inv`
and `headers` their checksum, `cmpctblock` and `block`, which are told as soon as their 80-byte header is there, that
header's own work. The chain's rules come after that, in the relay. A sighting from here never says `validated`, for
packets are not authenticated. Pure: knows no flow's state; where messages start is found out in reassembly.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from struct import Struct
from typing import TYPE_CHECKING

from sprint.bitcoin.block import HEADER_SIZE, MIN_TRANSACTION_SIZE, target_of
from sprint.bitcoin.codec import MAX_PAYLOAD_SIZE, U32, MalformedError, decode_compact_size
from sprint.bitcoin.compact import MAX_BLOCK_TRANSACTIONS, SHORT_ID_SIZE, SHORT_IDS_OFFSET
from sprint.bitcoin.framing import COMMAND_SIZE, FRAME_HEADER_SIZE
from sprint.bitcoin.messages import INVENTORY_ENTRY_SIZE
from sprint.bitcoin.peer_events import BlocksAnnouncedByInv, HeadersReceived, translate
from sprint.errors import RemoteProtocolError
from sprint.events import Announcement, Sighting, Source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xdp.segments import Flow, Segment

EARLY_SIZE = FRAME_HEADER_SIZE + HEADER_SIZE
"""Bytes of a cmpctblock or a block, from its frame's first one on, after which it is told."""
MAX_INV_SIZE = 128 * 1024
"""3,640 entries. Core sends some 1,000 at most, 500 of blocks; what is longer is no announcement."""
MAX_ANNOUNCED_HEADERS = 8
"""BIP130: a node announces up to eight headers at once; more in one message are an answer."""
MAX_TOLD = 4_096
"""Announcements remembered, so that a retransmission isn't told again: what 125 peers say in 32 blocks."""

FRAME = Struct("<4s12sI4s")
"""Magic, command, length and checksum."""
_COMPACT = Struct("<4s12sI4s80s8xBH")
"""The same, and of a compact block its header, and what the number of its short ids is in as a rule (BIP152)."""
_COMPACT_SIZE = _COMPACT.size
_COMPACT_U16 = 253  # what a compact size of two bytes begins with
_COMMAND = re.compile(rb"[\x21-\x7e]{1,12}\x00*")
_BITS_OFFSET = 72
_CMPCTBLOCK, _CAPTURE = Announcement.CMPCTBLOCK, Source.CAPTURE
_MASK = 0xFFFF_FFFF
_HALF = 1 << 31


@dataclass(frozen=True, slots=True)
class Kind:
    """A message that announces blocks."""

    announcement: Announcement
    command: str
    early: bool
    """EARLY_SIZE bytes of it are enough."""
    least: int
    """Bytes of payload; with fewer it announces nothing."""
    most: int


def _kind(announcement: Announcement, least: int, most: int, *, early: bool) -> Kind:
    return Kind(announcement, announcement.name.lower(), early, least, most)


KINDS: dict[bytes, Kind] = {
    kind.command.encode("ascii").ljust(COMMAND_SIZE, b"\0"): kind
    for kind in (
        _kind(Announcement.CMPCTBLOCK, SHORT_IDS_OFFSET + 2, MAX_PAYLOAD_SIZE, early=True),
        _kind(Announcement.BLOCK, HEADER_SIZE + 1 + MIN_TRANSACTION_SIZE, MAX_PAYLOAD_SIZE, early=True),
        _kind(Announcement.HEADERS, HEADER_SIZE + 2, 1 + (HEADER_SIZE + 1) * MAX_ANNOUNCED_HEADERS, early=False),
        _kind(Announcement.INV, 1 + INVENTORY_ENTRY_SIZE, MAX_INV_SIZE, early=False),
    )
}
"""By the command as it stands in the frame."""


_COMPACT_COMMAND = b"cmpctblock\0\0"
_COMPACT_LEAST = KINDS[_COMPACT_COMMAND].least
_make = tuple.__new__  # a named tuple's own constructor takes twice as long


@lru_cache(maxsize=256)
def _target(bits: bytes) -> bytes:
    """The target of nBits, as its four bytes stand in a header; 32 bytes, the highest first."""
    return target_of(U32.unpack(bits)[0]).to_bytes(32, "big")


def is_command(raw: bytes) -> bool:
    """Whether these 12 bytes can name a message, by Core's rule: printable ASCII, then zeros."""
    return _COMMAND.fullmatch(raw) is not None


@dataclass(slots=True)
class Counters:
    """What one backend's segments came to."""

    segments: int = 0
    bytes: int = 0
    """Of payload, as far as captured."""
    sightings: int = 0
    repeated: int = 0
    """Announcements that had been told before: retransmissions."""
    bad_checksum: int = 0
    unproven: int = 0
    """Block headers that don't meet their own target."""
    malformed: int = 0
    over_bound: int = 0
    """`inv` and `headers` too long, or too short, to announce anything."""
    contradictions: int = 0
    """Segments left out of a message because they disagree with what it has."""
    abandoned: int = 0
    """Messages given up half there."""
    forgotten: int = 0
    """Flows that grew old, or made room for others."""

    @property
    def skipped(self) -> int:
        """Messages that looked like announcements and proved nothing."""
        return self.bad_checksum + self.unproven + self.malformed


class Gathered:
    """A message that comes in pieces: its first bytes, without a gap."""

    __slots__ = ("data", "disputed", "kind", "need", "start")

    def __init__(self, start: int, data: bytes) -> None:
        self.start = start
        self.data = bytearray(data)
        self.need = FRAME_HEADER_SIZE
        self.kind: Kind | None = None
        """None until the 24 bytes of the frame's header are there."""
        self.disputed = False
        """Some segment disagrees: nothing but the checksum can tell whether all pieces are of one sender."""

    def contradicts(self, sequence: int, data: bytes) -> bool:
        """Whether a segment and this message disagree on some byte. It is then disputed from now on."""
        begins = (sequence - self.start + _HALF & _MASK) - _HALF
        low, high = max(begins, 0), min(begins + len(data), len(self.data))
        if low >= high or data[low - begins : high - begins] == self.data[low:high]:
            return False
        self.disputed = True
        return True

    def take(self, sequence: int, data: bytes) -> bool:
        """Append what a segment adds that doesn't contradict, which is to be asked before; False: nothing."""
        held = len(self.data)
        offset = (self.start + held - sequence) & _MASK
        if offset >= len(data):
            return False
        self.data += data[offset : offset + self.need - held]
        return True


class Announcements:
    """One backend's announcements. What is told, and what was told before, is known by flow, place and block."""

    def __init__(self, magic: bytes, peer: str) -> None:
        """`magic`: the network's 4 bytes; `peer`: the name in the sightings."""
        self.counters = Counters()
        self._magic = magic
        self._peer = peer
        self._told: dict[tuple[Flow, int, bytes], None] = {}

    def glance(self, segment: Segment, now_ns: int) -> Sequence[Sighting]:
        """The hot path: what the message at the very start of a segment announces, if enough of it is there."""
        _, arrival_ns, flow, sequence, _, _, payload = segment
        size = len(payload)
        if size < _COMPACT_SIZE:
            return self._glance(segment, now_ns)
        magic, command, length, _, header, count, more = _COMPACT.unpack_from(payload)
        if command != _COMPACT_COMMAND or magic != self._magic or not _COMPACT_LEAST <= length <= MAX_PAYLOAD_SIZE:
            return self._glance(segment, now_ns)
        # From here on the same as early(), in one piece: each call of a function costs a tenth of all this.
        block_hash = sha256(sha256(header).digest()).digest()
        if block_hash[::-1] > _target(header[_BITS_OFFSET : _BITS_OFFSET + 4]):
            self.counters.unproven += 1
            return ()
        if not self._is_new(flow, sequence, block_hash):
            return ()
        if count < _COMPACT_U16:
            behind = _COMPACT_SIZE - 2 + count * SHORT_ID_SIZE
        elif count == _COMPACT_U16 <= more <= MAX_BLOCK_TRANSACTIONS:
            count, behind = more, _COMPACT_SIZE + more * SHORT_ID_SIZE
        else:
            behind = 0
        end = min(FRAME_HEADER_SIZE + length, size)
        if behind < end:
            count = _compact_transactions(payload, FRAME_HEADER_SIZE + SHORT_IDS_OFFSET, end)
        elif count:
            count += 1  # the coinbase
        return (
            _make(
                Sighting, (_CAPTURE, self._peer, _CMPCTBLOCK, block_hash, header, arrival_ns or now_ns, count, 0, False)
            ),
        )

    def _glance(self, segment: Segment, now_ns: int) -> Sequence[Sighting]:
        """Any kind of announcement, and any size."""
        _, arrival_ns, flow, sequence, _, _, payload = segment
        size = len(payload)
        if size < FRAME_HEADER_SIZE:
            return ()
        magic, command, length, checksum = FRAME.unpack_from(payload)
        kind = KINDS.get(command)
        if kind is None or magic != self._magic or not kind.least <= length <= kind.most:
            return ()
        seen_ns = arrival_ns or now_ns
        if kind.early:
            return self.early(flow, sequence, kind, length, payload, 0, seen_ns) if size >= EARLY_SIZE else ()
        if size < FRAME_HEADER_SIZE + length:
            return ()
        body = bytes(payload[FRAME_HEADER_SIZE : FRAME_HEADER_SIZE + length])
        return self.whole(flow, sequence, kind, body, checksum, seen_ns)

    def early(
        self, flow: Flow, start: int, kind: Kind, length: int, data: bytes | memoryview, at: int, seen_ns: int
    ) -> Sequence[Sighting]:
        """What a cmpctblock or a block announces whose frame begins at data[at], EARLY_SIZE bytes at least.

        `start`: its first byte's sequence number; `length`: its payload's, which needn't all be in `data`.
        """
        header = bytes(data[at + FRAME_HEADER_SIZE : at + EARLY_SIZE])
        block_hash = sha256(sha256(header).digest()).digest()
        if block_hash[::-1] > _target(header[_BITS_OFFSET : _BITS_OFFSET + 4]):
            self.counters.unproven += 1
            return ()
        if not self._is_new(flow, start, block_hash):
            return ()
        end = min(at + FRAME_HEADER_SIZE + length, len(data))
        if kind.announcement is _CMPCTBLOCK:
            transactions, size = _compact_transactions(data, at + FRAME_HEADER_SIZE + SHORT_IDS_OFFSET, end), 0
        else:
            transactions, size = _count(data, at + EARLY_SIZE, end)[0], length
        return (Sighting(_CAPTURE, self._peer, kind.announcement, block_hash, header, seen_ns, transactions, size),)

    def whole(
        self, flow: Flow, start: int, kind: Kind, payload: bytes, checksum: bytes, seen_ns: int
    ) -> Sequence[Sighting]:
        """What an inv or headers announces, given all of its payload."""
        if sha256(sha256(payload).digest()).digest()[:4] != checksum:
            self.counters.bad_checksum += 1
            return ()
        try:
            event = translate(kind.command, payload)
        except (MalformedError, RemoteProtocolError):
            self.counters.malformed += 1
            return ()
        heard = []
        if isinstance(event, HeadersReceived):
            for at in range(0, len(event.headers), HEADER_SIZE):
                header = event.headers[at : at + HEADER_SIZE]
                block_hash = sha256(sha256(header).digest()).digest()
                if self._is_new(flow, start, block_hash):
                    heard.append(Sighting(Source.CAPTURE, self._peer, kind.announcement, block_hash, header, seen_ns))
        elif isinstance(event, BlocksAnnouncedByInv):
            block_hash = event.hashes[-1]  # as in Core: the peer's tip, one question a message
            if self._is_new(flow, start, block_hash):
                heard.append(Sighting(Source.CAPTURE, self._peer, kind.announcement, block_hash, None, seen_ns))
        return heard

    def _is_new(self, flow: Flow, start: int, block_hash: bytes) -> bool:
        told, key = self._told, (flow, start, block_hash)
        if key in told:
            self.counters.repeated += 1
            return False
        told[key] = None
        if len(told) > MAX_TOLD:
            del told[next(iter(told))]
        self.counters.sightings += 1
        return True


def _count(data: bytes | memoryview, at: int, end: int) -> tuple[int, int]:
    """How many transactions a list at `at` claims, 0 where that isn't there or can't be, and where they begin."""
    if at >= end:
        return 0, end
    try:
        return decode_compact_size(data, at, MAX_BLOCK_TRANSACTIONS)  # type: ignore[arg-type]  # it only reads by index
    except MalformedError:
        return 0, end


def _compact_transactions(data: bytes | memoryview, at: int, end: int) -> int:
    """The transactions of a compact block, by its short ids at `at` and the count of prefilled ones behind them.

    Where the latter isn't there, it is taken for 1, the coinbase (BIP152); 0: unknown.
    """
    short_ids, behind = _count(data, at, end)
    behind += short_ids * SHORT_ID_SIZE
    if behind < end:
        return short_ids + _count(data, behind, end)[0]
    return short_ids + 1 if short_ids else 0
