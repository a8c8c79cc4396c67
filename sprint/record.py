"""The record: all that Sprint says about one event in a block's life, in 192 little-endian bytes.

Ring slot, stream frame body, UDP payload and what a local reader maps are the same bytes (docs/wire-format.md lists the
offsets). A record is immutable: what changes about a block is a new record with a new sequence. Hashes are in wire
order inside the record and in display order (reversed) in its JSON form.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from sprint.errors import RemoteProtocolError
from sprint.events import Event, Source, State

LAYOUT = struct.Struct("<4s4sQQBBHIIIIIIIQ32s80sQQ")
SIZE = LAYOUT.size
MAGIC = b"SPR1"

SEQUENCE_OFFSET = 16
STATE_OFFSET = 26
_SEQUENCE = struct.Struct("<Q")
_STATE = struct.Struct("<H")


@dataclass(frozen=True, slots=True)
class Record:
    """A record's fields by name; see docs/wire-format.md for each."""

    network: bytes
    """4 bytes: the network's message start."""
    session: int
    sequence: int
    event: Event
    source: Source
    state: State
    height: int
    fork_height: int
    next_bits: int
    median_time_past: int
    transactions: int
    size: int
    wall_ns: int
    hash: bytes
    header: bytes
    seen_ns: int
    published_ns: int

    @property
    def previous_hash(self) -> bytes:
        """The parent's hash, 32 bytes, wire order."""
        return self.header[4:36]

    def encode(self) -> bytes:
        """The record's 192 bytes."""
        return LAYOUT.pack(
            MAGIC,
            self.network,
            self.session,
            self.sequence,
            self.event,
            self.source,
            self.state,
            self.height,
            self.fork_height,
            self.next_bits,
            self.median_time_past,
            self.transactions,
            self.size,
            0,
            self.wall_ns,
            self.hash,
            self.header,
            self.seen_ns,
            self.published_ns,
        )

    def as_dict(self) -> dict[str, Any]:
        """The JSON form of the stream and the API: hashes in display order, state as a list of lower-case names."""
        return {
            "seq": self.sequence,
            "event": self.event.name.lower(),
            "hash": self.hash[::-1].hex(),
            "prev": self.previous_hash[::-1].hex(),
            "height": self.height,
            "header": self.header.hex(),
            "state": state_names(self.state),
            "source": self.source.name.lower(),
            "time": self.wall_ns / 1_000_000_000,
            "seen_ns": self.seen_ns,
            "published_ns": self.published_ns,
            "transactions": self.transactions,
            "size": self.size,
            "next_bits": f"{self.next_bits:08x}" if self.next_bits else None,
            "median_time_past": self.median_time_past,
            "fork_height": self.fork_height if self.state & State.REORG else None,
            "session": f"{self.session:016x}",
        }


def state_names(state: State) -> list[str]:
    """The set bits' names in order: `["proven", "best"]`."""
    return [str(bit.name).lower() for bit in State if bit in state]


def decode(data: bytes | bytearray | memoryview) -> Record:
    """The record in the first 192 bytes of `data`.

    Raises RemoteProtocolError when they are fewer, or hold another magic, an event or a source that doesn't exist,
    or state bits of a later format.
    """
    if len(data) < SIZE:
        raise RemoteProtocolError(f"record of {len(data)} bytes: expected {SIZE}")
    fields = LAYOUT.unpack_from(data)
    magic, network, session, sequence, event, source, state = fields[:7]
    if magic != MAGIC:
        raise RemoteProtocolError(f"record magic {magic!r}: expected {MAGIC!r}")
    if fields[13]:
        raise RemoteProtocolError(f"record offset 52 holds {fields[13]}: expected 0")
    try:
        return Record(
            network,
            session,
            sequence,
            Event(event),
            Source(source),
            _state(state),
            *fields[7:13],
            *fields[14:],
        )
    except ValueError as error:
        raise RemoteProtocolError(f"record {sequence}: {error}") from None


_KNOWN_STATE = sum(State)


def _state(bits: int) -> State:
    if bits & ~_KNOWN_STATE:
        raise ValueError(f"state {bits:#06x} has unknown bits")
    return State(bits)


def sequence_of(data: bytes | bytearray | memoryview) -> int:
    """The sequence of an encoded record, without decoding the rest."""
    return int(_SEQUENCE.unpack_from(data, SEQUENCE_OFFSET)[0])


def state_of(data: bytes | bytearray | memoryview) -> int:
    """The state bits of an encoded record, without decoding the rest."""
    return int(_STATE.unpack_from(data, STATE_OFFSET)[0])
