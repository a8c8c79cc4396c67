"""What our fan-out is measured beside: libzmq, Redis and NATS as operators would run them, each told once, telling all.

Each peer is a server that subscribers connect to by TCP, and publish(), which hands it one payload. What a subscriber
says and gets is that server's own protocol: RESP2, the NATS protocol, ZMTP 3.0 (rfc.zeromq.org/spec/23).
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import zmq

from sprint.bench.fanout_receivers import Greeting
from sprint.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable

START_TIMEOUT_S = 15.0
SUBJECT = b"b"


class Peer(Protocol):
    """One server."""

    name: str
    port: int
    greeting: Greeting

    def frame_size(self, payload: int) -> int:
        """How many bytes one publication of so many bytes brings a subscriber."""

    def publish(self, payload: bytes) -> None:
        """Hand it to the server."""

    def close(self) -> None:
        """End the server."""


class _Server:
    """A server's process and our publishing connection to it."""

    def __init__(self, command: list[str], host: str, port: int, become: Callable[[], None]) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - found on this machine by name
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=become
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.sock = socket.create_connection((host, port), timeout=START_TIMEOUT_S)
                break
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.close()
                    raise HostError(f"{command[0]} does not start") from None
                time.sleep(0.02)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        if hasattr(self, "sock"):
            self.sock.close()
        self._process.kill()
        self._process.wait()


class Redis:
    """redis-server's PUBLISH."""

    name = "redis"
    greeting = Greeting(((b"*2\r\n$9\r\nSUBSCRIBE\r\n$1\r\nb\r\n", b":1\r\n"),))

    def __init__(self, host: str, port: int, subscribers: int, become: Callable[[], None]) -> None:
        """Raises HostError when it is not installed or doesn't start."""
        self.port = port
        self._server = _Server(
            [
                *(_found("redis-server"), "--bind", host, "--port", str(port), "--save", "", "--appendonly", "no"),
                *("--protected-mode", "no", "--maxclients", str(subscribers + 64), "--tcp-backlog", "4096"),
            ],
            host,
            port,
            become,
        )

    def frame_size(self, payload: int) -> int:
        """`*3 $7 message $1 b $192 …`."""
        return len(b"*3\r\n$7\r\nmessage\r\n$1\r\nb\r\n$%d\r\n" % payload) + payload + 2

    def publish(self, payload: bytes) -> None:
        """PUBLISH; its answer, how many it was sent to, is not waited for."""
        self._server.sock.sendall(b"*3\r\n$7\r\nPUBLISH\r\n$1\r\nb\r\n$%d\r\n%b\r\n" % (len(payload), payload))

    def close(self) -> None:
        """End it."""
        self._server.close()


class Nats:
    """nats-server's PUB."""

    name = "nats"
    greeting = Greeting(
        (
            (b"", b"\r\n"),
            (b'CONNECT {"verbose":false}\r\nSUB b 1\r\nPING\r\n', b"PONG\r\n"),
        )
    )

    def __init__(self, host: str, port: int, subscribers: int, become: Callable[[], None]) -> None:
        """Raises HostError when it is not installed or doesn't start."""
        self.port = port
        self._subscribers = subscribers
        self._server = _Server([_found("nats-server"), "-a", host, "-p", str(port)], host, port, become)
        self._server.sock.sendall(b'CONNECT {"verbose":false}\r\n')

    def frame_size(self, payload: int) -> int:
        """`MSG b 1 192 …`."""
        return len(b"MSG b 1 %d\r\n" % payload) + payload + 2

    def publish(self, payload: bytes) -> None:
        """PUB."""
        self._server.sock.sendall(b"PUB b %d\r\n%b\r\n" % (len(payload), payload))

    def close(self) -> None:
        """End it."""
        self._server.close()


class LibZmq:
    """libzmq's PUB socket over TCP, in this process, by pyzmq."""

    name = "libzmq"
    # Greeting: signature, version 3.0, mechanism NULL, not a server. Then READY, and the subscription as a message.
    greeting = Greeting(
        (
            (b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32), 64),
            (b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03SUB", 2),
        )
    )

    def __init__(self, host: str, port: int, subscribers: int, become: Callable[[], None]) -> None:  # noqa: ARG002
        """Raises HostError when it can't be bound."""
        self.port = port
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.BACKLOG, 4096)
        self._socket.setsockopt(zmq.SNDHWM, 1000)
        self._socket.bind(f"tcp://{host}:{port}")

    def frame_size(self, payload: int) -> int:
        """A flag, a length of one byte, the payload behind its topic."""
        return 2 + payload

    def publish(self, payload: bytes) -> None:
        """One message: the topic is how it begins."""
        self._socket.send(payload, zmq.DONTWAIT)

    def close(self) -> None:
        """End it."""
        self._context.destroy(linger=0)


def _found(name: str) -> str:
    """The path of a server's binary: the system's, or what a Python package brought."""
    path = shutil.which(name)
    if path is None:
        beside = Path(__import__("sys").executable).with_name(name)
        path = str(beside) if beside.exists() else None
    if path is None:
        raise HostError(f"{name} is not installed")
    return path
