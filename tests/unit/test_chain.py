from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sprint.bench.synthetic import SYNTHETIC, joined, mine, mine_branch, synthetic_headers
from sprint.bitcoin.block import double_sha256, work_of
from sprint.bitcoin.difficulty import MAX_FUTURE_S, header_bits, header_time, required_bits
from sprint.bitcoin.networks import MAIN, NETWORKS, REGTEST, TESTNET3, TESTNET4, Network
from sprint.chain import Accepted, HeaderChain, Reject

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


def _regtest(count: int, salt: int = 0) -> tuple[HeaderChain, list[tuple[bytes, bytes]]]:
    chain = HeaderChain(REGTEST)
    trunk = mine_branch(REGTEST.genesis_hash, 0, count, salt)
    assert chain.extend(joined(trunk), FAR).accepted == count
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
        branch = mine_branch(trunk[16][1], 17, 2, salt=9)
        assert chain.extend(joined(branch), FAR).accepted == 2
        return chain, branch[-1][1], 19

    def test_a_hash_above_its_own_target_is_no_work(self, aside: bool) -> None:
        chain, parent, height = self.parent(aside)
        header, _ = _child(parent, GENESIS_TIME + 600 * (height + 1), 5)
        assert chain.accept(_unmined(header), FAR) is Reject.NO_WORK

    def test_a_target_just_beyond_the_limit_is_no_work_even_if_it_is_met(self, aside: bool) -> None:
        chain, parent, height = self.parent(aside)
        header, _ = _child(parent, GENESIS_TIME + 600 * (height + 1), 5, bits=0x21008000)
        assert chain.accept(header, FAR) is Reject.NO_WORK

    @pytest.mark.parametrize("bits", [0x22000100, 0x00000000, 0x20FFFFFF, 0xFFFFFFFF])
    def test_bits_that_are_nonsense_are_no_work(self, aside: bool, bits: int) -> None:
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
    for split in (0, 26, 27, 28, 29 + offset):
        chain = HeaderChain(network)
        assert chain.extend(headers[: split * 80], FAR).rejection is None
        result = chain.extend(headers[split * 80 :], FAR)
        assert (split + result.accepted, result.rejection) == (29 + offset, Reject.BAD_VERSION)


def test_a_time_too_old_is_found_anywhere_in_a_batch() -> None:
    headers = [REGTEST.genesis_header]
    parent = REGTEST.genesis_hash
    bad = []
    for height in range(1, 150):
        median = sorted(map(header_time, headers[-11:]))[len(headers[-11:]) // 2]
        bad.append(_child(parent, median)[0])
        header, parent = _child(parent, max(median + 1, GENESIS_TIME + 600 * height - height * 7919 % 9000))
        headers.append(header)
    for height in range(1, 150):
        chain = HeaderChain(REGTEST)
        result = chain.extend(b"".join(headers[1:height]) + bad[height - 1], FAR)
        assert (result.accepted, result.rejection) == (height - 1, Reject.TIME_TOO_OLD)
        assert isinstance(chain.accept(headers[height], FAR), Accepted)


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
    headers = b"".join(synthetic_headers(10_100))
    chain = HeaderChain(SYNTHETIC)
    chain.extend(headers, FAR)
    work = 0
    for height in range(10_101):
        header = chain.header_at(height)
        header_hash = double_sha256(header)
        work += work_of(header_bits(header))
        assert (chain.hash_at(height), chain.height_of(header_hash)) == (header_hash, height)
        if height % 37 == 0:
            assert chain.work_of(header_hash) == work
    assert chain.height_of(b"\x01" * 32) is None
    assert work_of(header_bits(header)) == 3
    assert chain.work_bar == chain.tip_work - 144 * 3


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
@pytest.mark.parametrize(
    "gaps",
    [
        pytest.param((300, 250, 1300, 500, 100, 2500), id="late and early"),
        pytest.param((400,) * 8 + (1150,) * 24, id="fast, then slow until the limit"),
    ],
)
def test_a_chain_follows_its_networks_rules_whatever_its_pace(network: Network, gaps: tuple[int, ...]) -> None:
    chain = HeaderChain(network)
    headers = [network.genesis_header]
    parent = network.genesis_hash
    seen: set[int] = set()
    for height in range(1, 64):
        time = header_time(headers[-1]) + gaps[height * height % 6 if len(gaps) == 6 else height % len(gaps)]
        bits = required_bits(network, height, time, headers.__getitem__)
        for other in seen - {bits}:
            assert chain.accept(mine(parent, bytes(32), time, other)[0], FAR) is Reject.BAD_BITS
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
        trunk = mine_branch(network.genesis_hash, 0, 7)
        assert chain.extend(joined(trunk), FAR).accepted == 7
        bits = chain.next_bits(chain.tip_hash)
        early, _ = mine(chain.tip_hash, bytes(32), chain.tip_time - 601, bits)
        outcome = chain.accept(early, FAR)
        assert (outcome if isinstance(outcome, Reject) else None) is expected
        just, _ = mine(trunk[-1][1], b"\1" * 32, header_time(trunk[-1][0]) - 600, bits)
        assert isinstance(chain.accept(just, FAR), Accepted)


def test_next_bits_are_zero_where_the_next_blocks_time_decides() -> None:
    network = _easy(TESTNET4)
    chain = HeaderChain(network)
    chain.extend(joined(mine_branch(network.genesis_hash, 0, 6)), FAR)
    assert chain.next_bits(chain.hash_at(5)) == 0
    chain.extend(joined(mine_branch(chain.tip_hash, 6, 1)), FAR)
    assert chain.next_bits(chain.tip_hash) > 0


def test_a_batch_stops_at_its_first_bad_header_and_keeps_what_came_before() -> None:
    chain = HeaderChain(REGTEST)
    trunk = mine_branch(REGTEST.genesis_hash, 0, 9)
    bad = _unmined(trunk[5][0])
    result = chain.extend(joined(trunk[:5]) + bad + joined(trunk[6:]), FAR)
    assert (result.accepted, result.rejection, result.best, chain.tip_height) == (5, Reject.NO_WORK, True, 5)
