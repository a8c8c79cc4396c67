"""libzmq's sockets as Sprint uses them, on both sides: how they are set up, read to the end, and watched.

Three traps of libzmq shape this module. A socket's descriptor only says that something happened inside: it falls silent
as soon as any call on the socket has looked, with messages still waiting, so every look reads on until nothing is left,
or remembers that something is. A subscriber that reconnects sends its subscriptions again only when somebody looks at
its socket: whoever owns one must do so whenever the descriptor is readable, message or not. And a subscriber whose
publisher once breaks the protocol, by a message that is too large, say, never connects again: PublisherLink then begins
anew.

A context belongs to the process that made it: it is made after the fork.
"""

from __future__ import annotations

import errno
import ipaddress
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from sprint.tiers import NS_PER_S
from sprint.zmq_wire import HIGH_WATER_MARK, MAX_MESSAGE_SIZE

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from sprint.addresses import Address

    Frames = list[zmq.Frame]
    Context = zmq.Context[zmq.Socket[bytes]]
    Socket = zmq.Socket[bytes]

HEARTBEAT_MS: Final = 2_000
HEARTBEAT_TIMEOUT_MS: Final = 6_000
"""A publisher's host that vanished without a word is given up after this. libzmq answers pings from a thread of its
own, so that a node busy with a block doesn't look dead. Publishers have no timer of their own: who reads, watches."""
FIRST_RECONNECT_MS: Final = 200
LAST_RECONNECT_MS: Final = 2_000
RECEIVE_HIGH_WATER_MARK: Final = 32
"""Whole messages that wait here, of up to 4 MB each; then TCP holds the publisher back."""
MAX_THREADS: Final = 8
"""As many publishers as there may be. libzmq looks a name up in the thread that serves the socket, so that a resolver
which doesn't answer would keep all publishers of that thread unheard."""
MAX_SUBSCRIPTION: Final = 256
"""Bytes of what a subscriber may say: a topic's prefix and a byte."""
FRAMES: Final = 3
"""Of each message; what comes beyond is thrown away as it is read."""
RENEW_NS: Final = 5 * NS_PER_S
"""A subscriber without a connection for so long begins anew: libzmq may have given it up."""
MAX_EVENTS: Final = 64
"""Events, or words of subscribers, taken in one look: whoever makes more of them keeps nobody from being served."""

CONNECTED: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED
DISCONNECTED: Final = zmq.EVENT_DISCONNECTED
REFUSED: Final = zmq.EVENT_CLOSED
ACCEPTED: Final = zmq.EVENT_ACCEPTED


def new_context(threads: int = 1) -> Context:
    """A context of this process: so many threads of libzmq's move the bytes, with the calling thread's priority."""
    context: Context = zmq.Context(io_threads=min(threads, MAX_THREADS))
    # Real-time scheduling isn't inherited (SCHED_RESET_ON_FORK). libzmq aborts when it is refused, which it can't be
    # where the calling thread has it.
    if os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO:
        context.set(zmq.THREAD_SCHED_POLICY, os.SCHED_FIFO)
        context.set(zmq.THREAD_PRIORITY, os.sched_getparam(0).sched_priority)
    return context


class PublisherLink:
    """A socket that reads one publisher, now and whenever it is back, and what is known of its connection."""

    def __init__(
        self,
        context: Context,
        node: Address,
        topics: Sequence[bytes],
        *,
        thread: int = 0,
        high_water_mark: int = RECEIVE_HIGH_WATER_MARK,
    ) -> None:
        """`thread` is the one of the context's that serves it."""
        self.name = str(node)
        self.connected = False
        self.connects = self.failures = 0
        self.last_error = ""
        self._is_name = not _is_number(node.host)
        self._ipv6 = ":" in node.host
        self._endpoint = f"tcp://{node}"
        self._renew_ns = 0
        self._sub = sub = context.socket(zmq.SUB)
        sub.setsockopt(zmq.LINGER, 0)
        sub.setsockopt(zmq.RCVHWM, high_water_mark)
        sub.setsockopt(zmq.AFFINITY, 1 << thread % MAX_THREADS)
        sub.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_SIZE)
        sub.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        sub.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        sub.setsockopt(zmq.RECONNECT_IVL, FIRST_RECONNECT_MS)
        sub.setsockopt(zmq.RECONNECT_IVL_MAX, LAST_RECONNECT_MS)
        sub.setsockopt(zmq.IPV6, int(self._ipv6))
        for topic in topics:
            sub.setsockopt(zmq.SUBSCRIBE, topic)
        self._monitor = sub.get_monitor_socket(CONNECTED | DISCONNECTED | REFUSED)

    def descriptors(self) -> tuple[int, int]:
        """What to watch: whenever one is readable, look() and receive() until there is nothing."""
        return descriptor(self._sub), descriptor(self._monitor)

    def look(self, now_ns: int) -> bool:
        """Take note of what has happened to the connection, and begin a new one if there has long been none.

        Returns True when there is a new one after another: what was said between them is missed.
        """
        again = False
        for event, value in events_of(self._monitor):
            if event == CONNECTED:
                self.connected, self.last_error = True, ""
                self.connects += 1
                again = again or self.connects > 1
            elif event == DISCONNECTED and self.connected:
                self.connected, self.last_error = False, "connection lost"
                self.failures += 1
                self._renew_ns = now_ns + RENEW_NS
            elif event == REFUSED and not self.connected:
                self.failures += 1
                self.last_error = self.last_error or f"can't connect: {os.strerror(value or errno.ECONNREFUSED)}"
        if not self.connected and now_ns >= self._renew_ns:
            if self._renew_ns:
                with suppress(zmq.ZMQError):  # libzmq may have ended it
                    self._sub.disconnect(self._endpoint)
                if self._is_name and not self.connects:  # libzmq looks for addresses of one family only
                    self._ipv6 = not self._ipv6
                    self._sub.setsockopt(zmq.IPV6, int(self._ipv6))
            self._sub.connect(self._endpoint)
            self._renew_ns = now_ns + RENEW_NS
        return again

    def deadline(self) -> int | None:
        """When look() has something to do even if nothing is readable."""
        return None if self.connected else self._renew_ns

    def receive(self) -> Frames | None:
        """The next message, its three frames, uncopied; one with more or fewer is `[]`; None: there is none."""
        frames: Frames = []
        try:
            frame = self._sub.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        frames.append(frame)
        count = 1
        while frame.more:  # the rest of a message is there as soon as its beginning is
            frame = self._sub.recv(zmq.NOBLOCK, copy=False)
            count += 1
            if count <= FRAMES:
                frames.append(frame)
        return frames if count == FRAMES else []

    def subscribe(self, topic: bytes, *, wanted: bool) -> None:
        """Begin or end to be sent a topic. This may swallow what a descriptor would tell: receive() next."""
        self._sub.setsockopt(zmq.SUBSCRIBE if wanted else zmq.UNSUBSCRIBE, topic)

    def close(self) -> None:
        """Leave the publisher."""
        close(self._sub, self._monitor)


def publisher(context: Context, listener: socket.socket) -> tuple[Socket, Socket]:
    """A socket that publishes to whoever connects to `listener`, which it takes over, and the one that tells of them.

    It hears what is subscribed to (XPUB), and is a PUB socket to everybody else. Messages over the high-water mark of a
    slow subscriber are dropped for that one, as Core does.
    """
    host, port = listener.getsockname()[:2]
    pub = context.socket(zmq.XPUB)
    pub.setsockopt(zmq.LINGER, 0)
    pub.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    pub.setsockopt(zmq.MAXMSGSIZE, MAX_SUBSCRIPTION)
    pub.setsockopt(zmq.TCP_KEEPALIVE, 1)
    pub.setsockopt(zmq.IPV6, int(":" in host))
    listener.setblocking(False)
    pub.setsockopt(zmq.USE_FD, listener.detach())
    events = pub.get_monitor_socket(ACCEPTED | DISCONNECTED)
    pub.bind(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
    return pub, events


def descriptor(one: Socket) -> int:
    """The socket's descriptor, for epoll: readable means that it must be looked at."""
    return int(one.getsockopt(zmq.FD))


def subscriptions(pub: Socket) -> tuple[list[tuple[bool, bytes]], bool]:
    """What a subscriber wants by now, or nobody any longer: (True or False, prefix of topics) each, a few at a time;
    and whether there may be more.
    """
    found: list[tuple[bool, bytes]] = []
    for _ in range(MAX_EVENTS):
        try:
            said = pub.recv(zmq.NOBLOCK)
        except zmq.Again:
            return found, False
        if said[:1] in (b"\x00", b"\x01"):  # anything else is a message to us, which we have no use for
            found.append((said[:1] == b"\x01", said[1:]))
    return found, True


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def events_of(monitor: Socket) -> list[tuple[int, int]]:
    """What has happened to a socket's connections: libzmq's event and its value, a few at a time."""
    found: list[tuple[int, int]] = []
    while len(found) < MAX_EVENTS:
        try:
            message = recv_monitor_message(monitor, zmq.NOBLOCK)
        except zmq.Again:
            break
        found.append((int(message["event"]), int(message["value"])))
    return found


def close(one: Socket, monitor: Socket) -> None:
    """Close a socket and what tells of it, dropping what waits."""
    one.disable_monitor()
    monitor.close(0)
    one.close(0)
