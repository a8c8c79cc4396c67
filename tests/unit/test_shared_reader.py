"""The reader in shared memory between real processes: writers that are killed, and millions of records in a race."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest

from sprint.events import Lapped
from sprint.record import SIZE, STATE_OFFSET
from sprint.ring import RingWriter
from sprint.shared_reader import SharedReader
from tests.unit.shm_host import PATIENCE_S, Host, ended, fork, read_all, record_of, serving, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sprint.ring import Ring

RECORDS = int(os.environ.get("SPRINT_TEST_RECORDS", "2_000_000"))
"""How many the processes below exchange. Ten million pass too, in a minute on two cores: too long for each run."""
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
        return self.some(reader, RECORDS, dawdle)

    def some(self, reader: SharedReader, limit: int = 1000, dawdle: Callable[[int], None] = lambda _: None) -> Tally:
        """Read so many records, or fewer if there are no more."""
        while self.read < limit and self.following <= RECORDS:
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

            with SharedReader(path, key="turbo", since=1, spin=True) as reader:
                return Tally(1).until_the_end(reader, report)

        def be_lapped() -> Tally:
            def dawdle(read: int) -> None:
                if not read % 500:  # in the middle of a record, until it is gone
                    goal = min(RECORDS, reader.sequence + host.ring.slots)
                    while host.ring.tail < goal:
                        time.sleep(0.001)

            with SharedReader(path, key="enterprise", since=1) as reader:
                return Tally(1).until_the_end(reader, dawdle)

        readers = [in_a_process(keep_up), in_a_process(be_lapped)]
        until(lambda: host.accounts.accepted == 2)
        writer = fork(lambda: write_in_step(host, keen_at))
        late = []
        for share in (4, 2):
            until(lambda: host.ring.tail > RECORDS // share, 600)  # noqa: B023 - called before the next round
            oldest = host.ring.oldest
            with SharedReader(path, key="turbo", since=oldest) as reader:
                late.append(Tally(oldest).until_the_end(reader) if share == 2 else Tally(oldest).some(reader))
        assert ended(writer) == 0
        kept_up, lapped = (result_of(each) for each in readers)
        for tally in (kept_up, lapped, late[-1]):
            tally.check()
        assert (late[0].torn, late[0].misplaced) == (0, 0)
        assert (kept_up.read, kept_up.lost) == (RECORDS, 0)
        assert lapped.laps > 0
        assert lapped.caught > 0
        assert (host.ring.tail, host.ring.latest_best) == (RECORDS, RECORDS // 3 * 3)
