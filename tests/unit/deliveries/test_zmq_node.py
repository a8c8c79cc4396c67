"""Whose word a hashblock waits for, and that what is missing shows in the numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sprint.blocks import WholeBlock
from sprint.deliveries import zmq_word
from sprint.deliveries.zmq_word import PATIENCE_NS
from sprint.events import Event, Source, State
from tests.unit.deliveries.test_zmq import A1, A2, B1, B2, B3, Stage, display, staged

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def stage() -> Iterator[Stage]:
    one = Stage()
    yield one
    one.close()


def told(stage: Stage, block_events: str) -> None:
    """PROVEN and VALIDATED of each named block, in that order."""
    blocks = {"a1": A1, "a2": A2, "b1": B1, "b2": B2, "b3": B3}
    for name in block_events.split():
        for event in (Event.PROVEN, Event.VALIDATED):
            stage.tell(event, blocks[name])


def test_what_another_node_has_validated_waits_for_the_operator_s_own(stage: Stage) -> None:
    stage.heard = True
    reader = stage.reader("hashblock", "sprint")
    told(stage, "a1")
    assert [topic for topic, _, _ in reader.read(2)] == ["sprint", "sprint"]
    assert not reader.socket.poll(50)
    stage.delivery.node_has(A1.hash)
    assert reader.read(1) == [("hashblock", display(A1), 0)]
    stage.delivery.node_has(A1.hash)
    stage.delivery.node_has(A2.hash)
    assert not reader.socket.poll(50), "once, and nothing of which no record has come"
    stage.tell(Event.PROVEN, A2)
    assert reader.read(2)[0] == ("hashblock", display(A2), 1), "the node has it: its record needn't say so"


def test_blocks_whose_messages_were_lost_are_told_with_the_next_that_the_node_names(stage: Stage) -> None:
    stage.heard = True
    reader = stage.reader("hashblock")
    told(stage, "b1 b2 b3")
    stage.delivery.node_has(B3.hash)
    assert [body for _, body, _ in reader.read(3)] == [display(one) for one in (B1, B2, B3)]


def test_of_a_branch_that_wins_only_the_new_tip_is_told(stage: Stage) -> None:
    stage.heard = True
    reader = stage.reader("hashblock", "sequence")
    told(stage, "a1 a2")
    for block in (A1, A2):
        stage.delivery.node_has(block.hash)
    reader.read(4)
    told(stage, "b1 b2 b3")
    assert not reader.socket.poll(50)
    stage.delivery.node_has(B3.hash)
    assert [(topic, body[32:] or body) for topic, body, _ in reader.read(6)] == [
        *[("sequence", b"D")] * 2,
        *[("sequence", b"C")] * 3,
        ("hashblock", display(B3)),
    ]


def test_when_the_node_is_gone_the_others_word_has_to_do(stage: Stage) -> None:
    stage.heard = True
    reader = stage.reader("hashblock")
    told(stage, "a1")
    stage.heard = False
    stage.delivery.node_is_unheard()
    told(stage, "a2")
    assert [body for _, body, _ in reader.read(2)] == [display(A1), display(A2)]


def test_a_block_found_in_a_catch_up_waits_for_nobody(stage: Stage) -> None:
    """The node may have told of it before we were there to hear it."""
    stage.heard = True
    reader = stage.reader("hashblock")
    for event in (Event.PROVEN, Event.VALIDATED):
        stage.tell(event, A1, State.BEST | State.CATCHUP)
    assert reader.read(1) == [("hashblock", display(A1), 0)]


def test_a_block_that_a_publisher_was_the_first_to_tell_of_has_its_word(stage: Stage) -> None:
    stage.heard = True
    reader = stage.reader("hashblock")
    for event in (Event.PROVEN, Event.VALIDATED):
        stage.tell(event, A1, source=Source.ZMQ)
    assert reader.read(1) == [("hashblock", display(A1), 0)]


def test_a_node_that_stays_silent_is_not_waited_for_for_ever(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sprint.deliveries.zmq.PATIENCE_NS", PATIENCE_NS // 300)
    monkeypatch.setattr(zmq_word, "PATIENCE_NS", PATIENCE_NS // 300)
    stage.heard = True
    reader = stage.reader("hashblock")
    told(stage, "a1")
    assert reader.read(1) == [("hashblock", display(A1), 0)]


def test_with_proof_by_header_the_node_s_word_is_neither_here_nor_there() -> None:
    with staged(Event.PROVEN) as stage:
        stage.heard = True
        reader = stage.reader("hashblock")
        told(stage, "a1")
        stage.delivery.node_has(A1.hash)
        told(stage, "a2")
        assert [body for _, body, _ in reader.read(2)] == [display(A1), display(A2)]
        assert not reader.socket.poll(50)


@pytest.mark.parametrize("proof", [Event.VALIDATED, Event.PROVEN])
def test_a_block_that_competes_with_the_first_tip_gets_no_hashblock(proof: Event) -> None:
    """At the start there is a tip that was never told: a block beside it has no more work than it."""
    with staged(proof) as stage:
        reader = stage.reader("hashblock", "sequence")
        for event in (Event.PROVEN, Event.VALIDATED):
            stage.tell(event, B1, State(0))
        assert not reader.socket.poll(50)
        told(stage, "b2")
        assert reader.read(2)[1] == ("hashblock", display(B2), 0)


def test_what_the_node_s_publisher_lost_shows_in_our_numbers(stage: Stage) -> None:
    reader = stage.reader("hashtx", "sequence")
    change = bytes(32) + b"A" + bytes(8)
    stage.delivery.pass_through(b"hashtx", bytes(32))
    stage.delivery.pass_through(b"hashtx", bytes(32), 3)
    stage.delivery.pass_through(b"sequence", bytes(32) + b"C", 2)
    stage.delivery.pass_through(b"sequence", change)
    assert reader.read(3) == [("hashtx", bytes(32), 0), ("hashtx", bytes(32), 4), ("sequence", change, 2)]


def test_a_rawblock_that_nobody_tries_to_get_holds_up_no_other(stage: Stage) -> None:
    stage.hopeless.add(A1.hash)
    reader = stage.reader("rawblock")
    stage.store.add(A2.hash, WholeBlock(A2.payload, 1))
    told(stage, "a1 a2")
    assert reader.read(1) == [("rawblock", A2.payload, 1)]
