"""The newest whole blocks, as they go over the wire: a store with two bounds, and the check of what comes in. Pure."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple

from sprint.bitcoin.block import (
    HEADER_SIZE,
    double_sha256,
    merkle_root_matches,
    parse_block,
    witness_commitment_matches,
)
from sprint.bitcoin.codec import MalformedError
from sprint.errors import RemoteProtocolError

if TYPE_CHECKING:
    from sprint.bitcoin.block import Transaction

MAX_BLOCKS: Final = 16
MAX_BYTES: Final = 48 * 1024 * 1024
"""Twelve of the largest; sixteen of main's usual 2 MB leave room."""


class WholeBlock(NamedTuple):
    """A block with all its transactions, as it goes over the wire."""

    payload: bytes
    transactions: int
    """0: not counted, for whoever sent it has checked it."""


class BlockStore:
    """Blocks by hash; the oldest make room."""

    def __init__(self, max_blocks: int = MAX_BLOCKS, max_bytes: int = MAX_BYTES) -> None:
        self._max_blocks = max_blocks
        self._max_bytes = max_bytes
        self._blocks: OrderedDict[bytes, WholeBlock] = OrderedDict()
        self.size = 0
        """Bytes of all of them."""

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._blocks

    def get(self, block_hash: bytes) -> WholeBlock | None:
        """The whole block of that hash (wire order), if it is here."""
        return self._blocks.get(block_hash)

    def add(self, block_hash: bytes, block: WholeBlock) -> None:
        """Keep a block; one that is larger than the store holds altogether is not kept."""
        if block_hash in self._blocks or len(block.payload) > self._max_bytes:
            return
        self._blocks[block_hash] = block
        self.size += len(block.payload)
        while len(self._blocks) > self._max_blocks or self.size > self._max_bytes:
            _, gone = self._blocks.popitem(last=False)
            self.size -= len(gone.payload)


def checked(block_hash: bytes, payload: bytes) -> int:
    """The number of transactions in a whole block that is the one of that hash, and complete.

    Its header commits to exactly these transactions, and its coinbase to their witnesses. It begins with a coinbase:
    64 bytes that are two hashes of the merkle tree may pass for a transaction otherwise, and a row of them for the
    block's (CVE-2017-12842; Bitcoin Core's IsBlockMutated goes by the same sign). Raises RemoteProtocolError
    for anything else: then the block may be good, and these bytes are not it. About 15 µs a transaction.
    """
    if double_sha256(payload[:HEADER_SIZE]) != block_hash:
        raise RemoteProtocolError(f"another block than {block_hash[::-1].hex()}")
    try:
        header, transactions = parse_block(payload)
    except MalformedError as error:
        raise RemoteProtocolError(f"block {block_hash[::-1].hex()}: {error}") from None
    if not transactions or not _is_coinbase(transactions[0]):
        raise RemoteProtocolError(f"block {block_hash[::-1].hex()}: its first transaction is no coinbase")
    if not merkle_root_matches(header, transactions):
        raise RemoteProtocolError(f"block {block_hash[::-1].hex()}: its header commits to other transactions")
    if not witness_commitment_matches(transactions):
        raise RemoteProtocolError(f"block {block_hash[::-1].hex()}: its coinbase commits to other witnesses")
    return len(transactions)


def _is_coinbase(transaction: Transaction) -> bool:
    """Whether its one input spends nothing."""
    at = 6 if transaction.has_witness else 4
    return transaction.raw[at : at + 37] == b"\x01" + bytes(32) + b"\xff\xff\xff\xff"
