"""Subscribers that read nothing, say half a hello or far too much: every healthy one gets every block, in order."""

from __future__ import annotations

import json
import resource
import selectors
import socket
import struct
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from tests.real.product import Product
from tests.real.subscribers import JSON_HELLO, JsonStream, connect

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from tests.real.bcoin import BcoinNode
    from tests.real.product import Event

CROWD = 1_000
STALLED_EACH = 100
CROWD_BLOCKS = 60
FLAT_KB = 12 * 1024
"""What subscribers may cost beyond the memory of having connected, over all processes; each counts the shared ring's
pages that it has touched as its own."""
WAIT_TIMEOUT_S = 60.0
SMALL_BUFFER = 2_048
"""A receive buffer that a few records fill, so that the server's own is soon full too."""
_FRAME_HEAD = struct.Struct("<IB")
_RECORD_HEAD = struct.Struct("<4s4sQQBB")
_HASH = slice(64, 96)


def connect_small(address: str) -> socket.socket:
    """A connection that takes in next to nothing unless it is read."""
    host, _, port = address.rpartition(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)  # before the window is told
    sock.settimeout(10)
    sock.connect((host, int(port)))
    return sock


@contextmanager
def memory_stays_flat(product: Product) -> Iterator[None]:
    before_kb, _ = product.resident_kb()
    yield
    _, highest_kb = product.resident_kb()
    assert highest_kb - before_kb < FLAT_KB


class Reader:
    """One healthy subscriber of binary frames, read with no code of the product."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.answered = False
        self.sequences: list[int] = []
        self.proven: list[str] = []
        self.others = 0
        """Frames that are neither a record nor a heartbeat."""
        self._data = bytearray()

    def receive(self, data: bytes) -> None:
        """Take in what the socket gave."""
        self._data += data
        if not self.answered:
            line, newline, rest = bytes(self._data).partition(b"\n")
            if not newline:
                return
            assert "error" not in json.loads(line), line
            self.answered = True
            self._data = bytearray(rest)
        at = 0
        while len(self._data) - at >= _FRAME_HEAD.size:
            length, kind = _FRAME_HEAD.unpack_from(self._data, at)
            if len(self._data) - at < 4 + length:
                break
            self._frame(kind, bytes(self._data[at + 5 : at + 4 + length]))
            at += 4 + length
        del self._data[:at]

    def _frame(self, kind: int, body: bytes) -> None:
        if kind == 1:
            magic, _, _, sequence, event, _ = _RECORD_HEAD.unpack_from(body)
            assert magic == b"SPR1"
            self.sequences.append(sequence)
            if event == 1:
                self.proven.append(body[_HASH][::-1].hex())
        elif kind != 3:
            self.others += 1


class Crowd:
    """Many subscribers, read by one thread with one selector; one in a hundred is never read."""

    def __init__(self, address: str, key: str) -> None:
        self._key = key
        self.readers: list[Reader] = []
        self.stalled: list[socket.socket] = []
        self.lost: list[Reader] = []
        """Whose connection ended."""
        self._selector = selectors.DefaultSelector()
        self._ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        try:
            for number in range(CROWD):
                self._join(address, stalled=number % STALLED_EACH == STALLED_EACH - 1)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        self._thread.join(WAIT_TIMEOUT_S)
        self._close()

    def wait_for_records(self, count: int) -> None:
        """Wait until every healthy subscriber has so many records."""
        deadline = time.monotonic() + WAIT_TIMEOUT_S
        while (slow := sum(len(reader.sequences) < count for reader in self.readers)) and not self.lost:
            assert time.monotonic() < deadline, f"{slow} healthy subscribers lack records of {count}"
            time.sleep(0.05)

    def _join(self, address: str, *, stalled: bool) -> None:
        sock = connect_small(address) if stalled else connect(address)
        if stalled:
            self.stalled.append(sock)
            sock.sendall(b'{"format":"json","key":"%s"}\n' % self._key.encode())
            return
        reader = Reader(sock)
        self.readers.append(reader)
        sock.sendall(b'{"key":"%s"}\n' % self._key.encode())
        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ, reader)

    def _read(self) -> None:
        while not self._ended:
            for key, _ in self._selector.select(0.1):
                reader: Reader = key.data
                data = b""
                with suppress(ConnectionError):
                    data = reader.sock.recv(1 << 16)
                if data:
                    reader.receive(data)
                else:
                    self.lost.append(reader)
                    self._selector.unregister(reader.sock)

    def _close(self) -> None:
        self._selector.close()
        for sock in [*self.stalled, *(reader.sock for reader in self.readers)]:
            sock.close()


@contextmanager
def enough_descriptors(count: int) -> Iterator[None]:
    """Raise our own limit of open files, or skip."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count:
        pytest.skip(f"at most {hard} open files are allowed here, {count} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("tier", "account"), [("turbo", "overwritten"), ("business", "dropped")])
def test_of_a_thousand_subscribers_every_healthy_one_gets_every_block_in_order(
    bcoin: BcoinNode, tmp_path: Path, tier: str, account: str
) -> None:
    bcoin.mine(12)
    with (
        enough_descriptors(CROWD + 512),
        # A short deadline, so that what a stalled one is owed has ended by the time that we look.
        Product(tmp_path, bcoin.p2p_address, tier=tier, WRITE_DEADLINE="10ms") as product,
    ):
        product.wait_until_healthy()
        with Crowd(product.stream, product.key) as crowd:
            product.wait_for_subscribers(CROWD)
            with memory_stays_flat(product):
                mined = [block_hash for _ in range(CROWD_BLOCKS) for block_hash in bcoin.mine(1)]
                last = product.wait_for_last_sequence(2 * len(mined))
                crowd.wait_for_records(last)
            assert crowd.lost == []
            for reader in crowd.readers:
                assert reader.sequences == list(range(1, last + 1))
                assert reader.proven == mined
                assert reader.others == 0
            healthy = len(crowd.readers) * last

            def counted(_: object) -> bool:
                accounts = product.deliveries()["tiers"][tier]
                return bool(accounts["on_time"] + accounts["late"] >= healthy)

            product.wait_for("deliveries", counted, "the deliveries' accounts")
            accounts = product.deliveries()["tiers"][tier]
            assert accounts[account] > 0, "nobody was stalled"
            ended = sum(accounts[name] for name in ("on_time", "late", "dropped", "overwritten"))
            assert ended <= CROWD * last
            assert product.ask("health")["status"] == "ok"


def test_one_that_never_reads_is_told_what_it_lost_when_it_does_and_others_lose_nothing(
    bcoin: BcoinNode, tmp_path: Path
) -> None:
    bcoin.mine(12)
    with Product(tmp_path, bcoin.p2p_address) as product, ExitStack() as stack:
        product.wait_until_healthy()
        sleeper = stack.enter_context(connect_small(product.stream))
        sleeper.sendall(product.hello)
        healthy = stack.enter_context(JsonStream(product.stream))
        product.wait_for_subscribers(2)
        mined: list[str] = []
        with memory_stays_flat(product):
            for _ in range(200):
                mined += bcoin.mine(1)
            healthy.wait_for_hashes("validated", mined)
        assert healthy.hashes("proven") == mined
        last = product.wait_for_last_sequence(2 * len(mined))
        healthy.wait_until(lambda events: events[-1]["seq"] == last, f"record {last}")
        assert [one["seq"] for one in healthy.events] == list(range(1, last + 1))

        told = read_until_sequence(sleeper, last)
        losses = [one for one in told if one["event"] == "lost"]
        assert losses, "it lost nothing: its buffers hold more than was sent"
        # Records and losses, in the order told, are every sequence once.
        expected = 1
        for one in told:
            first, count = (one["first"], one["lost"]) if one["event"] == "lost" else (one["seq"], 1)
            assert first == expected
            expected += count
        assert told[-1]["hash"] == mined[-1], "not even the newest came"


def read_until_sequence(sock: socket.socket, last: int) -> list[Event]:
    """Every event that a JSON subscriber is told, up to the record of that sequence."""
    told = []
    with sock.makefile("rb") as lines:
        assert "error" not in json.loads(lines.readline())
        for line in lines:
            one = json.loads(line)
            if one["event"] != "heartbeat":
                told.append(one)
            if one.get("seq") == last and one["event"] != "heartbeat":
                return told
    raise AssertionError(f"the stream ended before record {last}; {len(told)} came")


def test_a_bad_hello_is_answered_and_closed_while_the_healthy_are_served(bcoin: BcoinNode, tmp_path: Path) -> None:
    bcoin.mine(12)
    with Product(tmp_path, bcoin.p2p_address) as product, ExitStack() as stack:
        product.wait_until_healthy()
        healthy = stack.enter_context(JsonStream(product.stream))
        halves = [stack.enter_context(connect(product.stream)) for _ in range(20)]
        mined = bcoin.mine(2)  # every process has taken what it needs for a block
        healthy.wait_for_hashes("validated", mined)
        with memory_stays_flat(product):
            for number, half in enumerate(halves):
                half.sendall(JSON_HELLO[: number % len(JSON_HELLO)])  # some say nothing at all
            mined += bcoin.mine(1)
            healthy.wait_for_hashes("validated", mined)
            for hello, words in (
                (b"x" * (1 << 20), "longer than"),
                (b"[" * (1 << 20), "longer than"),
                (b'{"key":"' + b"k" * (1 << 20) + b'"}\n', "longer than"),
                (b"\xff\xfe\n", "not JSON"),
                (b"GET / HTTP/1.1\r\n\r\n", "not JSON"),
                (b'{"sinse":1}\n', "sinse"),
                (b'{"since":-1}\n', "since"),
            ):
                assert words in refusal(product.stream, hello)
            mined += bcoin.mine(2)
            healthy.wait_for_hashes("validated", mined)
            for half in halves:
                assert "no hello in time" in last_words(half)
        assert healthy.hashes("proven") == mined
        product.wait_for_subscribers(1)
        delivery = product.deliveries()
        assert (delivery["accepted"], delivery["refused"]) == (1, len(halves) + 7)


def refusal(address: str, hello: bytes) -> str:
    """Say this hello, as far as it is listened to, and return the error that it is answered with."""
    with connect(address) as sock:
        with suppress(ConnectionError):
            sock.sendall(hello)
        return last_words(sock)


def last_words(sock: socket.socket) -> str:
    """The one line of error before the connection's end."""
    said = b""
    with suppress(ConnectionResetError):  # what it has not read of a far too long hello
        while part := sock.recv(4096):
            said += part
    assert said.count(b"\n") == 1, said
    error: str = json.loads(said)["error"]
    return error
