"""Names to addresses in a thread: every question is answered once, and the loop is told by a descriptor."""

from __future__ import annotations

import select
import socket
import threading

import pytest

from sprint.addresses import Address
from sprint.sources.resolver import Resolver, SocketAddress, numeric


def _wait(resolver: Resolver) -> list[tuple[Address, list[SocketAddress], str]]:
    assert select.select([resolver], [], [], 10)[0]
    return resolver.results()


def _readable(resolver: Resolver) -> bool:
    return bool(select.select([resolver], [], [], 0)[0])


@pytest.mark.parametrize(
    ("host", "family", "sockaddr"),
    [
        ("127.0.0.1", socket.AF_INET, ("127.0.0.1", 8333)),
        ("::1", socket.AF_INET6, ("::1", 8333, 0, 0)),
    ],
)
def test_a_numeric_host_needs_no_resolver(host: str, family: int, sockaddr: tuple[object, ...]) -> None:
    assert numeric(Address(host, 8333)) == (family, sockaddr)


def test_a_name_is_not_numeric() -> None:
    assert numeric(Address("localhost", 8333)) is None


def test_a_name_is_resolved_and_the_descriptor_says_when() -> None:
    resolver = Resolver()
    try:
        assert not _readable(resolver)
        resolver.submit(Address("localhost", 1234))
        ((address, found, error),) = _wait(resolver)
        assert address == Address("localhost", 1234)
        assert {sockaddr[:2] for _, sockaddr in found} <= {("127.0.0.1", 1234), ("::1", 1234)}
        assert found
        assert error == ""
        assert not _readable(resolver)
        assert resolver.results() == []
    finally:
        resolver.close()


def test_a_slow_name_holds_up_neither_the_caller_nor_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    real, gate = socket.getaddrinfo, threading.Event()

    def slow(host: str, *rest: int, **options: int) -> object:
        if host == "slow.example":
            gate.wait(10)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return real(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    resolver = Resolver()
    try:
        slow_one, quick = Address("slow.example", 1), Address("localhost", 2)
        resolver.submit(slow_one)
        resolver.submit(quick)
        assert [address for address, _, _ in _wait(resolver)] == [quick]
        gate.set()
        assert _wait(resolver)[0][0] == slow_one
    finally:
        gate.set()
        resolver.close()


@pytest.mark.parametrize(
    "error",
    [
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        UnicodeError("label too long"),
        ValueError("NUL"),
    ],
)
def test_a_name_that_can_not_be_resolved_is_answered_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> object:
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    resolver = Resolver()
    try:
        resolver.submit(Address("nowhere.invalid", 1))
        ((_, found, reason),) = _wait(resolver)
        assert found == []
        assert reason.startswith("nowhere.invalid can't be resolved: ")
    finally:
        resolver.close()


def test_every_one_of_many_names_is_answered_once() -> None:
    resolver = Resolver()
    try:
        addresses = {Address("localhost", port) for port in range(1, 41)}
        for address in addresses:
            resolver.submit(address)
        answered: list[Address] = []
        while len(answered) < len(addresses):
            answered += [address for address, _, _ in _wait(resolver)]
        assert sorted(answered) == sorted(addresses)
    finally:
        resolver.close()


def test_an_answer_after_the_end_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, begun = threading.Event(), threading.Event()

    def slow(*_: object, **__: object) -> list[object]:
        begun.set()
        gate.wait(10)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    resolver = Resolver()
    resolver.submit(Address("slow.example", 1))
    begun.wait(10)
    (thread,) = [each for each in threading.enumerate() if each.name == "resolve slow.example:1"]
    resolver.close()
    gate.set()
    thread.join(10)
    assert not thread.is_alive()
