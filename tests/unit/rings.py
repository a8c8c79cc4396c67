"""Records for tests of the ring: what one holds is a function of its sequence; a torn or misplaced one shows."""

from __future__ import annotations

import hashlib

from sprint.events import Lapped, State
from sprint.record import SIZE, STATE_OFFSET
from sprint.ring import Ring, RingReader, RingWriter, size_for

SESSION = 0xFEED_0000_BEEF_0001
HALF = SIZE // 2


def is_best(sequence: int) -> bool:
    return sequence % 3 == 1


def content(sequence: int) -> bytes:
    """192 bytes that only this sequence has, each 32 of them: a mixture of two records is neither."""
    record = bytearray(hashlib.sha256(sequence.to_bytes(8, "little")).digest() * (SIZE // 32))
    record[STATE_OFFSET : STATE_OFFSET + 2] = (State.BEST if is_best(sequence) else 0).to_bytes(2, "little")
    return bytes(record)


def new_ring(slots: int) -> Ring:
    return Ring.create(bytearray(size_for(slots)), slots, SESSION)


def write(writer: RingWriter, count: int = 1) -> None:
    for _ in range(count):
        sequence = writer.next_sequence
        writer.claim()[:] = content(sequence)
        assert writer.commit(best=is_best(sequence)) == sequence


def drain(reader: RingReader) -> list[int | Lapped]:
    """Everything there is to read: the sequence of each record, once its content is found right, and each loss."""
    outcomes: list[int | Lapped] = []
    while (read := reader.read()) is not None:
        if isinstance(read, bytes):
            assert read == content(reader.cursor - 1)
            outcomes.append(reader.cursor - 1)
        else:
            assert read.lost > 0
            outcomes.append(read)
    return outcomes
