"""The relay's books in the status block: counters, the peers' accounts, the blocks' timelines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sprint.bitcoin.networks import REGTEST
from sprint.chain import Reject
from sprint.events import Announcement, BlockRebuilt, State
from sprint.ledger import MAX_UNPROVEN, REJECT_INDEX, Ledger
from sprint.regtest import mine
from sprint.status import BLOCKS, MARKS, REASONS, StatusBlock
from tests.unit.chains import MS, WALL_S, Stage, headers_of, sighting_of

if TYPE_CHECKING:
    from sprint.events import Sighting
    from sprint.regtest import MinedBlock
    from sprint.status import Peer

INV, HEADERS = Announcement.INV, Announcement.HEADERS
RECORD = bytes(range(192))


class _Desk:
    """A relay whose every turn is booked, in the engine's order: what was published, then what was decided."""

    def __init__(self, blocks: int = 5) -> None:
        self.stage = Stage(blocks)
        self.stage.sync("a", "b", "c")
        self.status = StatusBlock.create(1, {})
        self.ledger = Ledger(self.status)
        self.sequence = 0

    def hear(self, *sightings: Sighting) -> None:
        for sighting in sightings:
            self.stage.hear(sighting)
            self.book()

    def book(self) -> None:
        for block in self.stage.published:
            self.sequence += 1
            self.ledger.published(block, self.sequence, RECORD, block.seen_ns + MS)
        self.ledger.decided(self.stage.journal)
        self.stage.published.clear()
        self.stage.journal.clear()
        self.ledger.state_of(self.stage.relay, self.stage.now_ns)

    def mine(self, count: int = 1) -> list[MinedBlock]:
        return self.stage.node.extend(count, WALL_S)

    def peer(self, name: str) -> Peer:
        return next(row for row in self.status.peers() if row.name == name.encode())


def test_each_reason_of_refusal_has_its_place() -> None:
    assert len(REJECT_INDEX) == len(Reject) <= REASONS


def test_events_are_counted_by_kind() -> None:
    desk = _Desk()
    (block,) = desk.mine()
    desk.hear(sighting_of(block, seen_ns=1_000), sighting_of(block, "b", HEADERS, 2_000))
    relay = desk.status.relay
    assert (relay.proven, relay.validated, relay.stale, relay.reorgs, relay.catchup) == (1, 1, 0, 0, 0)
    assert (relay.sequence, relay.sightings, relay.duplicates) == (2, 2, 1)
    assert (relay.tip_height, relay.caught_up, relay.held) == (6, 1, 0)
    assert relay.heartbeat_ns == desk.stage.now_ns
    assert relay.last_block_wall_ns > 0
    assert (relay.prove_latency.count, relay.prove_latency.sum_ns) == (1, MS)


def test_catch_up_blocks_are_counted_apart_and_say_nothing_of_latency() -> None:
    desk = _Desk()
    desk.stage.hear_run(headers_of(desk.mine(3)))
    desk.book()
    relay = desk.status.relay
    assert (relay.proven, relay.catchup, relay.validated) == (3, 3, 3)
    assert relay.prove_latency.count == 0


def test_refusals_are_counted_by_reason_be_it_of_a_sighting_or_of_an_answer() -> None:
    desk = _Desk(blocks=200)
    low = mine(desk.stage.chain.hash_at(3), 4, WALL_S + 1_000, REGTEST.pow_limit_bits, b"low")
    desk.hear(sighting_of(low))
    desk.stage.hear_run(headers_of([low]))
    desk.book()
    assert desk.status.relay.rejected[REJECT_INDEX[Reject.LOW_WORK]] == 2
    assert sum(desk.status.relay.rejected) == 2


def test_the_first_leads_by_what_the_second_comes_behind() -> None:
    desk = _Desk()
    (block,) = desk.mine()
    desk.hear(
        sighting_of(block, "b", seen_ns=1_000),
        sighting_of(block, "a", seen_ns=1_400),
        sighting_of(block, "c", seen_ns=3_000),
        sighting_of(block, "b", HEADERS, 9_000),
        sighting_of(block, "a", HEADERS, 9_000),
    )
    a, b, c = (desk.peer(name) for name in "abc")
    assert (b.first, b.sightings, b.lead_ns, b.leads, b.behinds) == (1, 1, 400, 1, 0)
    assert (a.first, a.sightings, a.behind_ns, a.behinds, a.leads) == (0, 1, 400, 1, 0)
    assert (c.first, c.behind_ns) == (0, 2_000)


def test_a_timeline_has_every_mark_in_order_with_what_came_before_the_proof() -> None:
    desk = _Desk()
    (block,) = desk.mine()
    desk.hear(
        sighting_of(block, "c", INV, 500), sighting_of(block, "a", seen_ns=700), sighting_of(block, "b", seen_ns=900)
    )
    (row,) = desk.status.blocks()
    names = [desk.status.peers()[mark.peer].name for mark in row.marks[: row.sightings]]
    assert names == [b"c", b"a", b"b"]
    assert [mark.seen_ns for mark in row.marks[:3]] == [500, 700, 900]
    assert row.marks[0].announcement == INV
    assert (row.first_seen_ns, row.proven_ns, row.sightings) == (500, 500 + MS, 3)
    assert bytes(row.record) == RECORD
    assert row.state & State.VALIDATED  # the inv said so
    assert row.validated_ns


def test_what_is_said_of_a_block_later_stands_in_its_row() -> None:
    desk = _Desk()
    (loser,) = desk.mine()
    desk.hear(sighting_of(loser))
    bits = REGTEST.pow_limit_bits
    first = mine(desk.stage.node.headers.hash_at(5), 6, WALL_S + 1_000, bits, b"fork")
    desk.hear(sighting_of(first), sighting_of(mine(first.hash, 7, WALL_S + 1_000, bits)))
    lost = desk.status.blocks()[2]
    assert lost.state & State.STALE
    assert lost.stale_ns
    assert (desk.status.relay.stale, desk.status.relay.reorgs) == (1, 1)


def test_a_whole_block_s_count_and_size_stand_in_its_row_and_nothing_else_of_its_record() -> None:
    desk = _Desk()
    (block,) = desk.mine()
    desk.hear(sighting_of(block, seen_ns=1_000))
    (rebuilt,) = desk.stage.relay.rebuilt(BlockRebuilt(block.hash, 3, 1_000), 0)
    desk.ledger.published(rebuilt, 2, bytes(192), 5_000)
    row = desk.status.blocks(1)[0]
    assert bytes(row.record) == RECORD[:44] + bytes(8) + RECORD[52:]
    assert row.state & State.REBUILT


def test_a_sighting_that_was_held_counts_once() -> None:
    desk = _Desk()
    parent, child = desk.mine(2)
    desk.hear(sighting_of(child, "a", seen_ns=10), sighting_of(parent, "b", seen_ns=20))
    assert desk.status.relay.sightings == 2
    assert desk.status.relay.proven == 2
    newest, older = desk.status.blocks()
    assert (newest.sightings, older.sightings) == (1, 1)
    assert desk.peer("a").first == desk.peer("b").first == 1


def test_nobody_is_first_with_a_block_from_before_the_session() -> None:
    desk = _Desk()
    old = desk.stage.node.blocks[desk.stage.chain.hash_at(5)]
    desk.hear(sighting_of(old, "a", HEADERS, 5), sighting_of(old, "b", HEADERS, 6))
    assert desk.status.relay.duplicates == 2
    assert all(row.first == 0 for row in desk.status.peers())


def test_more_sightings_than_a_row_has_marks_for_still_count() -> None:
    desk = _Desk()
    (block,) = desk.mine()
    desk.hear(*(sighting_of(block, "abc"[number % 3], seen_ns=number) for number in range(MARKS + 5)))
    (row,) = desk.status.blocks()
    assert row.sightings == MARKS + 5
    assert row.marks[MARKS - 1].seen_ns == MARKS - 1


def test_a_row_that_was_taken_for_a_newer_block_is_left_alone() -> None:
    desk = _Desk()
    blocks = desk.mine(BLOCKS + 1)
    desk.hear(*(sighting_of(block, seen_ns=number) for number, block in enumerate(blocks)))
    before = bytes(desk.status.layout.blocks[0])
    desk.hear(sighting_of(blocks[0], "b", seen_ns=9_999))
    assert bytes(desk.status.layout.blocks[0]) == before
    desk.hear(sighting_of(blocks[1], "b", seen_ns=9_999))
    assert desk.status.layout.blocks[1].sightings == 2


def test_what_is_remembered_is_bounded_however_the_blocks_were_found() -> None:
    desk = _Desk()
    limit = MAX_UNPROVEN + BLOCKS
    desk.hear(*(sighting_of(block) for block in desk.mine(limit)))
    desk.stage.hear_run(headers_of(desk.mine(200)))
    desk.book()
    for number in range(limit):
        strange = mine(bytes(32), 1, WALL_S, REGTEST.pow_limit_bits, b"%d" % number)
        desk.hear(sighting_of(strange, "a", INV))
    assert len(desk.ledger._seen) <= limit


def test_a_peer_without_a_row_does_no_harm() -> None:
    desk = _Desk()
    for number in range(40):
        desk.status.peer_index(f"other{number}")
    (block,) = desk.mine()
    desk.hear(sighting_of(block, "nobody"), sighting_of(block, "a"))
    (row,) = desk.status.blocks()
    assert row.marks[0].peer == len(desk.status.layout.peers)
    assert row.sightings == 2


def test_an_event_of_a_block_without_a_row_is_only_counted() -> None:
    desk = _Desk(blocks=8)
    bits = REGTEST.pow_limit_bits
    previous, blocks = desk.stage.chain.hash_at(6), []
    for height in (7, 8, 9):
        blocks.append(mine(previous, height, WALL_S + 1_000, bits, b"fork"))
        previous = blocks[-1].hash
    desk.hear(*(sighting_of(block) for block in blocks))
    assert desk.status.relay.stale == 2
    assert len(desk.status.blocks()) == 3
