"""The v1 transport: a header of 24 bytes (magic, command, length, checksum) before each payload.

A framer takes the bytes of one direction of one connection, in whatever pieces they come, and gives out whole messages
whose checksum holds. It keeps at most one payload: 4,000,000 bytes, and only as much of it as has arrived. A message of
a type that isn't decoded, or longer than its type's own bound, is counted and its bytes run through unkept. Bad magic
and an oversize length can't be recovered from: they are a violation, after which the framer takes no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from struct import Struct

from sprint.bitcoin.block import double_sha256
from sprint.bitcoin.codec import MAX_PAYLOAD_SIZE
from sprint.bitcoin.messages import MESSAGES
from sprint.errors import RemoteProtocolError

FRAME_HEADER_SIZE = 24
COMMAND_SIZE = 12

Frame = tuple[str, bytes, int]
"""Command, payload, and the offset in the stream at which the message's header began."""

_HEADER = Struct("<4s12sI4s")


def _padded(command: str) -> bytes:
    return command.encode("ascii").ljust(COMMAND_SIZE, b"\0")


_TYPES: dict[bytes, tuple[str, int]] = {
    _padded(command): (command, min(message.max_size, MAX_PAYLOAD_SIZE)) for command, message in MESSAGES.items()
}


def encode_frame(magic: bytes, command: str, payload: bytes) -> bytes:
    """A whole message, ready to be sent."""
    return _HEADER.pack(magic, _padded(command), len(payload), double_sha256(payload)[:4]) + payload


@dataclass(slots=True)
class Counters:
    """What came in on one connection, by what became of it."""

    messages: int = 0
    """Framed soundly and handed on, even if they are counted again below."""
    bad_checksum: int = 0
    unknown_type: int = 0
    over_bound: int = 0
    """Longer than their type can be, though not than a message may be."""
    malformed: int = 0
    """Sound by checksum, but the body breaks its format."""
    unexpected: int = 0
    """Not to be sent in that phase of the connection, or an answer to nothing we asked."""

    @property
    def skipped(self) -> int:
        return self.bad_checksum + self.unknown_type + self.over_bound + self.malformed + self.unexpected


class Framer:
    """Bytes in, whole messages out."""

    __slots__ = ("_awaited", "_body", "_head", "_magic", "_skip", "_start", "counters", "offset", "violation")

    def __init__(self, magic: bytes, counters: Counters | None = None) -> None:
        self._magic = magic
        self._head = bytearray()
        """The beginning of a header that is still incomplete."""
        self._body = bytearray()
        self._awaited: tuple[str, int, bytes] | None = None
        """Command, length and checksum of the message whose body is being gathered."""
        self._skip = 0
        """Bytes still to be left out."""
        self._start = 0
        self.counters = Counters() if counters is None else counters
        self.offset = 0
        """Bytes received in all."""
        self.violation: RemoteProtocolError | None = None
        """Why the stream can't be followed any further."""

    def receive(self, data: bytes | memoryview) -> list[Frame]:
        """The messages that `data` completes, in order.

        Where a violation follows sound messages, they are returned and `violation` is set; each further call raises it,
        and so does this one if there is nothing to return. So no cut of the stream into pieces loses a message.
        """
        if self.violation is not None:
            raise self.violation
        frames: list[Frame] = []
        try:
            self._frame(data, frames)
        except RemoteProtocolError as violation:
            self.violation = violation
            self._body.clear()
            if not frames:
                raise
        return frames

    def _frame(self, data: bytes | memoryview, frames: list[Frame]) -> None:
        at, end = 0, len(data)
        base = self.offset
        self.offset += end
        counters = self.counters
        while at < end:
            if self._skip:
                step = min(self._skip, end - at)
                self._skip -= step
                at += step
                continue
            if self._awaited is not None:
                at = self._gather(data, at, frames)
                continue
            if end - at >= FRAME_HEADER_SIZE and not self._head:
                magic, raw_command, length, checksum = _HEADER.unpack_from(data, at)
                self._start = base + at
                at += FRAME_HEADER_SIZE
            else:
                if not self._head:
                    self._start = base + at
                step = min(FRAME_HEADER_SIZE - len(self._head), end - at)
                self._head += data[at : at + step]
                at += step
                if len(self._head) < FRAME_HEADER_SIZE:
                    return
                magic, raw_command, length, checksum = _HEADER.unpack(self._head)
                self._head.clear()
            if magic != self._magic or length > MAX_PAYLOAD_SIZE:
                raise self._violation_of(magic, raw_command, length)
            known = _TYPES.get(raw_command)
            if known is None:
                counters.unknown_type += 1
                self._skip = length
            elif length > known[1]:
                counters.over_bound += 1
                self._skip = length
            elif end - at < length:
                self._awaited = (known[0], length, checksum)
            else:
                # The usual case: the whole payload is here, and one copy takes it out.
                payload = bytes(data[at : at + length])
                at += length
                if sha256(sha256(payload).digest()).digest()[:4] == checksum:
                    counters.messages += 1
                    frames.append((known[0], payload, self._start))
                else:
                    counters.bad_checksum += 1

    def _violation_of(self, magic: bytes, raw_command: bytes, length: int) -> RemoteProtocolError:
        if magic != self._magic:
            return RemoteProtocolError(
                f"magic {magic.hex()} at byte {self._start} of the stream: {self._magic.hex()} was expected"
            )
        command = raw_command.rstrip(b"\0").decode("ascii", "backslashreplace")
        return RemoteProtocolError(
            f"{command!r} of {length} bytes at byte {self._start} of the stream: at most {MAX_PAYLOAD_SIZE} allowed"
        )

    def _gather(self, data: bytes | memoryview, at: int, frames: list[Frame]) -> int:
        assert self._awaited is not None
        command, length, checksum = self._awaited
        step = min(length - len(self._body), len(data) - at)
        self._body += memoryview(data)[at : at + step]
        if len(self._body) == length:
            payload = bytes(self._body)
            self._body.clear()
            self._awaited = None
            if double_sha256(payload)[:4] == checksum:
                self.counters.messages += 1
                frames.append((command, payload, self._start))
            else:
                self.counters.bad_checksum += 1
        return at + step
