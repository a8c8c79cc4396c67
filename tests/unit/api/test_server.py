"""The API over real sockets, through waitress."""

from __future__ import annotations

import http.client
import os
import resource
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from sprint.addresses import Address
from sprint.api.app import create_app
from sprint.api.server import LIMITS, ApiServer
from sprint.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sprint.status import StatusBlock

ANY_PORT = Address("127.0.0.1", 0)


@pytest.fixture
def server(status: StatusBlock) -> Iterator[ApiServer]:
    """The API served on a free port."""
    with ApiServer(create_app(status), ANY_PORT) as running:
        yield running


def ask(server: ApiServer, method: str, path: str) -> tuple[int, bytes]:
    """One request on a connection of its own: the status and the body."""
    connection = http.client.HTTPConnection(*server.address, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_a_real_client_gets_the_tier_and_its_write_deadline(server: ApiServer) -> None:
    code, body = ask(server, "GET", "/api/turbo-status")
    assert code == 200
    assert '"writeDeadline": "500µs"'.encode() in body


def test_head_and_errors_cross_the_wire(server: ApiServer) -> None:
    assert ask(server, "HEAD", "/api/health") == (200, b"")
    assert ask(server, "GET", "/none")[0] == 404
    assert ask(server, "POST", "/api/health")[0] == 405
    assert ask(server, "GET", "/api/blocks?limit=100")[0] == 400


def test_a_taken_port_is_refused_at_once_naming_address_and_reason(status: StatusBlock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(HostError, match=rf"^API_BIND=127\.0\.0\.1:{port}: Address already in use$"):
            ApiServer(create_app(status), Address("127.0.0.1", port))


def test_two_servers_that_bound_the_same_address_cannot_both_have_it(status: StatusBlock) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        first = ApiServer(create_app(status), Address("127.0.0.1", other.getsockname()[1]))
        try:
            with pytest.raises(HostError, match="Address already in use"):
                ApiServer(create_app(status), first.address)
        finally:
            first.stop()


@pytest.mark.parametrize("host", ["192.0.2.1", "unix:/tmp/sprint.sock", "no.such.host.invalid", "a" * 64])
def test_a_host_that_is_not_ours_or_no_tcp_address_is_refused(status: StatusBlock, host: str) -> None:
    with pytest.raises(HostError, match=r"^API_BIND=.+: .+"):
        ApiServer(create_app(status), Address(host, 0))


def test_stop_frees_the_port_ends_the_threads_and_closes_open_connections(status: StatusBlock) -> None:
    before = set(threading.enumerate())
    server = ApiServer(create_app(status), ANY_PORT)
    server.start()
    idle = http.client.HTTPConnection(*server.address, timeout=10)
    idle.request("GET", "/")
    idle.getresponse().read()
    server.stop()
    assert idle.sock.recv(1) == b""
    idle.close()
    assert set(threading.enumerate()) <= before  # an earlier test's may have ended meanwhile
    socket.create_server(server.address).close()
    server.stop()


def test_a_server_that_was_never_started_frees_its_port(status: StatusBlock) -> None:
    server = ApiServer(create_app(status), ANY_PORT)
    server.stop()
    socket.create_server(server.address).close()


def test_a_descriptor_beyond_1023_is_served(server: ApiServer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1_200:
        pytest.skip(f"hard limit of {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1_200), hard))
    held: list[int] = []
    try:
        while not held or held[-1] < 1_100:
            held.append(os.open(os.devnull, os.O_RDONLY))
        assert ask(server, "GET", "/api/sources")[0] == 200
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "request_bytes", [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"y" * 40_000]
)
def test_junk_and_endless_headers_are_refused_and_others_still_served(server: ApiServer, request_bytes: bytes) -> None:
    with socket.create_connection(server.address, timeout=10) as client:
        client.sendall(request_bytes)
        assert client.recv(12).startswith(b"HTTP/1.0 4") or client.recv(1) == b""
    assert ask(server, "GET", "/")[0] == 200


def test_half_sent_requests_short_of_the_limit_keep_nobody_out(server: ApiServer) -> None:
    half = [socket.create_connection(server.address, timeout=10) for _ in range(LIMITS["connection_limit"] // 2)]
    try:
        for client in half:
            client.sendall(b"GET / HTTP/1.1\r\n")
        assert ask(server, "GET", "/")[0] == 200
    finally:
        for client in half:
            client.close()
