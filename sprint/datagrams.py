"""The UDP feed's datagrams, shared by server and client; docs/wire-format.md has them byte by byte. Pure.

A record is its own datagram, 192 bytes that begin with `SPR1`. Everything else is short and begins with a magic of its
own. From the server: a heartbeat, and a challenge, which holds a cookie for the address that it is sent to. From the
client: an echo of that cookie, and a keep-alive; both name the subscription by the token that came over TCP. A
challenge is never longer than the keep-alive that may have caused it, so nobody can be flooded with more than what the
flooder sends himself.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from sprint.record import MAGIC as RECORD_MAGIC
from sprint.record import SIZE as RECORD_SIZE

HEARTBEAT_MAGIC: Final = b"SPRH"
CHALLENGE_MAGIC: Final = b"SPRC"
ECHO_MAGIC: Final = b"SPRE"
KEEP_ALIVE_MAGIC: Final = b"SPRK"

TOKEN_SIZE: Final = 16
"""Bytes of chance: who wasn't told a token over TCP doesn't guess one."""
COOKIE_SIZE: Final = 24

_HEARTBEAT: Final = struct.Struct("<4sQQQ")
_CHALLENGE: Final = struct.Struct(f"<4sQ{COOKIE_SIZE}s")
_ECHO: Final = struct.Struct(f"<4s{TOKEN_SIZE}s{COOKIE_SIZE}s")
_KEEP_ALIVE: Final = struct.Struct(f"<4s{TOKEN_SIZE}s20x")

MAX_FROM_CLIENT: Final = _ECHO.size
"""Bytes: whatever is longer is nothing that a client sends."""
MAX_FROM_SERVER: Final = RECORD_SIZE
CHALLENGE_SIZE: Final = _CHALLENGE.size
KEEP_ALIVE_SIZE: Final = _KEEP_ALIVE.size
assert CHALLENGE_SIZE <= KEEP_ALIVE_SIZE


@dataclass(frozen=True, slots=True)
class Beat:
    """The server lives, and `sequence` is the newest record that it has published; 0: none yet."""

    session: int
    sequence: int
    wall_ns: int

    def encode(self) -> bytes:
        """28 bytes."""
        return _HEARTBEAT.pack(HEARTBEAT_MAGIC, self.session, self.sequence, self.wall_ns)


@dataclass(frozen=True, slots=True)
class Challenge:
    """Whoever gets this may echo the cookie, and has shown thereby that datagrams reach him here."""

    session: int
    cookie: bytes

    def encode(self) -> bytes:
        """CHALLENGE_SIZE bytes."""
        return _CHALLENGE.pack(CHALLENGE_MAGIC, self.session, self.cookie)


@dataclass(frozen=True, slots=True)
class Echo:
    """The subscription with this token wants its records where this datagram comes from."""

    token: bytes
    cookie: bytes

    def encode(self) -> bytes:
        """44 bytes."""
        return _ECHO.pack(ECHO_MAGIC, self.token, self.cookie)


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """The subscription with this token is at the address that this datagram comes from."""

    token: bytes

    def encode(self) -> bytes:
        """KEEP_ALIVE_SIZE bytes."""
        return _KEEP_ALIVE.pack(KEEP_ALIVE_MAGIC, self.token)


def from_client(data: bytes) -> Echo | KeepAlive | None:
    """What a datagram to the server says; None for anything that no client sends."""
    magic = data[:4]
    if magic == ECHO_MAGIC and len(data) == _ECHO.size:
        return Echo(*_ECHO.unpack(data)[1:])
    if magic == KEEP_ALIVE_MAGIC and len(data) == KEEP_ALIVE_SIZE:
        return KeepAlive(_KEEP_ALIVE.unpack(data)[1])
    return None


def from_server(data: bytes) -> Beat | Challenge | bytes | None:
    """What a datagram to the client says: an encoded record is given back as it is; None for anything else."""
    magic, size = data[:4], len(data)
    if magic == RECORD_MAGIC and size == RECORD_SIZE:
        return data
    if magic == HEARTBEAT_MAGIC and size == _HEARTBEAT.size:
        return Beat(*_HEARTBEAT.unpack(data)[1:])
    if magic == CHALLENGE_MAGIC and size == CHALLENGE_SIZE:
        return Challenge(*_CHALLENGE.unpack(data)[1:])
    return None
