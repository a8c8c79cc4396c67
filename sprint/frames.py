"""The stream's framing, shared by server and client: binary frames, and one JSON line an event.

A frame is `u32 length, u8 type, body`, little-endian; `length` counts the type's byte and the body, not itself. The
bodies: type 1 a record of 192 bytes, type 2 what was lost, type 3 a heartbeat, type 4 whether records come by UDP.
docs/wire-format.md has them byte by byte. Pure: bytes and values in, bytes and values out.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from sprint.errors import RemoteProtocolError
from sprint.events import Lapped
from sprint.record import SIZE as RECORD_SIZE
from sprint.record import Record
from sprint.record import decode as decode_record


class FrameType(IntEnum):
    """What a frame's body is."""

    RECORD = 1
    LOST = 2
    HEARTBEAT = 3
    UDP = 4


class Format(IntEnum):
    """How a subscriber wants to be told."""

    BINARY = 0
    JSON = 1

    @property
    def label(self) -> str:
        """The format's name in the hello and in its answer."""
        return self.name.lower()


MAX_FRAME: Final = 4096
"""The longest frame that a reader accepts, its length field apart: twenty times today's longest, for types to come."""

HEAD: Final = struct.Struct("<IB")
_LENGTH: Final = struct.Struct("<I")
_LOST: Final = struct.Struct("<QQ")
_HEARTBEAT: Final = struct.Struct("<QQQ")
_UDP: Final = struct.Struct("<BB6xQ")
_RECORD_HEAD: Final = HEAD.pack(1 + RECORD_SIZE, FrameType.RECORD)
_BODY_SIZES: Final = {
    FrameType.RECORD: RECORD_SIZE,
    FrameType.LOST: _LOST.size,
    FrameType.HEARTBEAT: _HEARTBEAT.size,
    FrameType.UDP: _UDP.size,
}


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The server lives, and this subscriber has been sent (or told of the loss of) everything up to `sequence`."""

    session: int
    sequence: int
    """0: nothing yet."""
    wall_ns: int


class UdpState(IntEnum):
    """Which way a subscriber's records come."""

    ACTIVE = 1
    """By UDP."""
    INACTIVE = 2
    """On this connection."""


class UdpReason(IntEnum):
    """Why they don't, or no longer, come by UDP."""

    NONE = 0
    LAPSED = 1
    """No keep-alive came for too long."""
    UNPROVEN = 2
    """No echo of a cookie came."""
    FULL = 3
    """There are too many UDP subscribers, on this server or behind this address."""
    RESTARTED = 4
    """The server's UDP side began anew, and asks for the proof again."""
    UNREACHABLE = 5
    """This host can't send to that address."""
    REPLACED = 6
    """Another session has proven the same address."""
    UNHEARD = 7
    """The subscriber says that none of it reaches him."""


@dataclass(frozen=True, slots=True)
class UdpChange:
    """From record `next` on, records come that way."""

    state: UdpState
    reason: UdpReason
    next: int


Item = Record | Lapped | Heartbeat | UdpChange
"""What a frame says."""


def record_frame(record: bytes, form: Format) -> bytes:
    """The frame of an encoded record of 192 bytes."""
    if form is Format.BINARY:
        return _RECORD_HEAD + record
    return json_line(decode_record(record).as_dict())


def lost_frame(lapped: Lapped, form: Format) -> bytes:
    """The frame that tells a subscriber what it won't get."""
    if form is Format.BINARY:
        return HEAD.pack(1 + _LOST.size, FrameType.LOST) + _LOST.pack(lapped.first, lapped.lost)
    return json_line({"event": "lost", "first": lapped.first, "lost": lapped.lost})


def heartbeat_frame(heartbeat: Heartbeat, form: Format) -> bytes:
    """The frame of a heartbeat; its JSON form gives the time in seconds."""
    if form is Format.BINARY:
        body = _HEARTBEAT.pack(heartbeat.session, heartbeat.sequence, heartbeat.wall_ns)
        return HEAD.pack(1 + _HEARTBEAT.size, FrameType.HEARTBEAT) + body
    return json_line(
        {
            "event": "heartbeat",
            "session": f"{heartbeat.session:016x}",
            "seq": heartbeat.sequence,
            "time": heartbeat.wall_ns / 1_000_000_000,
        }
    )


def udp_frame(change: UdpChange, form: Format) -> bytes:
    """The frame that tells a subscriber which way its records come from now on."""
    if form is Format.BINARY:
        return HEAD.pack(1 + _UDP.size, FrameType.UDP) + _UDP.pack(change.state, change.reason, change.next)
    return json_line(
        {
            "event": "udp",
            "state": change.state.name.lower(),
            "reason": change.reason.name.lower() if change.reason else None,
            "next": change.next,
        }
    )


def json_line(value: dict[str, object]) -> bytes:
    """One line of compact JSON in UTF-8, newline included."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


class FrameDecoder:
    """Bytes in, items out, whatever way the bytes are cut. Holds at most one unfinished frame of MAX_FRAME bytes."""

    def __init__(self) -> None:
        self._rest = b""
        self._broken: RemoteProtocolError | None = None

    @property
    def unfinished(self) -> int:
        """How many bytes of a frame that is not yet whole are held."""
        return len(self._rest)

    def receive(self, data: bytes) -> list[Item]:
        """The items that these bytes complete; frames of unknown types are passed over.

        Raises RemoteProtocolError for an empty frame, one longer than MAX_FRAME, a body of the wrong length and a
        record that is none: at once if nothing came before it, else by the next call, so that no item is lost.
        """
        if self._broken is not None:
            raise self._broken
        items: list[Item] = []
        try:
            self._rest = _decode_all(self._rest + data, items)
        except RemoteProtocolError as error:
            if not items:
                raise
            self._rest = b""
            self._broken = error
        return items


def _decode_all(data: bytes, items: list[Item]) -> bytes:
    """Adds what whole frames say to `items`, and returns the bytes behind them."""
    at = 0
    while len(data) - at >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(data, at)
        if not 0 < length <= MAX_FRAME:
            raise RemoteProtocolError(f"frame of {length} bytes: expected 1 to {MAX_FRAME}")
        end = at + _LENGTH.size + length
        if len(data) < end:
            break
        item = _decode(data[at + _LENGTH.size], data[at + HEAD.size : end])
        if item is not None:
            items.append(item)
        at = end
    return data[at:]


def _decode(number: int, body: bytes) -> Item | None:
    try:
        kind = FrameType(number)
    except ValueError:
        return None  # of a later version, which says nothing that we need
    if len(body) != _BODY_SIZES[kind]:
        raise RemoteProtocolError(f"frame of type {number} with {len(body)} bytes: expected {_BODY_SIZES[kind]}")
    if kind is FrameType.RECORD:
        return decode_record(body)
    if kind is FrameType.LOST:
        return Lapped(*_LOST.unpack(body))
    if kind is FrameType.UDP:
        state, reason, following = _UDP.unpack(body)
        try:
            return UdpChange(UdpState(state), UdpReason(reason), following)
        except ValueError as error:
            raise RemoteProtocolError(f"frame of type {number}: {error}") from None
    return Heartbeat(*_HEARTBEAT.unpack(body))
