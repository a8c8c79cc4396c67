"""The subscribers that the stream benchmark sends to: one process with as many connections as it is told, and an epoll.

The sender commands it by a pipe: connect so many; then tell of each round, which is over once one frame has come on
every connection; then close them. What is stamped is the return of each read, CLOCK_MONOTONIC ns.
"""

from __future__ import annotations

import os
import select
import socket
import time
from array import array
from typing import TYPE_CHECKING

from sprint.errors import HostError
from sprint.frames import HEAD
from sprint.record import SIZE, sequence_of

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

FRAME_SIZE = HEAD.size + SIZE
_ANSWER = 4096
_READ = 4096
_EVENTS = 512


class Receiver:
    """The process's state: its connections, and the frames of the round that is under way."""

    def __init__(self, control: Connection) -> None:
        self._control = control
        self._epoll = select.epoll()
        self._epoll.register(control.fileno(), select.EPOLLIN)
        self._sockets: list[socket.socket] = []
        self._stamps: array[int] = array("q")
        self._frames: set[bytes] = set()

    def serve(self) -> None:
        """Do what the sender says, until it kills us."""
        control, poll, read, clock = self._control.fileno(), self._epoll.poll, os.read, time.monotonic_ns
        stamps, frames = self._stamps, self._frames
        while True:
            for descriptor, _ in poll(-1, _EVENTS):
                if descriptor == control:
                    self._obey(*self._control.recv())
                    continue
                frame = read(descriptor, _READ)
                stamps.append(clock())
                frames.add(frame)
            if stamps and len(stamps) == len(self._sockets):
                self._tell()

    def _obey(self, command: str, *arguments: object) -> None:
        if command == "close":
            for sock in self._sockets:
                sock.close()  # which takes it out of the epoll
            self._sockets.clear()
            self._control.send("closed")
        else:
            host, port, count = arguments
            for _ in range(int(str(count))):
                self._connect(str(host), int(str(port)))
            self._control.send("connected")

    def _connect(self, host: str, port: int) -> None:
        sock = socket.create_connection((host, port))
        self._sockets.append(sock)
        sock.sendall(b"{}\n")
        answer = b""
        while not answer.endswith(b"\n"):
            more = sock.recv(_ANSWER)
            if not more:
                raise HostError(f"the stream closed connection {len(self._sockets)}: {answer!r}")
            answer += more
        self._epoll.register(sock, select.EPOLLIN)

    def _tell(self) -> None:
        """Say what came: the stamps, and the one frame that all connections must have brought."""
        same = self._frames.pop() if len(self._frames) == 1 else b""
        sequence = sequence_of(same[HEAD.size :]) if len(same) == FRAME_SIZE else None
        self._control.send((sequence, self._stamps.tobytes()))
        del self._stamps[:]
        self._frames.clear()
