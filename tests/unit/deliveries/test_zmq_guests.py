"""What hostile subscribers of ZMQ do with their connections, and that nobody else feels it."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest

from sprint.deliveries.zmq_guests import FLOOD_BYTES, FLOOD_NS, MAX_WATCHED, Guests
from sprint.events import Event
from sprint.tiers import NS_PER_S, Tier
from tests.unit.deliveries.test_zmq import A1, Stage, display

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self

WAIT_S = 20.0
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\3\0" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03SUB"
FLOODS = {
    "subscriptions": b"\0\2\1x\0\2\0x",
    "messages": b"\0\2\7x",
    "one message without an end": b"\1\2\7x",
}


@pytest.fixture
def stage() -> Iterator[Stage]:
    one = Stage()
    yield one
    one.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as one:
        yield one


class Flood:
    """A subscriber that speaks without end, until it is cut off or told to stop."""

    def __init__(self, port: int, said: bytes) -> None:
        self.sent = 0
        self._chunk = said * (1 << 16)
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
        self._socket.sendall(GREETING + READY)
        with self._socket.makefile("rb") as theirs:  # libzmq itself ends what says more before its own READY
            theirs.read(theirs.read(len(GREETING) + 2)[-1])
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # which ends a send() that waits
        self._socket.close()
        self._thread.join(WAIT_S)

    def _run(self) -> None:
        rest = memoryview(self._chunk)
        with suppress(OSError):
            while True:
                # Where the other end is slow, a part: beginning anew then would be no ZMQ, which libzmq ends by itself.
                count = self._socket.send(rest)
                self.sent += count
                rest = rest[count:] or memoryview(self._chunk)


@pytest.mark.parametrize("kind", FLOODS)
def test_a_subscriber_that_speaks_without_end_is_cut_off_and_starves_nobody(
    kind: str, stage: Stage, stack: ExitStack
) -> None:
    reader = stage.reader("hashblock")
    flood = stack.enter_context(Flood(stage.port, FLOODS[kind]))
    stage.wait(lambda: flood.sent > 0, "the flood")
    stage.tell(Event.PROVEN, A1)
    stage.tell(Event.VALIDATED, A1)
    assert reader.read(1) == [("hashblock", display(A1), 0)]
    tier = stage.accounts.tiers[Tier.TURBO]
    stage.wait(lambda: tier.subscribers == 1, "the reader alone")
    assert (stage.accounts.refused, stage.accounts.disconnected) == (1, 1)


def test_subscribers_that_come_all_at_once_are_all_counted(stage: Stage, stack: ExitStack) -> None:
    count = 100  # a crowd that comes back after a restart, before the loop has its turn
    for _ in range(count):
        guest = stack.enter_context(socket.create_connection(("127.0.0.1", stage.port), timeout=WAIT_S))
        assert guest.recv(1) == GREETING[:1], "libzmq has accepted it, and told of it"
    stage.wait(lambda: stage.accounts.accepted == count, "all of them")
    assert stage.accounts.tiers[Tier.TURBO].subscribers == count


def test_whoever_comes_when_the_house_is_full_is_turned_away(stage: Stage, stack: ExitStack) -> None:
    stage.delivery.close()
    stage.most = 3
    stage.open()
    guests = [stack.enter_context(socket.create_connection(("127.0.0.1", stage.port))) for _ in range(5)]
    tier = stage.accounts.tiers[Tier.TURBO]
    stage.wait(lambda: stage.accounts.disconnected == 2, "two of them gone")
    assert (tier.subscribers, stage.accounts.refused) == (3, 2)
    guests[0].close()
    stage.wait(lambda: tier.subscribers == 2, "one less")
    reader = stage.reader("hashblock")
    stage.tell(Event.PROVEN, A1)
    stage.tell(Event.VALIDATED, A1)
    assert reader.read(1) == [("hashblock", display(A1), 0)]


class Connected:
    """A connection whose near side, at `port`, has been accepted by us."""

    def __init__(self, stack: ExitStack) -> None:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.port = listener.getsockname()[1]
        self.far = stack.enter_context(socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S))
        self.near = stack.enter_context(listener.accept()[0])

    def say(self, size: int) -> None:
        self.far.sendall(bytes(size))
        left = size
        while left:
            left -= len(self.near.recv(left))

    @property
    def ended(self) -> bool:
        self.far.settimeout(0.2)
        try:
            return self.far.recv(1) == b""
        except TimeoutError:
            return False


def test_words_are_counted_by_the_time_they_took(stack: ExitStack) -> None:
    one = Connected(stack)
    guests = Guests(one.port, 10)
    assert guests.came(one.near.fileno(), 0)
    now_ns = 0
    for _ in range(5):
        one.say(FLOOD_BYTES // 2)
        now_ns += FLOOD_NS
        assert guests.end_floods(now_ns) == 0
    one.say(5 * FLOOD_BYTES)
    now_ns += NS_PER_S
    assert guests.end_floods(now_ns) == 0, "this loop may have been kept from looking"
    one.say(FLOOD_BYTES + 1)
    assert guests.end_floods(now_ns + FLOOD_NS) == 1
    assert one.ended


def test_a_descriptor_that_is_somebody_else_s_by_now_is_left_alone(stack: ExitStack) -> None:
    other = Connected(stack)
    guests = Guests(1, 0)  # another port than the connection's
    assert not guests.came(other.near.fileno(), 0), "the house is full"
    other.say(2 * FLOOD_BYTES)
    assert guests.end_floods(1) == 0
    pipe, *_ = pair = socket.socketpair()
    for one in pair:
        stack.callback(one.close)
    guests.came(pipe.fileno(), 0)
    guests.came(999_999, 0)
    assert guests.end_floods(2) == 0
    assert not other.ended
    assert guests.went(999_999)
    assert not guests.went(999_999)


def test_of_more_guests_than_are_looked_at_in_a_round_each_has_its_turn(stack: ExitStack) -> None:
    flood = Connected(stack)
    guests = Guests(flood.port, 10_000)
    for descriptor in range(100_000, 100_000 + 2 * MAX_WATCHED):
        guests.came(descriptor, 0)
    guests.came(flood.near.fileno(), 0)
    flood.say(2 * FLOOD_BYTES)
    assert [guests.end_floods(1) for _ in range(3)] == [0, 0, 1]
