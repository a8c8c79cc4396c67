"""The UDP feed: every record to every proven address, enterprise first, and a heartbeat each second.

Owns the UDP socket. Subscriptions come from the TCP sessions of the stream, by links (udp_link); who gets what is
decided by Leases, purely. A subscriber who can be reached by the fan-out (live frames, one system call for all, made by
the relay right after the record is in the ring) is handed to it; everybody else is sent to here, in batches. Nothing is
kept for anybody: what gets lost is noticed by the next heartbeat, and asked for again over TCP.

Not thread-safe: start(), publish() and close() belong on the loop's thread.
"""

from __future__ import annotations

import secrets
import socket
import time
from typing import TYPE_CHECKING, Final

from sprint.addresses import Address
from sprint.binding import bound
from sprint.datagrams import MAX_FROM_CLIENT, Echo, from_client
from sprint.deliveries.accounts import TierLedger
from sprint.deliveries.reception import network_of
from sprint.deliveries.session import latency_origin_ns
from sprint.deliveries.udp_beats import Beats
from sprint.deliveries.udp_leases import Activated, Deactivated, Leases, SendChallenge
from sprint.deliveries.udp_link import Active, Began, Ended, Inactive, Link, Unheard, Wanted
from sprint.deliveries.udp_sender import Batches, Run, Rung, Target
from sprint.deliveries.udp_sessions import UDP_TIERS, unmapped
from sprint.frames import UdpReason
from sprint.histograms import Histogram
from sprint.tiers import NS_PER_S, PROFILES, Tier

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sprint.deliveries.udp_ladder import Fanout
    from sprint.deliveries.udp_leases import Action, Lease
    from sprint.deliveries.udp_link import Message
    from sprint.ring import Ring
    from sprint.status import Delivery, Udp

HOUSEKEEPING_S: Final = 1.0
DATAGRAMS_A_TURN: Final = 64
"""Taken from the socket in one turn of the loop: 0.3 ms, which a flood can delay a publication by."""
SOCKET_BUFFER: Final = 4 << 20
"""Asked for, each way: room for a burst of ten thousand small datagrams. The kernel may grant less."""


class _Subscriber(Target):
    """One who gets records: the address that a lease has proven."""

    __slots__ = ("lease", "rung")

    def __init__(self, lease: Lease) -> None:
        super().__init__(lease.address)
        self.lease = lease
        self.rung = Rung.SENDMMSG


class UdpDelivery:
    """Serves one ring to UDP subscribers."""

    def __init__(
        self,
        ring: Ring,
        accounts: Delivery,
        counters: Udp,
        links: Sequence[socket.socket],
        *,
        write_deadline_ns: Mapping[Tier, int],
        fanout: Fanout | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        heartbeat_ns: int = NS_PER_S,
    ) -> None:
        """`links`: this side's end of the pair that each stream delivery has."""
        self._ring = ring
        self._accounts = accounts
        self._counters = counters
        self._link_socks = tuple(links)
        self._ledgers = {
            tier: TierLedger(accounts.tiers[tier], PROFILES[tier], write_deadline_ns[tier]) for tier in UDP_TIERS
        }
        self._fanout = fanout
        self._clock = clock
        self._heartbeat_ns = heartbeat_ns
        self._sequence = ring.tail
        self._processing = Histogram(accounts.processing)
        self._leases = Leases(ring.session, secrets.token_bytes(32), _network_of, clock())
        self._by_socket: dict[Tier, Batches] = {}
        """Whom nothing better reaches, the highest tier first."""
        self._live: Batches
        """Whom the relay serves; the socket only if a heartbeat can't be sent by frames."""
        self._by_frames = dict.fromkeys(UDP_TIERS, 0)
        """How many are on the second rung."""
        self._subscribers: dict[bytes, _Subscriber] = {}
        self._unsettled: list[tuple[TierLedger, Run, int]] = []
        self._bytes_sent = 0
        self._making_ready = False
        self._links: list[Link] = []
        self._loop: asyncio.AbstractEventLoop
        self._sock: socket.socket
        self._beats: Beats
        self._timer: asyncio.TimerHandle | None = None
        self._ipv6 = False

    @staticmethod
    def bind(address: Address) -> socket.socket:
        """The socket for start(). Raises HostError, naming UDP_BIND, address and reason, when it can't be bound."""

        def prepare(sock: socket.socket) -> None:
            sock.setblocking(False)
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)

        return bound("UDP_BIND", address, socket.SOCK_DGRAM, prepare)

    def start(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> Address:
        """Serve by that socket, one of bind()'s; close() leaves it open, for a successor. Returns its address."""
        self._loop = loop
        self._sock = sock
        self._ipv6 = sock.family == socket.AF_INET6
        self._by_socket = {tier: Batches(sock, self._clock) for tier in reversed(UDP_TIERS)}
        self._live = Batches(sock, self._clock)
        if self._fanout is not None:
            loop.add_reader(self._fanout.fileno(), self._look)
        self._beats = Beats(
            loop,
            self._heartbeat_ns,
            self._ring,
            by_frames=self._beat_by_frames,
            framed=self._live,
            others=[*self._by_socket.values()],
            sent=self._beaten,
        )
        for owner, link in enumerate(self._link_socks):
            self._links.append(Link(loop, link, lambda message, owner=owner: self._told(owner, message)))  # type: ignore[misc]  # bound now
        loop.add_reader(sock, self._readable)
        self._timer = loop.call_later(HOUSEKEEPING_S, self._on_timer)
        return bound_address(sock)

    def close(self) -> None:
        """Stop; the sessions go on over TCP when this side's successor says that it has begun."""
        self._loop.remove_reader(self._sock)
        if self._fanout is not None:
            self._loop.remove_reader(self._fanout.fileno())
            self._fanout.close()
            self._fanout = None
        if self._timer is not None:
            self._timer.cancel()
        for link in self._links:
            link.close()
        for subscriber in list(self._subscribers.values()):
            self._drop(subscriber)
        self._beats.close()
        self._settle()

    def publish(self) -> None:
        """The ring has grown: send what is new to everybody whom the fan-out doesn't serve, enterprise first."""
        began = self._clock()
        ring, sequence = self._ring, self._sequence
        while sequence < (tail := ring.tail):
            sequence = max(sequence + 1, min(ring.oldest, tail))  # what is gone was overwritten too soon; it is lost
            record = ring.copy(sequence)
            self._sequence = sequence
            if record is not None:
                self._send(record)
        if self._unsettled:
            self._loop.call_soon(self._settle)
        self._processing.record(self._clock() - began)

    def _send(self, record: bytes) -> None:
        seen_ns = latency_origin_ns(record)
        if self._fanout is not None and any(self._by_frames.values()):
            self._send_frames(self._fanout, record, seen_ns)
        for tier, batches in self._by_socket.items():
            for run in batches.send(record):
                self._unsettled.append((self._ledgers[tier], run, seen_ns))
                self._bytes_sent += run.sent * len(record)

    def _send_frames(self, fanout: Fanout, record: bytes, seen_ns: int) -> None:
        started_ns = self._clock()
        left = fanout.transmit(record)
        ended_ns = self._clock()
        self._bytes_sent += left * len(record)
        for tier in self._by_socket:  # enterprise went first: what is missing is turbo's, as far as there were any
            sent = min(left, self._by_frames[tier])
            self._unsettled.append(
                (self._ledgers[tier], Run(sent, self._by_frames[tier] - sent, started_ns, ended_ns), seen_ns)
            )
            left -= sent

    def _settle(self) -> None:
        """Count what was sent, afterwards."""
        for ledger, run, seen_ns in self._unsettled:
            ledger.sent_together(run.sent, run.started_ns, run.ended_ns, seen_ns)
            ledger.dropped(run.failed)
        self._unsettled.clear()
        self._accounts.bytes_sent = self._bytes_sent

    def _beat_by_frames(self, beat: bytes, go_on: Callable[[], bool]) -> int | None:
        if self._fanout is None:
            return 0
        sent = self._fanout.transmit(beat) if any(self._by_frames.values()) else 0
        live = self._fanout.beat(beat, go_on) if len(self._live) else 0
        return None if live is None else sent + live

    def _beaten(self, count: int, size: int) -> None:
        self._accounts.heartbeats += count
        self._bytes_sent += count * size

    def _send_one(self, address: Address, data: bytes) -> bool:
        """Now or not at all."""
        host = f"::ffff:{address.host}" if self._ipv6 and ":" not in address.host else address.host
        try:
            self._bytes_sent += self._sock.sendto(data, (host, address.port))
        except OSError:
            return False
        return True

    def _told(self, owner: int, message: Message) -> None:
        """A stream worker has something to say."""
        leases = self._leases
        if isinstance(message, Wanted):
            actions = leases.want(message.token, message.tier, owner, message.address, message.peer, self._clock())
        elif isinstance(message, Ended):
            actions = leases.end(message.token)
        elif isinstance(message, Unheard):
            actions = leases.give_up(message.token)
        elif isinstance(message, Began):
            actions = leases.end_all_of(owner)
        else:
            return
        self._perform(actions)

    def _readable(self) -> None:
        for _ in range(DATAGRAMS_A_TURN):
            try:
                data, source = self._sock.recvfrom(MAX_FROM_CLIENT + 1)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # an ICMP error to something that was sent
                continue
            said = from_client(data)
            if said is None or (len(source) == 4 and source[3]):  # a link-local address means nothing without its zone
                self._counters.garbage += 1
                continue
            where, now_ns = Address(unmapped(source[0]), source[1]), self._clock()
            leases = self._leases
            self._perform(
                leases.echo(said, where, now_ns) if isinstance(said, Echo) else leases.keep_alive(said, where, now_ns)
            )

    def _on_timer(self) -> None:
        self._timer = self._loop.call_later(HOUSEKEEPING_S, self._on_timer)
        self._perform(self._leases.on_timer(self._clock()))
        if self._fanout is not None:
            self._look()
            self._counters.rung = self._fanout.step.encode()
            self._counters.reason = (self._fanout.reason or "").encode()[:159]
        leases, counters = self._leases, self._counters
        counters.unknown, counters.refused = leases.unknown, leases.refused
        counters.suppressed, counters.full = leases.suppressed, leases.full

    def _perform(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, SendChallenge):
                self._counters.challenges += 1
                if not self._send_one(action.address, action.data):
                    self._perform(self._leases.unreachable(action.lease))
            elif isinstance(action, Activated):
                self._start(action.lease)
            elif isinstance(action, Deactivated):
                self._drop(self._subscribers[action.lease.token])
                self._tell_inactive(action.lease, action.reason)
            else:
                self._tell_inactive(action.lease, action.reason)

    def _start(self, lease: Lease) -> None:
        """Records go there from now on."""
        self.publish()  # whatever stands in the ring goes to the others first
        subscriber = self._subscribers[lease.token] = _Subscriber(lease)
        first = self._sequence + 1
        rung = Rung.SENDMMSG
        if self._fanout is not None:
            rung = self._fanout.join(lease.token, lease.address, lease.tier)
        self._place(subscriber, rung)
        self._make_up(subscriber)
        self._accounts.accepted += 1
        self._ledgers[lease.tier].accounts.subscribers += 1
        self._links[lease.owner].send(Active(lease.token, first))

    def _drop(self, subscriber: _Subscriber) -> None:
        """Nothing is sent there any more."""
        lease = subscriber.lease
        del self._subscribers[lease.token]
        self._take_off(subscriber)
        if self._fanout is not None:
            self._fanout.leave(lease.token)
        self._accounts.disconnected += 1
        self._ledgers[lease.tier].accounts.subscribers -= 1

    def _look(self) -> None:
        """Some may be served by another rung than before."""
        assert self._fanout is not None
        self.publish()
        for token, rung in self._fanout.look(self._clock()):
            subscriber = self._subscribers.get(token)
            if subscriber is not None and subscriber.rung is not rung:
                self._take_off(subscriber)
                self._place(subscriber, rung)
                self._make_up(subscriber)

    def _place(self, subscriber: _Subscriber, rung: Rung) -> None:
        subscriber.rung = rung
        if rung is Rung.SENDMMSG:
            self._by_socket[subscriber.lease.tier].add(subscriber)
            self._changed()
        elif rung is Rung.AF_XDP:
            self._by_frames[subscriber.lease.tier] += 1
        else:
            self._live.add(subscriber)
            self._count_live(subscriber.lease.tier, 1)

    def _take_off(self, subscriber: _Subscriber) -> None:
        if subscriber.rung is Rung.SENDMMSG:
            self._by_socket[subscriber.lease.tier].remove(subscriber)
            self._changed()
        elif subscriber.rung is Rung.AF_XDP:
            self._by_frames[subscriber.lease.tier] -= 1
        else:
            self._live.remove(subscriber)
            self._count_live(subscriber.lease.tier, -1)

    def _count_live(self, tier: Tier, change: int) -> None:
        if tier is Tier.ENTERPRISE:
            self._counters.fanout_enterprise += change
        else:
            self._counters.fanout_turbo += change

    def _make_up(self, subscriber: _Subscriber) -> None:
        """The relay serves it from its next run on; what was written before it joined may have been sent by then."""
        if subscriber.rung is Rung.LIVE_FRAMES:
            for sequence in range(self._sequence + 1, self._ring.tail + 1):
                if (record := self._ring.copy(sequence)) is not None:
                    self._send_one(subscriber.address, record)

    def _changed(self) -> None:
        if not self._making_ready:
            self._making_ready = True
            self._loop.call_soon(self._make_ready)

    def _make_ready(self) -> None:
        """One batch in each turn of the loop."""
        self._making_ready = False
        if any(batches.make_ready() for batches in self._by_socket.values()):
            self._changed()

    def _tell_inactive(self, lease: Lease, reason: UdpReason) -> None:
        if reason is UdpReason.LAPSED:
            self._counters.lapsed += 1
        elif reason is UdpReason.UNPROVEN:
            self._counters.unproven += 1
        if reason is not UdpReason.NONE:  # else its session is over, or it is about to be active elsewhere
            self._links[lease.owner].send(Inactive(lease.token, reason))


def bound_address(sock: socket.socket) -> Address:
    """Where a socket of bind()'s is."""
    host, port = sock.getsockname()[:2]
    return Address(host, port)


def _network_of(host: str) -> str:
    return network_of(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
