"""Source rebuild: the relay's end of the line from the worker that fetches whole blocks.

The worker says of each block that it has it, whole and checked; the relay publishes that as REBUILT. A message is 40
bytes: hash (wire order), transactions, size. Both ends are made before the fork and outlive either process.
"""

from __future__ import annotations

import select
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

from sprint.events import BlockRebuilt

if TYPE_CHECKING:
    from sprint.events import Want
    from sprint.sources import Heard

_MESSAGE = struct.Struct("<32sII")
_MESSAGES_A_TURN = 16


class RebuildLine:
    """Both ends of the line: the worker calls report(), the relay's RebuildSource reads."""

    def __init__(self) -> None:
        self.reading, self._writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.reading.setblocking(False)
        self._writing.setblocking(False)

    def report(self, rebuilt: BlockRebuilt) -> None:
        """Tell the relay; a relay that has not listened for hundreds of blocks misses it."""
        with suppress(BlockingIOError):
            self._writing.send(_MESSAGE.pack(rebuilt.hash, rebuilt.transactions, rebuilt.size))

    def close(self) -> None:
        """Close both ends, in this process."""
        self.reading.close()
        self._writing.close()


class RebuildSource:
    """Whole blocks, as the worker reports them."""

    def __init__(self, line: RebuildLine, every: int = 1) -> None:
        """`every`: look at the line in one turn of so many, for a loop that spins: a look costs as much as at a peer's
        socket, and what comes here is in no hurry."""
        self._every = every
        self._turn = 0
        self._socket = line.reading
        self._epoll = select.epoll()
        self._epoll.register(self._socket, select.EPOLLIN)

    def fileno(self) -> int:
        """Readable when the worker has said something."""
        return self._epoll.fileno()

    def poll(self, now_ns: int) -> list[Heard]:  # noqa: ARG002 - nothing here goes by the clock
        """What it has said."""
        self._turn += 1
        if self._turn % self._every or not self._epoll.poll(0, 1):
            return []
        heard: list[Heard] = []
        with suppress(BlockingIOError):
            while len(heard) < _MESSAGES_A_TURN:
                said = self._socket.recv(_MESSAGE.size)
                if not said:  # nobody holds the other end any longer: there is nothing to wait for
                    self._epoll.unregister(self._socket)
                    break
                heard.append(BlockRebuilt(*_MESSAGE.unpack(said)))
        return heard

    def deadline(self) -> int | None:
        """None: the descriptor tells."""
        return None

    def want(self, want: Want, now_ns: int) -> None:
        """The worker has no headers to give."""

    def account(self) -> None:
        """The worker's peers are the upstreams, which have their rows already."""

    def close(self) -> None:
        """Stop reading; the line itself is the supervisor's."""
        self._epoll.close()
