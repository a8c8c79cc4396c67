"""The reader in shared memory over the real ring: nothing torn, everything in order, every loss told to the record."""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import time
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprint.errors import HostError
from sprint.events import Lapped, State
from sprint.record import SIZE, STATE_OFFSET, Record
from sprint.ring import RingWriter
from sprint.shared_reader import SharedReader
from tests.unit.shm_host import PATIENCE_S, SESSION, Host, ended, fork, record_of, serving, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sprint.ring import Ring

RECORDS = int(os.environ.get("SPRINT_TEST_RECORDS", "2_000_000"))
"""How many the processes below exchange. Ten million take some two minutes on two cores: too long for every run."""
IN_STEP = 1024
"""How far the writer may be ahead of the reader that must not be lapped; the ring holds twice as many."""
HALF = SIZE // 2

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"),
    reason=f"the order of stores that the ring relies on between processes is x86's; this is {platform.machine()}",
)


def content(sequence: int) -> bytes:
    """192 bytes of which each 8 are this sequence's own: a mixture of two records is neither."""
    return sequence.to_bytes(8, "little") * (SIZE // 8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shm.sock"


@pytest.fixture(params=[False, True], ids=["sleeping", "spinning"])
def spin(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def read_all(reader: SharedReader) -> list[int | Lapped]:
    """Everything there is: the sequence of each record, once its copy is found right, and each loss."""
    outcomes: list[int | Lapped] = []
    while (found := reader.read()) is not None:
        if isinstance(found, Lapped):
            outcomes.append(found)
        else:
            record = reader.copy()
            assert record is not None
            assert int.from_bytes(record[64:96], "little") == reader.sequence
            outcomes.append(reader.sequence)
    return outcomes


# One reader and its rules


def test_a_reader_begins_with_the_next_record_or_where_it_is_told_to(path: Path) -> None:
    with serving(path, slots=8) as host:
        host.put(5)
        with SharedReader(path, key="turbo") as fresh, SharedReader(path, key="enterprise", since=4) as late:
            assert (fresh.tier, fresh.network, fresh.session) == ("turbo", "regtest", SESSION)
            assert (late.tier, late.sequence, late.connected) == ("enterprise", 0, True)
            assert read_all(fresh) == []
            assert read_all(late) == [4, 5]
            host.put()
            assert read_all(fresh) == read_all(late) == [6]


@pytest.mark.parametrize(
    ("since", "told"),
    [
        (1, [Lapped(1, 12), *range(13, 21)]),
        (12, [Lapped(12, 1), *range(13, 21)]),
        (13, [*range(13, 21)]),
        (20, [20]),
        (21, []),
        (10**18, []),
        (0, [Lapped(1, 12), *range(13, 21)]),
    ],
)
def test_what_was_gone_before_the_reader_came_is_told_and_the_rest_is_read(
    path: Path, since: int, told: list[int | Lapped]
) -> None:
    with serving(path, slots=8) as host:
        host.put(20)
        with SharedReader(path, key="turbo", since=since) as reader:
            assert read_all(reader) == told
            assert reader.lost == sum(each.lost for each in told if isinstance(each, Lapped))
            host.put()
            assert read_all(reader) == [21]


def test_a_record_is_shown_where_it_lies_and_cannot_be_written_there(path: Path) -> None:
    with serving(path, slots=8) as host, SharedReader(path, key="turbo") as reader:
        host.put()
        view = reader.read()
        assert isinstance(view, memoryview)
        assert (view.readonly, view.nbytes) == (True, SIZE)
        with pytest.raises(TypeError):
            view[0] = 0
        assert reader.validate()
        assert reader.copy() == bytes(view) == host.ring.copy(1)
        host.put(8)  # the slot is written again
        assert bytes(view) == host.ring.copy(9)
        assert not reader.validate()


def test_a_view_that_was_overtaken_while_it_was_looked_at_counts_as_lost_and_only_once(path: Path) -> None:
    with serving(path, slots=4) as host, SharedReader(path, key="turbo") as reader:
        host.put(2)
        assert isinstance(reader.read(), memoryview)
        host.put(3)
        assert reader.copy() is None
        assert reader.copy() is None
        assert not reader.validate()
        assert reader.lost == 0
        assert read_all(reader) == [Lapped(1, 4), 5]
        assert reader.validate()
        assert reader.lost == 4
        host.put(4)
        assert not reader.validate()
        assert read_all(reader) == [Lapped(5, 4), 9]
        assert reader.lost == 8


def test_a_claimed_slot_is_already_lost_to_whoever_looks_at_it(path: Path) -> None:
    with serving(path, slots=4) as host, SharedReader(path, key="turbo") as reader:
        host.put(4)
        assert isinstance(reader.read(), memoryview)
        assert reader.validate()
        host.writer.claim()[:HALF] = bytes(HALF)
        assert reader.copy() is None
        assert read_all(reader) == [Lapped(1, 3), 4]


def test_nothing_was_shown_before_the_first_record(path: Path) -> None:
    with serving(path) as host, SharedReader(path, key="turbo") as reader:
        assert reader.copy() is None
        assert not reader.validate()
        assert read_all(reader) == []
        host.put()
        assert read_all(reader) == [1]


@pytest.mark.parametrize(
    ("bests", "told"),
    [
        ({20}, [Lapped(2, 18), 20]),
        ({18}, [Lapped(2, 16), 18, Lapped(19, 1), 20]),
        ({15, 19}, [Lapped(2, 17), 19, 20]),
        ({17}, [Lapped(2, 15), 17, Lapped(18, 2), 20]),
        ({16}, [Lapped(2, 18), 20]),
        (set(), [Lapped(2, 18), 20]),
    ],
)
def test_a_lapped_reader_goes_on_with_the_newest_best_tip_and_the_newest_record(
    path: Path, bests: set[int], told: list[int | Lapped]
) -> None:
    with serving(path, slots=4) as host, SharedReader(path, key="turbo") as reader:
        host.put()
        assert read_all(reader) == [1]
        for sequence in range(2, 21):
            host.put(best=sequence in bests)
        assert read_all(reader) == told
        host.put(2)
        assert read_all(reader) == [21, 22]
        assert reader.lost == sum(each.lost for each in told if isinstance(each, Lapped))


def test_a_best_tip_that_is_overtaken_before_it_is_read_gives_way_to_the_next(path: Path) -> None:
    with serving(path, slots=4) as host, SharedReader(path, key="turbo", since=1) as reader:
        host.put(7)
        host.put(2, best=False)
        assert reader.read() == Lapped(1, 6)
        host.put(10, best=False)
        assert read_all(reader) == [Lapped(7, 12), 19]


class Model:
    """Every sequence once, in order: shown whole, or told as lost."""

    def __init__(self, host: Host, reader: SharedReader) -> None:
        self.host, self.reader = host, reader
        self.following = host.ring.tail + 1
        self.lost = 0

    def read(self) -> None:
        tail = self.host.ring.tail
        found = self.reader.read()
        if found is None:
            assert self.following == tail + 1
        elif isinstance(found, Lapped):
            assert found.first == self.following
            assert found.lost > 0
            self.following += found.lost
            self.lost += found.lost
            assert self.following <= tail
        else:
            assert self.reader.sequence == self.following

    def settle(self, writes: int, best: bool) -> None:
        """Look at the record shown last, after so many more were written."""
        shown, before = self.reader.sequence, self.reader.lost
        if writes:
            self.host.put(writes, best=best)
        record = self.reader.copy()
        if record is not None:
            assert record == self.host.ring.copy(shown)
            self.following = shown + 1
        assert self.reader.lost == before == self.lost


@settings(deadline=None, max_examples=120)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["write", "read"]), st.integers(0, 9), st.booleans()), min_size=1, max_size=60
    )
)
def test_every_record_is_either_shown_whole_or_told_as_lost_whatever_the_writer_does(
    steps: list[tuple[str, int, bool]], shared_host: Host
) -> None:
    with SharedReader(shared_host.path, key="turbo") as reader:
        model = Model(shared_host, reader)
        for step, count, best in steps:
            if step == "write" and count:
                shared_host.put(count, best=best)
            elif step == "read":
                following = model.following
                model.read()
                if reader.sequence == following:
                    model.settle(count // 2, best)
        for _ in range(20):
            following = model.following
            model.read()
            if reader.sequence == following:
                model.settle(0, best=False)
        assert model.following == shared_host.ring.tail + 1
        assert reader.lost == model.lost


@pytest.fixture(scope="module")
def shared_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with serving(tmp_path_factory.mktemp("shm") / "shm.sock", slots=5) as host:
        yield host


# Waiting and iterating


def test_next_waits_for_a_record_and_no_longer_than_asked(path: Path, spin: bool) -> None:
    with serving(path) as host, SharedReader(path, key="turbo", spin=spin) as reader:
        began = time.monotonic()
        assert reader.next(0.05) is None
        assert time.monotonic() - began >= 0.05
        assert reader.next(0) is None

        def put_after_a_while() -> None:
            time.sleep(0.1)
            host.put()

        writer = fork(put_after_a_while)
        assert isinstance(reader.next(), memoryview)
        assert reader.sequence == 1
        assert ended(writer) == 0
        host.put(2)
        assert isinstance(reader.next(0), memoryview)
        assert isinstance(reader.next(), memoryview)
        assert reader.next(0) is None


def test_no_record_is_slept_through_however_they_come(path: Path, spin: bool) -> None:
    """Each is put while the reader is about to sleep; one missed wake-up call would be a wait for ever."""
    with serving(path) as host, SharedReader(path, key="turbo", spin=spin) as reader:

        def life() -> None:
            pause = random.Random(1)
            for sequence in range(1, 2001):
                until(lambda: host.status.relay.sequence == host.ring.tail)
                for _ in range(pause.randrange(300)):
                    pass
                assert host.put() == sequence

        writer = fork(life)
        for sequence in range(1, 2001):
            assert isinstance(reader.next(PATIENCE_S), memoryview)
            assert reader.sequence == sequence
            host.status.relay.sequence = sequence
        assert ended(writer) == 0


def test_iterating_yields_records_and_tells_of_losses_between_them(path: Path) -> None:
    told: list[Lapped | Record] = []
    with serving(path, slots=4) as host, SharedReader(path, key="turbo", on_lost=told.append) as reader:
        host.put(2)
        for record in reader:
            told.append(record)
            if record.sequence == 2:
                host.put(9)
            elif record.sequence == 11:
                host.put()
            elif record.sequence == 12:
                break
    assert [each if isinstance(each, Lapped) else each.sequence for each in told] == [1, 2, Lapped(3, 8), 11, 12]
    assert all(each.session == SESSION and each.state & State.BEST for each in told if isinstance(each, Record))


def test_iterating_ends_when_the_reader_is_closed(path: Path) -> None:
    with serving(path) as host, SharedReader(path, key="turbo") as reader:
        host.put(3)
        seen = []
        for record in reader:
            seen.append(record.sequence)
            reader.close()
        assert seen == [1]
        assert list(reader) == []
        assert reader.read() is None
        assert reader.next() is None
        reader.close()


def test_a_view_outlives_its_reader(path: Path) -> None:
    with serving(path) as host:
        with SharedReader(path, key="turbo") as reader:
            host.put()
            view = reader.read()
        assert isinstance(view, memoryview)
        assert bytes(view) == host.ring.copy(1)


def test_a_machine_that_the_ring_does_not_carry_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(HostError, match="aarch64"):
        SharedReader(path)


# A writer that is killed


class Dying:
    """A ring's index for a writer that is killed right behind one of its stores."""

    def __init__(self, words: memoryview, stores: int) -> None:
        self._words = words
        self._stores = stores

    def __getitem__(self, at: int) -> int:
        return int(self._words[at])

    def __setitem__(self, at: int, value: int) -> None:
        self._words[at] = value
        self._stores -= 1
        if not self._stores:
            os.kill(os.getpid(), signal.SIGKILL)


def die_behind_store(ring: Ring, store: int) -> None:
    """Stores: 1 intent, then the tail and best of commit()."""
    writer = RingWriter(ring)
    record = record_of(writer.next_sequence)
    cast("Any", writer)._index = Dying(ring._index, store)
    slot = writer.claim()
    slot[:] = record
    writer.commit(best=True)


def die_in_the_slot(ring: Ring, written: int) -> None:
    writer = RingWriter(ring)
    record = record_of(writer.next_sequence)
    writer.claim()[:written] = record[:written]
    os.kill(os.getpid(), signal.SIGKILL)


DEATHS: dict[str, tuple[Callable[[Ring], None], list[int | Lapped]]] = {
    "behind intent": (partial(die_behind_store, store=1), [Lapped(3, 3), 6]),
    **{
        f"behind {written} bytes of the record": (partial(die_in_the_slot, written=written), [Lapped(3, 3), 6])
        for written in (1, 8, 24, STATE_OFFSET + 1, 64, HALF, SIZE - 1, SIZE)
    },
    "behind tail": (partial(die_behind_store, store=2), [Lapped(3, 3), 6, 7]),  # 6 still stands as the newest best tip
    "behind best": (partial(die_behind_store, store=3), [Lapped(3, 4), 7]),
}
"""And what a reader behind by more than a round is told then."""


@pytest.mark.parametrize("where", DEATHS)
def test_wherever_a_writer_is_killed_its_successor_goes_on_and_readers_notice_nothing(path: Path, where: str) -> None:
    death, told = DEATHS[where]
    complete = told[-1] == 7
    with serving(path, slots=4) as host:
        host.put(6)
        with SharedReader(path, key="turbo", since=3) as behind, SharedReader(path, key="turbo") as keen:
            assert isinstance(behind.read(), memoryview)
            assert behind.validate()
            assert ended(fork(lambda: death(host.ring))) == -signal.SIGKILL
            # Record 3 lay where 7 was begun: it is gone, whether or not 7 came to be.
            assert behind.copy() is None
            assert read_all(keen) == ([7] if complete else [])

            def succeed() -> None:
                host.writer = RingWriter(host.ring)
                host.put(2)

            assert read_all(behind) == told
            assert ended(fork(succeed)) == 0
            last = 9 if complete else 8
            assert host.ring.tail == host.ring.latest_best == last
            assert read_all(keen) == ([8, 9] if complete else [7, 8])
            assert read_all(behind) == ([8, 9] if complete else [7, 8])
            assert keen.lost == 0


# Many records between real processes


def write_in_step(host: Host, keen_at: memoryview) -> None:
    """As fast as the keen reader lets us; signals now and then, as the relay does for each block."""
    writer = RingWriter(host.ring)
    claim, commit = writer.claim, writer.commit
    limit = 0
    for sequence in range(1, RECORDS + 1):
        while sequence > limit:
            limit = keen_at[0] + IN_STEP
        record = content(sequence)
        slot = claim()
        slot[:64], slot[64:] = record[:64], record[64:]  # in pieces: a reader has every chance to see half of it
        commit(best=sequence % 3 == 0)
        if not sequence & 255:
            host.channel.publish()
    host.channel.publish()


class Tally:
    """What one reader saw of the sequences from its first one on."""

    def __init__(self, first: int) -> None:
        self.first = self.following = first
        self.read = self.torn = self.lost = self.laps = self.misplaced = self.caught = 0

    def take(self, reader: SharedReader, found: memoryview | Lapped, dawdle: Callable[[int], None]) -> None:
        if isinstance(found, Lapped):
            self.misplaced += found.first != self.following or found.lost < 1
            self.lost += found.lost
            self.laps += 1
            self.following += found.lost
            return
        self.misplaced += reader.sequence != self.following
        first = bytes(found[:HALF])
        dawdle(self.read)
        record = first + bytes(found[HALF:])
        if reader.validate():
            self.torn += record != content(self.following)
            self.read += 1
            self.following += 1
        else:
            self.caught += 1  # the next read says what that cost

    def until_the_end(self, reader: SharedReader, dawdle: Callable[[int], None] = lambda _: None) -> Tally:
        while self.following <= RECORDS:
            found = reader.next(PATIENCE_S)
            assert found is not None, f"nothing came after {self.following - 1}"
            self.take(reader, found, dawdle)
        assert reader.lost == self.lost
        return self

    def check(self) -> None:
        assert (self.torn, self.misplaced) == (0, 0)
        assert self.following == RECORDS + 1
        assert self.read + self.lost == RECORDS - self.first + 1
        assert self.read > 0


def in_a_process(tally: Callable[[], Tally]) -> tuple[int, int]:
    """Fork; the child's pid, and where its tally comes."""
    receiving, sending = os.pipe()
    pid = fork(lambda: os.write(sending, json.dumps(vars(tally())).encode()))
    os.close(sending)
    return pid, receiving


def result_of(child: tuple[int, int]) -> Tally:
    pid, receiving = child
    with os.fdopen(receiving) as pipe:
        words = pipe.read()
    assert ended(pid) == 0
    tally = Tally(0)
    vars(tally).update(json.loads(words))
    return tally


def test_millions_of_records_between_processes_none_torn_none_out_of_order_every_loss_told(path: Path) -> None:
    """A reader that keeps up, one that is lapped, and some that join late and begin at the writer's heels."""
    with serving(path, slots=2 * IN_STEP) as host:
        keen_at = memoryview(host.status.layout.relay).cast("B")[:8].cast("Q")

        def keep_up() -> Tally:
            def report(_: int) -> None:
                keen_at[0] = reader.sequence

            with SharedReader(path, key="turbo", spin=True) as reader:
                return Tally(1).until_the_end(reader, report)

        def be_lapped() -> Tally:
            def dawdle(read: int) -> None:
                if not read % 500:  # in the middle of a record, until it is gone
                    goal = min(RECORDS, reader.sequence + host.ring.slots)
                    while host.ring.tail < goal:
                        time.sleep(0.001)

            with SharedReader(path, key="enterprise") as reader:
                return Tally(1).until_the_end(reader, dawdle)

        readers = [in_a_process(keep_up), in_a_process(be_lapped)]
        until(lambda: host.accounts.accepted == 2)
        readers.append((fork(lambda: write_in_step(host, keen_at)), os.open(os.devnull, os.O_RDONLY)))
        late = []
        for share in (4, 2):
            until(lambda: host.ring.tail > RECORDS // share, 600)  # noqa: B023 - called before the next round
            oldest = host.ring.oldest
            with SharedReader(path, key="turbo", since=oldest) as reader:
                tally = Tally(oldest)
                if share == 2:
                    tally.until_the_end(reader)
                else:
                    for _ in range(1000):
                        found = reader.next(PATIENCE_S)
                        assert found is not None
                        tally.take(reader, found, lambda _: None)
                    assert (tally.torn, tally.misplaced) == (0, 0)
                late.append(tally)
        writer, nothing = readers.pop()
        os.close(nothing)
        assert ended(writer) == 0
        kept_up, lapped = (result_of(each) for each in readers)
        for tally in (kept_up, lapped, late[-1]):
            tally.check()
        assert (kept_up.read, kept_up.lost) == (RECORDS, 0)
        assert lapped.laps > 0
        assert lapped.caught > 0
        assert (host.ring.tail, host.ring.latest_best) == (RECORDS, RECORDS // 3 * 3)
