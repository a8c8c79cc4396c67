"""`sprint watch` where nobody looks at it: a line an event as it comes, and what is wrong on standard error."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sprint.events import Lapped
from sprint.frames import Format, Heartbeat, heartbeat_frame, lost_frame, record_frame
from sprint.record import decode

if TYPE_CHECKING:
    from collections.abc import Iterator

VECTOR = Path(__file__).parents[1] / "vectors" / "records" / "main-block-1-proven.json"
RECORD = bytes.fromhex(json.loads(VECTOR.read_text(encoding="utf-8"))["hex"])
TOLD = decode(RECORD)
TITLE = {"tier": "free", "writeDeadline": "2s", "oldest": 1, "network": "main", "session": f"{TOLD.session:016x}"}


@contextmanager
def watching(*arguments: str, **settings: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "sprint", "watch", *arguments]
    with subprocess.Popen(
        command, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as watch:
        try:
            yield watch
        finally:
            watch.kill()


@contextmanager
def subscriber_of(server: socket.socket) -> Iterator[socket.socket]:
    """The next who connects, once he has said his hello and was answered."""
    sock, _ = server.accept()
    with sock:
        sock.settimeout(30)
        assert sock.recv(4096).endswith(b"\n")
        sock.sendall(json.dumps({**TITLE, "next": TOLD.sequence}).encode() + b"\n")
        yield sock


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(30)
        yield listening


def address_of(server: socket.socket) -> str:
    host, port = server.getsockname()
    return f"{host}:{port}"


@pytest.mark.parametrize("settings", [{}, {"TERM": "dumb", "LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}])
def test_each_event_is_a_line_as_soon_as_it_comes(server: socket.socket, settings: dict[str, str]) -> None:
    with watching(address_of(server), "--count", "2", **settings) as watch, subscriber_of(server) as sock:
        assert watch.stdout is not None
        sock.sendall(record_frame(RECORD, Format.BINARY))
        line = watch.stdout.readline()
        assert line.startswith(f"{TOLD.sequence} proven {TOLD.height} {TOLD.hash[::-1].hex()} proven best")
        sock.sendall(lost_frame(Lapped(TOLD.sequence + 1, 3), Format.BINARY))
        assert watch.stdout.readline() == f"{TOLD.sequence + 1} lost: 3 records\n"
        out, err = watch.communicate(timeout=30)
    assert (out, err, watch.returncode) == ("", "", 0)


@pytest.mark.parametrize("form", ["--json", "--count=9"])
def test_why_nothing_is_heard_is_said_once_and_ctrl_c_ends_it_without_a_word(form: str) -> None:
    with watching("127.0.0.1:9", form) as watch:
        assert watch.stderr is not None
        assert watch.stderr.readline() == "sprint: 127.0.0.1:9: Connection refused; trying again\n"
        with pytest.raises(subprocess.TimeoutExpired):
            watch.wait(2)  # in which it has tried three times more
        watch.send_signal(signal.SIGINT)
        out, err = watch.communicate(timeout=30)
    assert (out, err, watch.returncode) == ("", "", 130)


def test_trouble_is_told_again_when_the_stream_was_heard_in_between(server: socket.socket) -> None:
    address = address_of(server)
    words = f"sprint: {address}: {address} closed the connection; trying again\n"
    with watching(address, "--json") as watch:
        assert watch.stderr is not None
        for _ in range(2):
            with subscriber_of(server) as sock:
                sock.sendall(heartbeat_frame(Heartbeat(TOLD.session, 0, 1), Format.BINARY))
            assert watch.stderr.readline() == words
