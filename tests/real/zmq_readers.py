"""Programs that read a Core-style ZMQ publisher, written from Core's contract alone, and a relay of messages that loses
some. Nothing here is of the product.

The contract: SUB sockets; three frames, topic, body, four bytes of a counter for each topic, little-endian; hashes in
display order.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import zmq

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

WAIT_TIMEOUT_S = 30.0
BLOCK_TOPICS = ("hashblock", "rawblock")


class Message(NamedTuple):
    topic: str
    body: bytes
    number: int


class ZmqReader:
    """A subscriber, as a context manager; `messages` is what it has read so far."""

    def __init__(self, address: str, *topics: str) -> None:
        self.messages: list[Message] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        for topic in topics:
            self._socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        self._socket.connect(f"tcp://{address}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close(0)
        self._context.term()

    def read(self, wait_s: float) -> Message | None:
        """The next message, if one comes within that time."""
        if not self._socket.poll(int(wait_s * 1000)):
            return None
        topic, body, number = self._socket.recv_multipart()
        message = Message(topic.decode(), body, int.from_bytes(number, "little"))
        self.messages.append(message)
        return message

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Read until the condition holds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                told = [(one.topic, one.number, one.body[:32].hex()) for one in self.messages[-10:]]
                raise TimeoutError(f"not within {timeout_s:g} s: {what}; read were {told}")
            self.read(min(left_s, 0.2))

    def wait_for(self, topic: str, body: bytes) -> Message:
        """Read until this has come; returns it."""

        def found() -> list[Message]:
            return [one for one in self.messages if one.topic == topic and one.body == body]

        self.wait_until(lambda: bool(found()), f"{topic} {body[:40].hex()}")
        return found()[0]

    def wait_for_tip(self, block_hash: str) -> Message:
        """Read until the hashblock of this block has come."""
        return self.wait_for("hashblock", bytes.fromhex(block_hash))

    def of(self, topic: str) -> list[Message]:
        """What it has read of one topic, in order."""
        return [one for one in self.messages if one.topic == topic]

    def hashes(self) -> list[str]:
        """The hashblocks so far, in display order."""
        return [one.body.hex() for one in self.of("hashblock")]


class LossyProxy:
    """Hands a publisher's messages on, all but those that `drops` says: then subscribers see a gap."""

    def __init__(self, address: str) -> None:
        self.drops: Callable[[Message], bool] = lambda _message: False
        self.dropped: list[Message] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sub = self._context.socket(zmq.XSUB)
        self._sub.connect(f"tcp://{address}")
        self._pub = self._context.socket(zmq.XPUB)
        port = self._pub.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"127.0.0.1:{port}"
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self._thread.join(WAIT_TIMEOUT_S)
        self._sub.close(0)
        self._pub.close(0)
        self._context.term()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._sub, zmq.POLLIN)
        poller.register(self._pub, zmq.POLLIN)
        while not self._closing:
            for one, _ in poller.poll(50):
                if one is self._pub:
                    self._sub.send(self._pub.recv())  # a subscription
                    continue
                frames = self._sub.recv_multipart()
                message = Message(frames[0].decode(), frames[1], int.from_bytes(frames[2], "little"))
                if self.drops(message):
                    self.dropped.append(message)
                else:
                    self._pub.send_multipart(frames)
