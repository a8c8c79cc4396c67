"""The primitives of Bitcoin's serialisation: compact sizes, little-endian integers, a reader that never runs over.

Owns what all messages have in common, and the one error for a body that can't be parsed. Rules: a reader is bound to
one payload and checks each length against what is left before it takes anything, so a forged count costs no memory.
"""

from __future__ import annotations

import struct
from typing import ClassVar

from sprint.errors import LocalProtocolError, RemoteProtocolError, SprintError

MAX_COMPACT_SIZE = 0x0200_0000
"""Core's MAX_SIZE: no count or length on the wire may be larger (32 MiB)."""

MAX_PAYLOAD_SIZE = 4_000_000
"""Core's MAX_PROTOCOL_MESSAGE_LENGTH: a message with a longer payload ends the connection."""

HASH_SIZE = 32

U16 = struct.Struct("<H")
U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")
I32 = struct.Struct("<i")
I64 = struct.Struct("<q")


class MalformedError(SprintError):
    """A message's body doesn't follow its format. As in Core, the message is skipped and the connection lives on."""


def encode_compact_size(value: int) -> bytes:
    """The shortest encoding of 0 ≤ value < 2**64: 1, 3, 5 or 9 bytes."""
    if value < 0xFD:
        return value.to_bytes(1, "little")
    if value <= 0xFFFF:
        return b"\xfd" + U16.pack(value)
    if value <= 0xFFFF_FFFF:
        return b"\xfe" + U32.pack(value)
    return b"\xff" + U64.pack(value)


def decode_compact_size(data: bytes, at: int = 0, maximum: int = MAX_COMPACT_SIZE) -> tuple[int, int]:
    """The compact size at `at` and the offset after it.

    Raises MalformedError where it is cut short, not the shortest encoding, or larger than `maximum` (all as in Core).
    """
    try:
        first = data[at]
        if first < 0xFD:
            value, end, least = first, at + 1, 0
        elif first == 0xFD:
            value, end, least = U16.unpack_from(data, at + 1)[0], at + 3, 0xFD
        elif first == 0xFE:
            value, end, least = U32.unpack_from(data, at + 1)[0], at + 5, 0x1_0000
        else:
            value, end, least = U64.unpack_from(data, at + 1)[0], at + 9, 0x1_0000_0000
    except (IndexError, struct.error):
        raise MalformedError(f"compact size at {at} is cut short: {len(data)} bytes in all") from None
    if value < least:
        raise MalformedError(f"compact size {value} at {at} is not in its shortest encoding")
    if value > maximum:
        raise MalformedError(f"compact size {value} at {at} is over {maximum}")
    return value, end


def encode_bytes(data: bytes) -> bytes:
    """Length as compact size, then the bytes."""
    return encode_compact_size(len(data)) + data


class Reader:
    """Takes values off the front of one payload; raises MalformedError instead of reading past its end."""

    __slots__ = ("_data", "_end", "at")

    def __init__(self, data: bytes, at: int = 0) -> None:
        self._data = data
        self._end = len(data)
        self.at = at
        """Offset of the next byte to be read."""

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return self._end - self.at

    def _advance(self, size: int) -> int:
        start = self.at
        if size > self._end - start:
            raise MalformedError(f"{size} bytes wanted at {start}, {self._end - start} left")
        self.at = start + size
        return start

    def take(self, size: int) -> bytes:
        """The next `size` bytes, copied."""
        start = self._advance(size)
        return self._data[start : self.at]

    def skip(self, size: int) -> None:
        """Leave out `size` bytes."""
        self._advance(size)

    def since(self, start: int) -> bytes:
        """The bytes from offset `start` to where the reader stands."""
        return self._data[start : self.at]

    def u8(self) -> int:
        return self._data[self._advance(1)]

    def u16(self) -> int:
        value: int = U16.unpack_from(self._data, self._advance(2))[0]
        return value

    def u32(self) -> int:
        value: int = U32.unpack_from(self._data, self._advance(4))[0]
        return value

    def u64(self) -> int:
        value: int = U64.unpack_from(self._data, self._advance(8))[0]
        return value

    def i32(self) -> int:
        value: int = I32.unpack_from(self._data, self._advance(4))[0]
        return value

    def i64(self) -> int:
        value: int = I64.unpack_from(self._data, self._advance(8))[0]
        return value

    def hash(self) -> bytes:
        """32 bytes, wire order."""
        return self.take(HASH_SIZE)

    def compact_size(self, maximum: int = MAX_COMPACT_SIZE) -> int:
        value, self.at = decode_compact_size(self._data, self.at, maximum)
        return value

    def count(self, item_size: int, maximum: int = MAX_COMPACT_SIZE) -> int:
        """A compact size that counts items of at least `item_size` bytes each; all of them must still fit."""
        value = self.compact_size(maximum)
        if value * item_size > self._end - self.at:
            raise MalformedError(f"{value} items of at least {item_size} bytes announced, {self.left} bytes left")
        return value

    def compact_bytes(self, maximum: int = MAX_COMPACT_SIZE) -> bytes:
        """A length as compact size, then that many bytes."""
        return self.take(self.compact_size(maximum))

    def skip_compact_bytes(self) -> None:
        self._advance(self.compact_size())

    def finish(self) -> None:
        """Raises MalformedError unless everything has been read."""
        if self.at != self._end:
            raise MalformedError(f"{self._end - self.at} bytes left over at {self.at}")


class Message:
    """A message of the protocol."""

    __slots__ = ()
    command: ClassVar[str]
    max_size: ClassVar[int] = MAX_PAYLOAD_SIZE
    """Bytes of payload beyond which the type makes no sense, and is dropped unread."""

    @classmethod
    def parse(cls, payload: bytes) -> Message:
        raise NotImplementedError

    def encode(self) -> bytes:
        """The payload, without the frame's header."""
        raise NotImplementedError


def check_limit(command: str, what: str, count: int, limit: int) -> None:
    """Raises RemoteProtocolError for a list that the protocol forbids to be so long."""
    if count > limit:
        raise RemoteProtocolError(f"{command} with {count} {what}: at most {limit} are allowed")


def refuse_over(command: str, what: str, count: int, limit: int) -> None:
    """Raises LocalProtocolError where we ourselves are about to send such a list."""
    if count > limit:
        raise LocalProtocolError(f"{command} with {count} {what}: at most {limit} are allowed")
