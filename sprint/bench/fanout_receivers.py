"""The subscribers that `bench fanout` sends to: real sockets, a process with as many as it is told, and an epoll.

The same loop serves every way of sending, so that what a receiver costs is the same for all: one read a wake-up, one
stamp (CLOCK_MONOTONIC ns) when a socket has as many bytes as a publication brings it. The benchmark commands it by a
pipe; of a round it says, unasked, that each socket has got its publication, or, when told to give up, what has come.
"""

from __future__ import annotations

import os
import select
import socket
import time
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from sprint.bench.fanout_wire import join_namespace
from sprint.errors import HostError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

HANDSHAKE_TIMEOUT_S = 20.0
_READ = 448
"""More than a publication brings: all of it in one read."""
_EVENTS = 512


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a TCP subscriber says to a server, and by what it knows that it is subscribed."""

    steps: tuple[tuple[bytes, int | bytes], ...]
    """Each: send this; then read so many bytes, or until the answer ends so."""


class Round(NamedTuple):
    """What one process's subscribers got of a publication."""

    number: int
    stamps: bytes
    """int64: when each had it, in that order."""
    last: bytes
    """What was read last; empty if that wasn't a whole publication."""
    cpu_ns: int
    """That the process has used since the round began."""


class Receivers:
    """One process's sockets, and the round that is under way."""

    def __init__(self, control: Connection) -> None:
        self._control = control
        self._epoll = select.epoll()
        self._epoll.register(control.fileno(), select.EPOLLIN)
        self._sockets: list[socket.socket] = []
        self._number = self._size = self._cpu_ns = 0
        self._partial: dict[int, int] = {}
        self._stamps: array[int] = array("q")

    def serve(self) -> None:
        """Do what the benchmark says, until it kills us."""
        control, poll, read, clock = self._control.fileno(), self._epoll.poll, os.read, time.monotonic_ns
        append, partial, size, data = self._stamps.append, self._partial, 0, b""
        while True:
            for descriptor, _ in poll(-1, _EVENTS):
                if descriptor == control:
                    command, *arguments = self._control.recv()
                    getattr(self, f"do_{command}")(*arguments)
                    size, data = self._size, b""
                    continue
                data = read(descriptor, _READ)
                if len(data) == size and not partial:
                    append(clock())
                else:
                    self._add(descriptor, data, clock())
            if size and len(self._stamps) >= len(self._sockets):
                self._tell(data if len(data) == size else b"")
                size = 0

    def _add(self, descriptor: int, data: bytes, now_ns: int) -> None:
        """A publication that comes in parts; outside of a round, what a server says by itself."""
        if not data:
            raise HostError("a server closed a subscriber's connection")
        if not self._size:
            return
        have = self._partial.pop(descriptor, 0) + len(data)
        if have >= self._size:
            self._stamps.append(now_ns)
        else:
            self._partial[descriptor] = have

    def _tell(self, last: bytes) -> None:
        told = Round(self._number, self._stamps.tobytes(), last, time.process_time_ns() - self._cpu_ns)
        self._size = 0
        self._control.send(told)

    def do_namespace(self, pid: int) -> None:
        """Move into the network namespace of that process; answers with our own pid."""
        join_namespace(pid)
        self._control.send(os.getpid())

    def do_udp(self, host: str, ports: list[int]) -> None:
        """A socket on each of these ports; answers with how many there are."""
        for port in ports:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((host, port))
            self._watch(sock)
        self._control.send(len(self._sockets))

    def do_tcp(self, host: str, port: int, count: int, greeting: Greeting) -> None:
        """So many more connections to a server, subscribed; answers with how many there are."""
        try:
            for _ in range(count):
                sock = socket.create_connection((host, port), timeout=HANDSHAKE_TIMEOUT_S)
                for said, expected in greeting.steps:
                    sock.sendall(said)
                    _read_answer(sock, expected)
                self._watch(sock)
        except OSError as error:
            self._control.send(HostError(f"subscriber {len(self._sockets) + 1} of {host}:{port}: {error}"))
            return
        self._control.send(len(self._sockets))

    def do_expect(self, number: int, size: int) -> None:
        """A round begins: each socket is to get `size` bytes; answers when it is ready."""
        self._partial.clear()
        del self._stamps[:]
        self._number, self._size, self._cpu_ns = number, size, time.process_time_ns()
        self._control.send(number)

    def do_give_up(self, number: int) -> None:
        """Say what has come of that round, unless that has been said."""
        if self._size and self._number == number:
            self._tell(b"")

    def _watch(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sockets.append(sock)
        self._epoll.register(sock, select.EPOLLIN | select.EPOLLET)


def _read_answer(sock: socket.socket, expected: int | bytes) -> None:
    answer = b""
    while len(answer) < expected if isinstance(expected, int) else not answer.endswith(expected):
        more = sock.recv(expected - len(answer) if isinstance(expected, int) else _READ)
        if not more:
            raise ConnectionError(f"closed after {answer[:80]!r}")
        answer += more
