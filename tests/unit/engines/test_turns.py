"""What a turn does in which order, as far as a relay that is killed in the middle of one depends on it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from sprint.bitcoin.networks import REGTEST
from sprint.broadcaster import Broadcaster
from sprint.chain import HeaderChain
from sprint.engines.turns import Turns
from sprint.errors import HostError
from sprint.events import HeaderRun, PeerReady, Source
from sprint.header_file import HeaderFile
from sprint.ledger import Ledger
from sprint.record import decode
from sprint.regtest import RegtestChain
from sprint.relay import Relay
from sprint.ring import Ring, RingWriter, size_for
from sprint.status import StatusBlock
from tests.unit.chains import WALL_S, headers_of, sighting_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sprint.events import Want
    from sprint.sources import Heard


class _Source:
    def __init__(self) -> None:
        self.words: list[Heard] = []
        self.closed = False

    def fileno(self) -> int:
        return -1

    def poll(self, now_ns: int) -> list[Heard]:
        words, self.words = self.words, []
        return words

    def deadline(self) -> int | None:
        return None

    def want(self, want: Want, now_ns: int) -> None:
        pass

    def account(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class _Log:
    def info(self, _event: str, **_values: Any) -> None:
        pass

    warning = error = info


class _Stage:
    def __init__(self, folder: Path, deliver: Callable[[], None] = lambda: None) -> None:
        self.path = folder / "headers"
        self.file = HeaderFile.open(self.path, REGTEST)
        self.status = StatusBlock.create(7, {})
        self.ring = Ring.create(bytearray(size_for(64)), 64, 7)
        self.source, self.later = _Source(), _Source()
        self.publish = deliver
        self.relay = Relay(HeaderChain(REGTEST))
        self.turns = Turns(
            relay=self.relay,
            broadcaster=Broadcaster(RingWriter(self.ring), REGTEST.magic, [self], time.monotonic_ns),
            ring=self.ring,
            ledger=Ledger(self.status),
            header_file=self.file,
            sources=[self.source, self.later],
            log=_Log(),
        )

    def hear(self, *words: Heard) -> None:
        self.source.words += words
        assert self.turns.hear(self.source, time.monotonic_ns())

    def settle(self) -> None:
        self.turns.settle(time.monotonic_ns())

    def saved(self) -> bytes:
        return self.path.read_bytes()[80:]


def test_a_header_is_saved_only_after_its_record_stands_in_the_ring(tmp_path: Path) -> None:
    saved: list[bytes] = []
    stage = _Stage(tmp_path, lambda: saved.append(stage.saved()))
    stage.relay.sync.caught_up = True
    blocks = RegtestChain().extend(2, WALL_S)
    stage.hear(*(sighting_of(block) for block in blocks))
    assert stage.ring.tail == 2
    assert saved == [b"", b""]
    stage.settle()
    assert stage.saved() == headers_of(blocks)
    stage.turns.close()


def test_the_status_says_caught_up_only_of_a_chain_that_is_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a relay that takes over would tell the blocks of the first sync as news."""
    stage = _Stage(tmp_path)
    append = stage.file.append
    seen: list[tuple[int, int]] = []

    def watched(headers: bytes) -> None:
        seen.append((stage.status.relay.caught_up, stage.status.relay.tip_height))
        append(headers)

    monkeypatch.setattr(stage.file, "append", watched)
    headers = headers_of(RegtestChain().extend(10, WALL_S))
    stage.hear(PeerReady(Source.P2P, "a", 10), HeaderRun(Source.P2P, "a", headers, 0, complete=True))
    stage.settle()
    assert seen == [(0, 0)]
    assert (stage.status.relay.caught_up, stage.status.relay.tip_height) == (1, 10)
    stage.turns.close()


def test_after_a_fault_what_may_not_have_been_published_stays_out_of_the_file(tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    stage = _Stage(tmp_path, fail)
    stage.relay.sync.caught_up = True
    with pytest.raises(ZeroDivisionError):
        stage.hear(*(sighting_of(block) for block in RegtestChain().extend(2, WALL_S)))
    stage.turns.close(save=False)
    assert stage.saved() == b""
    assert stage.source.closed
    with pytest.raises(HostError):
        stage.file.append(bytes(80))  # it is closed


def test_what_is_published_outside_a_turn_is_in_the_books_after_the_next(tmp_path: Path) -> None:
    stage = _Stage(tmp_path)
    chain = stage.relay.chain
    chain.restore(headers_of(RegtestChain().extend(3, WALL_S)))
    stage.turns.publish(stage.relay.resume([], 0, 0, caught_up=True, height=1))
    assert stage.ring.tail == 2
    stage.settle()
    assert (stage.status.relay.proven, stage.status.relay.sequence) == (2, 2)
    assert len(stage.status.blocks()) == 2
    stage.turns.close()


def test_what_the_first_source_has_by_then_is_told_before_what_another_says(tmp_path: Path) -> None:
    """The relay may have been kept from running between asking the capture and asking the sockets."""
    stage = _Stage(tmp_path)
    stage.relay.sync.caught_up = True
    (block,) = RegtestChain().extend(1, WALL_S)
    told = sighting_of(block)
    stage.source.words.append(told._replace(source=Source.CAPTURE))
    stage.later.words.append(told)

    assert stage.turns.hear(stage.later, time.monotonic_ns())

    first = stage.ring.copy(1)
    assert first is not None
    assert decode(first).source is Source.CAPTURE
    assert stage.ring.tail == 1
    stage.turns.close()


def test_the_first_source_is_not_asked_again_when_another_has_nothing_to_say(tmp_path: Path) -> None:
    stage = _Stage(tmp_path)
    stage.source.words.append(PeerReady(Source.P2P, "a", 0))

    assert not stage.turns.hear(stage.later, time.monotonic_ns())

    assert stage.source.words
    stage.turns.close()
