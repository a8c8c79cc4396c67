"""Delivery zmq: publishes as Bitcoin Core does, so that a program that reads Core's ZMQ reads ours unchanged.

Topics are Core's: `hashblock` and `rawblock` for each new tip, `sequence` with C and D for each block that the tip took
or left, and what only a node can tell, `hashtx`, `rawtx` and the mempool's part of `sequence`, passed through from the
operator's. `sprint` is a topic of our own: every record of the ring. Order is Core's: D from the old tip down, C up to
the new one, then hashblock, then rawblock, as soon as the whole block is at hand; one that can't be had within half a
minute leaves a gap in its counter, which is how a subscriber learns of any loss.

Nobody waits for a subscriber: libzmq queues 1,000 messages for each, as Core's does, and drops more. Knows neither
relay nor engine. Not thread-safe: start(), publish() and close() belong on the loop's thread, in one process.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final

import zmq

from sprint import zmq_sockets
from sprint.binding import listening
from sprint.deliveries.accounts import TierLedger
from sprint.deliveries.session import latency_origin_ns
from sprint.deliveries.zmq_guests import FLOOD_NS, Guests
from sprint.deliveries.zmq_tip import NodeTip
from sprint.deliveries.zmq_word import PATIENCE_NS, NodeWord
from sprint.events import Event, Lapped, Source, State
from sprint.histograms import Histogram
from sprint.record import decode
from sprint.ring import RingReader
from sprint.tiers import NS_PER_S, PROFILES, Tier
from sprint.zmq_wire import (
    CONNECTED,
    DISCONNECTED,
    HASHBLOCK,
    PASSED_THROUGH,
    RAWBLOCK,
    SEQUENCE,
    SPRINT,
    TopicCounters,
    hash_body,
    is_sound,
    sequence_body,
    wanted_topics,
)

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable, Sequence

    from sprint.addresses import Address
    from sprint.blocks import BlockStore
    from sprint.deliveries.zmq_tip import TipChange
    from sprint.record import Record
    from sprint.ring import Ring
    from sprint.status import Delivery

RAWBLOCK_WAIT_NS: Final = 30 * NS_PER_S
MAX_AWAITED: Final = 64
"""rawblocks that wait for their block."""
REPEAT_S: Final = 1.0
"""A successor says the tip once more after this, when subscribers have come back (libzmq tries every 100 ms)."""
BACKLOG: Final = 128
MAX_SUBSCRIBERS: Final = 1_000
"""Connections at a time: a hundred times what a Core publisher serves, and few enough that strangers can't take all
descriptors of the process."""
TOPICS: Final = (HASHBLOCK, RAWBLOCK, *PASSED_THROUGH, SPRINT)


class ZmqDelivery:
    """Publishes one ring."""

    def __init__(
        self,
        ring: Ring,
        accounts: Delivery,
        *,
        proof: Event,
        tier: Tier,
        store: BlockStore,
        write_deadline_ns: int | None = None,
        max_subscribers: int = MAX_SUBSCRIBERS,
        on_wanted: Callable[[set[bytes]], None] = lambda _topics: None,
        node_is_heard: Callable[[], bool] = lambda: False,
        is_hopeless: Callable[[bytes], bool] = lambda _block_hash: False,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`proof` is the event upon which a block may be the tip: VALIDATED, or PROVEN. `store` is looked into for
        rawblock, and `is_hopeless` tells of one that nobody tries to get any longer. `on_wanted` is told which of
        PASSED_THROUGH somebody has subscribed to, whenever that changes. `node_is_heard`: the operator's node can say
        by node_has() that it has connected a block; a VALIDATED that isn't its own waits for that.
        """
        profile = PROFILES[tier]
        deadline_ns = profile.write_deadline_ns if write_deadline_ns is None else write_deadline_ns
        self._reader = RingReader(ring, ring.oldest)
        self._accounts = accounts
        self._proof = proof
        self._ledger = TierLedger(accounts.tiers[tier], profile, deadline_ns)
        self._processing = Histogram(accounts.processing)
        self._store = store
        self._on_wanted = on_wanted
        self._node_is_heard = node_is_heard
        self._is_hopeless = is_hopeless
        self._clock = clock
        self._counters = TopicCounters()
        self._tip = NodeTip()
        self._word = NodeWord(self._tip)
        self._awaited: deque[tuple[bytes, int]] = deque()
        self._prefixes: set[bytes] = set()
        self._max_subscribers = max_subscribers
        self._guests = Guests(0, max_subscribers)
        self._watch: asyncio.TimerHandle | None = None
        self._look_due = False
        self._context: zmq_sockets.Context | None = None
        self._pub: zmq_sockets.Socket
        self._monitor: zmq_sockets.Socket
        self._loop: asyncio.AbstractEventLoop

    @property
    def tip(self) -> bytes | None:
        """The block of the last hashblock, wire order; None: there was none yet."""
        return self._tip.hash

    @staticmethod
    def listen(bind: Address) -> socket.socket:
        """A listening socket for start(). Raises HostError, naming ZMQ_BIND and the reason, when there can't be one."""
        return listening("ZMQ_BIND", bind, BACKLOG)

    def start(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        """Publish to whoever connects to `listener`, of which a duplicate is taken: the original stays open.

        What the ring holds already was published by a predecessor, or was nobody's news; only the tip is said again.
        """
        self._loop = loop
        self._guests = Guests(listener.getsockname()[1], self._max_subscribers)
        self._context = zmq_sockets.new_context()
        self._pub, self._monitor = zmq_sockets.publisher(self._context, listener.dup())
        while (item := self._reader.read()) is not None:
            if not isinstance(item, Lapped):
                self._follow(decode(item), listening=False)
        self._ledger.accounts.subscribers = 0
        for one in (self._pub, self._monitor):
            loop.add_reader(zmq_sockets.descriptor(one), self._look)
        if self._tip.hash is not None:
            loop.call_later(REPEAT_S, self._repeat_tip)
        loop.call_soon(self._look)
        self._watch_guests()

    def close(self) -> None:
        """Stop publishing; what libzmq has not sent yet is dropped."""
        if self._context is None:
            return
        if self._watch is not None:
            self._watch.cancel()
        for one in (self._pub, self._monitor):
            self._loop.remove_reader(zmq_sockets.descriptor(one))
        zmq_sockets.close(self._pub, self._monitor)
        self._context.term()
        self._context = None

    def publish(self) -> None:
        """The ring has grown: publish what is new."""
        if self._context is None:
            return
        began_ns = self._clock()
        while (item := self._reader.read()) is not None:
            if isinstance(item, Lapped):
                self._counters.leave_out(SPRINT, item.lost)
                continue
            started_ns = self._clock()
            self._tell(self._follow(decode(item), listening=self._node_is_heard()))
            self._send(SPRINT, item)
            if self._guests:
                self._ledger.delivered(started_ns, self._clock(), latency_origin_ns(item))
        self._processing.record(self._clock() - began_ns)

    def block_arrived(self) -> None:
        """The store has one block more: the rawblocks that waited for it go out, in the order of their hashblocks."""
        if self._context is None:
            return
        now_ns = self._clock()
        while self._awaited:
            block_hash, due_ns = self._awaited[0]
            block = self._store.get(block_hash)
            if block is not None:
                self._send(RAWBLOCK, block.payload)
            elif now_ns >= due_ns or len(self._awaited) > MAX_AWAITED or self._is_hopeless(block_hash):
                self._counters.leave_out(RAWBLOCK, 1)
            else:
                return
            self._awaited.popleft()

    def pass_through(self, topic: bytes, body: bytes, lost: int = 0) -> None:
        """Publish what the operator's node has said; anything that isn't as Core's, and a block's sequence, isn't.

        `lost` messages of that topic did not come to us, and are left out of our numbers, too.
        """
        if self._context is None:
            return
        if lost:
            self._counters.leave_out(topic, lost)
        if is_sound(topic, body):
            self._send(topic, body)

    def node_has(self, block_hash: bytes) -> None:
        """The operator's node has connected a block: by its own word."""
        if self._context is not None and self._proof is Event.VALIDATED:
            self._tell(self._advance(self._word.named(block_hash)))

    def node_is_unheard(self) -> None:
        """Nobody can tell any longer what the operator's node has connected: others' word has to do."""
        if self._context is not None:
            self._tell(self._advance(self._word.unheard()))

    def _on_patience(self) -> None:
        if self._context is not None:
            self._tell(self._advance(self._word.overdue(self._clock())))

    def _follow(self, record: Record, *, listening: bool) -> list[TipChange]:
        best = bool(record.state & State.BEST)
        self._tip.learn(record.hash, record.header, record.height, best=best)
        if self._proof is not Event.VALIDATED:
            return self._advance([record.hash]) if record.event is self._proof else []
        if record.event is not Event.VALIDATED:
            return self._advance(self._word.learnt(record.hash))
        # A block of which a publisher was the first to tell has its word; one found in a catch-up may have had it
        # before we were there to hear it.
        waits = listening and record.source is not Source.ZMQ and not record.state & State.CATCHUP
        blocks = self._word.validated(record.hash, self._clock(), listening=waits)
        if not blocks:
            self._loop.call_later(PATIENCE_NS / NS_PER_S + 0.01, self._on_patience)
        return self._advance(blocks)

    def _advance(self, blocks: Sequence[bytes]) -> list[TipChange]:
        return [change for one in blocks if (change := self._tip.advance(one)) is not None]

    def _tell(self, changes: Sequence[TipChange]) -> None:
        for change in changes:
            for block_hash in change.disconnected:
                self._send(SEQUENCE, sequence_body(block_hash, DISCONNECTED))
            for block_hash in change.connected:
                self._send(SEQUENCE, sequence_body(block_hash, CONNECTED))
            self._tell_tip(change.connected[-1])

    def _tell_tip(self, tip: bytes) -> None:
        self._send(HASHBLOCK, hash_body(tip))
        self._awaited.append((tip, self._clock() + RAWBLOCK_WAIT_NS))
        self.block_arrived()
        if self._awaited:
            self._loop.call_later(RAWBLOCK_WAIT_NS / NS_PER_S + 0.01, self.block_arrived)

    def _repeat_tip(self) -> None:
        if self._context is not None and self._tip.hash is not None:
            self._tell_tip(self._tip.hash)

    def _send(self, topic: bytes, body: bytes) -> None:
        """One message; libzmq drops it for whoever is over the high-water mark, and takes it from us in any case."""
        self._pub.send_multipart([topic, body, self._counters.take(topic)], zmq.NOBLOCK)
        self._look_soon()  # a send may have swallowed what the descriptors would tell
        self._accounts.bytes_sent += (len(topic) + len(body) + 4) * len(self._guests)

    def _watch_guests(self) -> None:
        if self._context is not None:
            self._accounts.refused += self._guests.end_floods(self._clock())
            self._watch = self._loop.call_later(FLOOD_NS / NS_PER_S, self._watch_guests)

    def _look_soon(self) -> None:
        if not self._look_due:
            self._look_due = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        """What libzmq tells of subscribers: who comes and goes, and what is subscribed to."""
        self._look_due = False
        if self._context is None:
            return
        events = zmq_sockets.events_of(self._monitor)
        for event, descriptor in events:
            if event == zmq_sockets.ACCEPTED:
                self._accounts.accepted += 1
                self._accounts.refused += not self._guests.came(descriptor, self._clock())
            elif self._guests.went(descriptor):
                self._accounts.disconnected += 1
        self._ledger.accounts.subscribers = len(self._guests)
        before = wanted_topics(self._prefixes, PASSED_THROUGH)
        said, more = zmq_sockets.subscriptions(self._pub)
        for subscribes, prefix in said:
            if not wanted_topics([prefix], TOPICS):  # of nothing that we have: not worth remembering
                continue
            if subscribes:
                self._prefixes.add(prefix)
            else:
                self._prefixes.discard(prefix)
        after = wanted_topics(self._prefixes, PASSED_THROUGH)
        if after != before:
            self._on_wanted(after)
        if more or len(events) == zmq_sockets.MAX_EVENTS:  # of the rest no descriptor tells
            self._look_soon()
