"""The reader's connection: servers that are killed, replaced, full, silent or out of their mind, and what it keeps."""

from __future__ import annotations

import json
import os
import select
import socket
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from sprint import shared_reader
from sprint.deliveries.gate import OpenGate
from sprint.errors import HostError, RemoteProtocolError
from sprint.events import Lapped
from sprint.shared_reader import SharedReader
from sprint.subscription import ConnectionLostError, ServerFullError, SubscriptionRefusedError
from sprint.tiers import Tier
from tests.descriptors import open_descriptors
from tests.unit.shm_host import PATIENCE_S, SESSION, Host, serving, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MS = 1_000_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shm.sock"


def next_sequence(reader: SharedReader) -> int | Lapped | None:
    found = reader.next(PATIENCE_S)
    return reader.sequence if isinstance(found, memoryview) else found


# Servers that go and come


@pytest.mark.parametrize("spin", [False, True])
def test_a_killed_worker_costs_no_record_and_its_successor_wakes_us_again(path: Path, spin: bool) -> None:
    with serving(path, slots=16) as host, SharedReader(path, key="turbo", spin=spin) as reader:
        host.put()
        assert next_sequence(reader) == 1
        for round_, sequence in enumerate((2, 6, 10), 1):
            until(lambda: host.accounts.accepted == round_)  # noqa: B023 - called before the next round
            host.kill_worker()
            host.put()  # while nobody is there to wake us
            assert next_sequence(reader) == sequence
            while reader.connected:
                assert reader.next(0.01) is None
            host.put()
            host.serve()
            assert next_sequence(reader) == sequence + 1
            while not reader.connected:
                assert reader.next(0.01) is None
            host.put(2)
            assert next_sequence(reader) == sequence + 2
            assert next_sequence(reader) == sequence + 3
        assert reader.lost == 0


def test_a_server_that_dies_is_noticed_by_a_sleeping_reader(path: Path) -> None:
    with serving(path) as host, SharedReader(path, key="turbo", reconnect=False) as reader:
        dying = threading.Timer(0.05, host.kill_worker)
        dying.start()
        with pytest.raises(ConnectionLostError, match="the server is gone"):
            reader.next()
        dying.join()


def test_the_same_memory_is_not_mapped_again(path: Path) -> None:
    with serving(path) as host, SharedReader(path, key="turbo") as reader:
        before = mappings()
        for _ in range(3):
            host.kill_worker()
            while reader.connected:
                reader.next(0.01)
            host.serve()
            while not reader.connected:
                reader.next(0.01)
        assert mappings() == before


def mappings() -> int:
    with open("/proc/self/maps", encoding="ascii") as maps:
        return sum("memfd:test-ring" in line for line in maps)


@pytest.mark.parametrize("same_session", [False, True])
def test_another_memory_is_read_after_the_old_one_was_read_to_its_end(path: Path, same_session: bool) -> None:
    """As when all of Sprint is started anew."""
    with serving(path, slots=8) as old, SharedReader(path, key="turbo") as reader:
        old.put(3)
        assert next_sequence(reader) == 1
        old.kill_worker()
        while reader.connected:
            reader._listen(reader._wake, 0.01)  # type: ignore[arg-type] # it is connected
        new = Host(path, slots=4, session=SESSION if same_session else 77)
        new.put(6)
        new.serve()
        try:
            while not reader.connected:
                reader._tend()
            told = [next_sequence(reader) for _ in range(4)]
            assert told == ([2, 3, 4, 5] if same_session else [2, 3, Lapped(1, 2), 3])
            assert reader.session == (SESSION if same_session else 77)
            assert next_sequence(reader) == (6 if same_session else 4)
            new.put()
            assert [next_sequence(reader) for _ in range(1 if same_session else 3)][-1] == 7
        finally:
            new.kill_worker()
            os.close(new.memory.descriptor)
            os.close(new.channel.fileno())


def test_a_view_of_an_old_memory_is_not_vouched_for_once_it_was_left(path: Path) -> None:
    with serving(path, slots=8) as old, SharedReader(path, key="turbo") as reader:
        old.put()
        assert next_sequence(reader) == 1
        old.kill_worker()
        while reader.connected:
            reader.next(0.01)
        with serving(path, slots=8):
            while not reader.connected:
                reader.next(0.01)
            assert reader.read() is None
            assert not reader.validate()
            assert reader.copy() is None


def test_a_reader_may_come_before_its_server(path: Path) -> None:
    with SharedReader(path, key="turbo") as reader:
        assert (reader.connected, reader.session, reader.tier) == (False, None, None)
        assert reader.read() is None
        assert reader.next(0.02) is None
        with serving(path, slots=8) as host:
            until(lambda: reader.next(0.01) is None and reader.connected)
            host.put()
            assert next_sequence(reader) == 1


def test_a_full_server_is_asked_again_until_it_has_a_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_reader, "FULL_RETRY_NS", MS)
    with (
        serving(path, max_readers=1) as host,
        SharedReader(path, key="turbo") as first,
        SharedReader(path, key="turbo") as second,
    ):
        until(lambda: second.next(0.01) is None and host.accounts.refused > 3)
        assert not second.connected
        first.close()
        until(lambda: second.next(0.01) is None and second.connected)
        host.put()
        assert next_sequence(second) == 1


# Without reconnecting


def test_without_reconnecting_a_lost_server_is_an_error_after_the_last_record(path: Path) -> None:
    with serving(path) as host, SharedReader(path, key="turbo", reconnect=False) as reader:
        host.put(3)
        assert next_sequence(reader) == 1
        host.kill_worker()
        assert [next_sequence(reader), next_sequence(reader)] == [2, 3]
        for _ in range(2):
            with pytest.raises(ConnectionLostError, match=f"{path}: the server is gone"):
                reader.next(PATIENCE_S)
        with pytest.raises(ConnectionLostError):
            next(iter(reader))


def test_without_reconnecting_a_server_that_is_not_there_is_an_error(path: Path) -> None:
    with pytest.raises(ConnectionLostError, match=f"{path}: No such file"):
        SharedReader(path, reconnect=False)
    with serving(path) as host:
        host.kill_worker()
        before = open_descriptors()
        with pytest.raises(ConnectionLostError, match="Connection refused"):
            SharedReader(path, reconnect=False)
        assert open_descriptors() == before


@pytest.mark.parametrize(("key", "words"), [("nobody", "not accepted"), (None, "tier free has no shared memory")])
def test_a_refusal_is_an_error_whether_or_not_we_would_reconnect(path: Path, key: str | None, words: str) -> None:
    with serving(path):
        before = open_descriptors()
        for reconnect in (True, False):
            with pytest.raises(SubscriptionRefusedError, match=words):
                SharedReader(path, key=key, reconnect=reconnect)
        assert open_descriptors() == before


def test_a_key_that_ends_is_told_at_the_next_connection(path: Path) -> None:
    with serving(path) as host, SharedReader(path, key="turbo") as reader:
        host.kill_worker()
        host.put()
        host.serve(gate=OpenGate(lambda _: Tier.PRO))
        assert next_sequence(reader) == 1
        with pytest.raises(SubscriptionRefusedError, match="tier pro has no shared memory"):
            reader.next(PATIENCE_S)


def test_a_full_server_is_an_error_without_reconnecting(path: Path) -> None:
    with serving(path, max_readers=1), SharedReader(path, key="turbo"):
        for _ in range(100):  # whether it hangs up before or after our hello
            with pytest.raises(ServerFullError):
                SharedReader(path, key="turbo", reconnect=False)


def test_closing_gives_back_every_descriptor(path: Path) -> None:
    with serving(path, slots=8) as host:
        before = open_descriptors()
        for _ in range(3):
            with SharedReader(path, key="turbo") as reader:
                host.put()
                assert next_sequence(reader) is not None
                assert len(open_descriptors()) > len(before)
            del reader
        assert open_descriptors() == before
        until(lambda: host.accounts.tiers[Tier.TURBO].subscribers == 0)


# Servers out of their mind


@contextmanager
def server(path: Path, answer: Callable[[socket.socket], object]) -> Iterator[None]:
    """Answers each hello in the given way, and keeps the connection."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(os.fspath(path))
    listener.listen()
    taken: list[socket.socket] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                sock, _ = listener.accept()
                taken.append(sock)
                sock.recv(4096)
                answer(sock)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for each in (*taken, listener):
            each.close()


def refused_with(path: Path, answer: Callable[[socket.socket], object]) -> str:
    """What the reader has to say of such a server; it must keep nothing of what it was given."""
    with server(path, answer):
        before = open_descriptors()
        try:
            SharedReader(path, reconnect=False)
        except (RemoteProtocolError, ConnectionLostError, HostError) as error:
            words = f"{type(error).__name__}: {error}"
        # One more: the connection that the server's thread has taken, which may still be closing what it sent.
        until(lambda: len(open_descriptors()) == len(before) + 1)
        return words


GOOD = b'{"tier":"turbo","network":"regtest"}\n'


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "no JSON object"),
        (b"[]\n", "no JSON object"),
        (b"\xff\n", "no JSON object"),
        (GOOD, "0 descriptors"),
        (b"{" * 5000 + b"\n", "too long"),
        (b"", "without an answer"),
        (b'{"tier":', "without an answer"),
    ],
)
def test_an_answer_that_is_none_ends_the_connection(path: Path, answer: bytes, words: str) -> None:
    def say(sock: socket.socket) -> None:
        sock.sendall(answer)
        sock.shutdown(socket.SHUT_WR)

    assert words in refused_with(path, say)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_any_other_number_of_descriptors_than_two_ends_the_connection_and_none_is_kept(path: Path, count: int) -> None:
    def say(sock: socket.socket) -> None:
        reading, writing = os.pipe()
        socket.send_fds(sock, [GOOD], [reading] * count)
        os.close(reading)
        os.close(writing)

    assert "descriptors" in refused_with(path, say)


def test_descriptors_of_another_kind_end_the_connection(path: Path) -> None:
    def say(sock: socket.socket) -> None:
        reading, writing = os.pipe()
        socket.send_fds(sock, [GOOD], [reading, writing])
        os.close(reading)
        os.close(writing)

    assert "HostError: shared memory can't be mapped" in refused_with(path, say)


def test_memory_that_may_shrink_under_us_is_not_read_even_if_we_would_reconnect(path: Path) -> None:
    def say(sock: socket.socket) -> None:
        memory = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(memory, 1 << 16)
        with select.epoll() as wake:
            socket.send_fds(sock, [GOOD], [memory, wake.fileno()])
        os.close(memory)

    with server(path, say), pytest.raises(HostError, match="seals"):
        SharedReader(path)


def test_a_ring_of_another_layout_is_not_read(path: Path, tmp_path: Path) -> None:
    host = Host(tmp_path / "unused")
    host.memory.memory[8] = 2

    def say(sock: socket.socket) -> None:
        with select.epoll() as wake:
            socket.send_fds(sock, [GOOD], [host.memory.descriptor, wake.fileno()])

    assert "no ring of layout 1" in refused_with(path, say)
    os.close(host.memory.descriptor)
    os.close(host.channel.fileno())


def test_a_wake_up_call_that_is_none_is_refused(path: Path, tmp_path: Path) -> None:
    host = Host(tmp_path / "unused")

    def say(sock: socket.socket) -> None:
        descriptor = os.eventfd(0)
        socket.send_fds(sock, [GOOD], [host.memory.descriptor, descriptor])
        os.close(descriptor)

    assert "Invalid argument" in refused_with(path, say)
    os.close(host.memory.descriptor)
    os.close(host.channel.fileno())


def test_a_silent_server_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_reader, "ANSWER_TIMEOUT_NS", 30 * MS)
    assert "no answer to the hello in time" in refused_with(path, lambda _: None)


def test_a_silent_server_does_not_keep_a_reader_from_the_memory_it_has(path: Path) -> None:
    with serving(path) as host, SharedReader(path, key="turbo") as reader:
        host.kill_worker()
        path.unlink()
        with server(path, lambda _: None):
            until(lambda: reader.next(0.01) is None and not reader.connected and reader._call is not None)
            for sequence in range(1, 5):
                host.put()
                assert next_sequence(reader) == sequence


def test_an_answer_may_come_in_pieces(path: Path, tmp_path: Path) -> None:
    host = Host(tmp_path / "unused")
    went: list[Any] = []

    def say(sock: socket.socket) -> None:
        with select.epoll() as wake:
            socket.send_fds(sock, [GOOD[:5]], [host.memory.descriptor, wake.fileno()])
        for at in range(5, len(GOOD)):
            sock.sendall(GOOD[at : at + 1])
            went.append(at)

    with server(path, say), SharedReader(path) as reader:
        assert reader.network == json.loads(GOOD)["network"]
        assert reader.connected
    assert len(went) == len(GOOD) - 5
    os.close(host.memory.descriptor)
    os.close(host.channel.fileno())
