"""The ring's promises: what is read is whole, in order, and what was lost is counted to the record.

Two ways lead there. A model (hypothesis) runs writer and readers in one thread and cuts in between any two loads or
stores of theirs, deaths included. Real processes then race over shared memory, flat out.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import multiprocessing
import os
import platform
import signal
import time
import warnings
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sprint.errors import HostError
from sprint.events import Lapped, State
from sprint.record import SIZE, STATE_OFFSET
from sprint.ring import HEADER_SIZE, LAYOUT, MAGIC, MAX_SLOTS, MIN_SLOTS, Ring, RingReader, RingWriter, size_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

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


# One thread: the model


class KilledError(Exception):
    """The writer is dead, right behind one of its stores."""


class Index:
    """A ring's index in which something happens before each load and behind each store."""

    def __init__(
        self, words: memoryview, before_load: Callable[[], None] | None, after_store: Callable[[], None] | None
    ) -> None:
        self._words = words
        self._before_load = before_load
        self._after_store = after_store

    def __getitem__(self, at: int) -> int:
        if self._before_load:
            self._before_load()
        return int(self._words[at])

    def __setitem__(self, at: int, value: int) -> None:
        self._words[at] = value
        if self._after_store:
            self._after_store()


class Records:
    """A ring's records, where something happens between one half of a copy and the other."""

    def __init__(self, records: memoryview, meanwhile: Callable[[], None]) -> None:
        self._records = records
        self._meanwhile = meanwhile

    def __getitem__(self, where: slice) -> bytes:
        slot = self._records[where]
        first = bytes(slot[:HALF])
        self._meanwhile()
        return first + bytes(slot[HALF:])


class RingMachine(RuleBasedStateMachine):
    """One writer after another, of which any may die behind any store, and readers that come when they like."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = bytearray(0)
        self.tail = 0
        self.intent = 0
        self.slot: memoryview | None = None
        self.readers: list[RingReader] = []
        self.expected: list[int] = []

    @initialize(slots=st.sampled_from([2, 3, 4, 5, 7]))
    def lay_out(self, slots: int) -> None:
        self.buffer = bytearray(size_for(slots))
        self.ring = Ring.create(self.buffer, slots, SESSION)
        self.writer = RingWriter(self.ring)

    # The writer, store by store

    @rule()
    def claim(self) -> None:
        self.slot = self.writer.claim()
        self.intent = self.tail + 1

    @precondition(lambda self: self.slot is not None)
    @rule(bounds=st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted))
    def write_part(self, bounds: list[int]) -> None:
        assert self.slot is not None
        part = slice(*bounds)
        self.slot[part] = content(self.intent)[part]

    @precondition(lambda self: self.slot is not None)
    @rule()
    def commit(self) -> None:
        assert self.slot is not None
        self.slot[:] = content(self.intent)
        assert self.writer.commit(best=is_best(self.intent)) == self.intent
        self.tail, self.slot = self.intent, None

    @rule(count=st.integers(1, 12))
    def write_whole(self, count: int) -> None:
        write(self.writer, count)
        self.tail += count
        self.intent, self.slot = self.tail, None

    # The writer's end, and the next one

    def succeed(self) -> None:
        self.writer = RingWriter(Ring.attach(self.buffer))
        self.slot = None
        assert self.writer.next_sequence == self.tail + 1

    @rule()
    def die(self) -> None:
        """Wherever it is: nothing claimed, claimed, or part of the slot written."""
        self.succeed()

    @precondition(lambda self: self.slot is not None)
    @rule(stores=st.integers(1, 2), look=st.booleans())
    def die_in_commit(self, stores: int, look: bool) -> None:
        """Right behind the first or second of commit's own stores, in whatever order commit makes them."""
        assert self.slot is not None
        self.slot[:] = content(self.intent)
        left = stores

        def store_made() -> None:
            nonlocal left
            left -= 1
            if not left:
                raise KilledError

        cast("Any", self.writer)._index = Index(self.ring._index, None, store_made)
        with contextlib.suppress(KilledError):
            self.writer.commit(best=is_best(self.intent))
        self.tail = self.intent
        assert self.ring.tail == self.tail
        assert self.ring.latest_best <= self.ring.tail
        if look:
            self.read_all()
        self.succeed()

    # Readers

    @precondition(lambda self: len(self.readers) < 6)
    @rule(since=st.none() | st.integers(0, 60))
    def join(self, since: int | None) -> None:
        reader = RingReader(self.ring, since)
        following = self.tail + 1
        assert reader.cursor == (following if since is None else min(max(1, since), following))
        self.readers.append(reader)
        self.expected.append(reader.cursor)

    def read_one(self, number: int) -> bool:
        """Read, and hold the outcome against the model; whether there was anything."""
        reader, cursor = self.readers[number], self.expected[number]
        oldest = max(1, self.intent - self.ring.slots + 1)
        assert reader.behind == self.tail + 1 - cursor
        outcome = reader.read()
        if cursor > self.tail:
            assert outcome is None
        elif cursor < oldest:
            assert outcome == Lapped(cursor, oldest - cursor)
            self.expected[number] = oldest
        else:
            assert outcome == content(cursor)
            self.expected[number] = cursor + 1
        assert reader.cursor == self.expected[number]
        return outcome is not None

    @precondition(lambda self: self.readers)
    @rule(which=st.integers(0, 5), count=st.integers(1, 4))
    def read(self, which: int, count: int) -> None:
        for _ in range(count):
            self.read_one(which % len(self.readers))

    @rule()
    def read_all(self) -> None:
        for number in range(len(self.readers)):
            while self.read_one(number):
                pass

    @precondition(lambda self: self.readers)
    @rule(which=st.integers(0, 5))
    def skip(self, which: int) -> None:
        number = which % len(self.readers)
        cursor = self.expected[number]
        skipped = self.readers[number].skip_to_newest()
        if cursor >= self.tail:
            assert skipped is None
        else:
            assert skipped == Lapped(cursor, self.tail - cursor)
            self.expected[number] = self.tail
        assert self.readers[number].cursor == self.expected[number]

    @precondition(lambda self: self.readers)
    @rule(which=st.integers(0, 5), steps=st.lists(st.integers(0, 9), min_size=1, max_size=8))
    def read_while_the_writer_goes_on(self, which: int, steps: list[int]) -> None:
        """Before each load of the reader, and in the middle of its copy, the writer makes so many steps."""
        number = which % len(self.readers)
        reader, cursor = self.readers[number], self.expected[number]
        tail_before, oldest_before = self.tail, self.ring.oldest
        waiting = iter(steps)
        writing = self.writing()

        def meanwhile() -> None:
            for _ in range(next(waiting, 0)):
                next(writing)

        watched = cast("Any", Ring.attach(self.buffer))
        watched._index = Index(watched._index, meanwhile, None)
        watched._records = Records(watched._records, meanwhile)
        reader.ring = watched
        outcome = reader.read()
        reader.ring = self.ring
        if outcome is None:
            assert cursor > tail_before
        elif isinstance(outcome, Lapped):
            assert outcome.first == cursor
            assert oldest_before <= reader.cursor <= self.ring.oldest
            assert reader.cursor == cursor + outcome.lost > cursor
        else:
            assert outcome == content(cursor)
            assert reader.cursor == cursor + 1
        self.expected[number] = reader.cursor

    def writing(self) -> Iterator[None]:
        """The writer's way, a store at a time; a slot counts as two."""
        while True:
            if self.slot is None:
                self.claim()
                yield
            assert self.slot is not None
            self.slot[:HALF] = content(self.intent)[:HALF]
            yield
            self.commit()
            yield

    @rule(sequence=st.integers(-1, 80))
    def copy(self, sequence: int) -> None:
        there = max(1, self.intent - self.ring.slots + 1) <= sequence <= self.tail
        assert self.ring.copy(sequence) == (content(sequence) if there else None)

    @invariant()
    def the_indices_are_right(self) -> None:
        if not self.buffer:
            return
        best = next((each for each in range(self.tail, 0, -1) if is_best(each)), 0)
        assert (self.ring.tail, self.ring.latest_best) == (self.tail, best)
        assert self.ring.oldest == max(1, self.intent - self.ring.slots + 1)
        assert self.ring.session == SESSION


RingMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRing = RingMachine.TestCase


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


# Memory that holds no ring


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


# Processes that race over shared memory

RECORDS = 200_000
HANDOVER = 60_000
TIME_LIMIT_S = 30


def _write_flat_out(ring: Ring) -> None:
    writer = RingWriter(ring)
    claim, commit = writer.claim, writer.commit
    for sequence in range(writer.next_sequence, RECORDS + 1):
        record = content(sequence)
        slot = claim()
        # In pieces, as struct.pack_into does: a reader has every chance to see half a record.
        slot[:64], slot[64:] = record[:64], record[64:]
        commit(best=is_best(sequence))


def _read_to_the_end(ring: Ring, *, dawdle: bool) -> dict[str, int]:
    """Count what is read, torn and lost; a dawdling reader comes back only when it has been lapped."""
    reader = RingReader(ring, 1)
    counts = dict.fromkeys(("read", "torn", "lost", "laps", "misplaced"), 0)
    deadline = time.monotonic() + TIME_LIMIT_S
    following = 1
    while following <= RECORDS and time.monotonic() < deadline:
        if dawdle and counts["laps"] < 50:
            goal = min(RECORDS, following + ring.slots)
            while ring.tail < goal and time.monotonic() < deadline:
                pass
        # Right after a lap the writer is at the reader's heels: where a torn copy would come from.
        for _ in range(ring.slots):
            outcome = reader.read()
            if outcome is None:
                break
            if isinstance(outcome, Lapped):
                counts["misplaced"] += outcome.first != following or outcome.lost < 1
                counts["lost"] += outcome.lost
                counts["laps"] += 1
                following += outcome.lost
            else:
                counts["torn"] += outcome != content(following)
                counts["read"] += 1
                following += 1
            counts["misplaced"] += reader.cursor != following
            if ring.latest_best > ring.tail:  # tail is read later, and only grows
                counts["misplaced"] += 1
    return counts


def _in_a_process(target: Callable[..., object], *arguments: object) -> tuple[Any, Connection]:
    """Fork, and let the child send what `target` returns."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def child() -> None:
        sending.send(target(*arguments))

    process = context.Process(target=child, daemon=True)
    with warnings.catch_warnings():
        # Python 3.12 warns of threads that other tests may have left; the child touches nothing of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sending.close()
    return process, receiving


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"),
    reason=f"the order of stores that the ring relies on between processes is x86's; this is {platform.machine()}",
)
@pytest.mark.parametrize("slots", [16, 1536])
def test_between_processes_nothing_is_torn_and_every_loss_is_counted_even_when_a_writer_is_killed(slots: int) -> None:
    memory = mmap.mmap(-1, size_for(slots))
    ring = Ring.create(memoryview(memory), slots, SESSION)
    keen, from_keen = _in_a_process(lambda: _read_to_the_end(ring, dawdle=False))
    first, _ = _in_a_process(_write_flat_out, ring)
    processes = [keen, first]
    try:
        deadline = time.monotonic() + TIME_LIMIT_S
        while ring.tail < HANDOVER and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(first.pid, signal.SIGKILL)  # wherever it is
        first.join()
        left_at = ring.tail
        assert HANDOVER <= left_at < RECORDS
        second, _ = _in_a_process(_write_flat_out, ring)
        processes.append(second)
        lapped = _read_to_the_end(ring, dawdle=True)
        assert from_keen.poll(TIME_LIMIT_S), "the keen reader did not come to the end"
        for counts in (from_keen.recv(), lapped):
            assert (counts["torn"], counts["misplaced"]) == (0, 0)
            assert counts["read"] + counts["lost"] == RECORDS
            assert counts["read"] > 0
        assert lapped["laps"] > 0
        assert ring.tail == RECORDS
        assert ring.latest_best == max(each for each in range(RECORDS - 3, RECORDS + 1) if is_best(each))
    finally:
        for process in processes:
            process.kill()
            process.join()
