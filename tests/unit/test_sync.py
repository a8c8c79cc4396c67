"""The header conversation: whom it asks and when, and what it takes for having caught up."""

from __future__ import annotations

from dataclasses import replace

from sprint.bitcoin.networks import REGTEST
from sprint.events import HeaderRun, PeerGone, PeerReady, Source
from sprint.sync import RETRY_NS, UNANSWERED_NS, HeaderSync
from tests.unit.chains import MS, SECOND, WALL_S, Stage, headers_of

HARD = replace(REGTEST, minimum_chain_work=2 * 101)
"""Main's bar against chains that are still short: here a hundred blocks."""
AGED = replace(REGTEST, max_tip_age_s=24 * 3_600)


def _asked(stage: Stage) -> list[str]:
    peers = [want.peer for want in stage.wants]
    stage.wants.clear()
    return peers


# Caught up, or not


def test_the_first_sync_asks_on_until_the_peer_has_no_more() -> None:
    stage = Stage(blocks=4_500)
    stage.connect()
    assert [len(want.locator) for want in stage.wants] == [1]
    assert stage.answer() == []
    assert (stage.asked, stage.chain.tip_height, stage.relay.caught_up) == (3, 4_500, True)


def test_a_question_starts_one_below_our_tip() -> None:
    stage = Stage(blocks=40)
    stage.sync()
    stage.lose("a")
    stage.connect("a")
    (want,) = stage.wants
    assert want.locator[0] == stage.chain.hash_at(39)
    assert want.locator[-1] == REGTEST.genesis_hash


def test_a_new_regtest_chain_is_current_without_an_answer() -> None:
    stage = Stage()
    stage.connect()
    assert stage.relay.caught_up


def test_a_peer_without_blocks_does_not_make_us_current_where_the_tip_has_an_age() -> None:
    stage = Stage(network=AGED)
    stage.connect()
    stage.answer()
    assert not stage.relay.caught_up


def test_an_empty_answer_below_the_minimum_of_work_is_not_caught_up() -> None:
    stage = Stage(blocks=50, network=HARD)
    stage.connect()
    stage.answer()
    assert not stage.relay.caught_up
    assert stage.chain.tip_height == 50
    stage.node.extend(60, WALL_S)
    stage.wait(RETRY_NS)
    assert _asked(stage) == ["a"]
    stage.hear_run(headers_of(list(stage.node.blocks.values())[50:]))
    assert stage.relay.caught_up
    assert stage.published == []


def test_an_old_tip_is_not_caught_up() -> None:
    stage = Stage(network=AGED)
    stage.node.extend(30, WALL_S - 48 * 3_600)
    stage.connect()
    stage.answer()
    assert not stage.relay.caught_up
    fresh = stage.node.extend(1, WALL_S)
    stage.hear_run(headers_of(fresh))
    assert stage.relay.caught_up


def test_an_empty_answer_of_a_peer_that_claimed_more_is_not_caught_up() -> None:
    stage = Stage(blocks=5)
    stage.connect("a", height=900)
    stage.hear_run(headers_of(stage.node.blocks.values()))
    assert not stage.relay.caught_up
    stage.hear_run(b"")
    assert not stage.relay.caught_up


def test_a_peer_far_behind_us_can_not_tell_that_we_are_current() -> None:
    stage = Stage(blocks=50)
    stage.chain.restore(headers_of(stage.node.blocks.values()))
    stage.connect("behind", height=43)
    stage.wants.clear()
    stage.hear_run(b"", "behind")
    assert not stage.relay.caught_up
    stage.connect("near", height=44)
    stage.hear_run(b"", "near")
    assert stage.relay.caught_up


def test_an_answer_that_is_refused_is_not_caught_up() -> None:
    stage = Stage(blocks=50)
    stage.chain.restore(headers_of(stage.node.blocks.values()))
    stage.connect("a")
    header = bytearray(stage.node.blocks[stage.chain.tip_hash].header.encode())
    header[10] ^= 1
    while True:  # a header of work on a parent that we don't know
        header[76] = (header[76] + 1) % 256
        stage.hear_run(bytes(header))
        if stage.relay.take_refused_runs():
            break
    assert not stage.relay.caught_up


def test_once_caught_up_every_other_peer_is_asked() -> None:
    stage = Stage(blocks=20)
    for peer in "abc":
        stage.connect(peer)
    assert [want.peer for want in stage.wants] == ["a"]
    want = stage.wants.pop()
    stage.hear_run(stage.node.headers_after(want.locator, bytes(32)), "a")
    assert _asked(stage) == ["b", "c"]
    stage.connect("d")
    assert _asked(stage) == ["d"]


# Who serves


def test_when_the_serving_peer_is_lost_the_next_one_takes_over() -> None:
    stage = Stage(blocks=20)
    stage.connect("a")
    stage.connect("b")
    assert _asked(stage) == ["a"]
    stage.lose("a")
    assert [want.peer for want in stage.wants] == ["b"]
    stage.answer()
    assert stage.relay.caught_up


def test_when_the_serving_peer_is_silent_the_next_one_takes_over_in_turn() -> None:
    stage = Stage(blocks=20)
    for peer in "abc":
        stage.connect(peer)
    assert _asked(stage) == ["a"]
    for peer in "bcab":
        assert stage.wait(UNANSWERED_NS - MS) == []
        assert stage.wants == []
        stage.wait(MS)
        assert _asked(stage) == [peer]


def test_a_silent_peer_is_asked_again_if_it_is_the_only_one() -> None:
    stage = Stage(blocks=20)
    stage.connect("a")
    assert _asked(stage) == ["a"]
    stage.wait(UNANSWERED_NS)
    assert _asked(stage) == ["a"]


def test_a_peer_that_is_itself_syncing_is_asked_again_and_the_others_too() -> None:
    stage = Stage(blocks=20)
    stage.connect("a", height=500)
    stage.connect("b", height=500)
    _asked(stage)
    stage.hear_run(b"", "a")
    assert _asked(stage) == ["b"]  # at once: it may know better
    stage.hear_run(b"", "b")
    assert stage.wants == []
    stage.wait(RETRY_NS)
    assert _asked(stage) == ["a"]
    stage.hear_run(b"", "a")
    assert _asked(stage) == ["b"]


def test_a_peer_that_comes_while_the_others_have_disappointed_us_is_asked_at_once() -> None:
    stage = Stage(blocks=20)
    stage.connect("a", height=500)
    _asked(stage)
    stage.hear_run(b"", "a")
    stage.connect("b")
    assert _asked(stage) == ["b"]


def test_a_peer_that_connects_anew_without_a_farewell_is_asked_anew() -> None:
    stage = Stage(blocks=20)
    stage.connect("a")
    stage.wants.clear()
    stage.connect("a")
    assert _asked(stage) == ["a"]


def test_without_a_peer_nothing_is_due() -> None:
    stage = Stage(blocks=20)
    stage.connect("a")
    stage.lose("a")
    assert stage.wants == []
    stage.wait(60 * SECOND)
    assert stage.wants == []


# Open questions


def test_a_late_answer_of_a_peer_that_has_gone_changes_nothing() -> None:
    sync = HeaderSync(Stage().chain)
    run = HeaderRun(Source.P2P, "ghost", b"", 1, complete=True)
    assert not sync.answered(run, grew=False, refused=False, last_height=None, now_ns=1, wall_s=WALL_S)
    assert sync.take_wants() == []


def test_what_comes_up_while_a_question_is_open_is_asked_with_the_answer() -> None:
    stage = Stage(blocks=20)
    stage.sync()
    stage.relay.sync.ask("a", stage.now_ns)
    stage.relay.sync.ask("a", stage.now_ns)
    assert len(stage.relay.take_wants()) == 1
    stage.hear_run(b"")
    assert _asked(stage) == ["a"]


def test_what_comes_up_while_a_question_is_open_is_asked_when_the_answer_is_overdue() -> None:
    stage = Stage(blocks=20)
    stage.sync()
    stage.relay.sync.ask("a", stage.now_ns)
    stage.relay.sync.ask("a", stage.now_ns)
    assert len(stage.relay.take_wants()) == 1
    stage.wait(UNANSWERED_NS)
    assert _asked(stage) == ["a"]
    stage.wait(60 * SECOND)
    assert stage.wants == []


def test_the_timer_rests_once_a_chain_without_blocks_is_current() -> None:
    """One peer promised blocks and gave none, then another has none to promise: no retry stays due for ever."""
    sync = HeaderSync(Stage().chain)
    sync.peer_ready(PeerReady(Source.P2P, "a", 900), 0)
    empty = HeaderRun(Source.P2P, "a", b"", 1, complete=True)
    sync.answered(empty, grew=False, refused=False, last_height=None, now_ns=1, wall_s=WALL_S)
    assert sync.deadline() is not None
    sync.peer_ready(PeerReady(Source.P2P, "b", 0), 2)
    assert sync.caught_up
    assert sync.deadline() is None


def test_a_timer_that_runs_too_early_does_nothing() -> None:
    stage = Stage(blocks=20)
    stage.connect("a")
    due = stage.relay.sync.deadline()
    assert due is not None
    stage.wants.clear()
    stage.relay.sync.on_timer(due - 1)
    assert stage.relay.take_wants() == []
    stage.relay.sync.peer_gone(PeerGone(Source.P2P, "nobody"), due)
    assert stage.relay.take_wants() == []
