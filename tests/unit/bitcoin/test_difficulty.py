"""Worked examples of each network's rules; the mainnet ones are history."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sprint.bitcoin.block import double_sha256, meets_target, target_of
from sprint.bitcoin.difficulty import (
    bits_depend_on_time,
    earliest_time,
    header_bits,
    median_time,
    minimum_version,
    required_bits,
    retarget,
    version_heights,
)
from sprint.bitcoin.networks import MAIN, NETWORKS, REGTEST, SIGNET, TESTNET3, TESTNET4, Network

if TYPE_CHECKING:
    from collections.abc import Callable

VECTORS = [
    (path.stem, json.loads(path.read_text()))
    for path in sorted((Path(__file__).parents[2] / "vectors" / "headers").glob("*.json"))
]
RETARGETS = [
    pytest.param(vector["network"], case, id=f"{vector['network']}-{case['height']}")
    for _, vector in VECTORS
    for case in vector.get("retargets", [])
]

LIMIT = 0x1D00FFFF
HARD = 0x1B0404CB
"""An nBits well below the limit."""


def _branch(blocks: list[tuple[int, int]]) -> Callable[[int], bytes]:
    """Headers of nothing but (time, nBits), from height 0 on."""
    headers = [bytes(68) + time.to_bytes(4, "little") + bits.to_bytes(4, "little") + bytes(4) for time, bits in blocks]

    def ancestor(height: int) -> bytes:
        assert height >= 0
        return headers[height]

    return ancestor


def _steady(count: int, bits: int, spacing: int = 600) -> list[tuple[int, int]]:
    return [(1_000_000 + spacing * height, bits) for height in range(count)]


@pytest.mark.parametrize(("name", "case"), RETARGETS)
def test_real_retargets_are_reproduced(name: str, case: dict[str, Any]) -> None:
    network = NETWORKS[name]
    first, last, following = (bytes.fromhex(case[key]) for key in ("first", "last", "next"))
    assert following[4:36] == double_sha256(last)
    assert all(meets_target(double_sha256(header), header_bits(header)) for header in (first, last, following))
    headers = {case["height"] - network.interval: first, case["height"] - 1: last}
    assert required_bits(network, case["height"], None, headers.__getitem__) == header_bits(following)


@pytest.mark.parametrize(
    ("bits", "first", "last", "expected"),
    [
        pytest.param(0x1D00FFFF, 1261130161, 1262152739, 0x1D00D86A, id="the first change ever, at 32256"),
        pytest.param(0x1D00FFFF, 1231006505, 1233061996, 0x1D00FFFF, id="never easier than the limit, at 2016"),
        pytest.param(0x1C05A3F4, 1279008237, 1279297671, 0x1C0168FD, id="at most four times harder, at 68544"),
        pytest.param(0x1C387F6F, 1263163443, 1269211443, 0x1D00E1FD, id="at most four times easier"),
    ],
)
def test_main_retargets_as_history_and_its_clamps_demand(bits: int, first: int, last: int, expected: int) -> None:
    assert retarget(MAIN, bits, first, last) == expected


def test_a_period_on_time_makes_the_next_harder_because_only_2015_spacings_are_measured() -> None:
    following = required_bits(MAIN, 2016, None, _branch(_steady(2016, HARD)))
    assert target_of(following) < target_of(HARD)
    assert target_of(following) == pytest.approx(target_of(HARD) * 2015 / 2016, rel=1e-4)


def test_main_keeps_its_bits_within_a_period() -> None:
    ancestor = _branch(_steady(2100, HARD, spacing=9000))
    assert {required_bits(MAIN, height, None, ancestor) for height in (1, 2, 2015, 2017, 2099)} == {HARD}


def test_a_late_block_on_main_gets_no_discount() -> None:
    blocks = _steady(100, HARD)
    assert required_bits(MAIN, 100, blocks[-1][0] + 100_000, _branch(blocks)) == HARD


@pytest.mark.parametrize("network", [TESTNET3, TESTNET4], ids=lambda network: network.name)
@pytest.mark.parametrize(("late", "expected"), [(1200, HARD), (1201, LIMIT)])
def test_more_than_twenty_minutes_after_its_parent_a_testnet_block_may_be_easy(
    network: Network, late: int, expected: int
) -> None:
    blocks = _steady(100, HARD)
    assert required_bits(network, 100, blocks[-1][0] + late, _branch(blocks)) == expected


def test_after_easy_blocks_testnet_returns_to_the_last_difficulty_that_was_not_the_exception() -> None:
    blocks = _steady(100, HARD)
    blocks += [(blocks[-1][0] + 1201 * n, LIMIT) for n in range(1, 6)]
    assert required_bits(TESTNET3, 105, blocks[-1][0] + 600, _branch(blocks)) == HARD


def test_the_walk_back_ends_at_the_period_it_is_in() -> None:
    blocks = [*_steady(2016, HARD), *((1_000_000 + 600 * height, LIMIT) for height in range(2016, 2020))]
    assert required_bits(TESTNET3, 2020, blocks[-1][0] + 600, _branch(blocks)) == LIMIT


def test_a_testnet3_period_that_ends_with_an_easy_block_loses_its_difficulty() -> None:
    blocks = _steady(2016, HARD)
    blocks[-1] = (blocks[-1][0], LIMIT)
    assert target_of(required_bits(TESTNET3, 2016, None, _branch(blocks))) > target_of(HARD) * 1000


def test_testnet4_retargets_from_the_periods_first_bits() -> None:
    blocks = _steady(2016, HARD)
    blocks[-1] = (blocks[-1][0], LIMIT)
    assert required_bits(TESTNET4, 2016, None, _branch(blocks)) == required_bits(
        MAIN, 2016, None, _branch(_steady(2016, HARD))
    )


def test_bits_of_an_unborn_testnet_block_are_known_at_a_retarget_only() -> None:
    ancestor = _branch(_steady(2020, HARD))
    assert required_bits(TESTNET4, 2015, None, ancestor) == 0
    assert required_bits(TESTNET4, 2016, None, ancestor) > 0
    assert [network.name for network in NETWORKS.values() if bits_depend_on_time(network)] == ["testnet3", "testnet4"]


def test_only_bip94_bounds_how_far_a_periods_first_block_goes_back() -> None:
    assert earliest_time(TESTNET4, 2016, 1_000_000) == 999_400
    assert earliest_time(TESTNET4, 2017, 1_000_000) == 0
    assert earliest_time(TESTNET3, 2016, 1_000_000) == 0
    assert earliest_time(MAIN, 2016, 1_000_000) == 0


def test_signet_never_gets_easier_than_its_own_limit() -> None:
    slow = _branch(_steady(2016, SIGNET.pow_limit_bits, spacing=2400))
    assert required_bits(SIGNET, 2016, None, slow) == SIGNET.pow_limit_bits
    fast = _branch(_steady(2016, SIGNET.pow_limit_bits, spacing=60))
    assert target_of(required_bits(SIGNET, 2016, None, fast)) == pytest.approx(SIGNET.pow_limit / 4, rel=1e-4)


def test_regtest_never_changes() -> None:
    ancestor = _branch(_steady(400, REGTEST.pow_limit_bits, spacing=1))
    assert {required_bits(REGTEST, height, 1, ancestor) for height in range(1, 400)} == {REGTEST.pow_limit_bits}


def test_versions_are_refused_from_the_heights_of_bip34_bip66_and_bip65() -> None:
    heights = (0, 227_930, 227_931, 363_724, 363_725, 388_380, 388_381)
    lowest = -(1 << 31)
    assert [minimum_version(MAIN, height) for height in heights] == [lowest, lowest, 2, 2, 3, 3, 4]
    assert minimum_version(REGTEST, 1) == 4
    for network in NETWORKS.values():
        for height in version_heights(network):
            assert minimum_version(network, height) > minimum_version(network, height - 1)


def test_version_rules_hold_whatever_the_order_of_their_heights() -> None:
    network = replace(MAIN, bip34_height=10, bip66_height=30, bip65_height=20)
    assert [minimum_version(network, height) for height in (9, 10, 20, 30)] == [-(1 << 31), 2, 4, 4]


def test_the_median_of_an_even_number_of_times_is_the_upper_one() -> None:
    assert median_time([5]) == 5
    assert median_time([4, 1]) == 4
    assert median_time([9, 1, 5]) == 5
    assert median_time(list(range(11))) == 5
