"""The same datagram to many addresses by sendmmsg(2): a thousand a system call, where no frame of ours can lead.

The kernel routes, resolves and queues each; about 5 µs a datagram. Owns nothing but the arrays of the call; the socket
is the caller's, and must not block. What the kernel refuses is counted by destination and left out.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple, final

if TYPE_CHECKING:
    from collections.abc import Sequence

GROUP = 1024
"""Of one call: UIO_MAXIOV is its limit."""
_ADDRESS_ROOM = 28  # struct sockaddr_in6
_IPV4, _IPV6 = struct.Struct("=H2s4s8x"), struct.Struct("=H2sI16sI")
_STOPPING = {errno.EAGAIN, errno.ENOBUFS, errno.EBADF, errno.ENOTSOCK, errno.EINVAL, errno.ENOMEM}
"""What isn't one destination's trouble."""


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Msghdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iov_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Mmsghdr(ctypes.Structure):
    _fields_ = (("header", _Msghdr), ("sent", ctypes.c_uint))


_libc = ctypes.CDLL(None, use_errno=True)
_sendmmsg = _libc.sendmmsg
_sendmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int]
_HEADER_BYTES = ctypes.sizeof(_Mmsghdr)


class Sent(NamedTuple):
    """What became of one datagram to many."""

    sent: int
    refused: int
    """By the kernel, each by its destination: no route, not permitted."""
    error: int
    """The errno that ended it before its time (EAGAIN: the socket's buffer is full), or 0."""


@final
class Multisend:
    """A list of addresses, made ready once; for one socket family at a time, in one thread."""

    def __init__(self, family: int, destinations: Sequence[tuple[bytes, int]]) -> None:
        """Addresses (4 bytes for AF_INET; 16, or 4 to be mapped, for AF_INET6) and ports, in the order of sending."""
        self._count = len(destinations)
        self._names = bytearray(_ADDRESS_ROOM * max(self._count, 1))
        for number, (address, port) in enumerate(destinations):
            big = struct.pack("!H", port)
            if family == socket.AF_INET:
                _IPV4.pack_into(self._names, number * _ADDRESS_ROOM, family, big, address)
            else:
                mapped = address if len(address) == 16 else bytes(10) + b"\xff\xff" + address
                _IPV6.pack_into(self._names, number * _ADDRESS_ROOM, family, big, 0, mapped, 0)
        self._room = (ctypes.c_char * len(self._names)).from_buffer(self._names)
        self._iovec = _Iovec()
        self._headers = (_Mmsghdr * max(self._count, 1))()
        size = _IPV4.size if family == socket.AF_INET else _IPV6.size
        start = ctypes.addressof(self._room)
        for number in range(self._count):
            header = self._headers[number].header
            header.name, header.name_length = start + number * _ADDRESS_ROOM, size
            header.iov, header.iov_length = ctypes.addressof(self._iovec), 1

    def __len__(self) -> int:
        """Destinations."""
        return self._count

    def send(self, sock: socket.socket, payload: bytes | memoryview) -> Sent:
        """The payload to each, in order; never raises for what the kernel refuses."""
        buffer = ctypes.create_string_buffer(bytes(payload), len(payload))
        self._iovec.base, self._iovec.length = ctypes.addressof(buffer), len(payload)
        at = sent = refused = 0
        base, fd = ctypes.addressof(self._headers), sock.fileno()
        while at < self._count:
            count = _sendmmsg(fd, base + at * _HEADER_BYTES, min(GROUP, self._count - at), socket.MSG_DONTWAIT)
            if count > 0:
                sent += count
                at += count
                continue
            error = ctypes.get_errno()
            if error == errno.EINTR:
                continue
            if error in _STOPPING:
                return Sent(sent, refused, error)
            refused += 1
            at += 1
        return Sent(sent, refused, 0)
