"""Source zmq: the hashblock and rawblock of nodes that publish as Bitcoin Core does.

What a node publishes it has connected: each message is a sighting that validates. A rawblock brings the header; a hash
alone of a block that nobody has told of makes the relay ask for its header at once. Lost messages show as gaps in the
counters, and a connection that was down may have missed some: either makes the relay ask everybody for what is new. A
publisher that is connected and says nothing, while others have told of a block for half a minute, is shown as silent.

libzmq connects, reconnects and reads in a thread of its own. Bounded: 32 messages wait, of 4 MB at most; what is not
such a message is counted and skipped. (The number of frames in one message is libzmq's affair, and not bounded there.)
"""

from __future__ import annotations

import select
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from sprint import zmq_sockets
from sprint.bitcoin.codec import MalformedError
from sprint.events import Announcement, MessagesMissed, Sighting, Source, State
from sprint.status import StatusBlock, writing
from sprint.tiers import NS_PER_S
from sprint.zmq_sockets import PublisherLink
from sprint.zmq_wire import HASHBLOCK, RAWBLOCK, GapCounter, read_block

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sprint.addresses import Address
    from sprint.events import Want
    from sprint.sources import Heard
    from sprint.zmq_sockets import Context, Frames

SILENT_NS: Final = 30 * NS_PER_S
"""A tip that others have told of for so long, and this publisher has not. A node connects a block within seconds."""
MESSAGES_A_TURN: Final = 16
"""Then the other sources have theirs."""
NAMED: Final = 64
"""Hashes that we remember a publisher to have named."""
MAX_TOPIC: Final = 16
RECENT: Final = 4
"""Rows of the books in which the tip must stand: it is among the newest."""
_HASH = slice(64, 96)  # of a record
TOPICS: Final = (HASHBLOCK, RAWBLOCK)


class Publisher:
    """One node's publisher: its sockets, its counters, and what the status shows of it."""

    def __init__(self, context: Context, node: Address, tip: bytes, thread: int) -> None:
        self.name = str(node)
        self.link = PublisherLink(context, node, TOPICS, thread=thread)
        self.skipped = self.lost = self.received_bytes = 0
        self.more = False
        """Messages may be waiting that no descriptor tells of."""
        self._connects = 0
        self._gaps = GapCounter()
        self._named: deque[bytes] = deque((tip,), maxlen=NAMED)

    def hear(self, now_ns: int, tip: bytes) -> list[Heard]:
        """What came since the last time; `tip` is our best block, which a new connection can't be blamed for."""
        heard: list[Heard] = []
        if self.link.look(now_ns):
            heard.append(MessagesMissed(Source.ZMQ, self.name))
        if self._connects != self.link.connects:
            self._connects = self.link.connects
            self._named.append(tip)
        for _ in range(MESSAGES_A_TURN):
            frames = self.link.receive()
            if frames is None:
                self.more = False
                return heard
            self._on_message(frames, time.monotonic_ns(), heard)
        self.more = True
        return heard

    def has_named(self, block_hash: bytes) -> bool:
        """Whether it has told of that block, or can't be expected to."""
        return block_hash in self._named

    def excuse(self, block_hash: bytes) -> None:
        """It can't be expected to tell of that block."""
        self._named.append(block_hash)

    def _on_message(self, frames: Frames, seen_ns: int, heard: list[Heard]) -> None:
        try:
            if not frames or len(frames[0].buffer) > MAX_TOPIC:
                raise MalformedError("not topic, body and counter")
            topic, body, counter = bytes(frames[0].buffer), frames[1].buffer, frames[2].buffer
            self.received_bytes += len(topic) + len(body) + len(counter)
            if topic not in TOPICS:  # a subscription is a prefix: hashblock2 is none of ours
                return
            block = read_block(topic, body, counter)
        except MalformedError:
            self.skipped += 1
            return
        lost = self._gaps.lost(topic, block.counter)
        if lost:
            self.lost += lost
            heard.append(MessagesMissed(Source.ZMQ, self.name))
        if block.hash not in self._named:
            self._named.append(block.hash)
        announcement = Announcement.HASHBLOCK if block.header is None else Announcement.RAWBLOCK
        heard.append(
            Sighting(
                Source.ZMQ, self.name, announcement, block.hash, block.header, seen_ns, block.transactions, block.size,
                validated=True,
            )
        )  # fmt: skip


class ZmqSource:
    """All configured publishers."""

    def __init__(
        self,
        nodes: Sequence[Address],
        tip: Callable[[], bytes],
        status: StatusBlock,
        *,
        silent_ns: int = SILENT_NS,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`tip` gives the hash of our best block, by which a silent publisher is known. Made after the fork."""
        self._tip = tip
        self._status = status
        self._silent_ns = silent_ns
        self._clock = clock
        self._context = zmq_sockets.new_context(len(nodes))
        self._tip_told = tip()
        self._tip_since_ns = clock()
        self._publishers = [
            Publisher(self._context, node, self._tip_told, thread) for thread, node in enumerate(dict.fromkeys(nodes))
        ]
        self._epoll = select.epoll()
        for publisher in self._publishers:
            for descriptor in publisher.link.descriptors():
                self._epoll.register(descriptor, select.EPOLLIN)
            status.peer_index(publisher.name)
        self._due_ns: int | None = 0
        """When to look without being told; at once, at first, for the set-up may have swallowed a signal."""

    def fileno(self) -> int:
        """The epoll descriptor over all of libzmq's."""
        return self._epoll.fileno()

    def poll(self, now_ns: int) -> list[Heard]:
        """Take what libzmq's thread has received."""
        if (self._due_ns is None or now_ns < self._due_ns) and not self._epoll.poll(0, 1):
            return []
        heard: list[Heard] = []
        tip = self._tip()
        for publisher in self._publishers:
            heard += publisher.hear(now_ns, tip)
        times = [0 if publisher.more else publisher.link.deadline() for publisher in self._publishers]
        self._due_ns = min((due_ns for due_ns in times if due_ns is not None), default=None)
        return heard

    def deadline(self) -> int | None:
        """When a publisher is to be tried anew; at once, if more is known to wait than one turn takes."""
        return self._due_ns

    def want(self, want: Want, now_ns: int) -> None:
        """A publisher can't be asked anything."""

    def account(self) -> None:
        """Write each publisher's row of the status block, and judge whether it has fallen silent."""
        tip, now_ns = self._tip(), self._clock()
        if tip != self._tip_told:
            self._tip_told, self._tip_since_ns = tip, now_ns
            if not self._is_news(tip):
                for publisher in self._publishers:
                    publisher.excuse(tip)
        for publisher in self._publishers:
            index = self._status.peer_index(publisher.name)
            if index is None:
                continue
            row = self._status.layout.peers[index]
            age_ns = now_ns - self._tip_since_ns
            link = publisher.link
            silent = link.connected and age_ns >= self._silent_ns and not publisher.has_named(tip)
            with writing(row):
                row.source = Source.ZMQ
                row.agent = b"ZMQ publisher"
                row.connected, row.connects, row.failures = link.connected, link.connects, link.failures
                row.bytes_received, row.skipped_messages = publisher.received_bytes, publisher.skipped
                row.lost_messages = publisher.lost
                row.silent_ns = age_ns if silent else 0
                row.last_error = link.last_error.encode()[:127]

    def _is_news(self, tip: bytes) -> bool:
        """Whether a block was announced while we listened: one found in a catch-up a publisher has told of before."""
        for row in self._status.blocks(RECENT):
            if bytes(row.record[_HASH]) == tip:
                return not row.state & State.CATCHUP
        return False

    def close(self) -> None:
        """Leave all publishers."""
        for publisher in self._publishers:
            publisher.link.close()
        self._epoll.close()
        self._context.term()
