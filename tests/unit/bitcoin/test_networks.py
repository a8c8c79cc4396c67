from __future__ import annotations

from hashlib import sha256

import pytest

from sprint.bitcoin.networks import MAIN, NETWORKS, REGTEST, SIGNET, TESTNET3, TESTNET4, Network, signet_magic

EVERY_NETWORK = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())


@EVERY_NETWORK
def test_the_genesis_header_hashes_to_the_known_genesis_hash(network: Network) -> None:
    assert len(network.genesis_header) == 80
    assert sha256(sha256(network.genesis_header).digest()).digest() == network.genesis_hash


@EVERY_NETWORK
def test_the_genesis_meets_its_own_target_which_is_the_limit(network: Network) -> None:
    bits = int.from_bytes(network.genesis_header[72:76], "little")
    assert bits == network.pow_limit_bits
    assert int.from_bytes(network.genesis_hash, "little") <= network.pow_limit


@EVERY_NETWORK
def test_the_limit_in_compact_form_is_the_limit_cut_to_three_digits(network: Network) -> None:
    size = network.pow_limit_bits >> 24
    digits = network.pow_limit_bits & 0x7FFFFF
    assert network.pow_limit >> (8 * (size - 3)) == digits


@EVERY_NETWORK
def test_blocks_are_due_every_ten_minutes(network: Network) -> None:
    assert network.target_spacing == 600


def test_signets_message_start_comes_from_its_challenge() -> None:
    assert SIGNET.magic == bytes.fromhex("0a03cf40")


def test_a_challenge_too_long_for_a_one_byte_length_is_refused() -> None:
    with pytest.raises(ValueError, match="253"):
        signet_magic(bytes(253))


def test_networks_are_told_apart_by_magic_port_and_genesis() -> None:
    assert list(NETWORKS.values()) == [MAIN, TESTNET3, TESTNET4, SIGNET, REGTEST]
    assert len({network.magic for network in NETWORKS.values()}) == 5
    assert len({network.port for network in NETWORKS.values()}) == 5
    assert len({network.genesis_hash for network in NETWORKS.values()}) == 5
    assert all(network.name == name for name, network in NETWORKS.items())
