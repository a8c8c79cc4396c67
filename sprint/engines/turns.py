"""One turn of the relay, the same under every loop: hear, prove, publish; and then all that can wait.

The loop (asyncio's in the standard engine, a spinning or blocking one in the memory-optimised) calls hear() for a
source that has something to say, on_timer() when deadline() has come, and settle() after either.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sprint.errors import HostError
from sprint.events import BlockRebuilt, HeaderRun, MessagesMissed, PeerGone, PeerReady
from sprint.record import decode
from sprint.tiers import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sprint.broadcaster import Broadcaster
    from sprint.events import Block
    from sprint.header_file import HeaderFile
    from sprint.ledger import Ledger
    from sprint.record import Record
    from sprint.relay import Relay
    from sprint.ring import Ring
    from sprint.sources import Heard, Source

SAVE_RETRY_NS = 5 * NS_PER_S
HOUSEKEEPING_NS = 1 * NS_PER_S


class Turns:
    """The relay and everything that hangs on it, but no loop."""

    def __init__(
        self,
        *,
        relay: Relay,
        broadcaster: Broadcaster,
        ring: Ring,
        ledger: Ledger,
        header_file: HeaderFile,
        sources: Sequence[Source],
        log: Any,
        on_relayed: Callable[[Record], None] | None = None,
    ) -> None:
        """`on_relayed` is told of each record once its deliveries are done."""
        self.sources = tuple(sources)
        self._relay = relay
        self._broadcaster = broadcaster
        self._ring = ring
        self._ledger = ledger
        self._header_file = header_file
        self._log = log
        self._on_relayed = on_relayed
        self._unsaved = bytearray()
        self._save_after_ns = 0
        self._housekeeping_ns = 0
        self._published: list[tuple[Block, int]] = []

    def hear(self, source: Source, now_ns: int) -> bool:
        """Take what a source has to say, and publish what is proven by it; False: it had nothing."""
        heard = source.poll(now_ns)
        if not heard:
            return False
        first = self.sources[0]
        if source is not first:
            # It is asked before the others, and yet this process may have been kept from running just in between: what
            # it has by now came in earlier, and the first that the relay is told of a block counts as first.
            heard = [*first.poll(now_ns), *heard]
        for one in heard:
            blocks = self._offer(one, now_ns)
            if blocks:
                self.publish(blocks)
        return True

    def on_timer(self, now_ns: int) -> None:
        """Whatever the relay has to do by the clock."""
        blocks = self._relay.on_timer(now_ns, time.time_ns())
        if blocks:
            self.publish(blocks)

    def publish(self, blocks: Sequence[Block]) -> None:
        """Each record goes out before the next is written: nobody waits for what comes after."""
        for block in blocks:
            sequence = self._broadcaster.write(block)
            self._broadcaster.wake()
            self._published.append((block, sequence))

    def settle(self, now_ns: int) -> None:
        """What can wait until the deliveries are done: questions, books, the header file, the log."""
        relay, ledger = self._relay, self._ledger
        was_caught_up = ledger.caught_up
        for want in relay.take_wants():
            for source in self.sources:
                source.want(want, now_ns)
        published, self._published = self._published, []
        for block, sequence in published:
            record = self._ring.copy(sequence)
            published_ns = int.from_bytes(record[184:192], "little") if record is not None else block.seen_ns
            ledger.published(block, sequence, record, published_ns)
            if self._on_relayed is not None and record is not None:
                self._on_relayed(decode(record))
        journal = relay.take_journal()
        if journal:
            ledger.decided(journal)
        # The file before the status: whoever resumes from both must not miss a header that was settled long ago.
        self._unsaved += relay.take_headers()
        if self._unsaved:
            self._save(now_ns)
        ledger.state_of(relay, now_ns)
        if relay.caught_up and not was_caught_up:
            self._log.info("Header chain caught up", height=relay.chain.tip_height)
        if now_ns >= self._housekeeping_ns:
            self._housekeeping_ns = now_ns + HOUSEKEEPING_NS
            for source in self.sources:
                source.account()

    def deadline(self) -> int:
        """When to come back even if no source says anything, CLOCK_MONOTONIC ns; within a second of the last time."""
        times = [self._relay.deadline(), *(source.deadline() for source in self.sources)]
        return min([self._housekeeping_ns, *(time_ns for time_ns in times if time_ns is not None)])

    def close(self, *, save: bool = True) -> None:
        """End the sources, and save what isn't."""
        for source in self.sources:
            source.close()
        if save:
            self._unsaved += self._relay.take_headers()
            self._save(time.monotonic_ns(), last_try=True)
        self._header_file.close()

    def _offer(self, heard: Heard, now_ns: int) -> Sequence[Block]:
        if isinstance(heard, HeaderRun):
            return self._relay.offer_run(heard, now_ns, time.time_ns())
        if isinstance(heard, PeerReady):
            self._relay.peer_ready(heard, now_ns)
            self._housekeeping_ns = 0  # the upstreams' accounts tell of it at once
            self._log.info("Upstream connected", peer=heard.peer, height=heard.height)
            return ()
        if isinstance(heard, PeerGone):
            self._relay.peer_gone(heard, now_ns)
            self._housekeeping_ns = 0
            self._log.warning("Upstream lost", peer=heard.peer)
            return ()
        if isinstance(heard, BlockRebuilt):
            return self._relay.rebuilt(heard, time.time_ns())
        if isinstance(heard, MessagesMissed):
            self._relay.missed(heard, now_ns)
            return ()
        return self._relay.offer(heard, now_ns, time.time_ns())

    def _save(self, now_ns: int, *, last_try: bool = False) -> None:
        """Append new headers to the file; a full disk delays that, and nothing else."""
        if not self._unsaved or (now_ns < self._save_after_ns and not last_try):
            return
        try:
            self._header_file.append(bytes(self._unsaved))
            self._unsaved.clear()
        except HostError as error:
            self._save_after_ns = now_ns + SAVE_RETRY_NS
            self._log.error("Headers not saved", error=str(error), waiting=len(self._unsaved) // 80)
