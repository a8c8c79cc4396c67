"""Compact blocks (BIP152): its three messages, short transaction ids, prefilled transactions, differential indexes.

Structure only; putting a block together again from a mempool is the business of another module. Version 2 of the
protocol throughout: a short id is made from the wtxid.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from struct import iter_unpack
from typing import TYPE_CHECKING, ClassVar

from sprint.bitcoin.block import MIN_TRANSACTION_SIZE, Header, Transaction, read_transaction
from sprint.bitcoin.codec import U64, MalformedError, Message, Reader, encode_compact_size
from sprint.errors import LocalProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SHORT_ID_SIZE = 6
MAX_BLOCK_TRANSACTIONS = 0xFFFF
"""Core refuses a compact block whose indexes don't fit 16 bits; no valid block holds as many transactions."""

SHORT_IDS_OFFSET = 88
"""The header (80 bytes) and the nonce (8) come before the short ids."""

_MASK = 0xFFFF_FFFF_FFFF_FFFF


def _rounds(v0: int, v1: int, v2: int, v3: int, count: int) -> tuple[int, int, int, int]:
    for _ in range(count):
        v0 = (v0 + v1) & _MASK
        v1 = (v1 << 13 & _MASK | v1 >> 51) ^ v0
        v0 = v0 << 32 & _MASK | v0 >> 32
        v2 = (v2 + v3) & _MASK
        v3 = (v3 << 16 & _MASK | v3 >> 48) ^ v2
        v0 = (v0 + v3) & _MASK
        v3 = (v3 << 21 & _MASK | v3 >> 43) ^ v0
        v2 = (v2 + v1) & _MASK
        v1 = (v1 << 17 & _MASK | v1 >> 47) ^ v2
        v2 = v2 << 32 & _MASK | v2 >> 32
    return v0, v1, v2, v3


def siphash_2_4(k0: int, k1: int, data: bytes) -> int:
    """SipHash-2-4 (Aumasson, Bernstein 2012) of `data` under the key of two 64-bit numbers, a 64-bit number."""
    v0 = k0 ^ 0x736F_6D65_7073_6575
    v1 = k1 ^ 0x646F_7261_6E64_6F6D
    v2 = k0 ^ 0x6C79_6765_6E65_7261
    v3 = k1 ^ 0x7465_6462_7974_6573
    # The last word carries what is left over, and the length modulo 256 in its top byte.
    padded = data + bytes(7 - len(data) % 8) + bytes((len(data) & 0xFF,))
    for (word,) in iter_unpack("<Q", padded):
        v0, v1, v2, v3 = _rounds(v0, v1, v2, v3 ^ word, 2)
        v0 ^= word
    v0, v1, v2, v3 = _rounds(v0, v1, v2 ^ 0xFF, v3, 4)
    return v0 ^ v1 ^ v2 ^ v3


@dataclass(frozen=True, slots=True)
class ShortIdKey:
    """The key that one compact block's short ids are made with."""

    k0: int
    k1: int

    @classmethod
    def of(cls, header: bytes, nonce: int) -> ShortIdKey:
        """From the 80-byte header and the compact block's 64-bit nonce: one SHA-256, its first two words."""
        digest = sha256(header + U64.pack(nonce)).digest()
        return cls(U64.unpack_from(digest)[0], U64.unpack_from(digest, 8)[0])

    def short_id(self, wtxid: bytes) -> int:
        """The low 48 bits of the wtxid's SipHash."""
        return siphash_2_4(self.k0, self.k1, wtxid) & 0xFFFF_FFFF_FFFF


def encode_differential(indexes: Sequence[int]) -> list[int]:
    """Ascending absolute indexes → distances, each counted from the one after its predecessor.

    Raises LocalProtocolError unless they ascend strictly within 0..65,534.
    """
    distances = []
    expected = 0
    for index in indexes:
        if not expected <= index < MAX_BLOCK_TRANSACTIONS:
            raise LocalProtocolError(f"index {index}: {expected} to {MAX_BLOCK_TRANSACTIONS - 1} was expected")
        distances.append(index - expected)
        expected = index + 1
    return distances


def decode_differential(distances: Iterable[int]) -> tuple[int, ...]:
    """Distances → absolute indexes. Raises MalformedError as soon as one is over 65,534, however it is built up."""
    indexes = []
    expected = 0
    for distance in distances:
        index = expected + distance
        if index >= MAX_BLOCK_TRANSACTIONS:
            raise MalformedError(f"transaction index {index} is not below {MAX_BLOCK_TRANSACTIONS}")
        indexes.append(index)
        expected = index + 1
    return tuple(indexes)


@dataclass(frozen=True, slots=True)
class PrefilledTransaction:
    """A transaction sent along with the compact block."""

    index: int
    """Its place in the block, absolute."""
    transaction: Transaction


@dataclass(frozen=True, slots=True)
class CmpctBlock(Message):
    """`cmpctblock`: a block by short ids (BIP152, HeaderAndShortIDs)."""

    command: ClassVar[str] = "cmpctblock"
    header: bytes
    nonce: int
    short_ids: tuple[int, ...]
    prefilled: tuple[PrefilledTransaction, ...]

    @property
    def transactions(self) -> int:
        """How many transactions the block has."""
        return len(self.short_ids) + len(self.prefilled)

    @property
    def key(self) -> ShortIdKey:
        return ShortIdKey.of(self.header, self.nonce)

    @classmethod
    def of_block(cls, header: Header, transactions: Sequence[Transaction], nonce: int) -> CmpctBlock:
        """The compact form of a block with its coinbase prefilled, as Core sends it."""
        encoded = header.encode()
        key = ShortIdKey.of(encoded, nonce)
        short_ids = tuple(key.short_id(transaction.wtxid) for transaction in transactions[1:])
        return cls(encoded, nonce, short_ids, (PrefilledTransaction(0, transactions[0]),))

    @classmethod
    def parse(cls, payload: bytes) -> CmpctBlock:
        """Raises MalformedError for broken structure, no transactions, or indexes outside the block."""
        reader = Reader(payload)
        header = reader.take(80)
        nonce = reader.u64()
        count = reader.count(SHORT_ID_SIZE, MAX_BLOCK_TRANSACTIONS)
        raw = reader.take(count * SHORT_ID_SIZE)
        short_ids = tuple(int.from_bytes(raw[at : at + SHORT_ID_SIZE], "little") for at in range(0, len(raw), 6))
        prefilled_count = reader.count(1 + MIN_TRANSACTION_SIZE, MAX_BLOCK_TRANSACTIONS)
        distances, bodies = [], []
        for _ in range(prefilled_count):
            distances.append(reader.compact_size())
            bodies.append(read_transaction(reader))
        total = count + prefilled_count
        if not 0 < total <= MAX_BLOCK_TRANSACTIONS:
            raise MalformedError(f"a compact block of {total} transactions: 1 to {MAX_BLOCK_TRANSACTIONS} expected")
        indexes = decode_differential(distances)
        if indexes and indexes[-1] >= total:
            raise MalformedError(f"prefilled transaction {indexes[-1]} in a block of {total}")
        return cls(header, nonce, short_ids, tuple(map(PrefilledTransaction, indexes, bodies)))

    def encode(self) -> bytes:
        parts = [self.header, U64.pack(self.nonce), encode_compact_size(len(self.short_ids))]
        parts += [short_id.to_bytes(SHORT_ID_SIZE, "little") for short_id in self.short_ids]
        parts.append(encode_compact_size(len(self.prefilled)))
        for distance, item in zip(encode_differential([p.index for p in self.prefilled]), self.prefilled, strict=True):
            parts += [encode_compact_size(distance), item.transaction.raw]
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class GetBlockTxn(Message):
    """`getblocktxn`: send these transactions of a block (BIP152)."""

    command: ClassVar[str] = "getblocktxn"
    max_size: ClassVar[int] = 32 + 3 + 3 * MAX_BLOCK_TRANSACTIONS
    block_hash: bytes
    indexes: tuple[int, ...]
    """Absolute, ascending."""

    @classmethod
    def parse(cls, payload: bytes) -> GetBlockTxn:
        reader = Reader(payload)
        block_hash = reader.hash()
        count = reader.count(1, MAX_BLOCK_TRANSACTIONS)
        return cls(block_hash, decode_differential(reader.compact_size() for _ in range(count)))

    def encode(self) -> bytes:
        distances = encode_differential(self.indexes)
        return b"".join((self.block_hash, *map(encode_compact_size, (len(distances), *distances))))


@dataclass(frozen=True, slots=True)
class BlockTxn(Message):
    """`blocktxn`: the transactions that a getblocktxn asked for, in its order (BIP152)."""

    command: ClassVar[str] = "blocktxn"
    block_hash: bytes
    transactions: tuple[Transaction, ...]

    @classmethod
    def parse(cls, payload: bytes) -> BlockTxn:
        reader = Reader(payload)
        block_hash = reader.hash()
        count = reader.count(MIN_TRANSACTION_SIZE, MAX_BLOCK_TRANSACTIONS)
        return cls(block_hash, tuple(read_transaction(reader) for _ in range(count)))

    def encode(self) -> bytes:
        raw = (transaction.raw for transaction in self.transactions)
        return b"".join((self.block_hash, encode_compact_size(len(self.transactions)), *raw))
