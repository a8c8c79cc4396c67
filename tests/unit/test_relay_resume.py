"""A relay that takes over from one that was killed: nothing twice, nothing lost, no subscriber left with a falsehood.

The one that dies saves its headers at the end of each turn, after its records, as the engine does; so it may be killed
behind any record. The one that takes over has the file's headers, the records, and what the status noted last.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprint.bitcoin.networks import REGTEST
from sprint.chain import HeaderChain
from sprint.events import Announcement, Block, Event, Sighting, State
from sprint.regtest import RegtestChain
from sprint.relay import Relay
from tests.unit.chains import MS, WALL_S, Stage, headers_of, record_of, sighting_of, told

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sprint.regtest import MinedBlock

PROVEN, VALIDATED, STALE = Event.PROVEN, Event.VALIDATED, Event.STALE
HEADERS = Announcement.HEADERS


@dataclass
class Life:
    """What one relay left when it was killed."""

    headers: bytes
    height: int
    """As the status noted it."""
    published: list[Block]
    caught_up: bool = True

    def successor(self, node: RegtestChain, slots: int = 4_096) -> Stage:
        """A relay in the state in which it starts; what it says at once is in `published`."""
        stage = Stage()
        stage.node = node
        stage.chain.restore(self.headers)
        stage.headers += self.headers
        records = [record_of(number, block) for number, block in enumerate(self.published, 1)][-slots:]
        said = stage.relay.resume(records, stage.now_ns, stage.wall_ns, caught_up=self.caught_up, height=self.height)
        stage._collect(said)
        return stage


@dataclass
class Story:
    """A relay that lives turn by turn, and could have been killed behind each record of the last one."""

    stage: Stage
    saved: bytes = b""
    height: int = 0
    deaths: list[Life] = field(default_factory=list)
    old: list[bytes] = field(default_factory=list)
    """The chain from before the session."""

    @classmethod
    def begun(cls, blocks: int) -> Story:
        """Caught up with a node of so many blocks; nothing published."""
        stage = Stage(blocks)
        stage.sync()
        old = [stage.chain.hash_at(height) for height in range(1, blocks + 1)]
        return cls(stage, bytes(stage.headers), stage.chain.tip_height, old=old)

    def turn(self, act: Callable[[Stage], object]) -> None:
        before = len(self.stage.published)
        act(self.stage)
        for records in range(before, len(self.stage.published) + 1):
            self.deaths.append(Life(self.saved, self.height, self.stage.published[:records]))
        self.saved, self.height = bytes(self.stage.headers), self.stage.chain.tip_height


def hearing(*sightings: Sighting) -> Callable[[Stage], object]:
    """A turn in which these come in."""
    return lambda stage: stage.hear(*sightings)


def finding(headers: bytes) -> Callable[[Stage], object]:
    """A turn in which an answer brings these."""
    return lambda stage: stage.hear_run(headers)


def branch_of(node: RegtestChain, height: int, count: int) -> list[MinedBlock]:
    """Blocks on that height's, unknown to the node until it extends them itself."""
    other = RegtestChain()
    other.headers.restore(node.headers.headers_after([REGTEST.genesis_hash], bytes(32))[: 80 * height])
    return other.extend(count, WALL_S, extra=b"rival of %d" % len(node.blocks))


def test_nothing_that_stands_in_the_ring_is_published_again() -> None:
    story = Story.begun(5)
    blocks = story.stage.node.extend(3, WALL_S)
    for block in blocks:
        story.turn(hearing(sighting_of(block)))
    story.turn(lambda stage: stage.hear(sighting_of(blocks[1], "a", HEADERS)))
    after = story.deaths[-1].successor(story.stage.node)
    assert after.published == []
    assert after.relay.caught_up
    after.connect()
    for block in blocks:
        after.hear(sighting_of(block), sighting_of(block, "b"))
    assert after.published == []


def test_validated_goes_on_where_it_stood() -> None:
    story = Story.begun(5)
    blocks = story.stage.node.extend(3, WALL_S)
    for block in blocks:
        story.turn(hearing(sighting_of(block)))
    story.turn(lambda stage: stage.hear(sighting_of(blocks[0], "a", HEADERS)))
    after = story.deaths[-1].successor(story.stage.node)
    after.connect()
    after.wants.clear()
    after.hear_run(b"")
    after.wait(10 * MS)
    assert after.wants, "nobody is asked whether the blocks are connected"
    said = after.hear(sighting_of(blocks[2], "a", HEADERS))
    assert told(said) == [(VALIDATED, blocks[1].hash), (VALIDATED, blocks[2].hash)]
    assert all(block.state & State.BEST and block.state & State.PROVEN for block in said)


def test_a_header_that_was_published_and_never_saved_is_taken_from_the_ring_and_saved() -> None:
    story = Story.begun(5)
    blocks = story.stage.node.extend(3, WALL_S)
    story.turn(lambda stage: stage.hear(*(sighting_of(block) for block in blocks)))
    killed = story.deaths[-1]
    assert killed.headers == headers_of(story.stage.node.blocks.values())[: 5 * 80]
    after = killed.successor(story.stage.node)
    assert after.chain.tip_hash == blocks[-1].hash
    assert bytes(after.headers) == killed.headers + headers_of(blocks)


def test_what_was_stale_stays_stale_and_may_win_again() -> None:
    story = Story.begun(5)
    node = story.stage.node
    rival = branch_of(node, 5, 2)
    (loser,) = node.extend(1, WALL_S)
    story.turn(lambda stage: stage.hear(sighting_of(loser)))
    story.turn(lambda stage: stage.hear(*(sighting_of(block) for block in rival)))
    assert told(story.stage.published)[-1] == (STALE, loser.hash)
    after = story.deaths[-1].successor(node)
    assert after.published == []
    heirs = node.extend(2, WALL_S)
    (_, *_), *said = (after.hear(sighting_of(block)) for block in heirs)
    assert (STALE, rival[1].hash) in told(said[0])
    won = after.hear(sighting_of(heirs[1], "a", HEADERS))
    assert (VALIDATED, loser.hash) in told(won)
    assert all(block.state & State.BEST for block in won)


def test_a_header_that_was_accepted_and_never_published_comes_with_catchup() -> None:
    """The engine doesn't save such a header; should it stand in the file all the same, it isn't lost silently."""
    story = Story.begun(5)
    (first,) = story.stage.node.extend(1, WALL_S)
    story.turn(lambda stage: stage.hear(sighting_of(first)))
    unsaid = story.stage.node.extend(2, WALL_S)
    killed = story.deaths[-1]
    saved = Life(killed.headers + headers_of([first, *unsaid]), 6, killed.published)
    after = saved.successor(story.stage.node)
    assert told(after.published) == [(PROVEN, block.hash) for block in unsaid]
    assert [block.height for block in after.published] == [7, 8]
    assert all(block.state & State.CATCHUP and block.state & State.BEST for block in after.published)
    assert after.hear(*(sighting_of(block) for block in unsaid)) == []
    assert told(after.hear(sighting_of(unsaid[1], "a", HEADERS)))[-1] == (VALIDATED, unsaid[1].hash)


def test_the_same_before_anything_was_published_at_all() -> None:
    story = Story.begun(5)
    unsaid = story.stage.node.extend(2, WALL_S)
    after = Life(story.saved + headers_of(unsaid), 5, []).successor(story.stage.node)
    assert told(after.published) == [(PROVEN, block.hash) for block in unsaid]


def test_an_unpublished_branch_that_won_comes_with_catchup_and_the_losers_as_stale() -> None:
    story = Story.begun(5)
    node = story.stage.node
    rival = branch_of(node, 5, 3)
    losers = node.extend(2, WALL_S)
    for loser in losers:
        story.turn(hearing(sighting_of(loser)))
    saved = Life(story.saved + headers_of(rival), 7, story.stage.published)
    after = saved.successor(node)
    assert told(after.published) == [
        *((PROVEN, block.hash) for block in rival),
        *((STALE, block.hash) for block in reversed(losers)),
    ]
    assert [bool(block.state & State.REORG) for block in after.published[:3]] == [False, False, True]
    assert after.published[2].fork_height == 5


def test_blocks_older_than_the_ring_are_no_news() -> None:
    story = Story.begun(5)
    blocks = story.stage.node.extend(30, WALL_S)
    for block in blocks:
        story.turn(hearing(sighting_of(block), sighting_of(block, "a", HEADERS)))
    for slots in (1, 2, 3, 8):
        after = story.deaths[-1].successor(story.stage.node, slots)
        assert after.published == []
        assert after.hear(*(sighting_of(block) for block in blocks)) == []


def test_before_the_first_catching_up_nothing_is_told() -> None:
    node = RegtestChain()
    blocks = node.extend(8, WALL_S)
    after = Life(headers_of(blocks[:5]), 3, [], caught_up=False).successor(node)
    assert after.published == []
    assert not after.relay.caught_up
    after.sync()
    assert after.published == []


def test_a_chain_that_was_never_saved_is_fetched_in_silence() -> None:
    """After a full disk: it may be all of main."""
    story = Story.begun(20)
    after = Life(b"", 20, []).successor(story.stage.node)
    assert not after.relay.caught_up
    after.connect()
    assert after.answer() == []
    assert after.relay.caught_up
    (block,) = story.stage.node.extend(1, WALL_S)
    assert told(after.hear(sighting_of(block))) == [(PROVEN, block.hash)]


def check(story: Story, death: Life, slots: int = 4_096) -> None:
    """The killed one's records and its successor's, as one subscriber sees them, once the node has answered."""
    node = story.stage.node
    after = death.successor(node, slots)
    after.connect()
    after.answer()
    for _ in range(4):
        after.wait(1_000 * MS)
        after.answer()
    seen = [*death.published, *after.published]
    proven = Counter(block.hash for block in seen if block.event is PROVEN)
    assert set(proven.values()) <= {1}
    chain = [node.headers.hash_at(height) for height in range(1, node.headers.tip_height + 1)]
    best = [block_hash for block_hash in chain if block_hash not in story.old]
    assert after.chain.tip_hash == chain[-1]
    assert set(best) <= set(proven)
    last: dict[bytes, Block] = {}
    ever_best: set[bytes] = set()
    for block in seen:
        last[block.hash] = block
        if block.state & State.BEST:
            ever_best.add(block.hash)
    for block_hash, block in last.items():
        if block_hash in best:
            assert block.state & State.VALIDATED, "a block of the best chain was never validated"
            assert block.state & State.BEST
            assert not block.state & State.STALE, "a block was called stale that never lost"
        elif block_hash in ever_best:
            assert block.state & State.STALE, "a block that lost is still the best for whoever listens"
            assert not block.state & State.BEST
    for old in story.old:
        assert (old in last) is (old not in chain), "a block from before, and whether it was told as stale"
        assert old in chain or last[old].state & State.STALE
    again = HeaderChain(REGTEST)
    again.restore(bytes(after.headers))
    assert again.tip_hash == chain[-1]


def _runs(node: RegtestChain, plan: list[tuple[str, int]]) -> Iterator[Callable[[Stage], object]]:
    """The turns of a story: new blocks announced one by one, or found in an answer, or a branch that wins."""
    for kind, count in plan:
        if kind == "announced":
            for block in node.extend(count, WALL_S):
                yield hearing(sighting_of(block))
                yield hearing(sighting_of(block, "a", HEADERS))
        elif kind == "found":
            found = headers_of(node.extend(count, WALL_S))
            yield finding(found)
        else:
            depth = min(count, node.headers.tip_height - 2)
            if depth > 0:
                branch = branch_of(node, node.headers.tip_height - depth, depth + 1)
                for block in branch:
                    node.blocks[block.hash] = block
                node.headers.restore(headers_of(branch))
                found = headers_of(branch)
                if kind == "found branch":
                    yield finding(found)
                else:
                    yield hearing(*map(sighting_of, branch))


@pytest.mark.parametrize("kind", ["announced", "found", "branch", "found branch"])
def test_killed_behind_any_record_of_a_turn_a_subscriber_hears_everything_once(kind: str) -> None:
    story = Story.begun(5)
    node = story.stage.node
    for act in _runs(node, [("announced", 2), (kind, 2)]):
        story.turn(act)
    deaths = [death for death in story.deaths if len(death.published) >= 4]
    assert len(deaths) >= 3
    for death in deaths:
        check(story, death)


@settings(max_examples=60, deadline=None)
@given(
    plan=st.lists(
        st.tuples(st.sampled_from(["announced", "found", "branch", "found branch"]), st.integers(1, 3)),
        min_size=1,
        max_size=5,
    ),
    data=st.data(),
)
def test_killed_at_any_moment_of_any_story_a_subscriber_hears_everything_once(
    plan: list[tuple[str, int]], data: st.DataObject
) -> None:
    story = Story.begun(5)
    for act in _runs(story.stage.node, plan):
        story.turn(act)
    if story.deaths:
        check(story, data.draw(st.sampled_from(story.deaths)))


def test_one_that_is_killed_again_and_again_still_tells_everything_once() -> None:
    story = Story.begun(5)
    node = story.stage.node
    seen: list[Block] = []
    stage = story.stage
    for number in range(8):
        blocks = node.extend(2, WALL_S)
        stage.hear(sighting_of(blocks[0]))
        seen = [*seen, *stage.published]
        life = Life(bytes(stage.headers), stage.chain.tip_height, seen)
        stage = life.successor(node)  # the second block was mined while nobody listened
        if number % 2:
            stage.connect()
            stage.answer()
    stage.connect()
    stage.answer()
    seen += stage.published
    proven = [block.hash for block in seen if block.event is PROVEN]
    assert sorted(proven) == sorted(set(proven))
    assert len(proven) == 16


def test_a_relay_that_resumes_without_records_is_a_new_one() -> None:
    relay = Relay(HeaderChain(REGTEST))
    assert relay.resume([], 0, 0, caught_up=False, height=0) == []
    assert not relay.caught_up
    assert relay.take_headers() == b""
