"""The relay: what is published of all that peers say, in which order, with which state, and what is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sprint import relay as relay_module
from sprint.bitcoin.block import Header, double_sha256
from sprint.bitcoin.networks import REGTEST
from sprint.chain import HeaderChain, Reject
from sprint.events import Announcement, Block, Event, Sighting, Source, State
from sprint.record import Record
from sprint.regtest import MinedBlock, mine
from sprint.relay import MAX_CLAIMS, MAX_HELD, Outcome, Relay
from sprint.sync import MAX_CHECKS
from tests.unit.chains import MS, SECOND, WALL_S, Stage, headers_of, sighting_of, told

PROVEN, VALIDATED, STALE = Event.PROVEN, Event.VALIDATED, Event.STALE
INV, HEADERS = Announcement.INV, Announcement.HEADERS
BITS = REGTEST.pow_limit_bits


def _stranger(previous: bytes = b"\x07" * 32, time: int = WALL_S, extra: bytes = b"") -> MinedBlock:
    """A block of enough work that stands on nothing we know."""
    return mine(previous, 1, time, BITS, extra)


def _fork(stage: Stage, height: int, count: int, extra: bytes = b"fork") -> list[MinedBlock]:
    """A branch of the node's chain from that height on, which the node itself doesn't know."""
    previous = stage.node.headers.hash_at(height)
    blocks = []
    for at in range(height + 1, height + 1 + count):
        blocks.append(mine(previous, at, WALL_S + at, BITS, extra))
        previous = blocks[-1].hash
    return blocks


# First, and once


def test_a_compact_block_on_the_tip_is_proven_at_once() -> None:
    stage = Stage(blocks=5)
    stage.sync()
    (block,) = stage.node.extend(1, WALL_S)
    (published,) = stage.hear(sighting_of(block, seen_ns=77, transactions=3))
    assert (published.event, published.hash, published.height) == (PROVEN, block.hash, 6)
    assert published.state == State.PROVEN | State.BEST
    assert published.header == block.header.encode()
    assert (published.source, published.peer, published.seen_ns) == (Source.P2P, "a", 77)
    assert (published.transactions, published.next_bits, published.fork_height) == (3, BITS, 0)
    assert published.median_time_past == stage.chain.median_time_past(block.hash)


def test_a_block_that_several_peers_announce_is_proven_once_and_credited_to_the_first() -> None:
    stage = Stage(blocks=5)
    stage.sync("a", "b", "c")
    (block,) = stage.node.extend(1, WALL_S)
    published = stage.hear(*(sighting_of(block, peer) for peer in ("b", "a", "c", "b")))
    assert told(published) == [(PROVEN, block.hash)]
    assert published[0].peer == "b"
    assert stage.outcomes() == [Outcome.FIRST, Outcome.DUPLICATE, Outcome.DUPLICATE, Outcome.DUPLICATE]


def test_whoever_named_the_hash_first_is_first_even_if_another_brought_the_header() -> None:
    stage = Stage(blocks=5)
    stage.sync("a", "b")
    (block,) = stage.node.extend(1, WALL_S)
    assert stage.hear(sighting_of(block, "b", INV, seen_ns=50)) == []
    published = stage.hear(sighting_of(block, "a", seen_ns=60, transactions=9))
    assert (published[0].peer, published[0].seen_ns, published[0].transactions) == ("b", 50, 9)


def test_an_inv_asks_for_the_header_at_once_and_publishes_nothing() -> None:
    stage = Stage(blocks=5)
    stage.sync("a", "b")
    (block,) = stage.node.extend(1, WALL_S)
    assert stage.hear(sighting_of(block, "b", INV)) == []
    (want,) = stage.wants
    assert want.peer == "b"
    assert want.locator[0] == stage.chain.hash_at(4)
    assert told(stage.answer()) == [(PROVEN, block.hash), (VALIDATED, block.hash)]
    assert not stage.published[0].state & State.CATCHUP
    assert stage.outcomes() == [Outcome.ASKED, Outcome.FIRST]


def test_an_inv_asks_at_once_even_while_another_question_is_open() -> None:
    stage = Stage(blocks=5)
    stage.sync()
    first, second = stage.node.extend(2, WALL_S)
    stage.hear(sighting_of(first))
    stage.wait(6 * MS)  # whether the first is connected has been asked, and is not answered
    assert len(stage.wants) == 1
    stage.hear(sighting_of(second, "a", INV))
    assert len(stage.wants) == 2


def test_a_flood_of_inv_opens_one_question_and_one_more_when_that_is_answered() -> None:
    stage = Stage(blocks=5)
    stage.sync()
    stage.asked = 0
    for number in range(500):
        stage.hear(sighting_of(_stranger(extra=b"%d" % number), "a", INV))
    assert stage.asked == 1
    stage.answer()
    assert stage.asked == 2


def test_an_inv_of_a_known_block_asks_nothing() -> None:
    stage = Stage(blocks=5)
    stage.sync()
    stage.asked = 0
    old = stage.node.blocks[stage.chain.hash_at(3)]
    assert stage.hear(sighting_of(old, "a", INV)) == []
    assert stage.asked == 0
    assert stage.outcomes() == [Outcome.DUPLICATE]


# Refused, and held


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        (Reject.BAD_BITS, {"bits": 0x1F7FFFFF}),
        (Reject.TIME_TOO_OLD, {"time": 1_296_688_602}),
        (Reject.BAD_VERSION, {"version": 1}),
    ],
)
def test_a_forged_header_is_counted_by_its_reason_and_published_nowhere(reason: Reject, change: dict[str, int]) -> None:
    stage = Stage(blocks=20)
    stage.sync()
    fields = {"version": 0x20000000, "time": WALL_S + 100, "bits": BITS} | change
    target = ((fields["bits"] & 0xFFFFFF) << 8 * ((fields["bits"] >> 24) - 3)) - 1
    for nonce in range(1 << 16):
        header = Header(fields["version"], stage.chain.tip_hash, bytes(32), fields["time"], fields["bits"], nonce)
        if int.from_bytes(header.hash, "little") <= target:
            break
    assert stage.hear(sighting_of(MinedBlock(header.hash, header, b""))) == []
    (decision,) = stage.journal
    assert (decision.outcome, decision.reason) == (Outcome.REJECTED, reason)
    assert stage.headers == headers_of(stage.node.blocks.values())


def test_a_header_without_work_is_refused() -> None:
    stage = Stage(blocks=3)
    stage.sync()
    nonce = 0
    while (header := Header(4, stage.chain.tip_hash, bytes(32), WALL_S, BITS, nonce)).hash[31] < 0x80:
        nonce += 1
    assert stage.hear(sighting_of(MinedBlock(header.hash, header, b""))) == []
    assert stage.journal[0].reason is Reject.NO_WORK


def test_a_block_with_an_unknown_parent_is_held_and_published_behind_its_parent() -> None:
    stage = Stage(blocks=5)
    stage.sync()
    first, second, third = stage.node.extend(3, WALL_S)
    assert stage.hear(sighting_of(third, seen_ns=1), sighting_of(second, seen_ns=2)) == []
    assert stage.relay.held == 2
    assert {want.peer for want in stage.wants} == {"a"}
    published = stage.hear(sighting_of(first, "b", seen_ns=3))
    assert told(published) == [(PROVEN, first.hash), (PROVEN, second.hash), (PROVEN, third.hash)]
    assert [block.seen_ns for block in published] == [3, 2, 1]
    assert stage.relay.held == 0
    assert not any(block.state & State.CATCHUP for block in published)


def test_the_answer_brings_the_missing_parent_and_what_was_held() -> None:
    stage = Stage(blocks=5)
    stage.sync()
    first, second = stage.node.extend(2, WALL_S)
    stage.hear(sighting_of(second, seen_ns=5, transactions=4))
    published = stage.answer()
    assert told(published) == [
        (PROVEN, first.hash), (PROVEN, second.hash), (VALIDATED, first.hash), (VALIDATED, second.hash)
    ]  # fmt: skip
    assert published[0].state & State.CATCHUP  # nobody announced the first
    assert not published[1].state & State.CATCHUP
    assert (published[1].seen_ns, published[1].transactions) == (5, 4)
    assert stage.relay.held == 0


def test_the_answer_brings_only_the_parent_of_what_was_held() -> None:
    stage = Stage(blocks=5)
    stage.sync()
    first, second = stage.node.extend(2, WALL_S)
    stage.hear(sighting_of(second))
    published = stage.hear_run(headers_of([first]))
    assert told(published) == [(PROVEN, first.hash), (VALIDATED, first.hash), (PROVEN, second.hash)]


def test_what_is_held_is_bounded_in_number() -> None:
    stage = Stage(blocks=5)
    stage.sync()
    for number in range(3 * MAX_HELD):
        stage.hear(sighting_of(_stranger(extra=b"%d" % number)))
    assert stage.relay.held == MAX_HELD


def test_what_is_held_is_given_up_after_a_minute() -> None:
    stage = Stage(blocks=5)
    stage.sync()
    stage.hear(sighting_of(_stranger()))
    stage.wait(59 * SECOND)
    assert stage.relay.held == 1
    stage.wait(2 * SECOND)
    assert stage.relay.held == 0
    assert stage.published == []


def test_a_header_from_the_future_is_published_when_its_time_has_come() -> None:
    stage = Stage(blocks=15)
    stage.sync()
    block = mine(stage.chain.tip_hash, 16, WALL_S + 7_200 + 30, BITS)
    assert stage.hear(sighting_of(block)) == []
    assert stage.outcomes() == [Outcome.HELD]
    assert stage.wait(25 * SECOND) == []
    assert told(stage.wait(10 * SECOND)) == [(PROVEN, block.hash)]
    assert stage.relay.held == 0
    assert [(line.outcome, line.repeated) for line in stage.journal] == [
        (Outcome.HELD, False), (Outcome.FIRST, True)
    ]  # fmt: skip


def test_blocks_from_the_future_that_stand_on_one_another_come_each_once() -> None:
    stage = Stage(blocks=15)
    stage.sync()
    first = mine(stage.chain.tip_hash, 16, WALL_S + 7_200 + 30, BITS)
    second = mine(first.hash, 17, WALL_S + 7_200 + 30, BITS)
    assert stage.hear(sighting_of(first), sighting_of(second)) == []
    assert told(stage.wait(40 * SECOND)) == [(PROVEN, first.hash), (PROVEN, second.hash)]
    assert stage.outcomes().count(Outcome.FIRST) == 2


def test_a_header_far_in_the_future_is_not_held_but_may_be_announced_again() -> None:
    stage = Stage(blocks=15)
    stage.sync()
    block = mine(stage.chain.tip_hash, 16, WALL_S + 7_200 + 500, BITS)
    assert stage.hear(sighting_of(block)) == []
    assert stage.outcomes() == [Outcome.REJECTED]
    assert stage.relay.held == 0
    stage.wait(501 * SECOND)
    assert told(stage.hear(sighting_of(block))) == [(PROVEN, block.hash)]


def test_a_valid_fork_200_blocks_down_yields_nothing() -> None:
    stage = Stage(blocks=400)
    stage.sync()
    fork = _fork(stage, 200, 20)
    assert stage.hear(*(sighting_of(block) for block in fork)) == []
    assert stage.hear_run(headers_of(fork)) == []
    assert stage.relay.take_refused_runs()[Reject.LOW_WORK] == 1
    assert stage.journal[0].reason is Reject.LOW_WORK
    assert stage.headers == stage.node.headers_after([REGTEST.genesis_hash], bytes(32))


def test_header_spam_leaves_nothing_behind_but_what_is_bounded() -> None:
    stage = Stage(blocks=300)
    stage.sync()
    relay = stage.relay
    low = stage.chain.hash_at(20)
    for number in range(3_000):
        extra = b"%d" % number
        kind = number % 4
        if kind == 0:
            stage.hear(sighting_of(_stranger(extra=extra)))
        elif kind == 1:
            stage.hear(sighting_of(_stranger(extra=extra), "a", INV))
        elif kind == 2:
            stage.hear(sighting_of(mine(low, 21, WALL_S + 1_000, BITS, extra)))
        else:
            stage.hear(sighting_of(mine(stage.chain.hash_at(299), 300, WALL_S + 1_000, BITS, extra)))
    assert relay.held <= MAX_HELD
    assert len(relay._claims) <= MAX_CLAIMS
    assert len(relay.sync._checks) <= MAX_CHECKS
    assert relay.take_journal() == []
    assert stage.asked < 20
    (block,) = stage.node.extend(1, WALL_S + 1)
    assert told(stage.hear(sighting_of(block))) == [(PROVEN, block.hash)]


def test_the_states_of_no_more_than_so_many_blocks_are_remembered() -> None:
    stage = Stage(blocks=5, recent_blocks=10)
    stage.sync()
    blocks = stage.node.extend(40, WALL_S)
    stage.hear(*(sighting_of(block) for block in blocks))
    assert len(stage.relay._known) == 10
    assert len(stage.relay.sync._checks) <= 10
    assert stage.hear(sighting_of(blocks[0], "b")) == []  # forgotten, yet not proven again
    assert stage.outcomes()[-1] is Outcome.DUPLICATE


# Caught up


def test_a_node_that_has_a_thousand_blocks_yields_none_and_the_next_one_is_the_first() -> None:
    stage = Stage(blocks=1_000)
    stage.connect()
    stage.answer()
    assert stage.relay.caught_up
    assert stage.published == []
    (block,) = stage.node.extend(1, WALL_S)
    assert told(stage.hear(sighting_of(block))) == [(PROVEN, block.hash)]
    assert stage.published[0].height == 1_001


def test_what_is_announced_during_the_first_sync_is_published_after_it_if_it_is_new() -> None:
    stage = Stage(blocks=2_500)
    stage.connect()
    old, new = stage.node.blocks[stage.node.headers.tip_hash], None
    (new,) = stage.node.extend(1, WALL_S)
    assert stage.hear(sighting_of(old), sighting_of(new)) == []
    assert stage.outcomes() == [Outcome.SYNCING, Outcome.SYNCING]
    headers = headers_of(stage.node.blocks.values())
    stage.hear_run(headers[: 80 * 2_000])
    published = stage.hear_run(headers[80 * 2_000 : 80 * 2_500])
    assert told(published) == [(PROVEN, new.hash)]


def test_a_hash_alone_is_no_reason_to_ask_before_we_have_caught_up() -> None:
    stage = Stage(blocks=3_000)
    stage.connect()
    stage.wants.clear()
    stage.hear(sighting_of(_stranger(), "a", INV))
    assert stage.wants == []
    assert stage.outcomes() == [Outcome.SYNCING]


def test_blocks_found_by_a_reconnect_carry_catchup_and_announced_ones_do_not() -> None:
    stage = Stage(blocks=5)
    stage.sync()
    stage.lose("a")
    missed = stage.node.extend(3, WALL_S)
    stage.connect("a")
    published = stage.answer()
    assert [block.hash for block in published if block.event is PROVEN] == [block.hash for block in missed]
    assert all(block.state & State.CATCHUP for block in published)
    assert [block.height for block in published if block.event is VALIDATED] == [6, 7, 8]
    (next_block,) = stage.node.extend(1, WALL_S)
    (live,) = stage.hear(sighting_of(next_block))
    assert not live.state & State.CATCHUP


# Reorganisations


def test_a_reorganisation_has_the_fork_height_on_the_new_tip_and_stale_for_each_loser() -> None:
    stage = Stage(blocks=10)
    stage.sync()
    losers = stage.node.extend(2, WALL_S)
    stage.hear(*(sighting_of(block) for block in losers))
    winners = _fork(stage, 10, 3)
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
    winners = _fork(stage, 8, 3)
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
    fork = _fork(stage, 10, 2)
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
    winners = _fork(stage, 5, 16)
    stage.hear(*(sighting_of(block) for block in winners))
    assert stage.published[15].state & State.REORG
    assert sum(block.event is STALE for block in stage.published) == 15
    assert stage.chain.tip_hash == winners[-1].hash


def test_a_block_whose_header_the_chain_gave_up_can_still_be_validated() -> None:
    stage = Stage(blocks=10)
    stage.sync()
    (side,) = _fork(stage, 8, 1)
    stage.hear(sighting_of(side))
    stage.chain._side.remove(side.hash)
    (published,) = stage.hear(sighting_of(side, "a", HEADERS))
    assert (published.event, published.next_bits) == (VALIDATED, BITS)


def test_a_block_that_the_chain_gave_up_and_learns_again_is_not_proven_twice() -> None:
    stage = Stage(blocks=10)
    stage.sync()
    side = _fork(stage, 9, 2)
    stage.hear(sighting_of(side[0]))
    stage.chain._side.remove(side[0].hash)
    stage.hear(sighting_of(side[1]))
    assert stage.relay.held == 1
    published = stage.hear_run(headers_of(side))
    assert [block.hash for block in published if block.event is PROVEN] == [side[1].hash]
    assert stage.relay._known[side[0].hash].state & State.BEST


# Validated


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
    side = _fork(stage, 48, 2)
    stage.hear(*(sighting_of(block) for block in side))
    stage.wait(6 * MS)
    assert all(len(stage.node.headers_after(want.locator, bytes(32))) <= 3 * 80 for want in stage.wants)


# The books


def test_headers_handed_out_give_a_fresh_chain_the_same_tip() -> None:
    stage = Stage(blocks=30)
    stage.sync()
    new = stage.node.extend(2, WALL_S)
    stage.hear(sighting_of(new[1]), sighting_of(new[0]), sighting_of(_stranger()))
    fork = _fork(stage, 29, 5)
    stage.hear_run(headers_of(fork[:4]))
    stage.hear(sighting_of(fork[4], "a", HEADERS))
    fresh = HeaderChain(REGTEST)
    restored = fresh.restore(bytes(stage.headers))
    assert (restored.kept, restored.rejection) == (30 + 2 + 5, None)
    assert fresh.tip_hash == stage.chain.tip_hash == fork[4].hash


def test_the_journal_has_one_first_for_each_block_accepted_after_catching_up() -> None:
    stage = Stage(blocks=5)
    stage.sync("a", "b")
    blocks = stage.node.extend(4, WALL_S)
    stage.hear(sighting_of(blocks[3]), sighting_of(blocks[1], "b", INV), sighting_of(blocks[0]))
    stage.answer()
    stage.hear(*(sighting_of(block, "b", HEADERS) for block in blocks))
    firsts = [line.sighting.hash for line in stage.journal if line.outcome is Outcome.FIRST]
    assert sorted(firsts) == sorted(block.hash for block in blocks)
    heard = [line for line in stage.journal if not line.repeated]
    assert len(heard) == 3 + 1 + 4  # three announced, one only the answer brought, four said again


def test_nothing_is_taken_twice() -> None:
    stage = Stage(blocks=5)
    stage.sync()
    (block,) = stage.node.extend(1, WALL_S)
    relay = stage.relay
    relay.offer(sighting_of(block), stage.now_ns, stage.wall_ns)
    assert relay.take_headers() == block.header.encode()
    assert relay.take_headers() == b""
    assert len(relay.take_journal()) == 1
    assert relay.take_journal() == []
    assert relay.take_refused_runs() == {}


def test_a_run_that_is_no_chain_is_taken_up_to_where_it_breaks() -> None:
    stage = Stage(blocks=5)
    stage.sync()
    blocks = stage.node.extend(3, WALL_S)
    published = stage.hear_run(headers_of([blocks[0], blocks[2]]))
    assert told(published) == [(PROVEN, blocks[0].hash), (VALIDATED, blocks[0].hash)]
    assert stage.relay.take_refused_runs() == {Reject.NOT_CONSECUTIVE: 1}


def test_a_block_is_published_without_a_look_at_the_others_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one sighting costs doesn't grow with the chain or with what is remembered."""
    stage = Stage(blocks=5)
    stage.sync()
    stage.hear(*(sighting_of(block) for block in stage.node.extend(200, WALL_S)))
    hashed = 0

    def counting(data: bytes) -> bytes:
        nonlocal hashed
        hashed += 1
        return double_sha256(data)

    monkeypatch.setattr(relay_module, "double_sha256", counting)
    (block,) = stage.node.extend(1, WALL_S)
    assert len(stage.hear(sighting_of(block))) == 1
    assert hashed == 0


def test_a_relay_on_a_loaded_chain_publishes_nothing_of_it() -> None:
    stage = Stage(blocks=50)
    chain = HeaderChain(REGTEST)
    chain.restore(headers_of(stage.node.blocks.values()))
    stage.chain, stage.relay = chain, Relay(chain)
    stage.sync()
    assert stage.headers == b""
    old = stage.node.blocks[chain.hash_at(49)]
    assert stage.hear(sighting_of(old, "a", HEADERS)) == []


def test_a_relay_that_takes_up_from_a_ring_publishes_nothing_twice_and_saves_what_was_lost() -> None:
    before = Stage(blocks=10)
    before.sync()
    (loser,) = before.node.extend(1, WALL_S)
    winners = _fork(before, 10, 2)
    before.hear(sighting_of(loser), *(sighting_of(block) for block in winners))
    records = [_record(number, block) for number, block in enumerate(before.published, 1)]
    after = Stage()
    after.node = before.node
    after.chain.restore(before.node.headers_after([REGTEST.genesis_hash], bytes(32))[: 80 * 10])
    assert after.relay.resume(records, after.now_ns, after.wall_ns, caught_up=True, height=10) == []
    after.connect()
    assert after.hear(*(sighting_of(block) for block in (loser, *winners))) == []
    assert after.chain.tip_hash == winners[1].hash
    assert sorted(after.headers) == sorted(headers_of([loser, *winners]))
    after.wants.clear()
    after.hear_run(b"")
    after.wait(10 * MS)
    assert after.wants  # the winners are still to be validated
    assert told(after.hear(sighting_of(winners[1], "a", HEADERS))) == [(VALIDATED, block.hash) for block in winners]


def _record(sequence: int, block: Block) -> Record:
    return Record(
        REGTEST.magic, 1, sequence, block.event, block.source, block.state, block.height, block.fork_height,
        block.next_bits, block.median_time_past, block.transactions, block.size, block.wall_ns, block.hash,
        block.header, block.seen_ns, block.seen_ns,
    )  # fmt: skip


def test_a_block_says_the_state_it_was_published_with_even_if_that_changes_later() -> None:
    stage = Stage(blocks=5)
    stage.sync()
    (block,) = stage.node.extend(1, WALL_S)
    (published,) = stage.hear(sighting_of(block))
    copy: Block = replace(published)
    stage.hear(sighting_of(block, "a", HEADERS))
    assert published == copy


def test_a_sighting_of_a_source_without_connections_asks_all_peers() -> None:
    stage = Stage(blocks=5)
    stage.sync("a", "b")
    named = Sighting(Source.ZMQ, "zmq", Announcement.HASHBLOCK, b"\x05" * 32, None, 1, validated=True)
    assert stage.hear(named) == []
    assert [want.peer for want in stage.wants] == ["a", "b"]
