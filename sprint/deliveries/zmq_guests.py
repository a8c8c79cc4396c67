"""The connections of ZMQ subscribers: how many there may be, and what one may say.

libzmq reads all that a subscriber sends, into queues of its own that have no bound in bytes: a few seconds of
subscriptions, or one message of endless frames, are a gigabyte, and whoever reads them does nothing else. Nothing of
libzmq's ends such a connection, so this does, going by what the kernel has counted: a subscriber has a few hundred
bytes to say, and a ping a second at most.

libzmq tells of connections by their descriptors, late: by then one may be closed, and its number somebody else's. So
each is looked at through a duplicate, which stays what it is, and left alone unless it is a connection to our port.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from sprint.tiers import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Iterator

FLOOD_BYTES: Final = 64 * 1024
"""Said in FLOOD_NS, over three thousand subscriptions: no subscriber's words."""
FLOOD_NS: Final = NS_PER_S // 5
MAX_WATCHED: Final = 256
"""Connections looked at in one round, at about 5 µs each; of more a part each time."""
_BYTES_RECEIVED: Final = struct.Struct("<128xQ")
"""tcpi_bytes_received in struct tcp_info (linux/tcp.h)."""


class Guests:
    """All subscribers' connections to one port, by libzmq's descriptors."""

    def __init__(self, port: int, most: int) -> None:
        """`most`: how many there may be at a time; whoever comes beyond is turned away."""
        self._port = port
        self._most = most
        self._heard: dict[int, tuple[int, int]] = {}
        """descriptor → (bytes received, when that was noted)."""

    def __len__(self) -> int:
        return len(self._heard)

    def came(self, descriptor: int, now_ns: int) -> bool:
        """A connection has been accepted; False: there are too many, and this one is being ended."""
        self._heard[descriptor] = (0, now_ns)
        if len(self._heard) <= self._most:
            return True
        self._end(descriptor)
        return False

    def went(self, descriptor: int) -> bool:
        """A connection has ended; False: we knew of none."""
        return self._heard.pop(descriptor, None) is not None

    def end_floods(self, now_ns: int) -> int:
        """End the connections that say far more than a subscriber has to say; returns how many."""
        ended = 0
        for descriptor in list(self._heard)[:MAX_WATCHED]:
            before, since_ns = self._heard.pop(descriptor)
            received = self._received(descriptor)
            if received - before > FLOOD_BYTES * max(1, (now_ns - since_ns) // FLOOD_NS):
                self._end(descriptor)
                ended += 1
            self._heard[descriptor] = (received, now_ns)  # at the end: the next round begins behind it
        return ended

    def _connections(self, descriptor: int) -> Iterator[socket.socket]:
        """The connection of that descriptor, if it is one to our port."""
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getsockname()[1] == self._port:
                yield connection

    def _received(self, descriptor: int) -> int:
        for connection in self._connections(descriptor):
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
            if len(info) == _BYTES_RECEIVED.size:
                return int(_BYTES_RECEIVED.unpack(info)[0])
        return 0

    def _end(self, descriptor: int) -> None:
        for connection in self._connections(descriptor):
            connection.shutdown(socket.SHUT_RDWR)  # libzmq meets the end of it, and closes it
