"""What the operator's nodes publish, for whoever publishes in turn: blocks, and what only a node can tell.

Not for the relay's process: a busy mempool is a thousand messages a second. Blocks come over a connection of their own
from each node, so that they never wait behind transactions. Transactions and the mempool's changes are subscribed to
while they are wanted, at every port of the first node's host (some nodes publish each topic at a port of its own); of
one topic only one publisher is heard, the first that speaks of it, until its connection is lost: two would tell
everything twice.
"""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from sprint import zmq_sockets
from sprint.bitcoin.codec import MalformedError
from sprint.zmq_sockets import PublisherLink
from sprint.zmq_wire import HASHBLOCK, HIGH_WATER_MARK, RAWBLOCK, GapCounter, read_block, read_counter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sprint.addresses import Address
    from sprint.zmq_sockets import Frames

MESSAGES_A_TURN: Final = 64
"""Of each connection; then the loop has its turn, after about a millisecond."""
MAX_TOPIC: Final = 16
FEED_HIGH_WATER_MARK: Final = HIGH_WATER_MARK
"""Messages of one feed that wait, as at any other subscriber's: a connected block is thousands at once. They are a few
hundred bytes each; 4 MB is the bound of one."""


class Published(NamedTuple):
    """One message of a node's."""

    node: str
    topic: bytes
    body: bytes
    block_hash: bytes
    """Of a hashblock or rawblock, wire order; else empty."""
    lost: int
    """How many of this topic are missing before it."""


class _Feed:
    """One publisher of transactions."""

    def __init__(self, link: PublisherLink) -> None:
        self.link = link
        self.gaps = GapCounter()
        self.interrupted: set[bytes] = set()
        """Topics of which something may be missing that no counter tells: there is a new connection."""


class ZmqIntake:
    """Reads the publishers; poll() whenever fileno() is readable, and again at once while it says so."""

    def __init__(self, nodes: Sequence[Address]) -> None:
        """Made after the fork."""
        self._nodes = nodes
        self._context = zmq_sockets.new_context(len(nodes))
        self._epoll = select.epoll()
        self._blocks = [self._link(number, (HASHBLOCK, RAWBLOCK)) for number in range(len(nodes))]
        self._feeds: list[_Feed] = []
        self._topics: set[bytes] = set()
        self._speakers: dict[bytes, _Feed] = {}

    def fileno(self) -> int:
        """One descriptor for all of libzmq's."""
        return self._epoll.fileno()

    @property
    def connected(self) -> bool:
        """Whether a node could tell us of a block."""
        return any(link.connected for link in self._blocks)

    def want(self, topics: set[bytes]) -> None:
        """Be subscribed to these topics beside blocks. poll() next: this may swallow what the descriptor tells."""
        if topics and not self._feeds:
            first = self._nodes[0].host
            numbers = [number for number, node in enumerate(self._nodes) if node.host == first]
            self._feeds = [_Feed(self._link(number, (), FEED_HIGH_WATER_MARK)) for number in numbers]
        for topic in topics ^ self._topics:
            self._speakers.pop(topic, None)
            for feed in self._feeds:
                feed.link.subscribe(topic, wanted=topic in topics)
                feed.gaps.forget(topic)
                feed.interrupted.discard(topic)
        self._topics = set(topics)

    def deadline(self) -> int | None:
        """When poll() has something to do even if nothing is readable."""
        links = [*self._blocks, *(feed.link for feed in self._feeds)]
        return min((due_ns for link in links if (due_ns := link.deadline()) is not None), default=None)

    def poll(self) -> tuple[list[Published], bool]:
        """What has come, blocks first, and whether more may be waiting."""
        now_ns = time.monotonic_ns()
        heard: list[Published] = []
        more = False
        for link in self._blocks:
            link.look(now_ns)
            messages, left = _read(link)
            more = more or left
            for frames in messages:
                self._on_block(link, frames, heard)
        for feed in self._feeds:
            if feed.link.look(now_ns):
                feed.interrupted = set(self._topics)
            messages, left = _read(feed.link)
            more = more or left
            for frames in messages:
                self._on_transaction(feed, frames, heard)
        return heard, more

    def close(self) -> None:
        """Leave the publishers."""
        for link in (*self._blocks, *(feed.link for feed in self._feeds)):
            link.close()
        self._epoll.close()
        self._context.term()

    def _link(
        self, number: int, topics: Sequence[bytes], high_water_mark: int = zmq_sockets.RECEIVE_HIGH_WATER_MARK
    ) -> PublisherLink:
        link = PublisherLink(self._context, self._nodes[number], topics, thread=number, high_water_mark=high_water_mark)
        for descriptor in link.descriptors():
            self._epoll.register(descriptor, select.EPOLLIN)
        return link

    @staticmethod
    def _on_block(link: PublisherLink, frames: Frames, heard: list[Published]) -> None:
        topic, body = bytes(frames[0].buffer), bytes(frames[1].buffer)
        try:
            block = read_block(topic, body, frames[2].buffer)
        except MalformedError:
            return
        heard.append(Published(link.name, topic, body, block.hash, 0))

    def _on_transaction(self, feed: _Feed, frames: Frames, heard: list[Published]) -> None:
        topic = bytes(frames[0].buffer)
        if topic not in self._topics:  # a subscription is a prefix
            return
        try:
            number = read_counter(frames[2].buffer)
        except MalformedError:
            return
        lost = feed.gaps.lost(topic, number)
        speaker = self._speakers.get(topic)
        if speaker is not feed:
            if speaker is not None and speaker.link.connected:
                return
            lost = int(speaker is not None)  # what the one before said last, nobody knows
            self._speakers[topic] = feed
        if topic in feed.interrupted:
            feed.interrupted.discard(topic)
            lost = max(lost, 1)
        heard.append(Published(feed.link.name, topic, bytes(frames[1].buffer), b"", lost))


def _read(link: PublisherLink) -> tuple[list[Frames], bool]:
    """The messages that wait, of three frames and with a topic of a topic's length, and whether there may be more."""
    messages: list[Frames] = []
    for _ in range(MESSAGES_A_TURN):
        frames = link.receive()
        if frames is None:
            return messages, False
        if frames and len(frames[0].buffer) <= MAX_TOPIC:
            messages.append(frames)
    return messages, True
