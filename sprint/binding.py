"""Sockets at the addresses that the operator names; each is refused alike, by a line that begins with the variable."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from sprint.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sprint.addresses import Address


def bound(
    variable: str, address: Address, kind: socket.SocketKind, prepare: Callable[[socket.socket], None]
) -> socket.socket:
    """A socket of that kind at that address; port 0 takes a free one. `prepare` sets its options before it is bound.

    Raises HostError, naming the variable, the address and the reason.
    """
    try:
        family, _, protocol, _, found = socket.getaddrinfo(
            address.host, address.port, type=kind, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise _refusal(variable, address, error) from None
    try:
        prepare(sock)
        sock.bind(found)
    except OSError as error:
        sock.close()
        raise _refusal(variable, address, error) from None
    return sock


def listening(
    variable: str, address: Address, backlog: int, prepare: Callable[[socket.socket], None] | None = None
) -> socket.socket:
    """A TCP socket that listens there: as bound(), and with SO_REUSEADDR, so that a restart need not wait."""

    def options(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if prepare is not None:
            prepare(sock)

    sock = bound(variable, address, socket.SOCK_STREAM, options)
    try:
        sock.listen(backlog)  # only now is the address ours: two with SO_REUSEADDR may share it until one listens
    except OSError as error:
        sock.close()
        raise _refusal(variable, address, error) from None
    return sock


def _refusal(variable: str, address: Address, error: Exception) -> HostError:
    return HostError(f"{variable}={address}: {getattr(error, 'strerror', None) or error}")
