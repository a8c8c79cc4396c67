"""The relay process's loop, blocking and spinning, over sources without peers: what it does, when, and how it ends."""

from __future__ import annotations

import os
import resource
import signal
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from sprint.bitcoin.networks import REGTEST
from sprint.broadcaster import Broadcaster
from sprint.chain import HeaderChain
from sprint.engines import memory, turns
from sprint.engines.memory import RelayLoop
from sprint.engines.turns import Turns
from sprint.events import Event, PeerReady, Want
from sprint.events import Source as Kind
from sprint.header_file import HeaderFile
from sprint.ledger import Ledger
from sprint.record import decode
from sprint.regtest import RegtestChain
from sprint.relay import Relay
from sprint.ring import Ring, RingWriter, size_for
from sprint.status import StatusBlock
from tests.descriptors import open_descriptors
from tests.unit.chains import WALL_S, headers_of, sighting_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sprint.regtest import MinedBlock
    from sprint.sources import Heard

both = pytest.mark.parametrize("spin", [False, True], ids=["blocking", "spinning"])


@pytest.fixture(autouse=True)
def _sigterm_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


class _Log:
    def info(self, _event: str, **_values: Any) -> None:
        pass

    warning = error = info


class _Source:
    """Calls `script` at each poll with its number, from 1 on; what that returns is what is heard."""

    def __init__(self, script: Callable[[int], list[Heard]]) -> None:
        self._ears, self._mouth = os.pipe()
        self._script = script
        self.polls = 0
        self.due_ns: int | None = 0
        self.closed = False
        self.speak()

    def speak(self) -> None:
        os.write(self._mouth, b"\0")

    def fileno(self) -> int:
        return self._ears

    def poll(self, now_ns: int) -> list[Heard]:
        self.polls += 1
        return self._script(self.polls)

    def deadline(self) -> int | None:
        return self.due_ns

    def want(self, want: Want, now_ns: int) -> None:
        pass

    def account(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
        os.close(self._ears)
        os.close(self._mouth)


class _Stage:
    """A caught-up relay on a header file, its ring, and Turns with one source."""

    def __init__(self, folder: Path, script: Callable[[int], list[Heard]]) -> None:
        self.path = folder / "headers"
        self.chain = HeaderChain(REGTEST)
        self.relay = Relay(self.chain)
        self.relay.sync.caught_up = True
        self.status = StatusBlock.create(7, {})
        self.ring = Ring.create(bytearray(size_for(64)), 64, 7)
        self.source = _Source(script)
        self.wakes = 0
        self.on_wake: Callable[[], None] = lambda: None
        self.turns = Turns(
            relay=self.relay,
            broadcaster=Broadcaster(RingWriter(self.ring), REGTEST.magic, [self], time.monotonic_ns),
            ring=self.ring,
            ledger=Ledger(self.status),
            header_file=HeaderFile.open(self.path, REGTEST),
            sources=[self.source],
            log=_Log(),
        )

    def publish(self) -> None:
        self.wakes += 1
        self.on_wake()

    def told(self) -> list[tuple[Event, bytes]]:
        records = [self.ring.copy(sequence) for sequence in range(1, self.ring.tail + 1)]
        return [(decode(record).event, decode(record).hash) for record in records if record is not None]

    def saved(self) -> bytes:
        return self.path.read_bytes()[80:]


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def mined(count: int) -> list[MinedBlock]:
    return RegtestChain().extend(count, WALL_S)


@both
def test_what_is_heard_is_published_at_once_and_saved_and_sigterm_ends_it_in_good_order(
    tmp_path: Path, spin: bool
) -> None:
    blocks = mined(3)

    def script(number: int) -> list[Heard]:
        if number <= 3:
            return [sighting_of(blocks[number - 1])]
        stop()
        return []

    descriptors = len(open_descriptors())
    stage = _Stage(tmp_path, script)
    RelayLoop(stage.turns, spin=spin).run()
    assert stage.told() == [(Event.PROVEN, block.hash) for block in blocks]
    assert stage.wakes == 3
    assert stage.saved() == headers_of(blocks)
    assert stage.source.closed
    assert stage.status.relay.proven == 3
    assert len(open_descriptors()) == descriptors
    assert signal.set_wakeup_fd(-1) == -1


@both
def test_what_was_heard_last_is_saved_even_when_the_signal_comes_in_the_same_turn(tmp_path: Path, spin: bool) -> None:
    (block,) = mined(1)

    def script(number: int) -> list[Heard]:
        stop()
        return [sighting_of(block)] if number == 1 else []

    stage = _Stage(tmp_path, script)
    RelayLoop(stage.turns, spin=spin).run()
    assert stage.saved() == headers_of([block])


@both
def test_after_an_exception_in_a_turn_nothing_is_saved_that_may_not_have_been_published(
    tmp_path: Path, spin: bool
) -> None:
    first, second = mined(2)

    def script(number: int) -> list[Heard]:
        return [sighting_of(second)] if stage.saved() else [sighting_of(first)]

    stage = _Stage(tmp_path, script)

    def fail() -> None:
        if stage.wakes == 2:
            raise ZeroDivisionError

    stage.on_wake = fail
    with pytest.raises(ZeroDivisionError):
        RelayLoop(stage.turns, spin=spin).run()
    assert stage.saved() == headers_of([first])
    assert stage.source.closed
    assert signal.set_wakeup_fd(-1) == -1


@both
def test_timers_have_their_turn_while_a_source_never_stops_talking(
    tmp_path: Path, spin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "HOUSEKEEPING_NS", 1_000_000)
    (block,) = mined(1)
    stage = _Stage(tmp_path, lambda number: [sighting_of(block)])
    timers = idle = 0
    on_timer = stage.relay.on_timer

    def counted(now_ns: int, wall_ns: int) -> Any:
        nonlocal timers
        timers += 1
        if timers == 5:
            stop()
        return on_timer(now_ns, wall_ns)

    def on_idle() -> None:
        nonlocal idle
        idle += 1

    monkeypatch.setattr(stage.relay, "on_timer", counted)
    RelayLoop(stage.turns, spin=spin, on_idle=on_idle).run()
    assert timers == idle == 5
    assert stage.told() == [(Event.PROVEN, block.hash)]


@both
def test_housekeeping_goes_on_while_nothing_is_heard(
    tmp_path: Path, spin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "HOUSEKEEPING_NS", 5_000_000)
    stage = _Stage(tmp_path, lambda _: [])
    stage.source.due_ns = None
    os.read(stage.source.fileno(), 1)
    beats: list[int] = []

    def account() -> None:
        beats.append(stage.status.relay.heartbeat_ns)
        if len(beats) == 4:
            stop()

    monkeypatch.setattr(stage.source, "account", account)
    RelayLoop(stage.turns, spin=spin).run()
    assert beats == sorted(set(beats))
    if not spin:
        assert stage.source.polls <= 8  # once for each deadline, not all the time


def test_blocking_it_sleeps_until_something_comes(tmp_path: Path) -> None:
    stage = _Stage(tmp_path, lambda _: [])
    stage.source.due_ns = None
    os.read(stage.source.fileno(), 1)
    timer = time.monotonic() + 0.5

    def on_idle() -> None:
        if time.monotonic() > timer:
            stop()

    before = resource.getrusage(resource.RUSAGE_SELF)
    stage.source.due_ns = time.monotonic_ns() + 500_000_000
    RelayLoop(stage.turns, spin=False, on_idle=on_idle).run()
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.2
    assert stage.source.polls < 10


def test_a_spinning_loop_rehearses_only_when_nothing_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "REHEARSE_SPINS", 10)
    (block,) = mined(1)

    class Rehearsal:
        performed: tuple[int, ...] = ()

        def perform(self) -> None:
            self.performed += (stage.source.polls,)
            if len(self.performed) == 3:
                stop()

    def script(number: int) -> list[Heard]:
        stage.source.due_ns = None
        return [sighting_of(block)] if number <= 50 else []

    stage = _Stage(tmp_path, script)
    rehearsal = Rehearsal()
    RelayLoop(stage.turns, spin=True, rehearsal=rehearsal).run()
    assert rehearsal.performed[0] > 50
    assert all(after - before >= 10 for before, after in pairwise(rehearsal.performed))
    assert stage.wakes == 1


@both
def test_what_a_dead_relay_left_unsaid_goes_out_before_the_loop_begins(tmp_path: Path, spin: bool) -> None:
    first, second = mined(2)

    def script(number: int) -> list[Heard]:
        if number == 1:
            return [PeerReady(Kind.P2P, "a", 2)]
        stop()
        return []

    stage = _Stage(tmp_path, script)
    stage.chain.restore(headers_of([first, second]))
    stage.turns.publish(stage.relay.resume([], 0, 0, caught_up=True, height=1))
    assert stage.told() == [(Event.PROVEN, second.hash)]
    RelayLoop(stage.turns, spin=spin).run()
    assert stage.status.relay.proven == stage.status.relay.catchup == 1
    assert stage.status.relay.sequence == 1
