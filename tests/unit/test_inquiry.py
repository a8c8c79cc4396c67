"""Asking a running Sprint: what comes of answers that aren't Sprint's, and that no proxy is asked."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from sprint.addresses import Address
from sprint.inquiry import MAX_ANSWER, NoAnswerError, ask

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def answering(answer: bytes) -> Iterator[Address]:
    """A server that says this to the first who asks, whatever he asks."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)

        def serve() -> None:
            sock, _ = server.accept()
            with sock:
                sock.settimeout(30)
                try:
                    while b"\r\n\r\n" not in sock.recv(4096):
                        pass
                    sock.sendall(answer)
                except OSError:
                    pass  # it was enough for him

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Address(*server.getsockname())
        finally:
            thread.join(60)


def http(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


@pytest.mark.parametrize("status", ["200 OK", "503 Service Unavailable"])
def test_an_answer_is_the_object_whether_healthy_or_not(status: str) -> None:
    with answering(http(status, b'{"status": "x"}')) as api:
        assert ask(api, "health") == {"status": "x"}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b'{"error":"hello is not JSON: expected one line with an object"}\n', "doesn't speak HTTP"),
        (b"", "closed connection"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "no JSON object"),
        (http("404 Not Found", b"{}"), "answers 404"),
        (http("301 Moved", b"{}"), "answers 301"),
        (http("200 OK", b"<html>"), "no JSON object"),
        (http("200 OK", b"[1]"), "no JSON object"),
        (http("200 OK", b"[" * 200_000), "no JSON object"),
        (http("503 Busy", b"busy"), "no JSON object"),
        (http("200 OK", b" " * (MAX_ANSWER + 2)), f"longer than {MAX_ANSWER} bytes"),
    ],
)
def test_any_other_answer_is_refused_in_words_that_name_the_address(answer: bytes, words: str) -> None:
    with answering(answer) as api, pytest.raises(NoAnswerError, match=words) as refused:
        ask(api, "health")
    assert str(refused.value).startswith(f"http://{api}/api/health: ")


def test_somebody_who_says_nothing_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(NoAnswerError, match="timed out"):
        ask(Address(*server.getsockname()), "health", 0.05)


def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with answering(http("200 OK", b"{}")) as api:
        assert ask(api, "health") == {}
