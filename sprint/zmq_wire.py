"""What Bitcoin Core's ZMQ publisher says, byte by byte: read by the source, spoken by the delivery. Pure.

A message has three frames: topic, body, and a counter of four bytes, little-endian, one for each topic, from 0 on; a
number left out means that messages were lost on the way. Bodies of the topics:

    hashblock, hashtx   32 bytes, display order: the reverse of what P2P messages carry
    rawblock, rawtx     the block or transaction as it goes over the wire
    sequence            a block's or transaction's hash in display order and one letter: C connected, D disconnected,
                        and, followed by a mempool sequence of eight bytes, A added, R removed

`sprint` is a topic of our own: its body is the record (sprint/record.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sprint.bitcoin.block import HEADER_SIZE, MIN_TRANSACTION_SIZE, double_sha256
from sprint.bitcoin.codec import MAX_PAYLOAD_SIZE, MalformedError, decode_compact_size

if TYPE_CHECKING:
    from collections.abc import Collection

HASHBLOCK: Final = b"hashblock"
RAWBLOCK: Final = b"rawblock"
HASHTX: Final = b"hashtx"
RAWTX: Final = b"rawtx"
SEQUENCE: Final = b"sequence"
SPRINT: Final = b"sprint"
PASSED_THROUGH: Final = (HASHTX, RAWTX, SEQUENCE)
"""Topics that only the operator's node can speak of."""

CONNECTED: Final = b"C"
DISCONNECTED: Final = b"D"
MAX_MESSAGE_SIZE: Final = MAX_PAYLOAD_SIZE + 4096
"""A frame's bound: the largest block, which can't be larger than a P2P message, and room to see that it is larger."""
HIGH_WATER_MARK: Final = 1000
"""Core's -zmqpub…hwm: messages that wait for one subscriber before more are dropped."""
_HASH_SIZE: Final = 32
_COUNTER_MASK: Final = 0xFFFF_FFFF
MAX_BLOCK_TRANSACTIONS: Final = MAX_PAYLOAD_SIZE // MIN_TRANSACTION_SIZE


@dataclass(frozen=True, slots=True)
class PublishedBlock:
    """One hashblock or rawblock."""

    hash: bytes
    """Wire order."""
    header: bytes | None
    """80 bytes; None: a hashblock has none."""
    transactions: int
    size: int
    """Bytes of the whole block; 0 where unknown."""
    counter: int


def read_block(topic: bytes, body: bytes | memoryview, counter: bytes | memoryview) -> PublishedBlock:
    """What a hashblock or rawblock says; of a rawblock the header and the count of transactions are read, no more.

    Raises MalformedError for another topic, or sizes that Core's never have.
    """
    number = read_counter(counter)
    if topic == HASHBLOCK:
        if len(body) != _HASH_SIZE:
            raise MalformedError(f"hashblock of {len(body)} bytes: {_HASH_SIZE} expected")
        return PublishedBlock(bytes(body)[::-1], None, 0, 0, number)
    if topic != RAWBLOCK:
        raise MalformedError(f"topic {topic[:16]!r}: hashblock or rawblock expected")
    head = bytes(body[: HEADER_SIZE + 9])  # the count's longest form
    if len(body) > MAX_PAYLOAD_SIZE:
        raise MalformedError(f"rawblock of {len(body)} bytes: at most {MAX_PAYLOAD_SIZE} are possible")
    if len(head) < HEADER_SIZE:
        raise MalformedError(f"rawblock of {len(body)} bytes: a header alone takes {HEADER_SIZE}")
    transactions, at = decode_compact_size(head, HEADER_SIZE, MAX_BLOCK_TRANSACTIONS)
    if not transactions or transactions * MIN_TRANSACTION_SIZE > len(body) - at:
        raise MalformedError(f"rawblock of {len(body)} bytes with {transactions} transactions")
    header = head[:HEADER_SIZE]
    return PublishedBlock(double_sha256(header), header, transactions, len(body), number)


def read_counter(frame: bytes | memoryview) -> int:
    """The third frame. Raises MalformedError when it isn't four bytes."""
    if len(frame) != 4:
        raise MalformedError(f"a counter of {len(frame)} bytes: 4 expected")
    return int.from_bytes(frame, "little")


def is_mempool_change(body: bytes) -> bool:
    """Whether a `sequence` body is a transaction's (A or R), which is passed through, or a block's, which isn't."""
    return len(body) == _HASH_SIZE + 9 and body[_HASH_SIZE : _HASH_SIZE + 1] in (b"A", b"R")


def is_sound(topic: bytes, body: bytes) -> bool:
    """Whether a body of one of PASSED_THROUGH is fit to be passed through."""
    if topic == HASHTX:
        return len(body) == _HASH_SIZE
    if topic == RAWTX:
        return MIN_TRANSACTION_SIZE <= len(body) <= MAX_PAYLOAD_SIZE
    return topic == SEQUENCE and is_mempool_change(body)


def hash_body(block_hash: bytes) -> bytes:
    """The body of a hashblock; `block_hash` in wire order."""
    return block_hash[::-1]


def sequence_body(block_hash: bytes, label: bytes) -> bytes:
    """The body of a block's `sequence`; `block_hash` in wire order, `label` CONNECTED or DISCONNECTED."""
    return block_hash[::-1] + label


class GapCounter:
    """Watches one publisher's counters, and tells how many messages of each topic were lost."""

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next: dict[bytes, int] = {}

    def lost(self, topic: bytes, counter: int) -> int:
        """How many messages of this topic are missing before this one; 0 for the first that is heard.

        A publisher that starts anew counts from 0 again: a number that lies behind the expected one is taken for that,
        and what it has said since its start for missing.
        """
        expected = self._next.get(topic)
        self._next[topic] = (counter + 1) & _COUNTER_MASK
        if expected is None:
            return 0
        missing = (counter - expected) & _COUNTER_MASK
        return missing if missing < _COUNTER_MASK // 2 else counter

    def forget(self, topic: bytes) -> None:
        """What is heard of this topic next is the first again: it was not listened to in between."""
        self._next.pop(topic, None)


class TopicCounters:
    """Our own counters: the third frame of each message that we publish."""

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next: dict[bytes, int] = {}

    def take(self, topic: bytes) -> bytes:
        """The next number of this topic, four bytes."""
        number = self._next.get(topic, 0)
        self._next[topic] = (number + 1) & _COUNTER_MASK
        return number.to_bytes(4, "little")

    def leave_out(self, topic: bytes, count: int) -> None:
        """Let subscribers see that so many messages of this topic did not come."""
        self._next[topic] = (self._next.get(topic, 0) + count) & _COUNTER_MASK


def wanted_topics(prefixes: Collection[bytes], topics: Collection[bytes]) -> set[bytes]:
    """Those topics that at least one subscriber has asked for: a subscription is a prefix."""
    return {topic for topic in topics if any(topic.startswith(prefix) for prefix in prefixes)}
