"""The TCP stream: every record to every subscriber, the highest tier first, each within its write deadline.

publish() sends straight from the loop's thread: one frame made once a record and format, one send() a subscriber, no
task and no queue between. Whoever is not caught up (replaying, or with a socket that refused bytes) is served from the
ring by its own cursor, in slices between which the loop looks for new blocks. Bounds: a session is a cursor and one
begun frame; the kernel holds at most SEND_BUFFER (doubled by it) for each; all else is per delivery, not per session.

Not thread-safe: start(), publish() and close() belong on the loop's thread.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Final

from sprint.deliveries.accounts import TierLedger
from sprint.deliveries.catch_up import TOP_FIRST, CatchUp
from sprint.deliveries.deadlines import Deadlines, Heartbeats
from sprint.deliveries.gate import admit
from sprint.deliveries.hearing import Hearing
from sprint.deliveries.hello import UDP_NOT_SERVED, Refusal, UdpOffer, welcome_line
from sprint.deliveries.reception import Reception, listen
from sprint.deliveries.rosters import Rosters
from sprint.deliveries.session import Feed, Written, latency_origin_ns
from sprint.deliveries.subscriber import Subscriber
from sprint.deliveries.udp_sessions import UdpSessions
from sprint.frames import Format, Heartbeat, heartbeat_frame, record_frame
from sprint.histograms import Histogram
from sprint.tiers import NS_PER_MS, NS_PER_S, PROFILES, Tier

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Mapping

    from sprint.deliveries.gate import Gate
    from sprint.deliveries.hello import Hello
    from sprint.deliveries.udp_sessions import UdpService
    from sprint.ring import Ring
    from sprint.seats import Seats
    from sprint.status import Delivery

SEND_BUFFER: Final = 32 * 1024
"""SO_SNDBUF of each connection: room for some fifty records, which is more than a day's blocks in an hour; and a bound
on what a subscriber that never reads costs the kernel."""
STALL_TIMEOUT_NS: Final = 300 * NS_PER_S
"""A session that has taken no byte for so long is closed."""
_USER_TIMEOUT_MARGIN_NS: Final = 30 * NS_PER_S
"""So much later the kernel gives up by TCP_USER_TIMEOUT, which also ends a host that vanished without a word; it counts
a closed receive window as well, and must not forestall our own stall timeout, which is the one that is counted."""
HELLO_TIMEOUT_NS: Final = 5 * NS_PER_S
_SLICE: Final = 16
"""Frames in one write to a subscriber that is catching up."""
_BATCH: Final = 16
"""Records sent in one go when several wait: all of them to one tier before the next tier's turn."""


class StreamDelivery:
    """Serves one ring to TCP subscribers."""

    def __init__(
        self,
        ring: Ring,
        accounts: Delivery,
        *,
        network: str,
        gate: Gate,
        write_deadline_ns: Mapping[Tier, int],
        max_sessions: int,
        max_sessions_per_address: int | None = None,
        seats: Seats | None = None,
        udp: UdpService | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        hello_timeout_ns: int = HELLO_TIMEOUT_NS,
        stall_timeout_ns: int = STALL_TIMEOUT_NS,
        heartbeat_ns: int = NS_PER_S,
        send_buffer: int = SEND_BUFFER,
    ) -> None:
        """`network` is the name told to subscribers; `gate` says who is served at which tier.

        `max_sessions` counts connections, those still to say hello included. `clock` is CLOCK_MONOTONIC in ns, the
        clock of the records' seen_ns. With `udp` the top tiers may have their records by UDP.
        """
        self.stalled_closed = 0
        """Sessions closed because they took no byte for the stall timeout."""
        self._ring = ring
        self._accounts = accounts
        self._network = network
        self._gate = gate
        self._ledgers = tuple(TierLedger(accounts.tiers[t], PROFILES[t], write_deadline_ns[t]) for t in Tier)
        self._max_sessions = max_sessions
        self._max_sessions_per_address = max_sessions_per_address
        self._seats = seats
        self._clock = clock
        self._hello_timeout_ns = hello_timeout_ns
        self._stall_timeout_ns = stall_timeout_ns
        self._heartbeat_ns = heartbeat_ns
        self._send_buffer = send_buffer
        self._feed = Feed(ring, clock)
        self._processing = Histogram(accounts.processing)
        self._rosters = Rosters()
        self._unsettled: list[tuple[TierLedger, list[int], list[int], int]] = []
        self._deadlines: Deadlines[Subscriber]
        self._heartbeats: Heartbeats[Subscriber]
        self._catching_up: CatchUp
        self._hearing: Hearing
        self._loop: asyncio.AbstractEventLoop
        self._reception: Reception | None = None
        self._udp_service = udp
        self._udp: UdpSessions | None = None

    @property
    def accept_pauses(self) -> int:
        """How often accepting rested because the process was out of file descriptors or memory."""
        return self._reception.accept_pauses if self._reception else 0

    @staticmethod
    def listen(
        host: str,
        port: int,
        *,
        reuse_port: bool = False,
        send_buffer: int = SEND_BUFFER,
        stall_timeout_ns: int = STALL_TIMEOUT_NS,
    ) -> socket.socket:
        """A listening socket for serve(); with `reuse_port` several may share the address, one a process.

        Raises HostError, naming address and reason, when it can't be bound.
        """
        user_timeout_ms = (stall_timeout_ns + _USER_TIMEOUT_MARGIN_NS) // NS_PER_MS
        return listen(host, port, send_buffer=send_buffer, user_timeout_ms=user_timeout_ms, reuse_port=reuse_port)

    def start(self, loop: asyncio.AbstractEventLoop, host: str, port: int) -> tuple[str, int]:
        """Listen and serve; returns the bound address. Raises HostError as listen() does."""
        listener = self.listen(host, port, send_buffer=self._send_buffer, stall_timeout_ns=self._stall_timeout_ns)
        return self.serve(loop, listener)

    def serve(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> tuple[str, int]:
        """Serve those who connect to `listener`, one of listen()'s; close() closes it. Returns its address."""
        self._loop = loop
        self._deadlines = Deadlines(loop, self._clock, self._deadline)
        self._heartbeats = Heartbeats(loop, self._clock, self._heartbeat_ns, self._turn_to_beat)
        self._catching_up = CatchUp(loop, self._clock, self._write)
        if self._udp_service is not None:
            self._udp = UdpSessions(loop, self._udp_service, self._rosters, self._catching_up)
        self._hearing = Hearing(
            loop, self._feed, self._catching_up, self._deadlines, self._udp, end=self._end, heartbeat=self._heartbeat
        )
        self._reception = Reception(
            loop,
            listener,
            self._accounts,
            self._admit,
            clock=self._clock,
            hello_timeout_ns=self._hello_timeout_ns,
            max_sessions=self._max_sessions,
            max_sessions_per_address=self._max_sessions_per_address,
            seats=self._seats,
        )
        bound = listener.getsockname()
        return str(bound[0]), int(bound[1])

    def close(self) -> None:
        """Stop listening and close every connection; whatever still waited is counted as dropped."""
        if self._reception is None:
            return
        for subscriber in [*self._rosters, *(self._udp or ())]:
            self._end(subscriber)
        if self._udp is not None:
            self._udp.close()
        self._reception.close()
        self._reception = None
        self._settle()
        self._deadlines.close()
        self._heartbeats.close()

    def publish(self) -> None:
        """The ring has grown: send what is new to everybody who is caught up, the highest tier first."""
        began = self._clock()
        feed = self._feed
        if self._unsettled:
            self._settle()  # publications follow each other without a turn of the loop between them
        while feed.sequence < (tail := self._ring.tail):
            first = feed.sequence + 1
            last = min(tail, feed.sequence + _BATCH)
            records = [record for n in range(first, last + 1) if (record := self._ring.copy(n)) is not None]
            if len(records) < last - first + 1:
                self._overtaken(began)
                break
            feed.publish(last, began)
            frames: list[list[bytes]] = [[record_frame(record, Format.BINARY), b""] for record in records]
            for tier in TOP_FIRST:
                if self._rosters.has(tier):
                    self._publish_to(tier, first, records, frames)
        if self._udp is not None:
            self._udp.published()
        if self._unsettled:
            self._loop.call_soon(self._settle)
        self._processing.record(self._clock() - began)

    def _settle(self) -> None:
        """Count what publish() sent: afterwards, so that neither a lower tier nor the relay waits for the books."""
        for ledger, times, failed, seen_ns in self._unsettled:
            ledger.sent(times, failed, seen_ns)
        self._unsettled.clear()
        self._accounts.bytes_sent = self._feed.bytes_sent

    def _publish_to(self, tier: Tier, first: int, records: list[bytes], frames: list[list[bytes]]) -> None:
        ledger = self._ledgers[tier]
        behind: list[Subscriber] = []
        for sequence, record, forms in zip(range(first, first + len(records)), records, frames, strict=True):
            behind = self._send_round(self._rosters.turn(tier), ledger, sequence, record, forms)
        worst = 0
        for subscriber in behind:
            worst = max(worst, subscriber.backlog)
            if subscriber.blocked:
                self._arm(subscriber)
        ledger.backlog(worst)

    def _send_round(
        self, subscribers: Iterable[Subscriber], ledger: TierLedger, sequence: int, record: bytes, forms: list[bytes]
    ) -> list[Subscriber]:
        """One record to all of one tier who are caught up, by one send() each; returns those who are not."""
        clock = self._clock
        seen_ns = latency_origin_ns(record)
        failed: list[int] = []
        behind: list[Subscriber] = []
        dead: list[Subscriber] = []
        times = [clock()]
        returned = times.append
        total = 0
        after = sequence + 1
        for subscriber in subscribers:
            if not subscriber.idle:
                behind.append(subscriber)
                continue
            frame = forms[subscriber.form]
            if not frame:
                forms[subscriber.form] = frame = record_frame(record, subscriber.form)
            try:
                sent = subscriber.sock.send(frame)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                dead.append(subscriber)
                sent = 0
            returned(clock())
            total += sent
            if sent == len(frame):
                subscriber.cursor = after
            else:
                failed.append(len(times) - 2)
                behind.append(subscriber)
                subscriber.interrupted(sequence, frame, sent, times[-2], seen_ns)
                self._refused(subscriber)
        for subscriber in dead:
            self._end(subscriber)
        self._feed.bytes_sent += total
        self._unsettled.append((ledger, times, failed, seen_ns))
        return [subscriber for subscriber in behind if not subscriber.closed]

    def _overtaken(self, now_ns: int) -> None:
        """The ring was overwritten before it was published: everybody catches up with what is left of it."""
        self._feed.publish(self._ring.tail, now_ns)
        for subscriber in self._rosters:
            subscriber.idle = False
            self._catching_up.add(subscriber)

    def _admit(self, sock: socket.socket, network: str, hello: Hello, extra: int) -> Refusal | None:
        ticket = admit(self._gate, hello.key, network, self._clock(), time.time_ns())
        if isinstance(ticket, Refusal):
            return ticket
        tier = ticket.tier
        ledger, feed = self._ledgers[tier], self._feed
        subscriber = Subscriber(feed, ledger, hello, sock, network, extra, ticket)
        offer = self._offer_udp(subscriber, hello)
        if isinstance(offer, Refusal):
            self._gate.leave(ticket)
            return offer
        ticket.end = lambda: self._end(subscriber)
        subscriber.write_line(
            welcome_line(
                tier,
                ledger.write_deadline_ns,
                oldest=min(self._ring.oldest, feed.sequence + 1),
                next_sequence=feed.sequence + 1,
                session=self._ring.session,
                network=self._network,
                form=hello.format,
                udp=offer,
            )
        )
        self._rosters.add(subscriber)
        self._accounts.accepted += 1
        self._heartbeats.add(subscriber)
        self._hearing.add(subscriber)
        self._catching_up.add(subscriber)
        return None

    def _offer_udp(self, subscriber: Subscriber, hello: Hello) -> UdpOffer | Refusal | None:
        if hello.udp is None:
            return None
        return Refusal(UDP_NOT_SERVED) if self._udp is None else self._udp.want(subscriber, hello.udp)

    def _end(self, subscriber: Subscriber) -> None:
        if subscriber.closed:
            return
        subscriber.closed = True
        subscriber.idle = False
        subscriber.abandon()
        if not subscriber.parked:
            self._rosters.remove(subscriber)
        if self._udp is not None:
            self._udp.end(subscriber)
        self._accounts.disconnected += 1
        self._loop.remove_reader(subscriber.sock)
        self._loop.remove_writer(subscriber.sock)
        subscriber.sock.close()
        self._gate.leave(subscriber.ticket)
        if self._reception is not None:
            self._reception.release(subscriber.network)

    def _write(self, subscriber: Subscriber) -> Written | None:
        """One slice for one subscriber; None when its socket turned out to be dead."""
        try:
            written = subscriber.write(_SLICE)
        except OSError:
            self._end(subscriber)
            return None
        if written is Written.REFUSED:
            self._refused(subscriber)
        elif written is Written.SOME:
            self._catching_up.add(subscriber)
        elif self._udp is not None:
            self._udp.caught_up(subscriber)
        return written

    def _refused(self, subscriber: Subscriber) -> None:
        if not subscriber.blocked:
            subscriber.blocked = True
            self._loop.add_writer(subscriber.sock, self._writable, subscriber)
        self._arm(subscriber)

    def _writable(self, subscriber: Subscriber) -> None:
        self._unblock(subscriber)
        self._catching_up.add(subscriber)

    def _unblock(self, subscriber: Subscriber) -> None:
        if subscriber.blocked:
            subscriber.blocked = False
            self._loop.remove_writer(subscriber.sock)

    def _arm(self, subscriber: Subscriber) -> None:
        due = subscriber.due_ns()
        if due:
            self._deadlines.set(subscriber, due)

    def _deadline(self, subscriber: Subscriber, now_ns: int) -> None:
        if subscriber.half_closed and subscriber.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._end(subscriber)
            return
        if not subscriber.blocked:
            return
        if 0 < subscriber.due_ns() <= now_ns:
            # Only a socket that is unwritable now loses anything, so ask it.
            written = self._write(subscriber)
            if written is Written.REFUSED:
                subscriber.expire(now_ns)
            elif written is not None:
                self._unblock(subscriber)
                if written is Written.SOME:
                    self._catching_up.add(subscriber)
                return
        if not subscriber.closed:
            self._arm(subscriber)

    def _heartbeat(self, subscriber: Subscriber) -> None:
        newest = self._feed.sequence if subscriber.parked else subscriber.cursor - 1
        beat = Heartbeat(self._ring.session, newest, time.time_ns())
        try:
            written = subscriber.beat(heartbeat_frame(beat, subscriber.form))
        except OSError:
            self._end(subscriber)
            return
        if written is Written.REFUSED:
            self._refused(subscriber)
        else:
            self._accounts.heartbeats += 1
            self._accounts.bytes_sent = self._feed.bytes_sent

    def _turn_to_beat(self, subscriber: Subscriber, now_ns: int) -> None:
        if subscriber.idle:
            if subscriber.parked or now_ns - self._feed.newest_ns >= self._heartbeat_ns:
                self._heartbeat(subscriber)
        elif subscriber.stalled_ns and now_ns - subscriber.stalled_ns >= self._stall_timeout_ns:
            self.stalled_closed += 1
            self._end(subscriber)
