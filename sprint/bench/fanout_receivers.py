"""The subscribers that the fan-out benchmark sends to: real sockets, a process with as many as it is told, and an epoll.

The same loop serves every way of sending, so that what a receiver costs is the same for all: one read a wake-up, one
stamp (CLOCK_MONOTONIC ns) when a socket has as many bytes as a publication brings it. The benchmark commands it by a
pipe: make so many sockets; expect so many bytes of each; say what came; close them.
"""

from __future__ import annotations

import os
import select
import socket
import time
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sprint.errors import HostError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

HANDSHAKE_TIMEOUT_S = 20.0
_READ = 4096
_EVENTS = 512


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a TCP subscriber says to a server, and by what it knows that it is subscribed."""

    steps: tuple[tuple[bytes, int | bytes], ...]
    """Each: send this; then read so many bytes, or until the answer ends so."""


class Receivers:
    """One process's sockets and the round that is under way."""

    def __init__(self, control: Connection) -> None:
        self._control = control
        self._epoll = select.epoll()
        self._epoll.register(control.fileno(), select.EPOLLIN)
        self._sockets: list[socket.socket] = []
        self._size = 0
        self._partial: dict[int, int] = {}
        self._stamps: array[int] = array("q")
        self._surplus = 0

    def serve(self) -> None:
        """Do what the benchmark says, until it kills us."""
        control, poll, read, clock = self._control.fileno(), self._epoll.poll, os.read, time.monotonic_ns
        append = self._stamps.append
        while True:
            for descriptor, _ in poll(-1, _EVENTS):
                if descriptor == control:
                    command, *arguments = self._control.recv()
                    self._control.send(getattr(self, f"do_{command}")(*arguments))
                    continue
                length = len(read(descriptor, _READ))
                if length == self._size:
                    append(clock())
                else:
                    self._add(descriptor, length, clock())

    def _add(self, descriptor: int, length: int, now_ns: int) -> None:
        """A publication that comes in parts, or more than one at once."""
        if not length:
            raise HostError("a server closed a subscriber's connection")
        have = self._partial.get(descriptor, 0) + length
        while have >= self._size > 0:
            self._stamps.append(now_ns)
            have -= self._size
        self._partial[descriptor] = have

    def do_namespace(self, pid: int) -> None:
        """Move into the network namespace of that process."""
        with open(f"/proc/{pid}/ns/net", "rb") as namespace:
            setns = __import__("ctypes").CDLL(None, use_errno=True).setns
            if setns(namespace.fileno(), 0x4000_0000):
                raise HostError("no way into the receivers' network namespace")

    def do_udp(self, host: str, ports: range) -> int:
        """A socket on each of these ports; how many."""
        for port in ports:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((host, port))
            self._watch(sock)
        return len(self._sockets)

    def do_tcp(self, host: str, port: int, count: int, greeting: Greeting) -> int:
        """So many connections to a server, subscribed."""
        for _ in range(count):
            sock = socket.create_connection((host, port), timeout=HANDSHAKE_TIMEOUT_S)
            for said, expected in greeting.steps:
                sock.sendall(said)
                _read_answer(sock, expected)
            self._watch(sock)
        return len(self._sockets)

    def do_expect(self, size: int) -> None:
        """A round begins: each socket is to get `size` bytes."""
        self._size = size
        self._partial.clear()
        del self._stamps[:]

    def do_count(self) -> int:
        """How many publications have come in this round."""
        return len(self._stamps)

    def do_stamps(self) -> bytes:
        """When each came, int64, in order."""
        return self._stamps.tobytes()

    def do_close(self) -> int:
        """Close them all."""
        count = len(self._sockets)
        for sock in self._sockets:
            sock.close()  # which takes it out of the epoll
        self._sockets.clear()
        return count

    def _watch(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sockets.append(sock)
        self._epoll.register(sock, select.EPOLLIN)


def _read_answer(sock: socket.socket, expected: int | bytes) -> Any:
    answer = b""
    while len(answer) < expected if isinstance(expected, int) else not answer.endswith(expected):
        more = sock.recv(_READ if isinstance(expected, bytes) else expected - len(answer))
        if not more:
            raise HostError(f"a server closed a subscriber's connection after {answer[:80]!r}")
        answer += more
