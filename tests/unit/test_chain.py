from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sprint.bench.synthetic import SYNTHETIC, mine, synthetic_headers
from sprint.bitcoin.block import double_sha256, work_of
from sprint.bitcoin.difficulty import MAX_FUTURE_S, header_bits, header_time, required_bits
from sprint.bitcoin.networks import MAIN, NETWORKS, REGTEST, TESTNET3, TESTNET4, Network
from sprint.chain import Accepted, HeaderChain, Reject, Reorg
from sprint.side_branches import MAX_SIDE_HEADERS

GENESIS_TIME = header_time(REGTEST.genesis_header)
EASY = REGTEST.pow_limit_bits
FAR = 1 << 32
"""A wall clock that finds nothing too new."""

CHAINS = [
    pytest.param(vector, id=path.stem)
    for path in sorted((Path(__file__).parents[1] / "vectors" / "headers").glob("*.json"))
    for vector in [json.loads(path.read_text())]
    if "headers" in vector
]


def _child(parent: bytes, time: int, salt: int = 0, bits: int = EASY) -> tuple[bytes, bytes]:
    return mine(parent, salt.to_bytes(32, "little"), time, bits)


def _branch(parent: bytes, parent_height: int, count: int, salt: int = 0) -> list[tuple[bytes, bytes]]:
    """(header, hash) upwards, ten minutes apart by height."""
    made = []
    for height in range(parent_height + 1, parent_height + 1 + count):
        header, parent = _child(parent, GENESIS_TIME + 600 * height, salt)
        made.append((header, parent))
    return made


def _joined(branch: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(header for header, _ in branch)


def _regtest(count: int, salt: int = 0) -> tuple[HeaderChain, list[tuple[bytes, bytes]]]:
    chain = HeaderChain(REGTEST)
    trunk = _branch(REGTEST.genesis_hash, 0, count, salt)
    assert chain.extend(_joined(trunk), FAR).accepted == count
    return chain, trunk


def _easy(network: Network, **changes: Any) -> Network:
    """That network's rules at regtest's limit, in periods of eight blocks."""
    return replace(
        network,
        genesis_header=REGTEST.genesis_header,
        genesis_hash=REGTEST.genesis_hash,
        pow_limit=REGTEST.pow_limit,
        pow_limit_bits=EASY,
        interval=8,
        target_timespan=4800,
        **changes,
    )


def _unmined(header: bytes) -> bytes:
    """The same header with a nonce that fails its target."""
    nonce = 0
    while double_sha256(changed := header[:76] + nonce.to_bytes(4, "little"))[31] < 0x80:
        nonce += 1
    return changed


# Real headers


@pytest.mark.parametrize("vector", CHAINS)
def test_real_headers_are_accepted_from_genesis_on(vector: dict[str, Any]) -> None:
    chain = HeaderChain(NETWORKS[vector["network"]])
    for height, (header, display_hash) in enumerate(zip(vector["headers"], vector["hashes"], strict=True), 1):
        outcome = chain.accept(bytes.fromhex(header), FAR)
        assert isinstance(outcome, Accepted)
        assert (outcome.hash[::-1].hex(), outcome.height, outcome.best) == (display_hash, height, True)
    again = HeaderChain(chain.network)
    assert again.extend(bytes.fromhex("".join(vector["headers"])), FAR).accepted == len(vector["headers"])
    assert again.tip_hash == chain.tip_hash


@pytest.mark.parametrize("vector", CHAINS)
def test_no_byte_of_a_real_header_can_be_changed(vector: dict[str, Any]) -> None:
    header = bytes.fromhex(vector["headers"][0])
    chain = HeaderChain(NETWORKS[vector["network"]])
    for at in range(80):
        forged = header[:at] + bytes([header[at] ^ 1]) + header[at + 1 :]
        assert chain.accept(forged, FAR) is Reject.NO_WORK
    assert chain.tip_height == 0


# Each rule, on the tip and on a side branch


@pytest.mark.parametrize("aside", [False, True], ids=["on the tip", "on a side branch"])
class TestRules:
    def parent(self, aside: bool) -> tuple[HeaderChain, bytes, int]:
        chain, trunk = _regtest(20)
        if not aside:
            return chain, chain.tip_hash, 20
        branch = _branch(trunk[16][1], 17, 2, salt=9)
        assert chain.extend(_joined(branch), FAR).accepted == 2
        return chain, branch[-1][1], 19

    def test_a_hash_above_its_own_target_is_no_work(self, aside: bool) -> None:
        chain, parent, height = self.parent(aside)
        header, _ = _child(parent, GENESIS_TIME + 600 * (height + 1), 5)
        assert chain.accept(_unmined(header), FAR) is Reject.NO_WORK

    @pytest.mark.parametrize("bits", [0x21008000, 0x22000100, 0x00000000, 0x20FFFFFF, 0xFFFFFFFF])
    def test_a_target_beyond_the_limit_or_nonsense_is_no_work(self, aside: bool, bits: int) -> None:
        chain, parent, height = self.parent(aside)
        header, _ = _child(parent, GENESIS_TIME + 600 * (height + 1), 5)
        forged = header[:72] + bits.to_bytes(4, "little") + header[76:]
        assert chain.accept(forged, FAR) is Reject.NO_WORK

    def test_bits_other_than_the_rules_demand_are_refused_even_if_harder(self, aside: bool) -> None:
        chain, parent, height = self.parent(aside)
        header, _ = _child(parent, GENESIS_TIME + 600 * (height + 1), 5, bits=0x2000FFFF)
        assert chain.accept(header, FAR) is Reject.BAD_BITS

    def test_a_version_that_a_soft_fork_outlawed_is_refused(self, aside: bool) -> None:
        chain, parent, height = self.parent(aside)
        for version in (3, -1):
            header, _ = _child(parent, GENESIS_TIME + 600 * (height + 1), 5)
            nonce = 0
            head = version.to_bytes(4, "little", signed=True) + header[4:76]
            while double_sha256(old := head + nonce.to_bytes(4, "little"))[31] >= 0x7F:
                nonce += 1
            assert chain.accept(old, FAR) is Reject.BAD_VERSION

    def test_a_time_must_exceed_the_median_of_the_last_eleven(self, aside: bool) -> None:
        chain, parent, height = self.parent(aside)
        median = GENESIS_TIME + 600 * (height - 5)
        assert chain.median_time_past(parent) == median
        at, _ = _child(parent, median, 5)
        above, above_hash = _child(parent, median + 1, 5)
        assert chain.accept(at, FAR) is Reject.TIME_TOO_OLD
        outcome = chain.accept(above, FAR)
        assert isinstance(outcome, Accepted)
        assert (outcome.hash, outcome.best) == (above_hash, not aside)

    def test_a_header_too_far_ahead_is_refused_and_accepted_later(self, aside: bool) -> None:
        chain, parent, height = self.parent(aside)
        time = GENESIS_TIME + 600 * (height + 1)
        header, header_hash = _child(parent, time, 5)
        early = time - MAX_FUTURE_S - 1
        outcome = chain.accept(header, early)
        assert outcome is Reject.TIME_TOO_NEW
        assert outcome.retriable
        assert not chain.knows(header_hash)
        assert isinstance(chain.accept(header, early + 1), Accepted)

    def test_the_child_of_a_broken_header_is_known_to_be_invalid(self, aside: bool) -> None:
        chain, parent, height = self.parent(aside)
        header, header_hash = _child(parent, GENESIS_TIME, 5)
        child, child_hash = _child(header_hash, GENESIS_TIME + 600 * (height + 2), 5)
        grandchild, _ = _child(child_hash, GENESIS_TIME + 600 * (height + 3), 5)
        assert chain.accept(child, FAR) is Reject.UNKNOWN_PARENT
        assert chain.accept(header, FAR) is Reject.TIME_TOO_OLD
        assert chain.accept(child, FAR) is Reject.KNOWN_INVALID
        assert chain.accept(grandchild, FAR) is Reject.KNOWN_INVALID
        assert chain.accept(header, FAR) is Reject.TIME_TOO_OLD


def test_a_parent_never_seen_is_told_apart_only_once_the_work_is_done() -> None:
    chain = HeaderChain(REGTEST)
    header, _ = _child(b"\x07" * 32, GENESIS_TIME + 600)
    assert chain.accept(header, FAR) is Reject.UNKNOWN_PARENT
    assert chain.accept(_unmined(header), FAR) is Reject.NO_WORK


def test_a_header_seen_again_is_a_duplicate_and_changes_nothing() -> None:
    chain, trunk = _regtest(3)
    for height, (header, header_hash) in enumerate(trunk, 1):
        assert chain.accept(header, FAR) == Accepted(header_hash, height, best=height == 3, duplicate=True, reorg=None)
    assert chain.accept(REGTEST.genesis_header, FAR) == Accepted(
        REGTEST.genesis_hash, 0, best=False, duplicate=True, reorg=None
    )
    assert chain.tip_height == 3


@pytest.mark.parametrize("size", [0, 79, 81, 160])
def test_accept_wants_exactly_one_header(size: int) -> None:
    with pytest.raises(ValueError, match="80"):
        HeaderChain(REGTEST).accept(bytes(size), FAR)


def test_a_batch_must_be_whole_headers() -> None:
    with pytest.raises(ValueError, match="80"):
        HeaderChain(REGTEST).extend(bytes(81), FAR)


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_version_rules_begin_at_their_height_in_the_middle_of_a_batch(offset: int) -> None:
    network = replace(REGTEST, bip34_height=0, bip66_height=0, bip65_height=30 + offset)
    headers = b""
    parent = network.genesis_hash
    for height in range(1, 61):
        nonce = 0
        head = (3).to_bytes(4, "little") + parent + bytes(32) + (GENESIS_TIME + height).to_bytes(4, "little")
        head += EASY.to_bytes(4, "little")
        while double_sha256(header := head + nonce.to_bytes(4, "little"))[31] >= 0x7F:
            nonce += 1
        headers += header
        parent = double_sha256(header)
    result = HeaderChain(network).extend(headers, FAR)
    assert (result.accepted, result.rejection) == (29 + offset, Reject.BAD_VERSION)


# Retargets as the chain applies them


def test_a_synthetic_main_chain_changes_its_bits_and_is_accepted_in_pieces_of_any_size() -> None:
    headers = b"".join(synthetic_headers(6100))
    whole = HeaderChain(SYNTHETIC)
    assert whole.extend(headers, FAR).accepted == 6100
    assert len({header_bits(whole.header_at(height)) for height in range(6100)}) > 3
    pieces = HeaderChain(SYNTHETIC)
    at = 0
    for size in range(1, 200):
        pieces.extend(memoryview(headers)[at * 80 : (at + size) * 80], FAR)
        at += size
    assert (pieces.tip_hash, pieces.tip_work) == (whole.tip_hash, whole.tip_work)
    work = sum(work_of(header_bits(whole.header_at(height))) for height in range(6101))
    assert whole.tip_work == work


def test_every_header_of_a_long_chain_is_found_by_its_hash() -> None:
    headers = b"".join(synthetic_headers(9000))
    chain = HeaderChain(SYNTHETIC)
    chain.extend(headers, FAR)
    work = 0
    for height in range(9001):
        header = chain.header_at(height)
        header_hash = double_sha256(header)
        work += work_of(header_bits(header))
        assert (chain.hash_at(height), chain.height_of(header_hash)) == (header_hash, height)
        if height % 37 == 0:
            assert chain.work_of(header_hash) == work
    assert chain.height_of(b"\x01" * 32) is None


def test_the_old_bits_are_refused_after_a_retarget() -> None:
    headers = b"".join(synthetic_headers(2016))
    chain = HeaderChain(SYNTHETIC)
    chain.extend(headers[: 2015 * 80], FAR)
    last = headers[2015 * 80 :]
    assert chain.next_bits(chain.tip_hash) == header_bits(last) != EASY
    stale, _ = mine(chain.tip_hash, bytes(32), header_time(last), EASY)
    assert chain.accept(stale, FAR) is Reject.BAD_BITS
    assert isinstance(chain.accept(last, FAR), Accepted)


@pytest.mark.parametrize("network", [_easy(MAIN), _easy(TESTNET3), _easy(TESTNET4)], ids=lambda network: network.name)
def test_a_chain_with_late_and_early_blocks_follows_its_networks_rules(network: Network) -> None:
    chain = HeaderChain(network)
    headers = [network.genesis_header]
    parent = network.genesis_hash
    seen = set()
    for height in range(1, 64):
        gap = (300, 250, 1300, 500, 100, 2500)[height * height % 6]
        time = header_time(headers[-1]) + gap
        bits = required_bits(network, height, time, headers.__getitem__)
        seen.add(bits)
        header, parent = mine(parent, bytes(32), time, bits)
        headers.append(header)
        if height % 2:
            assert isinstance(chain.accept(header, FAR), Accepted)
        elif height % 4 == 0:
            assert chain.extend(header, FAR).accepted == 1
        else:
            assert chain.restore(header).kept == 1
    again = HeaderChain(network)
    assert again.extend(b"".join(headers[1:]), FAR).accepted == 63
    assert (again.tip_hash, again.tip_work) == (chain.tip_hash, chain.tip_work)
    assert len(seen) > 1


def test_only_testnet4_refuses_a_period_that_begins_more_than_ten_minutes_before_its_parent() -> None:
    for base, expected in ((TESTNET4, Reject.TIME_TOO_OLD), (TESTNET3, None)):
        network = _easy(base)
        chain = HeaderChain(network)
        trunk = _branch(network.genesis_hash, 0, 7)
        assert chain.extend(_joined(trunk), FAR).accepted == 7
        bits = chain.next_bits(chain.tip_hash)
        early, _ = mine(chain.tip_hash, bytes(32), chain.tip_time - 601, bits)
        outcome = chain.accept(early, FAR)
        assert (outcome if isinstance(outcome, Reject) else None) is expected
        just, _ = mine(trunk[-1][1], b"\1" * 32, header_time(trunk[-1][0]) - 600, bits)
        assert isinstance(chain.accept(just, FAR), Accepted)


# Branches


def test_the_first_seen_of_two_equals_stays_best_until_the_other_grows() -> None:
    chain, trunk = _regtest(5)
    rival, rival_hash = _branch(trunk[3][1], 4, 1, salt=1)[0]
    assert chain.accept(rival, FAR) == Accepted(rival_hash, 5, best=False, duplicate=False, reorg=None)
    assert chain.tip_hash == trunk[4][1]
    assert [(tip.hash, tip.fork_height) for tip in chain.tips()] == [(trunk[4][1], 5), (rival_hash, 4)]
    child, child_hash = _branch(rival_hash, 5, 1, salt=1)[0]
    reorg = Reorg(4, (trunk[4][1],), (rival_hash, child_hash))
    assert chain.accept(child, FAR) == Accepted(child_hash, 6, best=True, duplicate=False, reorg=reorg)
    assert (chain.tip_hash, chain.tip_height) == (child_hash, 6)
    assert not chain.is_best(trunk[4][1])
    assert (chain.height_of(trunk[4][1]), chain.fork_height(trunk[4][1])) == (5, 4)


def test_a_batch_reports_one_reorganisation_up_to_its_last_header() -> None:
    chain, trunk = _regtest(10)
    rival = _branch(trunk[6][1], 7, 5, salt=1)
    result = chain.extend(_joined(trunk[4:7] + rival), FAR)
    assert (result.duplicates, result.accepted, result.rejection, result.best) == (3, 5, None, True)
    assert result.reorg == Reorg(7, tuple(h for _, h in trunk[7:]), tuple(h for _, h in rival))
    assert chain.tip_height == 12
    back = _branch(trunk[9][1], 10, 3)
    result = chain.extend(_joined(back), FAR)
    assert result.reorg == Reorg(7, tuple(h for _, h in rival), tuple(h for _, h in trunk[7:] + back))


def test_a_fork_far_below_the_tip_is_refused_and_one_just_below_is_kept() -> None:
    chain, trunk = _regtest(250)
    deep = _branch(trunk[49][1], 50, 1, salt=1)[0]
    assert chain.accept(deep[0], FAR) is Reject.LOW_WORK
    assert not chain.knows(deep[1])
    near = _branch(trunk[246][1], 247, 1, salt=1)[0]
    assert isinstance(chain.accept(near[0], FAR), Accepted)
    assert chain.knows(near[1])


@pytest.mark.parametrize(("below", "accepted"), [(145, True), (146, False)])
def test_the_bar_is_144_blocks_of_work_below_the_tip(below: int, accepted: bool) -> None:
    chain, trunk = _regtest(250)
    header, _ = _branch(trunk[249 - below][1], 250 - below, 1, salt=1)[0]
    assert isinstance(chain.accept(header, FAR), Accepted) is accepted


def test_a_batch_is_judged_by_its_end_and_leaves_nothing_behind_if_it_is_too_low() -> None:
    chain, trunk = _regtest(400)
    rival = _branch(trunk[99][1], 100, 301, salt=1)
    low = chain.extend(_joined(rival[:100]), FAR)
    assert (low.accepted, low.rejection, low.best) == (0, Reject.LOW_WORK, False)
    assert not any(chain.knows(rival_hash) for _, rival_hash in rival)
    enough = chain.extend(_joined(rival[:160]), FAR)
    assert (enough.accepted, enough.rejection, enough.best) == (160, None, False)
    over = chain.extend(_joined(rival), FAR)
    assert (over.duplicates, over.accepted, over.best) == (160, 141, True)
    assert over.reorg is not None
    assert (over.reorg.fork_height, len(over.reorg.disconnected), len(over.reorg.connected)) == (100, 300, 301)


def test_a_batch_stops_at_its_first_bad_header_and_keeps_what_came_before() -> None:
    chain = HeaderChain(REGTEST)
    trunk = _branch(REGTEST.genesis_hash, 0, 9)
    bad = _unmined(trunk[5][0])
    result = chain.extend(_joined(trunk[:5]) + bad + _joined(trunk[6:]), FAR)
    assert (result.accepted, result.rejection, result.best, chain.tip_height) == (5, Reject.NO_WORK, True, 5)


def test_a_batch_whose_headers_do_not_follow_each_other_ends_there() -> None:
    chain, trunk = _regtest(6)
    rivals = [_branch(trunk[height][1], height + 1, 1, salt=1)[0] for height in (3, 4)]
    result = chain.extend(_joined(rivals), FAR)
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
    rival = _branch(trunk[197][1], 198, 3, salt=1 << 40)
    assert chain.extend(_joined(rival), FAR).reorg is not None
    assert chain.tip_hash == rival[-1][1]


def test_a_branch_longer_than_the_bound_that_still_lacks_work_is_refused() -> None:
    harder = replace(REGTEST, interval=100_000)
    chain = HeaderChain(harder)
    trunk = _branch(harder.genesis_hash, 0, MAX_SIDE_HEADERS + 200)
    chain.extend(_joined(trunk), FAR)
    rival = _branch(harder.genesis_hash, 0, MAX_SIDE_HEADERS + 100, salt=1)
    result = chain.extend(_joined(rival), FAR)
    assert (result.accepted, result.rejection) == (0, Reject.LOW_WORK)
    assert chain.tips()[1:] == ()
    fitting = _branch(trunk[199][1], 200, MAX_SIDE_HEADERS, salt=2)
    assert chain.extend(_joined(fitting[:-1]), FAR).accepted == MAX_SIDE_HEADERS - 1


# Questions


def test_a_locator_steps_back_ever_faster_and_ends_at_genesis() -> None:
    chain, trunk = _regtest(100)
    heights = [chain.height_of(header_hash) for header_hash in chain.locator()]
    assert heights == [100, 99, 98, 97, 96, 95, 94, 93, 92, 91, 90, 89, 87, 83, 75, 59, 27, 0]
    rival = _branch(trunk[96][1], 97, 2, salt=1)
    chain.extend(_joined(rival), FAR)
    assert chain.locator_from(rival[1][1])[:4] == [rival[1][1], rival[0][1], trunk[96][1], trunk[95][1]]
    with pytest.raises(KeyError):
        chain.locator_from(b"\1" * 32)


def test_headers_are_served_from_the_first_known_hash_of_a_locator() -> None:
    chain, trunk = _regtest(30)
    nothing = bytes(32)
    assert chain.headers_after([b"\1" * 32, trunk[9][1], trunk[4][1]], nothing) == _joined(trunk[10:])
    assert chain.headers_after([trunk[9][1]], trunk[14][1]) == _joined(trunk[10:15])
    assert chain.headers_after([trunk[9][1]], nothing, limit=3) == _joined(trunk[10:13])
    assert chain.headers_after([b"\1" * 32], nothing) == _joined(trunk)
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


def test_next_bits_are_zero_where_the_next_blocks_time_decides() -> None:
    network = _easy(TESTNET4)
    chain = HeaderChain(network)
    chain.extend(_joined(_branch(network.genesis_hash, 0, 6)), FAR)
    assert chain.next_bits(chain.hash_at(5)) == 0
    chain.extend(_joined(_branch(chain.tip_hash, 6, 1)), FAR)
    assert chain.next_bits(chain.tip_hash) > 0
