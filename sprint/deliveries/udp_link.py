"""What the processes that hold TCP sessions and the one that holds the UDP socket say to each other.

One SOCK_SEQPACKET pair for each stream worker, made before the first fork, so that either end's process may die and
come back. Whoever begins says Began first, and then nothing counts that its predecessor said: a stream worker's
sessions are gone, the UDP side has forgotten every subscription. What can't be sent at once waits here, in order; the
bound is the number of sessions, for each of which there are a few messages.
"""

from __future__ import annotations

import json
import socket
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sprint.addresses import Address
from sprint.frames import UdpReason
from sprint.tiers import Tier

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

MAX_MESSAGE: Final = 512
_MESSAGES_A_TURN: Final = 64


@dataclass(frozen=True, slots=True)
class Began:
    """This end's process has just started: it knows of no subscription."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A session wants its records by UDP."""

    token: bytes
    tier: Tier
    address: Address
    """Where it says that it is."""
    peer: str
    """The host that its TCP connection comes from."""


@dataclass(frozen=True, slots=True)
class Ended:
    """That session is over."""

    token: bytes


@dataclass(frozen=True, slots=True)
class Unheard:
    """Its subscriber says that nothing arrives: send nothing until it proves an address anew."""

    token: bytes


@dataclass(frozen=True, slots=True)
class Active:
    """Its address is proven: every record from `first` on is sent there."""

    token: bytes
    first: int


@dataclass(frozen=True, slots=True)
class Inactive:
    """Nothing is sent by UDP, or no longer."""

    token: bytes
    reason: UdpReason


Message = Began | Wanted | Ended | Unheard | Active | Inactive


def encode(message: Message) -> bytes:
    """One datagram between two processes of ours."""
    if isinstance(message, Began):
        return b'["began"]'
    token = message.token.hex()
    if isinstance(message, Wanted):
        said = ["wanted", token, int(message.tier), *message.address, message.peer]
    elif isinstance(message, Active):
        said = ["active", token, message.first]
    elif isinstance(message, Inactive):
        said = ["inactive", token, int(message.reason)]
    elif isinstance(message, Unheard):
        said = ["unheard", token]
    else:
        said = ["ended", token]
    return json.dumps(said).encode()


def decode(data: bytes) -> Message:
    """What encode() made. Raises ValueError for anything else: it is our own."""
    kind, *said = json.loads(data)
    if kind == "began":
        return Began()
    token = bytes.fromhex(said[0])
    if kind == "wanted":
        return Wanted(token, Tier(said[1]), Address(said[2], said[3]), said[4])
    if kind == "active":
        return Active(token, said[1])
    if kind == "inactive":
        return Inactive(token, UdpReason(said[1]))
    if kind == "unheard":
        return Unheard(token)
    if kind == "ended":
        return Ended(token)
    raise ValueError(f"message {kind!r} between stream and UDP workers: unknown")


def pair() -> tuple[socket.socket, socket.socket]:
    """A stream worker's end, and the UDP worker's."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
    return ends


class Link:
    """One end of a pair, on a loop. `received` gets each message of the other end."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, received: Callable[[Message], None]
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._received = received
        self._waiting: deque[bytes] = deque()
        loop.add_reader(sock, self._readable)
        self.send(Began())

    def send(self, message: Message) -> None:
        """Now, or as soon as the other end takes more."""
        data = encode(message)
        if self._waiting or not self._try(data):
            if not self._waiting:
                self._loop.add_writer(self._sock, self._writable)
            self._waiting.append(data)

    def close(self) -> None:
        """Leave the loop; the socket stays, for a successor."""
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)

    def _try(self, data: bytes) -> bool:
        try:
            self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:  # as in _readable()
            return True
        return True

    def _writable(self) -> None:
        while self._waiting:
            if not self._try(self._waiting[0]):
                return
            self._waiting.popleft()
        self._loop.remove_writer(self._sock)

    def _readable(self) -> None:
        for _ in range(_MESSAGES_A_TURN):
            try:
                data = self._sock.recv(MAX_MESSAGE)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data = b""
            if not data:  # the other end is closed: everything is being taken down
                self._loop.remove_reader(self._sock)
                return
            self._received(decode(data))
