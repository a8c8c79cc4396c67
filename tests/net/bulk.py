"""A bulk sender: as many bytes as asked for over one TCP connection, from a file repeated, each round begun elsewhere.

As a program it connects, sends, prints the SHA-256 of what it sent, and ends. In the test's process, `bulk()` starts it
and hands back the near end of its connection.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.net.netns import Namespace

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 30.0
STEP = 7_919
"""Bytes by which each round is turned on: message starts fall elsewhere in the segments."""


class Bulk:
    """One transfer under way."""

    def __init__(self, connection: socket.socket, process: subprocess.Popen[bytes], size: int) -> None:
        self.connection = connection
        self.size = self.left = size
        self._process = process
        self._digest = hashlib.sha256()
        self._buffer = memoryview(bytearray(1 << 20))

    def receive(self, *, hashed: bool = True) -> int:
        """Take in what there is, or wait for it; returns how many bytes are still to come."""
        count = self.connection.recv_into(self._buffer)
        assert count, f"the connection ended {self.left} bytes early"
        if hashed:
            self._digest.update(self._buffer[:count])
        self.left -= count
        return self.left

    def is_whole(self) -> bool:
        """Whether what was received, all of it hashed, is what was sent."""
        self.connection.close()  # which the sender waits for
        out, _ = self._process.communicate(timeout=PATIENCE_S)
        return bool(out.decode().strip() == self._digest.hexdigest())


@contextlib.contextmanager
def bulk(near: Namespace, far: Namespace, address: tuple[str, int], content: Path, size: int) -> Iterator[Bulk]:
    """So many bytes of that file, to us at that address in `near`, from a process in `far`."""
    with near.entered(), socket.create_server(address) as listener:
        listener.settimeout(PATIENCE_S)
        command = [sys.executable, "-m", "tests.net.bulk", *map(str, (*address, content, size))]
        process = far.start(command, stdout=subprocess.PIPE, cwd=ROOT)
        with process:
            try:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(PATIENCE_S)
                    yield Bulk(connection, process, size)
            finally:
                process.kill()


def _send(host: str, port: str, content: str, size: str) -> None:
    data, left = Path(content).read_bytes(), int(size)
    digest = hashlib.sha256()
    twice = memoryview(data + data)
    start = 0
    with socket.create_connection((host, int(port)), PATIENCE_S) as connection:
        while left:
            piece = twice[start : start + min(left, len(data))]
            connection.sendall(piece)
            digest.update(piece)
            left -= len(piece)
            start = (start + STEP) % len(data)
        print(digest.hexdigest(), flush=True)
        connection.recv(1)  # until the other end has it all


if __name__ == "__main__":
    _send(*sys.argv[1:])
