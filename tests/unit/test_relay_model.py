"""The relay against a simple model: random trees of blocks, said in random order and manner by random peers.

The model knows what each peer has said so far, and that is all: a block is accepted as soon as it and all its ancestors
have been said by header. What the relay publishes must add up to it, whatever the order.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from sprint.bitcoin.networks import REGTEST
from sprint.chain import HeaderChain
from sprint.events import Announcement, Block, Event, State
from sprint.regtest import MinedBlock, mine
from sprint.relay import Outcome
from tests.unit.chains import WALL_S, Stage, headers_of, sighting_of

SHARED = 12
"""Blocks from before the session that all agree on."""
PEERS = ("a", "b", "c")


@cache
def _block(parent: bytes, height: int, number: int) -> MinedBlock:
    return mine(parent, height, WALL_S + 60 * height, REGTEST.pow_limit_bits, b"%d" % number)


@dataclass(frozen=True)
class _Said:
    peer: str
    block: int
    how: str


_HOW = ("cmpctblock", "headers", "inv", "run", "reconnect", "answers")


@st.composite
def _stories(draw: st.DrawFn) -> tuple[list[int], list[_Said]]:
    """For each new block its parent (-1 to -3: of the shared chain), and what is said in which order."""
    count = draw(st.integers(1, 9))
    parents = [draw(st.integers(-3, number - 1)) for number in range(count)]
    said = draw(
        st.lists(
            st.builds(_Said, st.sampled_from(PEERS), st.integers(0, count - 1), st.sampled_from(_HOW)), max_size=30
        )
    )
    return parents, said


def _tree(stage: Stage, parents: list[int]) -> list[list[MinedBlock]]:
    """For each new block, the branch that ends in it, from the shared chain up."""
    branches: list[list[MinedBlock]] = []
    for number, parent in enumerate(parents):
        below = branches[parent] if parent >= 0 else []
        if below:
            previous, height = below[-1].hash, _height(stage, below)
        else:
            height = SHARED + 1 + parent
            previous = stage.node.headers.hash_at(height)
        branches.append([*below, _block(previous, height + 1, number)])
    return branches


def _height(stage: Stage, branch: list[MinedBlock]) -> int:
    base = stage.node.headers.height_of(branch[0].header.encode()[4:36])
    assert base is not None
    return base + len(branch)


@settings(max_examples=300, deadline=None)
@given(_stories())
def test_whatever_is_said_in_whatever_order_adds_up(story: tuple[list[int], list[_Said]]) -> None:
    parents, said = story
    stage = Stage(blocks=SHARED)
    stage.sync(*PEERS)
    branches = _tree(stage, parents)
    before = {stage.chain.hash_at(height) for height in range(SHARED + 1)}
    by_hash = {branch[-1].hash: branch[-1] for branch in branches}
    announced: set[bytes] = set()
    has_header: set[bytes] = set()
    connected: set[bytes] = set()
    stage.wants.clear()
    for line in said:
        seen = len(stage.published)
        branch = branches[line.block]
        block = branch[-1]
        if line.how == "run":
            stage.hear_run(headers_of(branch), line.peer)
            has_header |= {each.hash for each in branch}
            connected |= {each.hash for each in branch}
        elif line.how == "reconnect":
            stage.lose(line.peer)
            stage.connect(line.peer)
        elif line.how == "answers":  # this peer's best chain ends in that block
            node = HeaderChain(REGTEST)
            node.restore(headers_of([*stage.node.blocks.values(), *branch]))
            mine_, stage.wants = [w for w in stage.wants if w.peer == line.peer], []
            for want in mine_:
                headers = node.headers_after(list(want.locator), bytes(32))
                stage.hear_run(headers, line.peer)
                hashes = {each.hash for each in branch if each.header.encode() in headers}
                has_header |= hashes
                connected |= hashes
        else:
            announcement = Announcement[line.how.upper()]
            announced.add(block.hash)
            stage.hear(sighting_of(block, line.peer, announcement))
            if announcement is not Announcement.INV:
                has_header.add(block.hash)
            if announcement is not Announcement.CMPCTBLOCK:
                connected.add(block.hash)
        _check_accepted(stage, branches, has_header)
        for each in stage.published[seen:]:
            if each.event is Event.PROVEN:
                assert bool(each.state & State.CATCHUP) == (each.hash not in announced)
    _check_events(stage.published, before, connected)
    _check_best(stage, by_hash)
    firsts = Counter(line.sighting.hash for line in stage.journal if line.outcome is Outcome.FIRST)
    assert firsts == Counter({block.hash: 1 for block in stage.published if block.event is Event.PROVEN})
    fresh = HeaderChain(REGTEST)
    fresh.restore(bytes(stage.headers))
    assert fresh.tip_hash == stage.chain.tip_hash
    assert len(stage.headers) == 80 * (SHARED + sum(firsts.values()))


def _check_accepted(stage: Stage, branches: list[list[MinedBlock]], has_header: set[bytes]) -> None:
    """Exactly what has been said together with all below it is on the chain, and was proven, each once."""
    reachable = {
        branch[-1].hash for branch in branches if all(block.hash in has_header for block in branch)
    }  # fmt: skip
    proven = Counter(block.hash for block in stage.published if block.event is Event.PROVEN)
    assert proven == Counter(dict.fromkeys(reachable, 1))
    assert all(stage.chain.knows(block_hash) for block_hash in reachable)


def _check_events(published: list[Block], before: set[bytes], connected: set[bytes]) -> None:
    proven: set[bytes] = set()
    validated: set[bytes] = set()
    for block in published:
        if block.event is Event.PROVEN:
            proven.add(block.hash)
        else:
            assert block.hash in proven | before
        if block.event is Event.VALIDATED:
            parent = block.header[4:36]
            assert block.hash not in validated
            assert parent in validated or parent in before
            validated.add(block.hash)
        assert block.state & State.PROVEN
        assert not (block.event is Event.STALE and block.state & State.BEST)
    assert connected & proven <= validated


def _check_best(stage: Stage, by_hash: dict[bytes, MinedBlock]) -> None:
    """BEST is on exactly the best chain's blocks, and each REORG says where the chains part."""
    best = {block_hash for block_hash in by_hash if stage.chain.is_best(block_hash)}
    known = stage.relay._known
    assert {name for name, each in known.items() if each.state & State.BEST and name in by_hash} == best
    states: dict[bytes, State] = {}
    """What a subscriber last heard of each block."""
    tip: tuple[bytes, int] | None = None
    for block in stage.published:
        if block.event is Event.PROVEN and block.state & State.REORG:
            assert block.fork_height < block.height
        if block.event is Event.STALE:
            assert stage.chain.height_of(block.hash) == block.height
        if block.event is Event.PROVEN and block.state & State.BEST:
            tip = block.hash, block.height
        states[block.hash] = block.state
    assert tip in {None, (stage.chain.tip_hash, stage.chain.tip_height)}
    assert all(stage.chain.is_best(name) for name, state in states.items() if state & State.BEST)
