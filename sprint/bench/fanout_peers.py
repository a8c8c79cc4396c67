"""What our fan-out is measured beside: libzmq, Redis and NATS as operators would run them, each told once, telling all.

A server runs in a process of its own, or is one; its subscribers connect to it by TCP, and publish() hands it one
payload. What a subscriber says and gets is that server's own protocol: RESP2, the NATS protocol, ZMTP 3.0
(rfc.zeromq.org/spec/23). Whatever isn't installed is left out, and said.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import zmq

from sprint.bench.apart import die_with
from sprint.bench.detect_wire import NEAR_ADDRESS
from sprint.bench.fanout_figures import Sent
from sprint.bench.fanout_receivers import Greeting
from sprint.errors import HostError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

START_TIMEOUT_S = 15.0
_BACKLOG = 4096


class Peer(Protocol):
    """One server, and our way of telling it."""

    pid: int
    """Whose processor time it costs; 0: ours."""

    def publish(self, payload: bytes) -> None:
        """Hand it to the server."""

    def close(self) -> None:
        """End the server."""


class Kind(NamedTuple):
    """What the subscribers of a peer have to know."""

    name: str
    port: int
    greeting: Greeting
    before: bytes
    """What stands in front of the payload that a subscriber gets,"""
    behind: bytes
    """and behind it."""
    threads: bool
    """Whether it has several, and so is the quicker with all CPUs."""


def kinds(payload: int) -> tuple[Kind, ...]:
    """The peers, for payloads of so many bytes (128 to 255)."""
    resp = b"*3\r\n$7\r\nmessage\r\n$1\r\nb\r\n$%d\r\n" % payload
    subscribe = b"*2\r\n$9\r\nSUBSCRIBE\r\n$1\r\nb\r\n"
    # Signature, version 3.0, mechanism NULL, not a server; READY; and the subscription to everything, as a message.
    zmtp = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    ready = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03SUB"
    nats = ((b"", b"\r\n"), (b'CONNECT {"verbose":false}\r\nSUB b 1\r\nPING\r\n', b"PONG\r\n"))
    return (
        Kind(
            "libzmq",
            20_001,
            Greeting(((zmtp, 64), (ready, b"PUB"), (b"\x00\x01\x01", 0))),
            bytes((0, payload)),
            b"",
            True,
        ),
        Kind("redis", 20_002, Greeting(((subscribe, b":1\r\n"),)), resp, b"\r\n", False),
        Kind("nats", 20_003, Greeting(nats), b"MSG b 1 %d\r\n" % payload, b"\r\n", True),
    )


class _Server:
    """A server's process and our publishing connection to it."""

    def __init__(self, command: list[str], port: int) -> None:
        parent = os.getpid()
        self._process = subprocess.Popen(  # noqa: S603 - found on this machine by name
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: die_with(parent, signal.SIGKILL),  # noqa: PLW1509 - there are no other threads yet
        )
        self.pid = self._process.pid
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.sock = socket.create_connection((NEAR_ADDRESS, port), timeout=START_TIMEOUT_S)
                break
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self._end()
                    raise HostError(f"{command[0]} does not start") from None
                time.sleep(0.02)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        """End it."""
        self.sock.close()
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()


class _Redis(_Server):
    """redis-server's PUBLISH; its answer, how many it was sent to, is not waited for."""

    def __init__(self, port: int, subscribers: int) -> None:
        quiet = ["--save", "", "--appendonly", "no", "--protected-mode", "no"]
        room = ["--maxclients", str(subscribers + 64), "--tcp-backlog", str(_BACKLOG)]
        super().__init__([found("redis-server"), "--bind", NEAR_ADDRESS, "--port", str(port), *quiet, *room], port)
        self.sock.setblocking(True)

    def publish(self, payload: bytes) -> None:
        self.sock.sendall(b"*3\r\n$7\r\nPUBLISH\r\n$1\r\nb\r\n$%d\r\n%b\r\n" % (len(payload), payload))


class _Nats(_Server):
    """nats-server's PUB. Its pings, each two minutes, are put off: a subscriber of ours doesn't answer them."""

    def __init__(self, port: int, _subscribers: int) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".conf", encoding="ascii") as configuration:
            configuration.write('ping_interval: "2h"\n')
            configuration.flush()
            command = [found("nats-server"), "-a", NEAR_ADDRESS, "-p", str(port), "-c", configuration.name]
            super().__init__(command, port)
        self.sock.sendall(b'CONNECT {"verbose":false}\r\n')

    def publish(self, payload: bytes) -> None:
        self.sock.sendall(b"PUB b %d\r\n%b\r\n" % (len(payload), payload))


class _LibZmq:
    """libzmq's PUB socket over TCP, in this process, by pyzmq; its own thread does the sending."""

    def __init__(self, port: int, _subscribers: int) -> None:
        self.pid = 0
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.BACKLOG, _BACKLOG)
        self._socket.bind(f"tcp://{NEAR_ADDRESS}:{port}")

    def publish(self, payload: bytes) -> None:
        self._socket.send(payload, zmq.DONTWAIT)

    def close(self) -> None:
        self._context.destroy(linger=0)


_SERVERS: dict[str, type[_Redis | _Nats | _LibZmq]] = {"libzmq": _LibZmq, "redis": _Redis, "nats": _Nats}


def be_peer_publisher(control: Connection, kind: Kind, subscribers: int) -> None:
    """The process that starts one server, and tells it what it is told to tell."""
    try:
        peer: Peer = _SERVERS[kind.name](kind.port, subscribers)
    except HostError as error:
        control.send(error)
        return
    control.send(peer.pid or os.getpid())
    while True:
        _, payload = control.recv()
        begun = time.monotonic_ns()
        peer.publish(payload)
        control.send(Sent(begun, time.monotonic_ns(), None, None, payload))


def found(name: str) -> str:
    """The path of a server's binary: the system's, or what a Python package brought. Raises HostError."""
    beside = Path(sys.executable).with_name(name)
    path = shutil.which(name) or (str(beside) if beside.exists() else None)
    if path is None:
        raise HostError(f"{name} is not installed")
    return path


def version_of(name: str) -> str:
    """What the server says that it is; empty where it isn't installed."""
    if name == "libzmq":
        return f"libzmq {zmq.zmq_version()}"
    try:
        said = subprocess.run(  # noqa: S603 - likewise
            [found(f"{name}-server"), "--version"], capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False
        )
    except (HostError, OSError):
        return ""
    return said.stdout.strip()
