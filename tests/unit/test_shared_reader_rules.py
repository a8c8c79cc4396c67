"""The rules of the reader in shared memory: where it begins, what it shows, what it tells as lost, how it waits."""

from __future__ import annotations

import platform
import random
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprint.errors import HostError
from sprint.events import Lapped, State
from sprint.record import SIZE, Record
from sprint.shared_reader import SharedReader
from tests.unit.shm_host import PATIENCE_S, SESSION, Host, ended, fork, read_all, serving, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


HALF = SIZE // 2

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"),
    reason=f"the order of stores that the ring relies on between processes is x86's; this is {platform.machine()}",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shm.sock"


@pytest.fixture(params=[False, True], ids=["sleeping", "spinning"])
def spin(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


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


def test_a_view_is_not_vouched_for_once_a_later_loss_was_told(path: Path) -> None:
    with serving(path, slots=4) as host, SharedReader(path, key="turbo") as reader:
        host.put()
        assert isinstance(reader.read(), memoryview)
        host.put(9)
        assert reader.read() == Lapped(2, 8)
        assert not reader.validate()
        assert reader.copy() is None
        assert read_all(reader) == [10]
        assert reader.lost == 8


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
