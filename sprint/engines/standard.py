"""StandardSprint: one process, one asyncio loop, the ring in private memory.

Each source hangs on the loop by its descriptor and its deadline. A turn takes what the source heard, publishes what the
relay proves, at once, and only when the last delivery is done does the rest: questions to peers, the header file, the
books, the log. An exception in a turn ends run(): asyncio would log it and go on, with a relay that may be deaf.
"""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING, Any

from sprint.durations import format_duration
from sprint.errors import HostError
from sprint.events import Block, Event, HeaderRun, PeerGone, PeerReady, State
from sprint.tiers import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sprint.broadcaster import Broadcaster
    from sprint.header_file import HeaderFile
    from sprint.ledger import Ledger
    from sprint.relay import Relay
    from sprint.ring import Ring
    from sprint.sources import Heard, Source

HOUSEKEEPING_S = 1.0
SAVE_RETRY_NS = 5 * NS_PER_S


class StandardSprint:
    """Drives sources, relay and deliveries on one event loop."""

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
        relay_label: str,
    ) -> None:
        """`relay_label` opens the log line of each relay: `Turbo relay successful`."""
        self._relay = relay
        self._broadcaster = broadcaster
        self._ring = ring
        self._ledger = ledger
        self._header_file = header_file
        self._sources = tuple(sources)
        self._log = log
        self._relay_label = relay_label
        self._unsaved = bytearray()
        self._save_after_ns = 0
        self._published: list[tuple[Block, int]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._stop = asyncio.Event()
        self._error: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, on_started: Callable[[], None] | None = None) -> None:
        """Run until stop(), SIGINT or SIGTERM. Raises whatever went wrong in a turn: nothing was meant to."""
        loop = self._loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
        for source in self._sources:
            loop.add_reader(source.fileno(), self._turn, source)
        try:
            self._turn(None)
            housekeeping = loop.create_task(self._keep_house())
            if on_started is not None:
                on_started()
            await self._stop.wait()
            housekeeping.cancel()
            if self._error is not None:
                raise self._error
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for source in self._sources:
                loop.remove_reader(source.fileno())
                source.close()
            self._unsaved += self._relay.take_headers()
            self._save(time.monotonic_ns(), last_try=True)
            self._header_file.close()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """End run() in good order."""
        self._stop.set()

    def _turn(self, source: Source | None) -> None:
        """One source has something to say (None: look at all of them)."""
        if self._stop.is_set():
            return
        try:
            self._take_turn(source)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """End run() with that error."""
        self._error = self._error or error
        self._stop.set()

    def _take_turn(self, source: Source | None) -> None:
        now_ns = time.monotonic_ns()
        for one in self._sources if source is None else (source,):
            for heard in one.poll(now_ns):
                blocks = self._offer(heard, now_ns)
                if blocks:
                    self._publish(blocks)
        blocks = self._relay.on_timer(now_ns, time.time_ns()) if source is None else ()
        if blocks:
            self._publish(blocks)
        self._after(now_ns)

    def _offer(self, heard: Heard, now_ns: int) -> Sequence[Block]:
        if isinstance(heard, HeaderRun):
            return self._relay.offer_run(heard, now_ns, time.time_ns())
        if isinstance(heard, PeerReady):
            self._relay.peer_ready(heard, now_ns)
            self._log.info("Upstream connected", peer=heard.peer, height=heard.height)
            return ()
        if isinstance(heard, PeerGone):
            self._relay.peer_gone(heard, now_ns)
            self._log.warning("Upstream lost", peer=heard.peer)
            return ()
        return self._relay.offer(heard, now_ns, time.time_ns())

    def _publish(self, blocks: Sequence[Block]) -> None:
        """Each record goes out before the next is written: nobody waits for what comes after."""
        for block in blocks:
            sequence = self._broadcaster.write(block)
            self._broadcaster.wake()
            self._published.append((block, sequence))

    def _after(self, now_ns: int) -> None:
        """What can wait until the deliveries are done."""
        was_caught_up = self._ledger.caught_up
        relay = self._relay
        for want in relay.take_wants():
            for source in self._sources:
                source.want(want, now_ns)
        published, self._published = self._published, []
        for block, sequence in published:
            self._book(block, sequence)
        journal = relay.take_journal()
        if journal:
            self._ledger.decided(journal)
        self._ledger.state_of(relay, now_ns)
        if relay.caught_up and not was_caught_up:
            self._log.info("Header chain caught up", height=relay.chain.tip_height)
        self._unsaved += relay.take_headers()
        if self._unsaved:
            self._save(now_ns)
        self._schedule()

    def _book(self, block: Block, sequence: int) -> None:
        record = self._ring.copy(sequence)
        published_ns = int.from_bytes(record[184:192], "little") if record is not None else block.seen_ns
        self._ledger.published(block, sequence, record, published_ns)
        name, block_hash = block.event.name, block.hash[::-1].hex()
        if block.event is Event.PROVEN and not block.state & State.CATCHUP:
            elapsed = format_duration((time.monotonic_ns() - block.seen_ns) // 1000 * 1000)
            self._log.info(self._relay_label, elapsed=elapsed, blockHash=block_hash, height=block.height)
        else:
            self._log.info(f"Block {name.lower()}", blockHash=block_hash, height=block.height)

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

    def _schedule(self) -> None:
        """Wake up for whichever comes first of the sources' and the relay's deadlines."""
        assert self._loop is not None
        times = [source.deadline() for source in self._sources]
        times.append(self._relay.deadline())
        due_ns = min((time_ns for time_ns in times if time_ns is not None), default=None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due_ns is not None:
            wait_s = max(0, due_ns - time.monotonic_ns()) / NS_PER_S
            self._timer = self._loop.call_later(wait_s, self._turn, None)

    async def _keep_house(self) -> None:
        """Once a second: prove that the loop turns, and bring the upstreams' accounts up to date."""
        while True:
            try:
                self._ledger.state_of(self._relay, time.monotonic_ns())
                for source in self._sources:
                    source.account()
            except Exception as error:
                self._fail(error)
                return
            await asyncio.sleep(HOUSEKEEPING_S)
