"""An upstream that says whatever a test has it say: sockets, `struct` and `hashlib`, no codec of the product.

Owns a listening port and at most one connection at a time. It shakes hands, answers pings, and answers each getheaders
with `served`, as a node that knows nothing else would; all else is up to the test, which calls `send` and `send_raw`
from its own thread. Hashes are in wire order.
"""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from typing_extensions import Self

REGTEST_MAGIC = bytes.fromhex("fabfb5da")
REGTEST_BITS = 0x207FFFFF
MAX_PAYLOAD = 4_000_000
WAIT_TIMEOUT_S = 30.0
SEND_TIMEOUT_S = 30.0
_HEADER = struct.Struct("<4s12sI4s")


def double_sha256(data: bytes) -> bytes:
    return hashlib.sha256(hashlib.sha256(data).digest()).digest()


def message(command: str, payload: bytes = b"") -> bytes:
    """A whole message of the v1 transport."""
    return _HEADER.pack(REGTEST_MAGIC, command.encode(), len(payload), double_sha256(payload)[:4]) + payload


def meets(block_hash: bytes, bits: int) -> bool:
    """Whether the hash is at most the target of nBits."""
    exponent, mantissa = bits >> 24, bits & 0x7FFFFF
    return int.from_bytes(block_hash, "little") <= mantissa << 8 * (exponent - 3)


def make_header(
    previous: bytes,
    time_s: int,
    *,
    version: int = 0x2000_0000,
    bits: int = REGTEST_BITS,
    label: str = "",
    work: bool = True,
) -> bytes:
    """80 bytes on top of `previous` that meet their own nBits, or with work=False just don't."""
    root = hashlib.sha256(label.encode()).digest()
    head = struct.pack("<i32s32sII", version, previous, root, time_s, bits)
    nonce = 0
    while True:
        header = head + nonce.to_bytes(4, "little")
        if meets(double_sha256(header), bits) == work:
            return header
        nonce += 1


def make_branch(parent: bytes, count: int, label: str) -> list[bytes]:
    """`count` consecutive headers on top of the header `parent`, a second apart."""
    headers = []
    for number in range(count):
        time_s = int.from_bytes(parent[68:72], "little") + 1
        parent = make_header(double_sha256(parent), time_s, label=f"{label} {number}")
        headers.append(parent)
    return headers


def headers_payload(headers: Iterable[bytes]) -> bytes:
    """The body of a `headers` message: each followed by its count of no transactions."""
    listed = list(headers)
    return compact_size(len(listed)) + b"".join(header + b"\0" for header in listed)


def cmpctblock_payload(header: bytes) -> bytes:
    """The body of a `cmpctblock` with one short id and nothing prefilled."""
    return header + bytes(8) + b"\x01" + bytes(6) + b"\x00"


def compact_size(value: int) -> bytes:
    if value < 0xFD:
        return bytes((value,))
    return b"\xfd" + struct.pack("<H", value) if value <= 0xFFFF else b"\xfe" + struct.pack("<I", value)


class ScriptedPeer:
    """An upstream on a free port, of loopback if not told otherwise, as a context manager."""

    aside: bytes | None = b"(blocks)"
    """In its version message, whom not to count as the one who is connected."""

    def __init__(self, height: int = 0, served: Iterable[bytes] = (), *, host: str = "127.0.0.1") -> None:
        """`height` is what its version message claims, `served` the headers that any getheaders is answered with."""
        self.height = height
        self.served = list(served)
        self.handshakes = 0
        """Completed so far."""
        self.received: dict[str, int] = {}
        """How many messages came, by command."""
        self._listener = socket.create_server((host, 0), backlog=8)
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._attention = threading.Lock()
        self._connection: socket.socket | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.hang_up()
        if self._thread.ident is not None:
            self._thread.join(WAIT_TIMEOUT_S)
        self._listener.close()

    @property
    def address(self) -> str:
        """`host:port`, as BITCOIN_NODE takes it."""
        host, port = self._listener.getsockname()
        return f"{host}:{port}"

    def open(self) -> None:
        """Answer from now on: until then connections wait in the kernel, so that an honest node can be first."""
        self._thread.start()

    def wait_for_handshakes(self, count: int) -> None:
        """Wait until so many handshakes have been completed in all, and the last one's connection stands."""
        self._await(lambda: self.handshakes >= count and self._connection is not None, f"handshake {count}")

    def wait_for_answer(self) -> None:
        """Send a ping and wait for its pong: everything sent before has been read by then."""
        count = self.received.get("pong", 0)
        self.send("ping", bytes(8))
        self._await(lambda: self.received.get("pong", 0) > count, "a pong")

    def wait_for_hang_up(self) -> None:
        """Wait until the other side has closed the connection."""
        self._await(lambda: self._connection is None, "the connection's end")

    def send(self, command: str, payload: bytes = b"") -> None:
        """Send one well-formed message."""
        self.send_raw(message(command, payload))

    def send_raw(self, data: bytes) -> None:
        """Send bytes. OSError when there is no connection, or it ends meanwhile."""
        connection = self._connection
        if connection is None:
            raise ConnectionError("nobody is connected")
        with self._sending:
            connection.sendall(data)

    def announce(self, header: bytes, how: str) -> None:
        """Tell of one block by `cmpctblock` or `headers`."""
        self.send(how, cmpctblock_payload(header) if how == "cmpctblock" else headers_payload([header]))

    def hang_up(self) -> None:
        """Close the connection, if there is one."""
        connection = self._connection
        if connection is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _await(self, condition: object, what: str) -> None:
        assert callable(condition)
        deadline = time.monotonic() + WAIT_TIMEOUT_S
        with self._changed:
            while not condition():
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(f"scripted peer: not within {WAIT_TIMEOUT_S:g} s: {what}; got {self.received}")
                self._changed.wait(left_s)

    def _serve(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.settimeout(SEND_TIMEOUT_S)
            threading.Thread(target=self._attend, args=(connection,), daemon=True).start()

    def _attend(self, connection: socket.socket) -> None:
        """One connection to its end. One at a time has our attention, except that who only fetches blocks stands aside:
        it is shaken hands with, and is told that there are none."""
        with connection, suppress(OSError, EOFError):
            version = _exactly(connection, _HEADER.size)
            version += _exactly(connection, _HEADER.unpack(version)[2])
            if self.aside is not None and self.aside in version:
                self._answer(connection, "version", version[_HEADER.size :])
                while True:
                    _, command, length, _ = _HEADER.unpack(_exactly(connection, _HEADER.size))
                    payload = _exactly(connection, length)
                    if command.startswith(b"getdata"):
                        connection.sendall(message("notfound", payload))
                    elif command.startswith(b"ping"):
                        connection.sendall(message("pong", payload))
            with self._attention:
                try:
                    self._converse(connection, version)
                finally:
                    with self._changed:
                        self._connection = None
                        self._changed.notify_all()

    def _converse(self, connection: socket.socket, version: bytes | None = None) -> None:
        if version is not None:  # read already
            self._hear(connection, "version", version[_HEADER.size :])
        while True:
            try:
                magic, raw_command, length, _ = _HEADER.unpack(_exactly(connection, _HEADER.size))
            except TimeoutError:
                continue  # nobody has said anything for a while
            assert magic == REGTEST_MAGIC
            payload = _exactly(connection, length)
            self._hear(connection, raw_command.rstrip(b"\0").decode(), payload)

    def _hear(self, connection: socket.socket, command: str, payload: bytes) -> None:
        with self._sending:
            self._answer(connection, command, payload)
        with self._changed:
            self.received[command] = self.received.get(command, 0) + 1
            if command == "verack":
                self.handshakes += 1
                self._connection = connection
            self._changed.notify_all()

    def _answer(self, connection: socket.socket, command: str, payload: bytes) -> None:
        if command == "version":
            address = bytes(26)
            version = struct.pack("<iQq", 70016, 9, int(time.time())) + address + address
            version += (
                struct.pack("<Q", id(self)) + compact_size(10) + b"/Scripted/" + struct.pack("<i?", self.height, True)
            )
            connection.sendall(message("version", version) + message("verack"))
        elif command == "ping":
            connection.sendall(message("pong", payload))
        elif command == "getheaders":
            connection.sendall(message("headers", headers_payload(self.served)))


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 16))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
