"""A synthetic chain of valid headers: main's rules, a limit as easy as regtest's.

How it is made: the network is main in everything, retarget every 2,016 included, but for its limit (regtest's, so that
the first periods cost two hashes a header) and its genesis (regtest's too, for it meets that limit). The periods' pace
follows a fixed cycle of fast and slow, so that nBits change at every retarget, yet the difficulty stays between one and
two times the easiest. Seven headers in eight keep the pace, the eighth lies 900 s behind it, so that the cheap test
against the highest time fails as often as it may on main. Each nonce is found by search, the merkle root is the height.
The same length gives the same bytes.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from struct import Struct
from typing import TYPE_CHECKING

from sprint.bitcoin.block import HEADER_SIZE, target_of
from sprint.bitcoin.difficulty import header_bits, header_time, retarget
from sprint.bitcoin.networks import MAIN, REGTEST, Network

if TYPE_CHECKING:
    from collections.abc import Iterator

SYNTHETIC = replace(
    MAIN,
    name="synthetic",
    genesis_header=REGTEST.genesis_header,
    genesis_hash=REGTEST.genesis_hash,
    pow_limit=REGTEST.pow_limit,
    pow_limit_bits=REGTEST.pow_limit_bits,
    minimum_chain_work=0,
)

_VERSION = (0x2000_0000).to_bytes(4, "little")
_PACE_PERCENT = (70, 125, 80, 160, 60, 140, 75, 170)
"""Spacing of each period, of the 600 s due: difficulty rises after a fast period and falls after a slow one."""
_STEP_BACK_S = 900
_TAIL = Struct("<III")


def synthetic_headers(count: int, network: Network = SYNTHETIC, batch: int = 2000) -> Iterator[bytes]:
    """The `count` headers after genesis, in pieces of up to `batch`. About 4 µs each on one core."""
    previous = network.genesis_hash
    bits = header_bits(network.genesis_header)
    pace_time = first_time = last_time = header_time(network.genesis_header)
    target = target_of(bits)
    spacing = 0
    piece = bytearray()
    for height in range(1, count + 1):
        if height % network.interval == 0:
            bits = retarget(network, bits, first_time, last_time)
            target = target_of(bits)
        if height % network.interval == 0 or height == 1:
            pace = _PACE_PERCENT[height // network.interval % len(_PACE_PERCENT)]
            spacing = network.target_spacing * pace // 100
        pace_time += spacing
        last_time = pace_time - _STEP_BACK_S if height % 8 == 5 else pace_time
        if height % network.interval == 0:
            first_time = last_time
        header, previous = mine(previous, height.to_bytes(32, "little"), last_time, bits, target)
        piece += header
        if len(piece) == batch * HEADER_SIZE or height == count:
            yield bytes(piece)
            piece.clear()


def mine(previous: bytes, merkle_root: bytes, time: int, bits: int, target: int | None = None) -> tuple[bytes, bytes]:
    """A header with those fields and the first nonce that meets its target, and its hash. For easy targets only."""
    goal = target_of(bits) if target is None else target
    head = _VERSION + previous + merkle_root
    pack = _TAIL.pack
    nonce = 0
    while True:
        header = head + pack(time, bits, nonce)
        digest = sha256(sha256(header).digest()).digest()
        if int.from_bytes(digest, "little") <= goal:
            return header, digest
        nonce += 1


def mine_branch(parent: bytes, parent_height: int, count: int, salt: int = 0) -> list[tuple[bytes, bytes]]:
    """`count` regtest headers on top of a parent, lowest first, each with its hash.

    Their times follow from their heights, ten minutes apart; branches of different `salt` differ in every header.
    """
    made = []
    for height in range(parent_height + 1, parent_height + 1 + count):
        time = header_time(REGTEST.genesis_header) + REGTEST.target_spacing * height
        header, parent = mine(parent, salt.to_bytes(32, "little"), time, REGTEST.pow_limit_bits)
        made.append((header, parent))
    return made


def joined(branch: list[tuple[bytes, bytes]]) -> bytes:
    """The headers of a branch in one piece, as a batch wants them."""
    return b"".join(header for header, _ in branch)
