"""What a block is made of: its header and proof of work, its transactions, its merkle root, its witness commitment.

Pure functions over bytes. Hashes are in wire order. Nothing here knows which chain a block belongs to: nBits is read
as it stands, the chain decides whether it is the right one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from struct import Struct
from typing import TYPE_CHECKING

from sprint.bitcoin.codec import MalformedError, Reader

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER_SIZE = 80
MIN_TRANSACTION_SIZE = 60
"""Version, one input with an empty script, one output with an empty script, lock time: 4 + 1 + 41 + 1 + 9 + 4."""

WITNESS_COMMITMENT_PREFIX = bytes.fromhex("6a24aa21a9ed")
"""OP_RETURN, a push of 36 bytes, and the commitment's tag (BIP141)."""

_HEADER = Struct("<i32s32sIII")
_MIN_INPUT_SIZE = 41
_MIN_OUTPUT_SIZE = 9


def double_sha256(data: bytes | memoryview) -> bytes:
    """SHA-256 of SHA-256: Bitcoin's hash of headers, transactions and payloads, 32 bytes in wire order."""
    return sha256(sha256(data).digest()).digest()


def header_hashes(headers: bytes) -> list[bytes]:
    """The hashes of n × 80 bytes of headers, about 0.9 µs each (of which the hashing is 0.8)."""
    return [
        sha256(sha256(headers[at : at + HEADER_SIZE]).digest()).digest() for at in range(0, len(headers), HEADER_SIZE)
    ]


@dataclass(frozen=True, slots=True)
class Header:
    """The six fields of a block header."""

    version: int
    """Signed, 32 bits."""
    previous: bytes
    merkle_root: bytes
    time: int
    """Unix seconds, 32 bits."""
    bits: int
    """nBits, the compact form of the target."""
    nonce: int

    @classmethod
    def parse(cls, data: bytes | memoryview) -> Header:
        """Reads the first 80 bytes of `data`. Raises MalformedError if there are fewer."""
        if len(data) < HEADER_SIZE:
            raise MalformedError(f"a header of {len(data)} bytes instead of {HEADER_SIZE}")
        return cls(*_HEADER.unpack_from(data))

    def encode(self) -> bytes:
        """80 bytes."""
        return _HEADER.pack(self.version, self.previous, self.merkle_root, self.time, self.bits, self.nonce)

    @property
    def hash(self) -> bytes:
        return double_sha256(self.encode())


def decode_compact_target(bits: int) -> tuple[int, bool, bool]:
    """nBits → (magnitude, negative, overflow), by the rules of Core's `arith_uint256::SetCompact`.

    The top byte is a size in bytes, the low 23 bits the mantissa, bit 23 its sign. The magnitude is cut to 256 bits.
    """
    size = bits >> 24
    mantissa = bits & 0x007F_FFFF
    if size <= 3:
        mantissa >>= 8 * (3 - size)
        magnitude = mantissa
    else:
        magnitude = mantissa << 8 * (size - 3) & (1 << 256) - 1
    negative = mantissa != 0 and bits & 0x0080_0000 != 0
    overflow = mantissa != 0 and (size > 34 or (mantissa > 0xFF and size > 33) or (mantissa > 0xFFFF and size > 32))
    return magnitude, negative, overflow


def encode_compact_target(target: int) -> int:
    """A target of 0 ≤ target < 2**256 → nBits, losing what doesn't fit 23 bits (Core's `GetCompact`)."""
    size = (target.bit_length() + 7) // 8
    mantissa = target << 8 * (3 - size) if size <= 3 else target >> 8 * (size - 3)
    if mantissa & 0x0080_0000:
        # Bit 23 is the sign, so the mantissa gives up its last byte.
        mantissa >>= 8
        size += 1
    return size << 24 | mantissa


@lru_cache(maxsize=1024)
def target_of(bits: int) -> int:
    """The target that a hash must not exceed; 0, which nothing meets, where nBits is negative, zero or overflows."""
    magnitude, negative, overflow = decode_compact_target(bits)
    return 0 if negative or overflow else magnitude


@lru_cache(maxsize=1024)
def work_of(bits: int) -> int:
    """The expected number of hashes behind nBits, 2**256 / (target + 1); 0 where there is no valid target."""
    target = target_of(bits)
    return (1 << 256) // (target + 1) if target else 0


def meets_target(block_hash: bytes, bits: int) -> bool:
    """Whether the hash is proof of the work that these nBits demand. Says nothing about nBits themselves."""
    target = target_of(bits)
    return target > 0 and int.from_bytes(block_hash, "little") <= target


@dataclass(frozen=True, slots=True)
class Transaction:
    """One transaction's bytes, and where its witness stands in them."""

    raw: bytes
    body_end: int
    """Offset after the outputs; with a witness, that is where it begins."""
    has_witness: bool

    @property
    def txid(self) -> bytes:
        """The hash without the witness."""
        if not self.has_witness:
            return double_sha256(self.raw)
        # Version, then inputs and outputs without marker and flag, then the lock time (BIP144).
        return double_sha256(self.raw[:4] + self.raw[6 : self.body_end] + self.raw[-4:])

    @property
    def wtxid(self) -> bytes:
        """The hash with the witness; the same as txid if there is none (BIP141)."""
        return double_sha256(self.raw)


def read_transaction(reader: Reader) -> Transaction:
    """Finds the end of the transaction at the reader and takes it.

    Raises MalformedError for a broken structure, no inputs, unknown flags, or a witness that is empty (as Core does).
    """
    start = reader.at
    reader.skip(4)
    inputs = reader.count(_MIN_INPUT_SIZE)
    has_witness = inputs == 0
    if has_witness:
        flags = reader.u8()
        if flags != 1:
            raise MalformedError(f"transaction at {start} has no inputs, flags {flags} (1 was expected)")
        inputs = reader.count(_MIN_INPUT_SIZE)
        if inputs == 0:
            raise MalformedError(f"transaction at {start} has no inputs")
    for _ in range(inputs):
        reader.skip(36)
        reader.skip_compact_bytes()
        reader.skip(4)
    for _ in range(reader.count(_MIN_OUTPUT_SIZE)):
        reader.skip(8)
        reader.skip_compact_bytes()
    body_end = reader.at - start
    if has_witness:
        empty = True
        for _ in range(inputs):
            items = reader.count(1)
            empty = empty and items == 0
            for _ in range(items):
                reader.skip_compact_bytes()
        if empty:
            raise MalformedError(f"transaction at {start} has a witness without a single item")
    reader.skip(4)
    return Transaction(reader.since(start), body_end, has_witness)


def parse_transaction(raw: bytes) -> Transaction:
    """The transaction that fills `raw` exactly. Raises MalformedError."""
    reader = Reader(raw)
    transaction = read_transaction(reader)
    reader.finish()
    return transaction


def parse_block(payload: bytes) -> tuple[Header, list[Transaction]]:
    """A whole block, trailing bytes refused. About 10 µs a transaction: work for a worker, not for the hot path."""
    header = Header.parse(payload)
    reader = Reader(payload, HEADER_SIZE)
    transactions = [read_transaction(reader) for _ in range(reader.count(MIN_TRANSACTION_SIZE))]
    reader.finish()
    return header, transactions


def merkle_root(hashes: Sequence[bytes]) -> tuple[bytes, bool]:
    """The merkle root of one or more hashes, and whether two equal hashes form a pair at any level.

    Such a pair means that the same root has a second list of leaves (CVE-2012-2459): the list must be refused, but
    its block hash must not be remembered as invalid. Raises ValueError for no hashes.
    """
    if not hashes:
        raise ValueError("the merkle root of no hashes")
    level = list(hashes)
    mutated = False
    while len(level) > 1:
        mutated = mutated or any(level[i] == level[i + 1] for i in range(0, len(level) - 1, 2))
        if len(level) % 2:
            level.append(level[-1])
        level = [double_sha256(level[i] + level[i + 1]) for i in range(0, len(level), 2)]
    return level[0], mutated


def merkle_root_matches(header: Header, transactions: Sequence[Transaction]) -> bool:
    """Whether the header commits to exactly these transactions, and to no other list of them."""
    if not transactions:
        return False
    root, mutated = merkle_root([transaction.txid for transaction in transactions])
    return root == header.merkle_root and not mutated


def witness_commitment_matches(transactions: Sequence[Transaction]) -> bool:
    """BIP141's rule for a block under segwit: the coinbase commits to all witnesses, or there is no witness at all."""
    if not transactions:
        return False
    scripts, stack = _coinbase_outputs_and_stack(transactions[0])
    commitments = [s for s in scripts if len(s) >= 38 and s.startswith(WITNESS_COMMITMENT_PREFIX)]
    if not commitments:
        return not any(transaction.has_witness for transaction in transactions)
    if len(stack) != 1 or len(stack[0]) != 32:
        return False
    # The coinbase's own wtxid counts as zero, for the commitment can't contain itself.
    root, _ = merkle_root([bytes(32), *(transaction.wtxid for transaction in transactions[1:])])
    return double_sha256(root + stack[0]) == commitments[-1][6:38]


def _coinbase_outputs_and_stack(coinbase: Transaction) -> tuple[list[bytes], list[bytes]]:
    """Output scripts, and the witness stack of the first input. The transaction was walked before: it is sound."""
    reader = Reader(coinbase.raw, 6 if coinbase.has_witness else 4)
    for _ in range(reader.compact_size()):
        reader.skip(36)
        reader.skip_compact_bytes()
        reader.skip(4)
    scripts = []
    for _ in range(reader.compact_size()):
        reader.skip(8)
        scripts.append(reader.compact_bytes())
    stack = [reader.compact_bytes() for _ in range(reader.compact_size())] if coinbase.has_witness else []
    return scripts, stack
