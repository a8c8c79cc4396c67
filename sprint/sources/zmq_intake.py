"""What the operator's node publishes beside its hashes, for whoever passes it on: whole blocks, and transactions.

Not for the relay's process: a busy mempool is a thousand messages a second. Only what is wanted is subscribed to. The
second and further nodes are asked for blocks only: transactions of two nodes would be told twice.
"""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING, Final

from sprint import zmq_sockets
from sprint.bitcoin.codec import MalformedError
from sprint.zmq_sockets import PublisherLink
from sprint.zmq_wire import RAWBLOCK, read_counter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sprint.addresses import Address

MESSAGES_A_TURN: Final = 64
"""Then the loop has its turn, after about a millisecond: blocks come by it."""
MAX_TOPIC: Final = 16


class ZmqIntake:
    """Reads the publishers; poll() whenever fileno() is readable, and again at once while it says so."""

    def __init__(self, nodes: Sequence[Address]) -> None:
        """Made after the fork."""
        self._context = zmq_sockets.new_context()
        self._links = [PublisherLink(self._context, node, (RAWBLOCK,)) for node in nodes]
        self._topics: set[bytes] = set()
        self._epoll = select.epoll()
        for link in self._links:
            for descriptor in link.descriptors():
                self._epoll.register(descriptor, select.EPOLLIN)

    def fileno(self) -> int:
        """One descriptor for all of libzmq's."""
        return self._epoll.fileno()

    def want(self, topics: set[bytes]) -> None:
        """Be subscribed to these topics beside rawblock. poll() next: this may swallow what the descriptor tells."""
        for topic in topics ^ self._topics:
            self._links[0].subscribe(topic, wanted=topic in topics)
        self._topics = set(topics)

    def deadline(self) -> int | None:
        """When poll() has something to do even if nothing is readable."""
        return min((due_ns for link in self._links if (due_ns := link.deadline()) is not None), default=None)

    def poll(self) -> tuple[list[tuple[bytes, bytes]], bool]:
        """What has come, (topic, body) each, and whether more may be waiting."""
        heard: list[tuple[bytes, bytes]] = []
        for link in self._links:
            link.look(time.monotonic_ns())
            for _ in range(MESSAGES_A_TURN):
                frames = link.receive()
                if frames is None:
                    break
                if frames and len(frames[0].buffer) <= MAX_TOPIC:
                    topic = bytes(frames[0].buffer)
                    try:
                        read_counter(frames[2].buffer)
                    except MalformedError:
                        continue
                    if topic == RAWBLOCK or topic in self._topics:
                        heard.append((topic, bytes(frames[1].buffer)))
            else:
                return heard, True
        return heard, False

    def close(self) -> None:
        """Leave the publishers."""
        for link in self._links:
            link.close()
        self._epoll.close()
        self._context.term()
