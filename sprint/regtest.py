"""Blocks for regtest: empty ones, valid by every rule, mined in microseconds because anybody's hash will do. Pure."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sprint.bitcoin.block import Header, double_sha256, meets_target, parse_transaction
from sprint.bitcoin.codec import encode_bytes, encode_compact_size
from sprint.bitcoin.compact import CmpctBlock
from sprint.bitcoin.networks import NETWORKS
from sprint.chain import HeaderChain, Reject

if TYPE_CHECKING:
    from collections.abc import Sequence

VERSION = 0x2000_0000
"""BIP9: no soft fork signalled."""
SUBSIDY = 50 * 100_000_000
OP_TRUE = b"\x51"
_OP_1, _LARGEST_OPCODE_NUMBER = 0x51, 16
MINED_BY = b"/Sprint demo/"


@dataclass(frozen=True, slots=True)
class MinedBlock:
    """One block with nothing but its coinbase transaction."""

    hash: bytes
    """Wire order."""
    header: Header
    coinbase: bytes

    @property
    def payload(self) -> bytes:
        """The body of a `block` message."""
        return self.header.encode() + b"\x01" + self.coinbase

    def compact(self, nonce: int) -> CmpctBlock:
        """As a compact block, the coinbase prefilled."""
        return CmpctBlock.of_block(self.header, [parse_transaction(self.coinbase)], nonce)


def coinbase_transaction(height: int, extra: bytes = MINED_BY) -> bytes:
    """A coinbase that anybody may spend. Its script begins with the height (BIP34)."""
    script = _pushed(height) + encode_bytes(extra)
    output = struct.pack("<q", SUBSIDY) + encode_bytes(OP_TRUE)
    return b"".join((
        struct.pack("<i", 1), b"\x01", bytes(32), b"\xff" * 4, encode_compact_size(len(script)), script, b"\xff" * 4,
        b"\x01", output, bytes(4),
    ))  # fmt: skip


def mine(previous: bytes, height: int, time: int, bits: int, extra: bytes = MINED_BY) -> MinedBlock:
    """The block on top of `previous`. On regtest every second nonce will do."""
    coinbase = coinbase_transaction(height, extra)
    nonce = 0
    while True:
        header = Header(VERSION, previous, double_sha256(coinbase), time, bits, nonce)
        block_hash = header.hash
        if meets_target(block_hash, bits):
            return MinedBlock(block_hash, header, coinbase)
        nonce += 1


class RegtestChain:
    """A node's chain: the headers as every chain of ours keeps them, and the blocks behind them."""

    def __init__(self) -> None:
        self.headers = HeaderChain(NETWORKS["regtest"])
        self.blocks: dict[bytes, MinedBlock] = {}

    def extend(
        self, count: int, wall_s: int, *, parent: bytes | None = None, extra: bytes = MINED_BY
    ) -> list[MinedBlock]:
        """Mine `count` blocks on the tip, or on `parent`: a fork, if that isn't the tip."""
        mined = []
        chain = self.headers
        for _ in range(count):
            parent = chain.tip_hash if parent is None else parent
            height = (chain.height_of(parent) or 0) + 1
            time = max(wall_s, chain.median_time_past(parent) + 1)
            block = mine(parent, height, time, chain.network.pow_limit_bits, extra)
            outcome = chain.accept(block.header.encode(), wall_s + 7_200)
            if isinstance(outcome, Reject):
                raise RuntimeError(f"our own block at height {height} is refused: {outcome.value}")
            self.blocks[block.hash] = block
            mined.append(block)
            parent = block.hash
        return mined

    def headers_after(self, locator: Sequence[bytes], stop: bytes) -> bytes:
        """The answer to a getheaders, n × 80 bytes."""
        return self.headers.headers_after(list(locator), stop)


def _pushed(number: int) -> bytes:
    """A number as scripts push it: small ones by an opcode of their own, others little-endian with a sign bit."""
    if number <= _LARGEST_OPCODE_NUMBER:
        return bytes([_OP_1 - 1 + number]) if number else b"\x00"
    return encode_bytes(number.to_bytes(number.bit_length() // 8 + 1, "little"))
