"""What publishes by ZMQ, put together: the delivery, the blocks that it publishes, and where these come from.

In the memory-optimised engine it is a process of its own, which also fetches each proven block from the nodes, checks
it, and reports it to the relay. In the standard engine, whose one process must not stop for 4 MB, blocks come from
ZMQ_NODE alone, whose node has checked them.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from sprint.blocks import BlockStore, WholeBlock, checked
from sprint.deliveries.zmq import ZmqDelivery
from sprint.errors import RemoteProtocolError
from sprint.events import BlockRebuilt, Event, Lapped
from sprint.record import decode
from sprint.ring import RingReader
from sprint.sources.rebuild_fetch import BlockFetcher, FetchedBlock
from sprint.sources.zmq_intake import ZmqIntake
from sprint.status import PEERS
from sprint.tiers import NS_PER_S
from sprint.zmq_wire import RAWBLOCK

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable
    from concurrent.futures import Future

    from sprint.config import Config
    from sprint.ring import Ring
    from sprint.status import Delivery, StatusBlock

SWITCH_INTERVAL_S = 0.0005
"""Checking a large block takes a second thread tens of milliseconds: a hashblock waits for it no longer than this."""
MAX_UNCHECKED = 8
"""Blocks, of 4 MB at most, that wait for the check; of one hash there may be several, for only the check tells which
of them is the block."""
MAX_FORGONE = 64


class ZmqDesk:
    """The delivery zmq and its surroundings, on one asyncio loop."""

    def __init__(
        self,
        config: Config,
        ring: Ring,
        status: StatusBlock,
        accounts: Delivery,
        log: Any,
        *,
        report: Callable[[BlockRebuilt], None] | None = None,
    ) -> None:
        """With `report` blocks are fetched and checked, and it is told of each; nothing opens a socket before
        start()."""
        self._config = config
        self._status = status
        self._log = log
        self._report = report
        self._store = BlockStore()
        self._delivery = ZmqDelivery(
            ring,
            accounts,
            proof=Event.VALIDATED if config.zmq_proof == "node" else Event.PROVEN,
            tier=config.tier,
            store=self._store,
            write_deadline_ns=config.write_deadline_ns,
            on_wanted=self._on_wanted,
            node_is_heard=lambda: self._intake is not None and self._intake.connected,
            is_hopeless=lambda block_hash: block_hash in self._forgone,
        )
        self._reader = RingReader(ring)
        self._fetcher: BlockFetcher | None = None
        self._intake: ZmqIntake | None = None
        self._checker: ThreadPoolExecutor | None = None
        self._unchecked: dict[bytes, list[FetchedBlock]] = {}
        """By hash, the one that is being checked first."""
        self._forgone: deque[bytes] = deque(maxlen=MAX_FORGONE)
        """Blocks that are not fetched, for there were newer ones."""
        self._timer: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop
        self._closed = False

    def start(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        """Publish to whoever connects to `listener`, which stays the caller's."""
        self._loop = loop
        if self._config.zmq_nodes:
            self._intake = ZmqIntake(self._config.zmq_nodes)
            loop.add_reader(self._intake.fileno(), self._take_in)
            loop.call_soon(self._take_in)
        if self._report is not None:
            sys.setswitchinterval(SWITCH_INTERVAL_S)
            self._checker = ThreadPoolExecutor(1, "check")
            self._fetcher = BlockFetcher(self._config.upstreams, self._config.network)
            loop.add_reader(self._fetcher.fileno(), self._fetch)
            loop.call_soon(self._fetch)
        self._delivery.start(loop, listener)
        if self._fetcher is not None and self._delivery.tip is not None:  # the one before us had it, if anybody
            self._fetcher.want(self._delivery.tip, self._announcer_of(self._delivery.tip))

    def publish(self) -> None:
        """The ring has grown: publish what is new, and fetch its blocks."""
        self._delivery.publish()
        while (item := self._reader.read()) is not None:
            if isinstance(item, Lapped):
                continue
            record = decode(item)
            if record.event is not Event.PROVEN:
                continue
            if record.hash in self._store:  # the operator's node was quicker than its header
                self._rebuilt(record.hash)
            elif self._fetcher is not None:
                forgone = self._fetcher.want(record.hash, self._announcer_of(record.hash))
                if forgone is not None:
                    self._forgone.append(forgone)
                    self._delivery.block_arrived()
        self._fetch()

    def close(self) -> None:
        """End everything."""
        self._closed = True
        for timer in (self._timer, self._retry):
            if timer is not None:
                timer.cancel()
        for one in (self._intake, self._fetcher):
            if one is not None:
                self._loop.remove_reader(one.fileno())
                one.close()
        self._delivery.close()
        if self._checker is not None:
            self._checker.shutdown(wait=True, cancel_futures=True)

    # Blocks.

    def _fetch(self) -> None:
        fetcher = self._fetcher
        if fetcher is None or self._closed:
            return
        for block in fetcher.poll():
            self._check(block)
        if self._timer is not None:
            self._timer.cancel()
        due_ns = fetcher.deadline()
        if due_ns is not None:
            wait_s = max(0, due_ns - time.monotonic_ns()) / NS_PER_S
            self._timer = self._loop.call_later(wait_s, self._fetch)

    def _check(self, block: FetchedBlock) -> None:
        """Have a block checked in the other thread, once it is its turn."""
        if self._checker is None or block.hash in self._store:
            return
        versions = self._unchecked.get(block.hash, [])
        if sum(map(len, self._unchecked.values())) >= MAX_UNCHECKED:  # it is asked for again
            return
        if any(one.peer == block.peer for one in versions):
            return
        self._unchecked[block.hash] = [*versions, block]
        if not versions:
            self._submit(block)

    def _submit(self, block: FetchedBlock) -> None:
        assert self._checker is not None
        future = self._checker.submit(checked, block.hash, block.payload)
        future.add_done_callback(lambda done: self._loop.call_soon_threadsafe(self._on_checked, block, done))

    def _on_checked(self, block: FetchedBlock, done: Future[int]) -> None:
        if self._closed or done.cancelled():
            return
        others = self._unchecked.pop(block.hash)[1:]
        error = done.exception()
        if error is None:
            self._keep(block.hash, WholeBlock(block.payload, done.result()))
            self._rebuilt(block.hash)
            return
        if not isinstance(error, RemoteProtocolError):
            raise error
        self._log.warning("Block refused", peer=block.peer, reason=str(error))
        if others:  # one of these may be the block
            self._unchecked[block.hash] = others
            self._submit(others[0])
        if self._fetcher is not None:
            self._fetcher.requests.failed(block.hash, block.peer)
            self._fetch()

    def _keep(self, block_hash: bytes, block: WholeBlock) -> None:
        self._store.add(block_hash, block)
        self._delivery.block_arrived()

    def _rebuilt(self, block_hash: bytes) -> None:
        """Tell the relay of a block that is in the store; one that isn't proven yet is told of again when it is."""
        block = self._store.get(block_hash)
        if self._report is not None and self._fetcher is not None and block is not None:
            self._fetcher.requests.settle(block_hash)
            self._report(BlockRebuilt(block_hash, block.transactions, len(block.payload)))

    def _announcer_of(self, block_hash: bytes) -> str:
        """The first peer that the books name for a block; they are written after the deliveries were woken."""
        for row in self._status.blocks(4):
            if bytes(row.record[64:96]) == block_hash:
                marks = row.marks[: min(row.sightings, len(row.marks))]
                peers = [self._status.layout.peers[mark.peer] for mark in marks if mark.peer < PEERS]
                return next((bytes(peer.name).decode(errors="replace") for peer in peers), "")
        return ""

    # What the operator's node publishes.

    def _on_wanted(self, topics: set[bytes]) -> None:
        if self._intake is not None:
            self._intake.want(topics)
            self._loop.call_soon(self._take_in)

    def _take_in(self) -> None:
        intake = self._intake
        if intake is None or self._closed:
            return
        heard, more = intake.poll()
        for said in heard:
            if not said.block_hash:
                self._delivery.pass_through(said.topic, said.body, said.lost)
                continue
            self._delivery.node_has(said.block_hash)
            if said.topic != RAWBLOCK:
                continue
            if self._report is None:
                self._keep(said.block_hash, WholeBlock(said.body, 0))
            else:
                self._check(FetchedBlock(said.node, said.block_hash, said.body))
        if not intake.connected:
            self._delivery.node_is_unheard()
        if more:
            self._loop.call_soon(self._take_in)
        elif (due_ns := intake.deadline()) is not None:
            if self._retry is not None:
                self._retry.cancel()
            self._retry = self._loop.call_later(max(0, due_ns - time.monotonic_ns()) / NS_PER_S, self._take_in)
