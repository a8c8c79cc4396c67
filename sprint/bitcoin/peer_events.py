"""What a peer said, as facts: the events of a connection, and their translation from single messages.

`translate` needs no handshake and keeps no state, so a passively captured flow is read by the very same code as our own
connections. It reads lazily: of a compact block, a block or a blocktxn only what an announcement needs, with the
payload kept for whoever wants the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sprint.bitcoin.block import HEADER_SIZE, MIN_TRANSACTION_SIZE, double_sha256
from sprint.bitcoin.codec import MalformedError, decode_compact_size
from sprint.bitcoin.compact import MAX_BLOCK_TRANSACTIONS, SHORT_ID_SIZE, SHORT_IDS_OFFSET, GetBlockTxn
from sprint.bitcoin.messages import (
    BLOCK_TYPES,
    INVENTORY_ENTRY_SIZE,
    MSG_BLOCK,
    MSG_CMPCT_BLOCK,
    GetHeaders,
    InventoryEntry,
    Version,
    inventory_span,
    parse_headers,
    parse_inventory,
)
from sprint.events import Announcement

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class HandshakeCompleted:
    """Both sides have accepted each other's version."""

    version: Version
    """The peer's."""


@dataclass(frozen=True, slots=True)
class BlockAnnounced:
    """A compact block came (BIP152)."""

    announcement: Announcement
    hash: bytes
    header: bytes
    """80 bytes."""
    transactions: int
    """Short ids and prefilled transactions together."""
    size: int
    """Bytes of the whole block; 0, for a compact block doesn't say."""
    payload: bytes
    """The whole cmpctblock, its tail unread: `CmpctBlock.parse` reads it, and may find it malformed."""


@dataclass(frozen=True, slots=True)
class HeadersReceived:
    """A `headers` message came, announcing (BIP130) or answering."""

    headers: bytes
    """n × 80 bytes, 0 ≤ n ≤ 2000."""
    count: int


@dataclass(frozen=True, slots=True)
class BlocksAnnouncedByInv:
    """An `inv` named blocks; its other entries are left out."""

    hashes: tuple[bytes, ...]
    """At least one."""


@dataclass(frozen=True, slots=True)
class HeadersRequested:
    """A `getheaders` came."""

    locator: tuple[bytes, ...]
    stop: bytes


@dataclass(frozen=True, slots=True)
class DataRequested:
    """A `getdata` came."""

    inventory: tuple[InventoryEntry, ...]


@dataclass(frozen=True, slots=True)
class NotFound:
    """A `notfound` came: the peer won't send these."""

    inventory: tuple[InventoryEntry, ...]


@dataclass(frozen=True, slots=True)
class BlockReceived:
    """A whole block came."""

    hash: bytes
    header: bytes
    """80 bytes."""
    transactions: int
    """As the block says; nothing past its count has been read."""
    payload: bytes


@dataclass(frozen=True, slots=True)
class BlockTransactionsRequested:
    """A `getblocktxn` came."""

    block_hash: bytes
    indexes: tuple[int, ...]
    """Absolute, ascending, none over 65,534."""


@dataclass(frozen=True, slots=True)
class BlockTransactionsReceived:
    """A `blocktxn` came."""

    block_hash: bytes
    transactions: int
    payload: bytes
    """The whole blocktxn: `BlockTxn.parse` reads it, and may find it malformed."""


@dataclass(frozen=True, slots=True)
class LatencyMeasured:
    """A pong answered our ping."""

    rtt_ns: int


ConnectionEvent = (
    HandshakeCompleted
    | BlockAnnounced
    | HeadersReceived
    | BlocksAnnouncedByInv
    | HeadersRequested
    | DataRequested
    | NotFound
    | BlockReceived
    | BlockTransactionsRequested
    | BlockTransactionsReceived
    | LatencyMeasured
)


def _counted(payload: bytes, at: int, item_size: int) -> tuple[int, int]:
    """How many items a list of a block's transactions at `at` claims, and the offset of the first."""
    count, start = decode_compact_size(payload, at, MAX_BLOCK_TRANSACTIONS)
    if count * item_size > len(payload) - start:
        raise MalformedError(f"{count} items of at least {item_size} bytes at {start} of {len(payload)} bytes")
    return count, start


def _cmpctblock(payload: bytes) -> BlockAnnounced:
    short_ids, at = _counted(payload, SHORT_IDS_OFFSET, SHORT_ID_SIZE)
    prefilled, _ = _counted(payload, at + short_ids * SHORT_ID_SIZE, 1 + MIN_TRANSACTION_SIZE)
    transactions = short_ids + prefilled
    if not 0 < transactions <= MAX_BLOCK_TRANSACTIONS:
        raise MalformedError(f"a compact block of {transactions} transactions: 1 to {MAX_BLOCK_TRANSACTIONS} expected")
    header = payload[:HEADER_SIZE]
    return BlockAnnounced(Announcement.CMPCTBLOCK, double_sha256(header), header, transactions, 0, payload)


def _headers(payload: bytes) -> HeadersReceived:
    headers = parse_headers(payload)
    return HeadersReceived(headers, len(headers) // HEADER_SIZE)


def _inv(payload: bytes) -> BlocksAnnouncedByInv | None:
    at, end = inventory_span("inv", payload)
    # Nearly every entry on the wire is a transaction. The lowest bytes of all types, taken out in one stroke, say
    # whether there can be a block among them (2 and 4, with or without the witness flag in the highest byte).
    lowest = payload[at:end:INVENTORY_ENTRY_SIZE]
    if MSG_BLOCK not in lowest and MSG_CMPCT_BLOCK not in lowest:
        return None
    hashes = tuple([name for kind, name in parse_inventory("inv", payload) if kind in BLOCK_TYPES])
    return BlocksAnnouncedByInv(hashes) if hashes else None


def _getheaders(payload: bytes) -> HeadersRequested:
    message = GetHeaders.parse(payload)
    return HeadersRequested(message.locator, message.stop)


def _getdata(payload: bytes) -> DataRequested:
    return DataRequested(parse_inventory("getdata", payload))


def _notfound(payload: bytes) -> NotFound:
    return NotFound(parse_inventory("notfound", payload))


def _block(payload: bytes) -> BlockReceived:
    transactions, _ = _counted(payload, HEADER_SIZE, MIN_TRANSACTION_SIZE)
    header = payload[:HEADER_SIZE]
    return BlockReceived(double_sha256(header), header, transactions, payload)


def _getblocktxn(payload: bytes) -> BlockTransactionsRequested:
    message = GetBlockTxn.parse(payload)
    return BlockTransactionsRequested(message.block_hash, message.indexes)


def _blocktxn(payload: bytes) -> BlockTransactionsReceived:
    transactions, _ = _counted(payload, 32, MIN_TRANSACTION_SIZE)
    return BlockTransactionsReceived(payload[:32], transactions, payload)


TRANSLATIONS: dict[str, Callable[[bytes], ConnectionEvent | None]] = {
    "cmpctblock": _cmpctblock,
    "headers": _headers,
    "inv": _inv,
    "getheaders": _getheaders,
    "getdata": _getdata,
    "notfound": _notfound,
    "block": _block,
    "getblocktxn": _getblocktxn,
    "blocktxn": _blocktxn,
}
"""The messages that mean something without knowing what was said before them."""


def translate(command: str, payload: bytes) -> ConnectionEvent | None:
    """The event in one message, None if it has none.

    Raises MalformedError (skip the message) or RemoteProtocolError (end the connection).
    """
    translation = TRANSLATIONS.get(command)
    return None if translation is None else translation(payload)
