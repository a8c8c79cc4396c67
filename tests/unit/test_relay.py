"""The relay: what is published of all that peers say, how often, with which state, and what the books say of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sprint import relay as relay_module
from sprint.bitcoin.block import double_sha256
from sprint.bitcoin.networks import REGTEST
from sprint.chain import HeaderChain, Reject
from sprint.events import Announcement, Block, Event, Sighting, Source, State
from sprint.relay import Outcome, Relay
from tests.unit.chains import BITS, MS, WALL_S, Stage, fork_of, headers_of, record_of, sighting_of, stranger, told

if TYPE_CHECKING:
    import pytest

PROVEN, VALIDATED = Event.PROVEN, Event.VALIDATED
INV, HEADERS = Announcement.INV, Announcement.HEADERS


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
        stage.hear(sighting_of(stranger(extra=b"%d" % number), "a", INV))
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
    stage.hear(sighting_of(stranger(), "a", INV))
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


# The books


def test_headers_handed_out_give_a_fresh_chain_the_same_tip() -> None:
    stage = Stage(blocks=30)
    stage.sync()
    new = stage.node.extend(2, WALL_S)
    stage.hear(sighting_of(new[1]), sighting_of(new[0]), sighting_of(stranger()))
    fork = fork_of(stage, 29, 5)
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
    winners = fork_of(before, 10, 2)
    before.hear(sighting_of(loser), *(sighting_of(block) for block in winners))
    records = [record_of(number, block) for number, block in enumerate(before.published, 1)]
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
