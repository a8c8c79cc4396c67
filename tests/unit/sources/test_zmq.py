"""Source zmq against a publisher of pyzmq's own: what it hears, what it misses, what it refuses."""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING

import pytest
import zmq

from sprint.addresses import Address
from sprint.api import views
from sprint.bitcoin.networks import REGTEST
from sprint.broadcaster import Broadcaster
from sprint.events import Announcement, Block, Event, MessagesMissed, Sighting, Source, State
from sprint.ledger import Ledger
from sprint.regtest import RegtestChain
from sprint.ring import Ring, RingWriter, size_for
from sprint.sources.zmq import MESSAGES_A_TURN, ZmqSource
from sprint.status import StatusBlock
from sprint.tiers import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sprint.regtest import MinedBlock
    from sprint.sources import Heard

WAIT_S = 20.0
BLOCKS = RegtestChain().extend(3, 1_700_000_000)
GENESIS = REGTEST.genesis_hash


class CorePublisher:
    """Publishes as Core does, on a port of its own; messages can be swallowed on the way."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.host = host
        self.port = 0
        self.counters: dict[bytes, int] = {}
        self.open()

    @property
    def address(self) -> Address:
        return Address("127.0.0.1", self.port)

    def open(self) -> None:
        self.socket = self.context.socket(zmq.XPUB)
        self.socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        self.socket.setsockopt(zmq.IPV6, int(":" in self.host))
        self.socket.bind(f"tcp://{self.host}:{self.port or '*'}")
        endpoint = self.socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        self.port = int(endpoint.rsplit(b":", 1)[1])

    def close(self) -> None:
        self.socket.close(0)

    def wait_for_subscriptions(self, count: int, keep_alive: Callable[[], object]) -> None:
        """Subscribers subscribe anew only when somebody looks at their sockets: `keep_alive` does."""
        deadline = time.monotonic() + WAIT_S
        while count:
            assert time.monotonic() < deadline, f"{count} subscriptions are missing"
            keep_alive()
            if self.socket.poll(10):
                count -= self.socket.recv()[:1] == b"\1"

    def send(self, topic: bytes, body: bytes, *, swallow: bool = False) -> None:
        number = self.counters.get(topic, 0)
        self.counters[topic] = number + 1
        if not swallow:
            self.socket.send_multipart([topic, body, number.to_bytes(4, "little")])


@pytest.fixture
def core() -> Iterator[CorePublisher]:
    publisher = CorePublisher()
    yield publisher
    publisher.close()
    publisher.context.term()


@pytest.fixture
def status() -> StatusBlock:
    return StatusBlock.create(1, {})


class Listener:
    """The source, driven as a loop would: poll() only when its descriptor is readable, or its deadline has come."""

    def __init__(self, source: ZmqSource) -> None:
        self.source = source
        self.heard: list[Heard] = []
        self.ahead_ns = 0
        """How far the source's clock is ahead of the machine's."""

    def turn(self, wait_s: float = 0.0) -> None:
        now_ns, due_ns = time.monotonic_ns() + self.ahead_ns, self.source.deadline()
        due = due_ns is not None and now_ns >= due_ns
        ready, _, _ = select.select([self.source.fileno()], [], [], 0 if due else wait_s)
        if ready or due:
            self.heard += self.source.poll(now_ns)

    def hurry(self) -> None:
        self.ahead_ns += NS_PER_S // 10
        self.turn()

    def wait_for(self, count: int) -> list[Heard]:
        deadline = time.monotonic() + WAIT_S
        while len(self.heard) < count:
            assert time.monotonic() < deadline, f"heard {self.heard}, {count} awaited"
            self.turn(0.1)
        heard, self.heard = self.heard, []
        return heard


@pytest.fixture
def listener(core: CorePublisher, status: StatusBlock) -> Iterator[Listener]:
    source = ZmqSource([core.address], lambda: GENESIS, status)
    one = Listener(source)
    core.wait_for_subscriptions(2, one.turn)
    yield one
    source.close()


def enter_into_books(status: StatusBlock, block: MinedBlock, state: State) -> None:
    """As the ledger does when a block has been published."""
    now_ns = time.monotonic_ns()
    header = block.header.encode()
    told = Block(Event.PROVEN, state, Source.P2P, "", block.hash, header, 1, 0, 0, 0, 0, 0, 0, now_ns)
    ring = Ring.create(bytearray(size_for(8)), 8, 7)
    Broadcaster(RingWriter(ring), REGTEST.magic, [], time.monotonic_ns).write(told)
    Ledger(status).published(told, 1, ring.copy(1), now_ns)


def test_a_hashblock_is_a_sighting_that_validates(core: CorePublisher, listener: Listener) -> None:
    before_ns = time.monotonic_ns()
    core.send(b"hashblock", BLOCKS[0].hash[::-1])
    (heard,) = listener.wait_for(1)
    assert isinstance(heard, Sighting)
    assert heard.validated
    assert heard.seen_ns > before_ns
    assert heard[:5] == (Source.ZMQ, str(core.address), Announcement.HASHBLOCK, BLOCKS[0].hash, None)


def test_a_rawblock_brings_the_header(core: CorePublisher, listener: Listener) -> None:
    core.send(b"rawblock", BLOCKS[0].payload)
    (heard,) = listener.wait_for(1)
    assert isinstance(heard, Sighting)
    assert (heard.announcement, heard.hash, heard.header) == (
        Announcement.RAWBLOCK,
        BLOCKS[0].hash,
        BLOCKS[0].header.encode(),
    )
    assert (heard.transactions, heard.size, heard.validated) == (1, len(BLOCKS[0].payload), True)


def test_more_than_a_turn_takes_is_heard_without_another_signal(core: CorePublisher, listener: Listener) -> None:
    count = 5 * MESSAGES_A_TURN
    for _ in range(count):
        core.send(b"hashblock", BLOCKS[0].hash[::-1])
    assert len(listener.wait_for(count)) == count


def test_a_gap_in_the_counter_is_told_and_counted(core: CorePublisher, listener: Listener, status: StatusBlock) -> None:
    core.send(b"hashblock", BLOCKS[0].hash[::-1])
    core.send(b"hashblock", BLOCKS[1].hash[::-1], swallow=True)
    core.send(b"hashblock", BLOCKS[2].hash[::-1])
    heard = listener.wait_for(3)
    assert [type(one) for one in heard] == [Sighting, MessagesMissed, Sighting]
    listener.source.account()
    (row,) = status.peers()
    assert (row.lost_messages, row.source, row.connected) == (1, Source.ZMQ, 1)


def test_a_hostile_publisher_is_counted_and_skipped(
    core: CorePublisher, listener: Listener, status: StatusBlock
) -> None:
    core.socket.send_multipart([b"hashblock", bytes(31), bytes(4)])
    core.socket.send_multipart([b"hashblock", bytes(32)])
    core.socket.send_multipart([b"hashblock"])
    core.socket.send_multipart([b"hashblock", bytes(32), bytes(4), *[b"x"] * 100])
    core.socket.send_multipart([b"hashblock", bytes(32), bytes(5)])
    core.socket.send_multipart([b"rawblock", bytes(200), bytes(4)])
    core.socket.send_multipart([b"rawblock" + b"x" * 100_000, bytes(200), bytes(4)])
    core.socket.send_multipart([b"hashblock2", bytes(32), bytes(4)])  # another topic of somebody's, and no error
    core.send(b"hashblock", BLOCKS[0].hash[::-1])
    (heard,) = listener.wait_for(1)
    assert isinstance(heard, Sighting)
    listener.source.account()
    assert status.peers()[0].skipped_messages == 7


def test_a_message_that_is_too_large_ends_the_connection_and_not_the_source(
    core: CorePublisher, listener: Listener
) -> None:
    core.send(b"rawblock", bytes(5_000_000))
    core.wait_for_subscriptions(2, listener.hurry)
    core.send(b"hashblock", BLOCKS[0].hash[::-1])
    kinds = [type(one) for one in listener.wait_for(2)]
    assert kinds == [MessagesMissed, Sighting]


def test_a_publisher_that_comes_back_is_heard_again_and_what_it_said_meanwhile_is_asked_for(
    core: CorePublisher, listener: Listener, status: StatusBlock
) -> None:
    core.close()
    deadline = time.monotonic() + WAIT_S
    while True:
        listener.turn(0.05)
        listener.source.account()
        if not status.peers()[0].connected:
            break
        assert time.monotonic() < deadline
    facts = {"bitcoinNodes": [], "version": "", "engine": "", "tier": "", "network": ""}
    status.facts = facts
    (warning,) = views.health(status, 0, 0)["warnings"]
    assert warning.startswith(f"zmq {core.address}: not connected: ")
    core.open()
    core.wait_for_subscriptions(2, listener.turn)
    assert [type(one) for one in listener.wait_for(1)] == [MessagesMissed]
    core.send(b"hashblock", BLOCKS[0].hash[::-1])
    assert isinstance(listener.wait_for(1)[0], Sighting)
    listener.source.account()
    assert (status.peers()[0].connects, status.peers()[0].connected) == (2, 1)
    assert views.health(status, 0, 0)["warnings"] == []


def test_a_publisher_that_says_nothing_of_a_block_is_silent_until_it_does(
    core: CorePublisher, status: StatusBlock
) -> None:
    tip, now_ns = [GENESIS], [0]
    source = ZmqSource([core.address], lambda: tip[0], status, silent_ns=30 * NS_PER_S, clock=lambda: now_ns[0])
    one = Listener(source)
    core.wait_for_subscriptions(2, one.turn)

    def silent_after(seconds: int) -> int:
        now_ns[0] += seconds * NS_PER_S
        source.account()
        return int(status.peers()[0].silent_ns) // NS_PER_S

    assert silent_after(3600) == 0, "of the tip that stood when it was connected it needn't tell"
    tip[0] = BLOCKS[0].hash
    enter_into_books(status, BLOCKS[0], State.PROVEN | State.BEST)
    assert silent_after(0) == 0
    assert silent_after(29) == 0
    assert silent_after(1) == 30
    status.facts = {"bitcoinNodes": [], "version": "", "engine": "", "tier": "", "network": ""}
    assert "silent: the best block has been known from others for 30 s" in views.health(status, 0, 0)["warnings"][0]
    core.send(b"hashblock", BLOCKS[0].hash[::-1])
    one.wait_for(1)
    assert silent_after(1) == 0
    source.close()


@pytest.mark.parametrize("state", [None, State.PROVEN | State.BEST | State.CATCHUP])
def test_a_publisher_isn_t_silent_for_blocks_that_were_found_in_a_catch_up(
    state: State | None, core: CorePublisher, status: StatusBlock
) -> None:
    """Those of the first sync are in no books; either kind it may have told of before we were there to hear it."""
    tip, now_ns = [GENESIS], [0]
    source = ZmqSource([core.address], lambda: tip[0], status, silent_ns=30 * NS_PER_S, clock=lambda: now_ns[0])
    core.wait_for_subscriptions(2, Listener(source).turn)
    tip[0] = BLOCKS[0].hash
    if state is not None:
        enter_into_books(status, BLOCKS[0], state)
    for _ in range(2):
        source.account()
        now_ns[0] += 3600 * NS_PER_S
        assert (status.peers()[0].connected, status.peers()[0].silent_ns) == (1, 0)
    source.close()


def test_each_of_several_publishers_is_heard_under_its_own_name(core: CorePublisher, status: StatusBlock) -> None:
    other = CorePublisher()
    source = ZmqSource([core.address, other.address], lambda: GENESIS, status)
    one = Listener(source)
    for publisher in (core, other):
        publisher.wait_for_subscriptions(2, one.turn)
        publisher.send(b"hashblock", BLOCKS[0].hash[::-1])
    assert {heard.peer for heard in one.wait_for(2) if isinstance(heard, Sighting)} == {
        str(core.address),
        str(other.address),
    }
    source.close()
    other.close()
    other.context.term()
