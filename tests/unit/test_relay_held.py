"""What the relay refuses, what it holds until its parent or its time has come, and how much of it."""

from __future__ import annotations

import pytest

from sprint.bitcoin.block import Header
from sprint.bitcoin.networks import REGTEST
from sprint.chain import Reject
from sprint.events import Announcement, Event, State
from sprint.regtest import MinedBlock, mine
from sprint.relay import MAX_CLAIMS, MAX_HELD, Outcome
from sprint.sync import MAX_CHECKS
from tests.unit.chains import BITS, SECOND, WALL_S, Stage, fork_of, headers_of, sighting_of, stranger, told

PROVEN, VALIDATED = Event.PROVEN, Event.VALIDATED
INV = Announcement.INV


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
        stage.hear(sighting_of(stranger(extra=b"%d" % number)))
    assert stage.relay.held == MAX_HELD


def test_what_is_held_is_given_up_after_a_minute() -> None:
    stage = Stage(blocks=5)
    stage.sync()
    stage.hear(sighting_of(stranger()))
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
    fork = fork_of(stage, 200, 20)
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
            stage.hear(sighting_of(stranger(extra=extra)))
        elif kind == 1:
            stage.hear(sighting_of(stranger(extra=extra), "a", INV))
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
