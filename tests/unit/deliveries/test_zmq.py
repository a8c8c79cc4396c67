"""Delivery zmq, read by plain pyzmq: topics, bodies, order and counters as Core's, and what happens to slow readers."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import zmq

from sprint.addresses import Address
from sprint.blocks import BlockStore, WholeBlock
from sprint.broadcaster import Broadcaster
from sprint.deliveries import zmq as delivery_module
from sprint.deliveries.zmq import ZmqDelivery
from sprint.errors import HostError
from sprint.events import Block, Event, Source, State
from sprint.regtest import RegtestChain
from sprint.ring import Ring, RingWriter, size_for
from sprint.status import StatusBlock
from sprint.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sprint.regtest import MinedBlock

WAIT_S = 20.0
CHAIN = RegtestChain()
A1, A2 = CHAIN.extend(2, 1_700_000_000)
B1, B2, B3 = CHAIN.extend(3, 1_700_000_000, parent=CHAIN.headers.hash_at(0), extra=b"/b/")
HEIGHTS = {A1.hash: 1, A2.hash: 2, B1.hash: 1, B2.hash: 2, B3.hash: 3}
Message = tuple[str, bytes, int]


class Reader:
    """A subscriber by Core's contract and nothing else."""

    def __init__(self, stage: Stage, *topics: str, hwm: int = 1000) -> None:
        self.stage = stage
        self.topics = topics or ("",)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.setsockopt(zmq.RCVHWM, hwm)
        for topic in self.topics:
            self.socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        self.socket.connect(f"tcp://127.0.0.1:{stage.port}")

    def read(self, count: int) -> list[Message]:
        """The next messages: (topic, body, counter) each."""
        messages: list[Message] = []

        def come() -> bool:
            while self.socket.poll(0) and len(messages) < count:
                topic, body, number = self.socket.recv_multipart()
                messages.append((topic.decode(), body, int.from_bytes(number, "little")))
            return len(messages) >= count

        self.stage.wait(come, f"{count} messages")
        return messages

    def close(self) -> None:
        self.socket.close(0)
        self.context.term()


class Stage:
    """A ring, the delivery on a loop of its own, and who reads it."""

    def __init__(self, proof: Event = Event.VALIDATED, slots: int = 64) -> None:
        self.loop = asyncio.new_event_loop()
        self.ring = Ring.create(bytearray(size_for(slots)), slots, 7)
        self.status = StatusBlock.create(7, {})
        self.accounts = self.status.delivery(0, "zmq")
        self.store = BlockStore()
        self.wanted: set[bytes] = set()
        self.hopeless: set[bytes] = set()
        self.heard = False
        """Whether the operator's node could tell what it has connected."""
        self.most = 100
        self.listener = ZmqDelivery.listen(Address("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.readers: list[Reader] = []
        self.proof = proof
        self.open()

    def open(self) -> None:
        self.delivery = ZmqDelivery(
            self.ring,
            self.accounts,
            proof=self.proof,
            tier=Tier.TURBO,
            store=self.store,
            max_subscribers=self.most,
            on_wanted=lambda topics: setattr(self, "wanted", topics),
            node_is_heard=lambda: self.heard,
            is_hopeless=lambda block_hash: block_hash in self.hopeless,
        )
        self.writer = Broadcaster(RingWriter(self.ring), b"regt", [self.delivery], time.monotonic_ns)
        self.delivery.start(self.loop, self.listener)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        async def until() -> None:
            deadline = time.monotonic() + WAIT_S
            while not condition():
                assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
                await asyncio.sleep(0.002)

        self.loop.run_until_complete(until())

    def reader(self, *topics: str) -> Reader:
        """One that is subscribed by now: what it reads of `sprint` is not needed to know."""
        one = Reader(self, *topics)
        self.readers.append(one)
        for topic in one.topics:
            self._probe(one, topic)
        return one

    def _probe(self, one: Reader, topic: str) -> None:
        """Ask this reader by that topic until it hears; whoever wants the same hears it, too, and reads to the end."""
        asked = 0

        def heard() -> bool:
            nonlocal asked
            asked += 1
            self.delivery._pub.send_multipart([topic.encode(), b"probe %d" % asked, bytes(4)])
            return bool(one.socket.poll(1))

        self.wait(heard, f"a subscription to {topic!r}")
        for each in self.readers:
            if any(topic.startswith(prefix) for prefix in each.topics):
                read = each.read(1)
                while read[-1][:2] != (topic, f"probe {asked}".encode()):
                    read = each.read(1)

    def tell(self, event: Event, block: MinedBlock, state: State = State.BEST, source: Source = Source.P2P) -> None:
        header = block.header.encode()
        now_ns = time.monotonic_ns()
        self.writer.write(
            Block(
                event, State.PROVEN | state, source, "peer", block.hash, header, HEIGHTS[block.hash], 0, 0, 0, 0, 0,
                time.time_ns(), now_ns,
            )
        )  # fmt: skip
        self.writer.wake()

    def close(self) -> None:
        for one in self.readers:
            one.close()
        self.delivery.close()
        self.listener.close()
        self.loop.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    one = Stage()
    yield one
    one.close()


@contextmanager
def staged(proof: Event) -> Iterator[Stage]:
    one = Stage(proof)
    try:
        yield one
    finally:
        one.close()


def display(block: MinedBlock) -> bytes:
    return block.hash[::-1]


CORE = ("hashblock", "rawblock", "sequence")


def test_a_connected_block_is_told_in_core_s_order_bytes_and_counters(stage: Stage) -> None:
    reader = stage.reader(*CORE)
    for number, block in enumerate((A1, A2)):
        stage.store.add(block.hash, WholeBlock(block.payload, 1))
        stage.tell(Event.PROVEN, block)
        stage.tell(Event.VALIDATED, block)
        assert reader.read(3) == [
            ("sequence", display(block) + b"C", number),
            ("hashblock", display(block), number),
            ("rawblock", block.payload, number),
        ]


def test_with_proof_by_a_node_a_proven_header_alone_says_nothing(stage: Stage) -> None:
    reader = stage.reader("hashblock", "sprint")
    stage.tell(Event.PROVEN, A1)
    stage.tell(Event.VALIDATED, A1)
    topics = [topic for topic, _, _ in reader.read(3)]
    assert topics == ["sprint", "hashblock", "sprint"]


def test_with_proof_by_header_a_proven_header_is_told_at_once_and_once() -> None:
    with staged(Event.PROVEN) as stage:
        reader = stage.reader("hashblock", "sprint")
        stage.tell(Event.PROVEN, A1)
        stage.tell(Event.VALIDATED, A1)
        assert [topic for topic, _, _ in reader.read(3)] == ["hashblock", "sprint", "sprint"]


def test_a_reorganisation_tells_each_block_by_sequence_and_only_the_new_tip_by_hash(stage: Stage) -> None:
    reader = stage.reader(*CORE)
    for block in (A1, A2, B1, B2, B3):
        stage.store.add(block.hash, WholeBlock(block.payload, 1))
        stage.tell(Event.PROVEN, block)
    stage.tell(Event.VALIDATED, A1)
    stage.tell(Event.VALIDATED, A2)
    reader.read(6)
    stage.tell(Event.STALE, A2, State.STALE)
    stage.tell(Event.STALE, A1, State.STALE)
    for block in (B1, B2, B3):
        stage.tell(Event.VALIDATED, block)
    assert reader.read(7) == [
        ("sequence", display(A2) + b"D", 2),
        ("sequence", display(A1) + b"D", 3),
        ("sequence", display(B1) + b"C", 4),
        ("sequence", display(B2) + b"C", 5),
        ("sequence", display(B3) + b"C", 6),
        ("hashblock", display(B3), 2),
        ("rawblock", B3.payload, 2),
    ]


def test_a_rawblock_follows_when_the_block_has_come_and_never_out_of_order(stage: Stage) -> None:
    reader = stage.reader("hashblock", "rawblock")
    for block in (A1, A2):
        stage.tell(Event.PROVEN, block)
        stage.tell(Event.VALIDATED, block)
    assert [topic for topic, _, _ in reader.read(2)] == ["hashblock", "hashblock"]
    stage.store.add(A2.hash, WholeBlock(A2.payload, 1))
    stage.delivery.block_arrived()
    stage.store.add(A1.hash, WholeBlock(A1.payload, 1))
    stage.delivery.block_arrived()
    assert reader.read(2) == [("rawblock", A1.payload, 0), ("rawblock", A2.payload, 1)]


def test_a_rawblock_that_can_t_be_had_leaves_a_gap(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_module, "RAWBLOCK_WAIT_NS", 50_000_000)
    reader = stage.reader("rawblock")
    stage.store.add(A2.hash, WholeBlock(A2.payload, 1))
    for block in (A1, A2):
        stage.tell(Event.PROVEN, block)
        stage.tell(Event.VALIDATED, block)
    assert reader.read(1) == [("rawblock", A2.payload, 1)]


def test_the_sprint_topic_carries_every_record(stage: Stage) -> None:
    reader = stage.reader("sprint")
    stage.tell(Event.PROVEN, A1)
    stage.tell(Event.VALIDATED, A1)
    assert reader.read(2) == [("sprint", stage.ring.copy(1), 0), ("sprint", stage.ring.copy(2), 1)]


def test_records_that_the_ring_no_longer_had_leave_a_gap(stage: Stage) -> None:
    reader = stage.reader("sprint")
    stage.tell(Event.PROVEN, A1)
    reader.read(1)
    stage.writer = Broadcaster(RingWriter(stage.ring), b"regt", [], time.monotonic_ns)
    for _ in range(stage.ring.slots + 5):
        stage.tell(Event.VALIDATED, A1)
    stage.delivery.publish()
    assert reader.read(1) == [("sprint", stage.ring.copy(stage.ring.oldest), stage.ring.oldest - 1)]


def test_the_node_s_transactions_are_passed_through_and_its_blocks_are_not(stage: Stage) -> None:
    reader = stage.reader("hashtx", "rawtx", "sequence", "hashblock")
    stage.delivery.pass_through(b"hashtx", bytes(32))
    stage.delivery.pass_through(b"rawtx", A1.coinbase)
    stage.delivery.pass_through(b"sequence", bytes(32) + b"C")
    stage.delivery.pass_through(b"hashblock", bytes(32))
    stage.delivery.pass_through(b"sequence", bytes(32) + b"A" + bytes(8))
    assert reader.read(3) == [
        ("hashtx", bytes(32), 0),
        ("rawtx", A1.coinbase, 0),
        ("sequence", bytes(32) + b"A" + bytes(8), 0),
    ]


def test_what_subscribers_want_of_the_node_is_known_while_they_want_it(stage: Stage) -> None:
    assert stage.wanted == set()
    reader = stage.reader("hash")
    stage.wait(lambda: stage.wanted == {b"hashtx"}, "hashtx wanted")
    everything = stage.reader()
    stage.wait(lambda: stage.wanted == {b"hashtx", b"rawtx", b"sequence"}, "everything wanted")
    for one in (reader, everything):
        stage.readers.remove(one)
        one.close()
    stage.wait(lambda: stage.wanted == set(), "nothing wanted")


def test_subscriptions_to_what_we_don_t_have_are_not_remembered(stage: Stage) -> None:
    reader = stage.reader("hashblock")
    for number in range(500):  # a subscriber has a high-water mark too
        reader.socket.setsockopt_string(zmq.SUBSCRIBE, f"nothing {number}")
    reader.socket.setsockopt_string(zmq.SUBSCRIBE, "rawtx")  # after them: when it is known, so are they
    stage.wait(lambda: stage.wanted == {b"rawtx"}, "rawtx wanted")
    assert stage.delivery._prefixes == {b"hashblock", b"rawtx"}


def test_subscribers_are_counted_and_what_they_got(stage: Stage) -> None:
    reader = stage.reader("hashblock")
    stage.wait(lambda: stage.accounts.tiers[Tier.TURBO].subscribers == 1, "a subscriber")
    stage.tell(Event.PROVEN, A1)
    stage.tell(Event.VALIDATED, A1)
    reader.read(1)
    tier = stage.accounts.tiers[Tier.TURBO]
    assert tier.on_time + tier.late == 2
    stage.readers.remove(reader)
    reader.close()
    stage.wait(lambda: tier.subscribers == 0, "nobody")
    assert (stage.accounts.accepted, stage.accounts.disconnected) == (1, 1)


def test_a_subscriber_that_never_reads_delays_nobody_and_loses_what_is_over_the_high_water_mark(stage: Stage) -> None:
    slow, quick = stage.reader("rawtx"), stage.reader("rawtx")
    body, count = bytes(20_000), 4_000
    longest_s = 0.0
    for number in range(count):
        began = time.monotonic()
        stage.delivery.pass_through(b"rawtx", body)
        longest_s = max(longest_s, time.monotonic() - began)
        if number % 100 == 99:
            quick.read(100)
    assert longest_s < 1, "nobody waits for a subscriber"
    stage.wait(lambda: bool(slow.socket.poll(0)), "what was kept for the slow one")
    numbers = []
    while slow.socket.poll(300):
        numbers.append(int.from_bytes(slow.socket.recv_multipart()[2], "little"))
    assert 1_000 <= len(numbers) < count, "as much as the marks of both sides and the kernel's buffers hold"
    assert numbers == sorted(numbers)
    assert numbers[:1_000] == list(range(1_000)), "what comes first is kept, as in Core"


def test_a_successor_says_the_tip_once_more_to_those_who_come_back(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for block in (A1, A2):
        stage.tell(Event.PROVEN, block)
        stage.tell(Event.VALIDATED, block)
    reader = stage.reader("hashblock")
    stage.delivery.close()
    stage.open()
    assert reader.read(1) == [("hashblock", display(A2), 0)]
    stage.tell(Event.PROVEN, B1, State(0))
    stage.tell(Event.PROVEN, B2, State(0))
    stage.tell(Event.PROVEN, B3)
    stage.tell(Event.VALIDATED, B3)
    assert reader.read(1) == [("hashblock", display(B3), 1)]


def test_an_address_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match=f"ZMQ_BIND=127.0.0.1:{port}: Address already in use"):
            ZmqDelivery.listen(Address("127.0.0.1", port))


def test_strangers_at_the_door_end_nothing(stage: Stage) -> None:
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(8) + b"\x7f" + b"x" * 10_000, b""):
        with socket.create_connection(("127.0.0.1", stage.port)) as stranger:
            stranger.sendall(said)
    reader = stage.reader("hashblock")
    stage.tell(Event.PROVEN, A1)
    stage.tell(Event.VALIDATED, A1)
    assert reader.read(1) == [("hashblock", display(A1), 0)]
