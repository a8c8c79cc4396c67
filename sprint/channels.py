"""How the relay's process wakes another one that reads the ring: nothing is sent but the fact that there is more.

USE_MEMORY_CHANNEL=true: an eventfd, one addition in kernel memory. false: a datagram over a loopback socket. Either way
signals that nobody has read yet become one, and the writer never waits.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Protocol

_SIGNAL = b"\x01"
_QUEUED = 4096


class Channel(Protocol):
    """One writer, one reader; both ends live in either process, for they are made before the fork."""

    def publish(self) -> None:
        """The ring has grown: wake the reader."""

    def fileno(self) -> int:
        """The reader's descriptor."""

    def drain(self) -> None:
        """Take all signals that have come, before looking at the ring."""


class EventChannel:
    """An eventfd."""

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def publish(self) -> None:
        """The ring has grown: wake the reader."""
        with suppress(BlockingIOError):  # 2**64 signals unread: it has been told
            os.eventfd_write(self._descriptor, 1)

    def fileno(self) -> int:
        """The reader's descriptor."""
        return self._descriptor

    def drain(self) -> None:
        """Take all signals that have come, before looking at the ring."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._descriptor)


class SocketChannel:
    """A UDP socket on the loopback interface that talks to itself."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.connect(self._socket.getsockname())  # takes nothing from anybody else

    def publish(self) -> None:
        """The ring has grown: wake the reader."""
        with suppress(BlockingIOError, ConnectionRefusedError):
            self._socket.send(_SIGNAL)

    def fileno(self) -> int:
        """The reader's descriptor."""
        return self._socket.fileno()

    def drain(self) -> None:
        """Take all signals that have come, before looking at the ring."""
        with suppress(BlockingIOError):
            for _ in range(_QUEUED):
                self._socket.recv(1)
