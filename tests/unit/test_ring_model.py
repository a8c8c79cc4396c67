"""The ring's promises against a model: what is read is whole, in order, and what was lost is counted to the record.

Writer and readers run in one thread, and hypothesis cuts in between any two loads or stores of theirs, deaths included.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sprint.events import Lapped
from sprint.record import SIZE
from sprint.ring import Ring, RingReader, RingWriter, size_for
from tests.unit.rings import HALF, SESSION, content, is_best, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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
