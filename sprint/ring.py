"""The broadcast ring: one writer that never waits, any number of readers that each own a cursor.

The ring lives in any writable buffer: a bytearray in one process, a memfd between processes. Its shape is Aeron's
broadcast buffer with records of one size. Layout, little-endian, each group on a cache line of its own:

    0    u64 magic, u64 layout, u64 slots, u64 record size, u64 session
    64   u64 tail_intent   the sequence that the writer has begun (or finished) writing
    128  u64 tail          the sequence of the newest complete record; 0: none yet
    136  u64 latest_best   the sequence of the newest complete record whose block was the best tip
    192  slots × 192 bytes; sequence s lies in slot (s - 1) modulo slots

The writer stores tail_intent, then the record, then tail. A reader copies a slot and only then looks at tail_intent: if
that has reached `sequence + slots` the copy may be torn and is thrown away as lapped. A writer that dies in mid-write
leaves tail_intent ahead of tail; its successor takes up that very sequence again and must not lower tail_intent before,
because the slot is already damaged for whoever still wants the record of one round before.

Shared indices are written through `memoryview.cast("Q")`, which is one aligned 8-byte store; struct.pack_into would
store zeros first. The order of those stores is kept by x86's memory model. On machines with a weaker one (arm64) the
ring is sound within one process, where the GIL orders everything, and must not be shared between processes.
"""

from __future__ import annotations

from typing import Final

from sprint.errors import HostError
from sprint.events import Lapped, State
from sprint.record import SIZE, state_of

HEADER_SIZE: Final = 192
MAGIC: Final = int.from_bytes(b"SPRRING1", "little")
LAYOUT: Final = 1

_MAGIC, _LAYOUT, _SLOTS, _RECORD, _SESSION = range(5)
_INTENT: Final = 8
_TAIL: Final = 16
_BEST: Final = 17

MIN_SLOTS: Final = 2
MAX_SLOTS: Final = 1 << 20
"""200 MB of records: more than a week of blocks with every event, and a bound on what a typing error can allocate."""


def size_for(slots: int) -> int:
    """How many bytes a ring of that many slots takes."""
    return HEADER_SIZE + slots * SIZE


class Ring:
    """A view of a ring in memory; create() makes one, attach() opens one that stands."""

    __slots__ = ("_index", "_records", "slots")

    def __init__(self, buffer: memoryview) -> None:
        if len(buffer) < HEADER_SIZE:
            raise HostError(f"no ring in {len(buffer)} bytes: its index alone takes {HEADER_SIZE}")
        index = buffer[:HEADER_SIZE].cast("Q")
        slots = index[_SLOTS]
        if index[_MAGIC] != MAGIC or index[_LAYOUT] != LAYOUT or index[_RECORD] != SIZE:
            raise HostError(f"no ring of layout {LAYOUT} in this memory: it starts with {bytes(buffer[:32]).hex()}")
        if not MIN_SLOTS <= slots <= MAX_SLOTS or len(buffer) < size_for(slots):
            raise HostError(f"a ring of {slots} slots does not fit {len(buffer)} bytes")
        self._index = index
        self._records = buffer[HEADER_SIZE : size_for(slots)]
        self.slots = slots

    @classmethod
    def create(cls, buffer: bytearray | memoryview, slots: int, session: int) -> Ring:
        """Lay out an empty ring in `buffer`. Raises HostError when it doesn't hold size_for(slots) bytes."""
        if not MIN_SLOTS <= slots <= MAX_SLOTS:
            raise ValueError(f"slots {slots}: expected {MIN_SLOTS} to {MAX_SLOTS}")
        view = memoryview(buffer)
        if len(view) < size_for(slots):
            raise HostError(f"a ring of {slots} slots does not fit {len(view)} bytes")
        index = view[:HEADER_SIZE].cast("Q")
        index[_MAGIC] = 0  # whoever attaches meanwhile finds no ring rather than half of one
        for at, value in ((_LAYOUT, LAYOUT), (_SLOTS, slots), (_RECORD, SIZE), (_SESSION, session)):
            index[at] = value
        index[_INTENT] = index[_TAIL] = index[_BEST] = 0
        index[_MAGIC] = MAGIC
        return cls(view)

    @classmethod
    def attach(cls, buffer: bytearray | memoryview) -> Ring:
        """Open the ring that stands in `buffer`. Raises HostError when there is none of this layout."""
        return cls(memoryview(buffer))

    @property
    def session(self) -> int:
        """The number that tells this ring's sequences from those of another ring."""
        return self._index[_SESSION]

    @property
    def tail(self) -> int:
        """The newest complete record's sequence; 0: none yet."""
        return self._index[_TAIL]

    @property
    def latest_best(self) -> int:
        """The newest complete record's sequence among those whose block was the best tip; 0: none yet."""
        return self._index[_BEST]

    @property
    def oldest(self) -> int:
        """The oldest sequence that can still be copied; tail + 1 when there is none."""
        return max(1, self._index[_INTENT] - self.slots + 1)

    def copy(self, sequence: int) -> bytes | None:
        """The record of that sequence; None when it isn't written yet or no longer there."""
        index = self._index
        if not 0 < sequence <= index[_TAIL]:
            return None
        at = (sequence - 1) % self.slots * SIZE
        record = bytes(self._records[at : at + SIZE])
        if index[_INTENT] - sequence >= self.slots:
            return None
        return record


class RingWriter:
    """The only writer of a ring: claim() a slot, fill it, commit(). Both halves are one store and no lock."""

    __slots__ = ("_index", "_records", "_slots", "ring")

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self._index = ring._index  # noqa: SLF001 - the writer is the other half of Ring
        self._records = ring._records  # noqa: SLF001
        self._slots = ring.slots
        newest = ring.copy(ring.tail)
        if newest is not None and state_of(newest) & State.BEST:  # a predecessor died between its last two stores
            self._index[_BEST] = ring.tail

    @property
    def next_sequence(self) -> int:
        """The sequence that the next claim() takes; after a writer's death in mid-write, the one it left unfinished."""
        return self._index[_TAIL] + 1

    def claim(self) -> memoryview:
        """The slot of next_sequence, 192 writable bytes. From now on the record of one round before is gone."""
        index = self._index
        sequence = index[_TAIL] + 1
        index[_INTENT] = sequence
        at = (sequence - 1) % self._slots * SIZE
        return self._records[at : at + SIZE]

    def commit(self, *, best: bool) -> int:
        """Make the claimed record visible, and return its sequence."""
        index = self._index
        sequence = index[_INTENT]
        index[_TAIL] = sequence
        if best:
            index[_BEST] = sequence
        return sequence


class RingReader:
    """A cursor of its own over a ring. Reading costs the writer nothing, and a slow reader delays nobody."""

    __slots__ = ("cursor", "ring")

    def __init__(self, ring: Ring, since: int | None = None) -> None:
        """Start with the next record to be written, or with sequence `since`.

        That may be gone (see read); one that isn't written yet means the next, so that nothing passes unaccounted.
        """
        self.ring = ring
        following = ring.tail + 1
        self.cursor = following if since is None else min(max(1, since), following)

    @property
    def behind(self) -> int:
        """How many complete records wait for this reader, lost ones included."""
        return max(0, self.ring.tail - self.cursor + 1)

    def read(self) -> bytes | Lapped | None:
        """The next record; Lapped when the writer overtook the cursor (which then stands at the oldest); or None."""
        ring = self.ring
        first = self.cursor
        if first > ring.tail:
            return None
        record = ring.copy(first)
        if record is not None:
            self.cursor = first + 1
            return record
        self.cursor = ring.oldest
        return Lapped(first, self.cursor - first)

    def skip_to_newest(self) -> Lapped | None:
        """Leave everything but the newest record, as the top tiers do; None when nothing is skipped."""
        first, newest = self.cursor, self.ring.tail
        if first >= newest:
            return None
        self.cursor = newest
        return Lapped(first, newest - first)
