"""The status block: every counter and histogram of a running Sprint in one fixed block of memory.

Relay and deliveries write it, the API reads it, in one process or across several: a reader can't slow a writer. Each
section has exactly one writer. Single counters are aligned 8-byte words, written by one store, and need nothing else.
Rows of several fields that must agree (a block's timeline, a peer's texts) carry a `version` that is odd while the row
is being written: read them with `consistent()`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sprint.histograms import HistogramData
from sprint.record import SIZE as RECORD_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

u8, u16, u32, u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64

MAGIC: Final = int.from_bytes(b"SPRSTAT1", "little")
PEERS: Final = 32
"""More upstreams than one relay should race."""
BLOCKS: Final = 64
"""Blocks whose timeline is kept: over ten hours of main."""
MARKS: Final = 12
"""Sightings kept in one block's timeline; later ones only count."""
REASONS: Final = 16
DELIVERIES: Final = 16
PROCESSES: Final = 20
STEPS: Final = 8
BYPASS_SIZE: Final = 4096
TIERS: Final = 5
FACTS_SIZE: Final = 8192


class _Section(ctypes.LittleEndianStructure):
    _pack_ = 8


class Relay(_Section):
    """Written by whoever runs the relay."""

    _fields_ = (
        ("heartbeat_ns", u64),
        ("caught_up", u64),
        ("tip_height", u64),
        ("headers", u64),
        ("sequence", u64),
        ("sightings", u64),
        ("duplicates", u64),
        ("held", u64),
        ("proven", u64),
        ("validated", u64),
        ("stale", u64),
        ("invalid", u64),
        ("reorgs", u64),
        ("catchup", u64),
        ("last_block_wall_ns", u64),
        ("rejected", u64 * REASONS),
        ("prove_latency", HistogramData),
    )


class Peer(_Section):
    """One upstream, written by the relay's process."""

    _fields_ = (
        ("version", u64),
        ("name", ctypes.c_char * 64),
        ("agent", ctypes.c_char * 64),
        ("last_error", ctypes.c_char * 128),
        ("source", u64),
        ("connected", u64),
        ("high_bandwidth", u64),
        ("height", u64),
        ("connects", u64),
        ("failures", u64),
        ("sightings", u64),
        ("first", u64),
        ("lead_ns", u64),
        ("leads", u64),
        ("behind_ns", u64),
        ("behinds", u64),
        ("rtt_ns", u64),
        ("bytes_received", u64),
        ("skipped_messages", u64),
        ("lost_messages", u64),
        ("silent_ns", u64),
    )


class Mark(_Section):
    """One sighting in a block's timeline."""

    _fields_ = (("peer", u32), ("source", u16), ("announcement", u16), ("seen_ns", u64))


class BlockRow(_Section):
    """One block's timeline, from its first sighting to its deliveries."""

    _fields_ = (
        ("version", u64),
        ("record", u8 * RECORD_SIZE),
        ("state", u64),
        ("first_seen_ns", u64),
        ("proven_ns", u64),
        ("published_ns", u64),
        ("validated_ns", u64),
        ("stale_ns", u64),
        ("sightings", u64),
        ("marks", Mark * MARKS),
    )


class TierAccounts(_Section):
    """What one delivery did for the subscribers of one tier."""

    _fields_ = (
        ("subscribers", u64),
        ("on_time", u64),
        ("late", u64),
        ("dropped", u64),
        ("overwritten", u64),
        ("replayed", u64),
        ("repaired", u64),
        ("lost_notices", u64),
        ("over_target", u64),
        ("buffer_used", u64),
        ("buffer_used_max", u64),
        ("relay_latency", HistogramData),
        ("write_time", HistogramData),
    )


class Delivery(_Section):
    """One delivery's accounts, written by the process that runs it, whose `pid` stands there from when it serves."""

    _fields_ = (
        ("name", ctypes.c_char * 16),
        ("pid", u64),
        ("accepted", u64),
        ("refused", u64),
        ("disconnected", u64),
        ("heartbeats", u64),
        ("bytes_sent", u64),
        ("processing", HistogramData),
        ("tiers", TierAccounts * TIERS),
    )


class Udp(_Section):
    """What the UDP side refused and ended, written by the process that has its socket."""

    _fields_ = (
        ("challenges", u64),
        ("suppressed", u64),
        ("refused", u64),
        ("unknown", u64),
        ("garbage", u64),
        ("full", u64),
        ("lapsed", u64),
        ("unproven", u64),
        ("fanout_turbo", u64),
        ("fanout_enterprise", u64),
        ("rung", ctypes.c_char * 16),
        ("reason", ctypes.c_char * 160),
    )


class Egress(_Section):
    """What the fan-out did, in one system call a record, written by the relay's process."""

    _fields_ = (("active", u64), ("runs", u64), ("attempted", u64), ("sent", u64), ("dropped", u64))


class Process(_Section):
    """One child of the memory-optimised engine, written by the supervisor."""

    _fields_ = (("name", ctypes.c_char * 16), ("pid", u64), ("restarts", u64), ("started_ns", u64))


class Step(_Section):
    """One step of OPTIMIZE_SYSTEM, written by the relay's process."""

    _fields_ = (("name", ctypes.c_char * 16), ("applied", u64), ("detail", ctypes.c_char * 160))


class Bypass(_Section):
    """What the kernel bypass says of itself, as JSON, written by the process that holds it; nothing: there is none."""

    _fields_ = (("version", u64), ("length", u64), ("text", u8 * BYPASS_SIZE))


class Layout(_Section):
    """The whole block."""

    _fields_ = (
        ("magic", u64),
        ("size", u64),
        ("session", u64),
        ("started_wall_ns", u64),
        ("facts_length", u64),
        ("facts", u8 * FACTS_SIZE),
        ("relay", Relay),
        ("peers", Peer * PEERS),
        ("block_count", u64),
        ("blocks", BlockRow * BLOCKS),
        ("deliveries", Delivery * DELIVERIES),
        ("processes", Process * PROCESSES),
        ("steps", Step * STEPS),
        ("bypass", Bypass),
        ("udp", Udp),
        ("egress", Egress),
    )


SIZE: Final = ctypes.sizeof(Layout)

_S = TypeVar("_S", bound=_Section)


class StatusBlock:
    """The status block in some memory; create() lays it out, attach() opens one that stands."""

    def __init__(self, buffer: bytearray | memoryview) -> None:
        self.memory = memoryview(buffer)
        self.layout = Layout.from_buffer(buffer)
        if self.layout.magic != MAGIC or self.layout.size != SIZE:
            raise ValueError(f"no status block of {SIZE} bytes in this memory")

    @classmethod
    def create(cls, session: int, facts: dict[str, Any], buffer: bytearray | memoryview | None = None) -> StatusBlock:
        """Lay out an empty block; `facts` is what doesn't change while Sprint runs (tier, switches, addresses)."""
        memory = bytearray(SIZE) if buffer is None else buffer
        layout = Layout.from_buffer(memory)
        ctypes.memset(ctypes.addressof(layout), 0, SIZE)
        layout.size = SIZE
        layout.session = session
        layout.started_wall_ns = time.time_ns()
        layout.magic = MAGIC
        block = cls(memory)
        block.facts = facts
        return block

    @classmethod
    def attach(cls, buffer: bytearray | memoryview) -> StatusBlock:
        """Open the block that stands in `buffer`. Raises ValueError when there is none of this layout."""
        return cls(buffer)

    @property
    def facts(self) -> dict[str, Any]:
        """What doesn't change while Sprint runs, as given to create()."""
        loaded: dict[str, Any] = json.loads(bytes(self.layout.facts[: self.layout.facts_length]))
        return loaded

    @facts.setter
    def facts(self, facts: dict[str, Any]) -> None:
        encoded = json.dumps(facts, separators=(",", ":")).encode()
        if len(encoded) > FACTS_SIZE:
            raise ValueError(f"facts of {len(encoded)} bytes: at most {FACTS_SIZE} fit")
        ctypes.memmove(self.layout.facts, encoded, len(encoded))
        self.layout.facts_length = len(encoded)

    @property
    def bypass(self) -> dict[str, Any] | None:
        """What the kernel bypass says of itself; None: there is none, or it has said nothing yet."""
        row = consistent(self.layout.bypass)
        if not row.length or row.version & 1:
            return None
        said: dict[str, Any] = json.loads(bytes(row.text[: row.length]))
        return said

    @bypass.setter
    def bypass(self, said: dict[str, Any]) -> None:
        encoded = json.dumps(said, separators=(",", ":")).encode()
        if len(encoded) > BYPASS_SIZE:
            raise ValueError(f"{len(encoded)} bytes of the bypass: at most {BYPASS_SIZE} fit")
        with writing(self.layout.bypass):
            ctypes.memmove(self.layout.bypass.text, encoded, len(encoded))
            self.layout.bypass.length = len(encoded)

    @property
    def relay(self) -> Relay:
        """The relay's counters."""
        section: Relay = self.layout.relay
        return section

    def delivery(self, index: int, name: str) -> Delivery:
        """Take section `index` for the delivery of that name."""
        section: Delivery = self.layout.deliveries[index]
        section.name = name.encode()
        return section

    def deliveries(self) -> list[Delivery]:
        """The sections that some delivery has taken."""
        return [section for section in self.layout.deliveries if section.name]

    def peers(self) -> list[Peer]:
        """A consistent copy of each row in use."""
        return [consistent(row) for row in self.layout.peers if row.name]

    def peer_index(self, name: str) -> int | None:
        """The row of the peer of that name, taken if it is new; None when all rows are taken."""
        encoded = _row_name(name)
        for index, row in enumerate(self.layout.peers):
            if row.name == encoded:
                return index
            if not row.name:
                with writing(row):
                    row.name = encoded
                return index
        return None

    def next_block_row(self) -> BlockRow:
        """The row for one more block: an unused one, else the oldest's, cleared."""
        row: BlockRow = self.layout.blocks[self.layout.block_count % BLOCKS]
        with writing(row):
            behind_version = ctypes.sizeof(u64)
            ctypes.memset(ctypes.addressof(row) + behind_version, 0, ctypes.sizeof(row) - behind_version)
        self.layout.block_count += 1
        return row

    def blocks(self, limit: int = BLOCKS) -> list[BlockRow]:
        """Consistent copies of the newest rows, newest first."""
        count = self.layout.block_count
        newest = range(count - 1, max(-1, count - 1 - min(limit, BLOCKS)), -1)
        return [consistent(self.layout.blocks[number % BLOCKS]) for number in newest]


def _row_name(name: str) -> bytes:
    """At most 63 bytes; a longer name is cut and told from others of the same beginning by its digest."""
    encoded = name.encode()
    if len(encoded) <= 63:
        return encoded
    return encoded[:54] + b"~" + hashlib.sha256(encoded).hexdigest()[:8].encode()


@contextmanager
def writing(row: Peer | BlockRow | Bypass) -> Iterator[None]:
    """Mark a row as being written, so that readers wait or look again."""
    row.version |= 1
    try:
        yield
    finally:
        row.version += 1


def consistent(row: _S) -> _S:
    """A copy of the row in which all fields agree.

    A writer that died in mid-write is waited for no longer than 10 ms; the copy's version is then odd.
    """
    deadline = time.monotonic_ns() + 10_000_000
    while True:
        before = row.version
        copy = type(row).from_buffer_copy(row)
        if before == row.version and not before & 1:
            return copy
        if time.monotonic_ns() > deadline:
            copy.version |= 1
            return copy
        os.sched_yield()  # a sleep fails where the clock is faked
