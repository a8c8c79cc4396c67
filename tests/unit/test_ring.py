"""The ring in one thread, and memory that holds none. Its model is in test_ring_model, races in test_ring_processes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprint.errors import HostError
from sprint.events import Lapped
from sprint.record import SIZE
from sprint.ring import HEADER_SIZE, LAYOUT, MAGIC, MAX_SLOTS, MIN_SLOTS, Ring, RingReader, RingWriter, size_for
from tests.unit.rings import HALF, SESSION, content, drain, new_ring, write


@pytest.mark.parametrize("slots", [2, 3, 512, 1280, 1536])
def test_a_ring_of_any_size_holds_its_newest_records_over_several_rounds(slots: int) -> None:
    ring = new_ring(slots)
    writer, reader = RingWriter(ring), RingReader(ring)
    written = 0
    for step in (slots - 1, 1, 1, slots, slots // 2):
        write(writer, step)
        assert drain(reader) == list(range(written + 1, written + step + 1))
        written += step
        oldest = max(1, written - slots + 1)
        assert ring.oldest == oldest
        assert drain(RingReader(ring, 1)) == [
            *([Lapped(1, oldest - 1)] if oldest > 1 else []),
            *range(oldest, written + 1),
        ]


def test_an_empty_ring_has_nothing_and_a_reader_of_it_waits() -> None:
    ring = new_ring(3)
    assert (ring.tail, ring.latest_best, ring.oldest) == (0, 0, 1)
    assert [ring.copy(sequence) for sequence in (-1, 0, 1)] == [None, None, None]
    for reader in (RingReader(ring), RingReader(ring, 0), RingReader(ring, 1)):
        assert (reader.read(), reader.skip_to_newest(), reader.behind) == (None, None, 0)


def test_a_reader_from_a_sequence_that_is_not_written_yet_misses_nothing_in_between() -> None:
    ring = new_ring(4)
    writer = RingWriter(ring)
    write(writer, 2)
    reader = RingReader(ring, 1_000)
    write(writer)
    assert drain(reader) == [3]


def test_what_a_writer_left_half_written_is_never_read_and_its_old_record_is_counted_as_lost() -> None:
    ring = new_ring(3)
    writer = RingWriter(ring)
    write(writer, 3)
    reader = RingReader(ring, 1)
    writer.claim()[:HALF] = content(4)[:HALF]
    successor = RingWriter(ring)
    assert drain(reader) == [Lapped(1, 1), 2, 3]
    write(successor)
    assert drain(reader) == [4]


@given(st.binary(max_size=2 * HEADER_SIZE))
def test_garbage_is_no_ring(garbage: bytes) -> None:
    with pytest.raises(HostError):
        Ring.attach(bytearray(garbage))


@pytest.mark.parametrize("length", [0, 1, 8, 64, HEADER_SIZE - 1, HEADER_SIZE, size_for(5) - 1])
def test_memory_that_is_too_small_is_refused_and_left_alone(length: int) -> None:
    memory = bytearray(b"\xa5" * length)
    with pytest.raises(HostError, match=f"{length} bytes"):
        Ring.create(memory, 5, SESSION)
    assert memory == b"\xa5" * length


@pytest.mark.parametrize("length", [0, 7, 8, HEADER_SIZE - 1, HEADER_SIZE, size_for(5) - 1])
def test_a_ring_that_was_cut_short_is_refused(length: int) -> None:
    memory = bytearray(size_for(5))
    Ring.create(memory, 5, SESSION)
    with pytest.raises(HostError, match=f"{length} bytes"):
        Ring.attach(memory[:length])


@pytest.mark.parametrize(
    ("word", "value", "complaint"),
    [
        (0, MAGIC + 1, "no ring of layout"),
        (1, LAYOUT + 1, "no ring of layout"),
        (3, SIZE - 1, "no ring of layout"),
        (2, 0, "0 slots"),
        (2, 1, "1 slots"),
        (2, 6, "6 slots"),
        (2, MAX_SLOTS + 1, "slots does not fit"),
        (2, 2**64 - 1, "slots does not fit"),
    ],
)
def test_a_ring_of_another_layout_is_refused(word: int, value: int, complaint: str) -> None:
    memory = bytearray(size_for(5))
    Ring.create(memory, 5, SESSION)
    memoryview(memory)[:HEADER_SIZE].cast("Q")[word] = value
    with pytest.raises(HostError, match=complaint):
        Ring.attach(memory)


@pytest.mark.parametrize("slots", [-1, 0, MIN_SLOTS - 1, MAX_SLOTS + 1])
def test_a_ring_of_too_few_or_too_many_slots_is_not_made(slots: int) -> None:
    with pytest.raises(ValueError, match=f"slots {slots}"):
        Ring.create(bytearray(4096), slots, SESSION)


def test_a_ring_laid_out_over_an_old_one_is_empty() -> None:
    memory = bytearray(size_for(3))
    write(RingWriter(Ring.create(memory, 3, SESSION)), 5)
    ring = Ring.create(memory, 3, SESSION + 1)
    assert (ring.session, ring.tail, ring.latest_best, ring.oldest, ring.copy(5)) == (SESSION + 1, 0, 0, 1, None)


def test_a_read_only_view_is_enough_for_a_reader() -> None:
    memory = bytearray(size_for(3))
    write(RingWriter(Ring.create(memory, 3, SESSION)), 2)
    assert drain(RingReader(Ring.attach(memoryview(memory).toreadonly()), 1)) == [1, 2]
