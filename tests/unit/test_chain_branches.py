"""Branches beside the best chain, reorganisations, and what may be asked of a chain."""

from __future__ import annotations

import pytest

from sprint.bench.synthetic import joined, mine, mine_branch
from sprint.bitcoin.difficulty import header_time
from sprint.bitcoin.networks import REGTEST
from sprint.chain import Accepted, HeaderChain, Reject, Reorg
from sprint.side_branches import MAX_SIDE_HEADERS

GENESIS_TIME = header_time(REGTEST.genesis_header)
FAR = 1 << 32
"""A wall clock that finds nothing too new."""


def _child(parent: bytes, time: int, salt: int = 0) -> tuple[bytes, bytes]:
    return mine(parent, salt.to_bytes(32, "little"), time, REGTEST.pow_limit_bits)


def _regtest(count: int, salt: int = 0) -> tuple[HeaderChain, list[tuple[bytes, bytes]]]:
    chain = HeaderChain(REGTEST)
    trunk = mine_branch(REGTEST.genesis_hash, 0, count, salt)
    assert chain.extend(joined(trunk), FAR).accepted == count
    return chain, trunk


# Branches


def test_the_first_seen_of_two_equals_stays_best_until_the_other_grows() -> None:
    chain, trunk = _regtest(5)
    rival, rival_hash = mine_branch(trunk[3][1], 4, 1, salt=1)[0]
    assert chain.accept(rival, FAR) == Accepted(rival_hash, 5, best=False, duplicate=False, reorg=None)
    assert chain.tip_hash == trunk[4][1]
    assert [(tip.hash, tip.fork_height) for tip in chain.tips()] == [(trunk[4][1], 5), (rival_hash, 4)]
    child, child_hash = mine_branch(rival_hash, 5, 1, salt=1)[0]
    reorg = Reorg(4, (trunk[4][1],), (rival_hash, child_hash))
    assert chain.accept(child, FAR) == Accepted(child_hash, 6, best=True, duplicate=False, reorg=reorg)
    assert (chain.tip_hash, chain.tip_height) == (child_hash, 6)
    assert not chain.is_best(trunk[4][1])
    assert (chain.height_of(trunk[4][1]), chain.fork_height(trunk[4][1])) == (5, 4)


def test_a_batch_reports_one_reorganisation_up_to_its_last_header() -> None:
    chain, trunk = _regtest(10)
    rival = mine_branch(trunk[6][1], 7, 5, salt=1)
    result = chain.extend(joined(trunk[4:7] + rival), FAR)
    assert (result.duplicates, result.accepted, result.rejection, result.best) == (3, 5, None, True)
    assert result.reorg == Reorg(7, tuple(h for _, h in trunk[7:]), tuple(h for _, h in rival))
    assert chain.tip_height == 12
    back = mine_branch(trunk[9][1], 10, 3)
    result = chain.extend(joined(back), FAR)
    assert result.reorg == Reorg(7, tuple(h for _, h in rival), tuple(h for _, h in trunk[7:] + back))


def test_a_fork_far_below_the_tip_is_refused_and_one_just_below_is_kept() -> None:
    chain, trunk = _regtest(250)
    deep = mine_branch(trunk[49][1], 50, 1, salt=1)[0]
    assert chain.accept(deep[0], FAR) is Reject.LOW_WORK
    assert not chain.knows(deep[1])
    near = mine_branch(trunk[246][1], 247, 1, salt=1)[0]
    assert isinstance(chain.accept(near[0], FAR), Accepted)
    assert chain.knows(near[1])


@pytest.mark.parametrize(("below", "accepted"), [(145, True), (146, False)])
def test_the_bar_is_144_blocks_of_work_below_the_tip(below: int, accepted: bool) -> None:
    chain, trunk = _regtest(250)
    header, _ = mine_branch(trunk[249 - below][1], 250 - below, 1, salt=1)[0]
    assert isinstance(chain.accept(header, FAR), Accepted) is accepted


def test_a_batch_is_judged_by_its_end_and_leaves_nothing_behind_if_it_is_too_low() -> None:
    chain, trunk = _regtest(400)
    rival = mine_branch(trunk[99][1], 100, 301, salt=1)
    low = chain.extend(joined(rival[:100]), FAR)
    assert (low.accepted, low.rejection, low.best) == (0, Reject.LOW_WORK, False)
    assert not any(chain.knows(rival_hash) for _, rival_hash in rival)
    enough = chain.extend(joined(rival[:160]), FAR)
    assert (enough.accepted, enough.rejection, enough.best) == (160, None, False)
    restored = HeaderChain(REGTEST)
    assert restored.restore(joined(trunk + rival[:160])).kept == 560
    assert restored.tips() == chain.tips()
    over = chain.extend(joined(rival), FAR)
    assert (over.duplicates, over.accepted, over.best) == (160, 141, True)
    assert over.reorg is not None
    assert (over.reorg.fork_height, len(over.reorg.disconnected), len(over.reorg.connected)) == (100, 300, 301)


def test_a_batch_whose_headers_do_not_follow_each_other_ends_there() -> None:
    chain, trunk = _regtest(6)
    rivals = [mine_branch(trunk[height][1], height + 1, 1, salt=1)[0] for height in (3, 4)]
    result = chain.extend(joined(rivals), FAR)
    assert (result.accepted, result.rejection) == (1, Reject.NOT_CONSECUTIVE)


def test_an_empty_batch_changes_nothing() -> None:
    result = HeaderChain(REGTEST).extend(b"", FAR)
    assert (result.accepted, result.duplicates, result.rejection, result.best) == (0, 0, None, False)


def test_a_hundred_thousand_junk_side_headers_leave_memory_bounded_and_the_tip_alone() -> None:
    chain, trunk = _regtest(200)
    parents = [header_hash for _, header_hash in trunk[150:190]]
    for number in range(100_000):
        height = 151 + number % 40
        header, _ = _child(parents[number % 40], GENESIS_TIME + 600 * (height + 1), number + 1)
        chain.accept(header, FAR)
    assert chain.tip_hash == trunk[-1][1]
    assert len(chain.tips()) == MAX_SIDE_HEADERS + 1
    assert len(chain._side._leaves) <= 2 * MAX_SIDE_HEADERS + 17
    assert len(chain._side._children) <= MAX_SIDE_HEADERS
    # The leaves of most work are those that stay, and a real rival still gets in and wins.
    assert min(tip.height for tip in chain.tips()) >= 190 - MAX_SIDE_HEADERS // 2500 - 1
    rival = mine_branch(trunk[197][1], 198, 3, salt=1 << 40)
    assert chain.extend(joined(rival), FAR).reorg is not None
    assert chain.tip_hash == rival[-1][1]
    assert len(chain._side) == MAX_SIDE_HEADERS


def test_headers_broken_for_good_are_remembered_within_a_bound() -> None:
    chain = HeaderChain(REGTEST)
    broken = [_child(REGTEST.genesis_hash, GENESIS_TIME, salt) for salt in range(1500)]
    for header, _ in broken:
        assert chain.accept(header, FAR) is Reject.TIME_TOO_OLD
    assert len(chain._invalid) == 1024
    newest, _ = _child(broken[-1][1], GENESIS_TIME + 600)
    oldest, _ = _child(broken[0][1], GENESIS_TIME + 600)
    assert chain.accept(newest, FAR) is Reject.KNOWN_INVALID
    assert chain.accept(oldest, FAR) is Reject.UNKNOWN_PARENT


def test_a_branch_longer_than_the_bound_is_refused_unless_it_overtakes_the_tip_in_time() -> None:
    chain, trunk = _regtest(MAX_SIDE_HEADERS + 60)
    rival, before = mine_branch(REGTEST.genesis_hash, 0, MAX_SIDE_HEADERS + 50, salt=1), chain.tips()
    result = chain.extend(joined(rival), FAR)
    assert (result.accepted, result.rejection) == (0, Reject.LOW_WORK)
    assert chain.tips() == before
    fitting = mine_branch(trunk[59][1], 60, MAX_SIDE_HEADERS + 30, salt=2)
    result = chain.extend(joined(fitting), FAR)
    assert (result.accepted, result.rejection, result.best) == (MAX_SIDE_HEADERS + 30, None, True)
    assert (chain.fork_height(trunk[60][1]), len(chain._side)) == (60, MAX_SIDE_HEADERS)


# Questions


def test_a_locator_steps_back_ever_faster_and_ends_at_genesis() -> None:
    chain, trunk = _regtest(100)
    heights = [chain.height_of(header_hash) for header_hash in chain.locator()]
    assert heights == [100, 99, 98, 97, 96, 95, 94, 93, 92, 91, 90, 89, 87, 83, 75, 59, 27, 0]
    rival = mine_branch(trunk[96][1], 97, 2, salt=1)
    chain.extend(joined(rival), FAR)
    assert chain.locator_from(rival[1][1])[:4] == [rival[1][1], rival[0][1], trunk[96][1], trunk[95][1]]
    with pytest.raises(KeyError):
        chain.locator_from(b"\1" * 32)


def test_headers_are_served_from_the_first_known_hash_of_a_locator() -> None:
    chain, trunk = _regtest(30)
    nothing = bytes(32)
    assert chain.headers_after([b"\1" * 32, trunk[9][1], trunk[4][1]], nothing) == joined(trunk[10:])
    assert chain.headers_after([trunk[9][1]], trunk[14][1]) == joined(trunk[10:15])
    assert chain.headers_after([trunk[9][1]], trunk[4][1]) == joined(trunk[10:])
    assert chain.headers_after([trunk[9][1]], nothing, limit=3) == joined(trunk[10:13])
    assert chain.headers_after([b"\1" * 32], nothing) == joined(trunk)
    assert chain.headers_after([chain.tip_hash], nothing) == b""
    assert chain.headers_after([], trunk[7][1]) == trunk[7][0]
    assert chain.headers_after([], nothing) == b""


def test_another_chain_catches_up_by_locators_alone() -> None:
    server, _ = _regtest(450)
    client, _ = _regtest(40, salt=3)
    while client.tip_hash != server.tip_hash:
        piece = server.headers_after(client.locator(), bytes(32), limit=100)
        assert piece
        assert client.extend(piece, FAR).rejection is None
    assert client.tip_work == server.tip_work


def test_what_is_unknown_is_said_to_be_so() -> None:
    chain, _ = _regtest(3)
    stranger = b"\1" * 32
    assert not chain.knows(stranger)
    assert [chain.header_of(stranger), chain.work_of(stranger), chain.fork_height(stranger)] == [None] * 3
    for question in (chain.median_time_past, chain.next_bits):
        with pytest.raises(KeyError, match="01" * 32):
            question(stranger)
    for height in (-1, 4):
        with pytest.raises(IndexError, match="from 0 to 3"):
            chain.header_at(height)
    assert chain.median_time_past(3) == GENESIS_TIME + 1200
