"""Reorganisations in the relay: what the new tip says, who is told stale, and blocks that the chain gave up."""

from __future__ import annotations

from sprint.events import Announcement, Event, State
from sprint.regtest import mine
from tests.unit.chains import BITS, WALL_S, Stage, fork_of, headers_of, sighting_of, told

PROVEN, VALIDATED, STALE = Event.PROVEN, Event.VALIDATED, Event.STALE
HEADERS = Announcement.HEADERS


def test_a_reorganisation_has_the_fork_height_on_the_new_tip_and_stale_for_each_loser() -> None:
    stage = Stage(blocks=10)
    stage.sync()
    losers = stage.node.extend(2, WALL_S)
    stage.hear(*(sighting_of(block) for block in losers))
    winners = fork_of(stage, 10, 3)
    assert told(stage.hear(*(sighting_of(block) for block in winners[:2]))) == [
        (PROVEN, block.hash) for block in winners[:2]
    ]
    assert not any(block.state & State.BEST for block in stage.published[-2:])
    published = stage.hear(sighting_of(winners[2]))
    assert told(published) == [(PROVEN, winners[2].hash), (STALE, losers[1].hash), (STALE, losers[0].hash)]
    tip, *stale = published
    assert tip.state == State.PROVEN | State.BEST | State.REORG
    assert (tip.fork_height, tip.height) == (10, 13)
    assert all(block.state & State.STALE and not block.state & State.BEST for block in stale)
    assert [(block.header, block.height) for block in stale] == [
        (losers[1].header.encode(), 12), (losers[0].header.encode(), 11)
    ]  # fmt: skip
    won = [stage.relay._known[block.hash].state for block in winners]
    assert all(state & State.BEST for state in won)


def test_losers_from_before_the_session_are_told_too() -> None:
    stage = Stage(blocks=10)
    stage.sync()
    winners = fork_of(stage, 8, 3)
    published = stage.hear_run(headers_of(winners))
    assert told(published)[:3] == [(PROVEN, block.hash) for block in winners]
    stale = [block for block in published if block.event is STALE]
    assert [block.height for block in stale] == [10, 9]
    lost = stage.node.blocks[stale[0].hash]
    assert stale[0].header == lost.header.encode()
    assert stale[0].next_bits == BITS
    assert (published[2].fork_height, published[2].state & State.REORG) == (8, State.REORG)
    assert not published[0].state & State.REORG


def test_a_reorganisation_back_makes_the_others_stale_and_publishes_only_what_is_new() -> None:
    stage = Stage(blocks=10)
    stage.sync()
    (first,) = stage.node.extend(1, WALL_S)
    fork = fork_of(stage, 10, 2)
    stage.hear(sighting_of(first), *(sighting_of(block) for block in fork))
    back = [mine(first.hash, 12, WALL_S + 50, BITS)]
    back.append(mine(back[0].hash, 13, WALL_S + 60, BITS))
    published = stage.hear(*(sighting_of(block) for block in back))
    assert told(published) == [
        (PROVEN, back[0].hash), (PROVEN, back[1].hash), (STALE, fork[1].hash), (STALE, fork[0].hash)
    ]  # fmt: skip
    assert published[1].fork_height == 10
    known = stage.relay._known
    assert known[first.hash].state & State.BEST
    assert not known[fork[0].hash].state & State.BEST
    assert all(block.state & State.PROVEN for block in published)


def test_a_reorganisation_deeper_than_what_is_remembered_ends_nothing() -> None:
    stage = Stage(blocks=20, recent_blocks=3)
    stage.sync()
    winners = fork_of(stage, 5, 16)
    stage.hear(*(sighting_of(block) for block in winners))
    assert stage.published[15].state & State.REORG
    assert sum(block.event is STALE for block in stage.published) == 15
    assert stage.chain.tip_hash == winners[-1].hash


def test_a_block_whose_header_the_chain_gave_up_can_still_be_validated() -> None:
    stage = Stage(blocks=10)
    stage.sync()
    (side,) = fork_of(stage, 8, 1)
    stage.hear(sighting_of(side))
    stage.chain._side.remove(side.hash)
    (published,) = stage.hear(sighting_of(side, "a", HEADERS))
    assert (published.event, published.next_bits) == (VALIDATED, BITS)


def test_a_block_that_the_chain_gave_up_and_learns_again_is_not_proven_twice() -> None:
    stage = Stage(blocks=10)
    stage.sync()
    side = fork_of(stage, 9, 2)
    stage.hear(sighting_of(side[0]))
    stage.chain._side.remove(side[0].hash)
    stage.hear(sighting_of(side[1]))
    assert stage.relay.held == 1
    published = stage.hear_run(headers_of(side))
    assert [block.hash for block in published if block.event is PROVEN] == [side[1].hash]
    assert stage.relay._known[side[0].hash].state & State.BEST
