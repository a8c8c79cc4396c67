"""Names to socket addresses without stopping the loop: getaddrinfo blocks, so it runs in a thread of its own.

Numeric addresses never come here. A thread lives only while it resolves; its answer arrives over a socket pair whose
reading end a loop can watch.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sprint.addresses import Address

SocketAddress = tuple[socket.AddressFamily, tuple[Any, ...]]


def numeric(address: Address) -> SocketAddress | None:
    """The socket address of a numeric host; None for a name."""
    try:
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        )
    except OSError:
        return None
    family, _, _, _, sockaddr = found[0]
    return family, sockaddr


class Resolver:
    """Answers submit() by results(), once fileno() is readable."""

    def __init__(self) -> None:
        self._reading, self._writing = socket.socketpair()
        self._reading.setblocking(False)
        self._writing.setblocking(False)
        self._answers: deque[tuple[Address, list[SocketAddress], str]] = deque()

    def fileno(self) -> int:
        """Readable when there are results."""
        return self._reading.fileno()

    def submit(self, address: Address) -> None:
        """Begin to resolve; every submitted address is answered once."""
        threading.Thread(target=self._resolve, args=(address,), daemon=True, name=f"resolve {address}").start()

    def results(self) -> list[tuple[Address, list[SocketAddress], str]]:
        """What has been resolved: the address, its socket addresses (perhaps none), and why there are none."""
        with contextlib.suppress(BlockingIOError):
            self._reading.recv(4_096)
        results = []
        while self._answers:
            results.append(self._answers.popleft())
        return results

    def close(self) -> None:
        """Give up what is under way."""
        self._reading.close()
        self._writing.close()

    def _resolve(self, address: Address) -> None:
        try:
            found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            self._answers.append((address, [(family, sockaddr) for family, _, _, _, sockaddr in found], ""))
        except (OSError, ValueError) as error:  # ValueError: a name that IDNA or the C library can't take
            self._answers.append((address, [], f"{address.host} can't be resolved: {error}"))
        try:
            self._writing.send(b"\0")
        except OSError:  # closed meanwhile, or thousands of answers unread: results() sees them all the same
            return
