"""When the relay takes a block for connected by a node: by what peers say, or by asking until one has."""

from __future__ import annotations

import pytest

from sprint.events import Announcement, Event, State
from tests.unit.chains import MS, SECOND, WALL_S, Stage, fork_of, sighting_of, told

PROVEN, VALIDATED = Event.PROVEN, Event.VALIDATED
INV, HEADERS = Announcement.INV, Announcement.HEADERS


@pytest.mark.parametrize("announcement", [HEADERS, INV])
def test_a_peer_that_announces_by_headers_or_inv_has_connected_the_block(announcement: Announcement) -> None:
    stage = Stage(blocks=5)
    stage.sync("a", "b")
    (block,) = stage.node.extend(1, WALL_S)
    stage.hear(sighting_of(block))
    (published,) = stage.hear(sighting_of(block, "b", announcement))
    assert (published.event, published.state) == (VALIDATED, State.PROVEN | State.BEST | State.VALIDATED)
    assert stage.hear(sighting_of(block, "a", announcement)) == []


def test_a_header_announced_first_is_proven_and_validated() -> None:
    stage = Stage(blocks=5)
    stage.sync()
    (block,) = stage.node.extend(1, WALL_S)
    assert told(stage.hear(sighting_of(block, "a", HEADERS))) == [(PROVEN, block.hash), (VALIDATED, block.hash)]


def test_a_compact_block_of_what_another_peer_named_by_inv_is_validated_at_once() -> None:
    stage = Stage(blocks=5)
    stage.sync("a", "b")
    (block,) = stage.node.extend(1, WALL_S)
    stage.hear(sighting_of(block, "b", INV))
    assert told(stage.hear(sighting_of(block, "a"))) == [(PROVEN, block.hash), (VALIDATED, block.hash)]


def test_a_peer_that_has_connected_what_is_still_held_need_not_say_so_again() -> None:
    stage = Stage(blocks=5)
    stage.sync("a", "b")
    parent, child = stage.node.extend(2, WALL_S)
    stage.hear(sighting_of(child, "a"), sighting_of(child, "b", HEADERS))
    assert told(stage.hear(sighting_of(parent, "a"))) == [
        (PROVEN, parent.hash), (PROVEN, child.hash), (VALIDATED, parent.hash), (VALIDATED, child.hash)
    ]  # fmt: skip
    assert stage.published[1].peer == "a"


def test_ancestors_are_validated_before_their_descendant() -> None:
    stage = Stage(blocks=5)
    stage.sync()
    blocks = stage.node.extend(3, WALL_S)
    stage.hear(*(sighting_of(block) for block in blocks))
    assert told(stage.hear(sighting_of(blocks[2], "a", HEADERS))) == [(VALIDATED, block.hash) for block in blocks]
    assert stage.hear(sighting_of(blocks[0], "a", HEADERS)) == []


def test_a_compact_block_alone_is_not_validated_and_is_asked_about_until_it_is() -> None:
    stage = Stage(blocks=5)
    stage.sync()
    chain = stage.node.headers
    before = chain.locator_from(chain.hash_at(chain.tip_height - 1))  # one below: there is always something to tell
    (block,) = stage.node.extend(1, WALL_S)
    stage.hear(sighting_of(block))
    assert stage.wait(4 * MS) == []
    assert stage.wants == []
    stage.wait(2 * MS)
    (want,) = stage.wants
    assert list(want.locator) == before
    stage.wants.clear()
    assert stage.hear_run(b"") == []  # not connected yet
    stage.wait(15 * MS)
    assert len(stage.wants) == 1
    assert told(stage.answer()) == [(VALIDATED, block.hash)]
    stage.asked = 0
    stage.wait(60 * SECOND)
    assert stage.asked == 0


def test_a_block_that_nobody_connects_is_not_asked_about_for_ever() -> None:
    stage = Stage(blocks=5)
    stage.sync()
    (block,) = stage.node.extend(1, WALL_S)
    stage.hear(sighting_of(block))
    stage.asked = 0
    for _ in range(2_000):
        stage.wait(SECOND)
        if stage.wants:
            stage.wants.clear()
            stage.hear_run(b"")
    assert 100 <= stage.asked <= 140
    assert stage.relay.deadline() is None


def test_a_block_whose_peer_has_gone_is_asked_about_elsewhere() -> None:
    stage = Stage(blocks=5)
    stage.sync("a", "b")
    (block,) = stage.node.extend(1, WALL_S)
    stage.hear(sighting_of(block, "a"))
    stage.lose("a")
    stage.wait(6 * MS)
    assert [want.peer for want in stage.wants] == ["b"]
    assert told(stage.answer()) == [(VALIDATED, block.hash)]


def test_a_question_about_a_side_block_does_not_fetch_the_whole_chain_again() -> None:
    stage = Stage(blocks=50)
    stage.sync()
    side = fork_of(stage, 48, 2)
    stage.hear(*(sighting_of(block) for block in side))
    stage.wait(6 * MS)
    assert all(len(stage.node.headers_after(want.locator, bytes(32))) <= 3 * 80 for want in stage.wants)
