"""The fan-out as the relay and the UDP worker have it: one system call a record, to all whom frames can reach.

RelayFanout makes the calls, right after the record is in the ring. WorkerFanout says who is served: each subscriber is
on the best rung that leads to him (live frames, AF_XDP, or a plain socket), and may change it whenever routes,
neighbours or interfaces do. Both take what the bypass's process hands over, when it does, and give it back when it has
ended.

The relay sends from its own CPU alone. A FanoutRun can use a second one, and with 10,000 subscribers in the product
the last one's frame was there sooner by it (1.15 instead of 1.6 ms after the announcement), but the first one's and the
last of enterprise's later (0.15 instead of 0.11, 0.34 instead of 0.26): the second CPU has to be told, and on a host of
two it is the delivery workers'.
"""

from __future__ import annotations

import select
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sprint.bypass_line import EGRESS, AskingEnd, close_all
from sprint.deliveries.accounts import TierLedger
from sprint.deliveries.session import latency_origin_ns
from sprint.deliveries.udp_sender import Rung, pack
from sprint.deliveries.udp_sessions import ANY_HOST
from sprint.record import decode
from sprint.tiers import NS_PER_MS, NS_PER_S, PROFILES, Tier
from xdp.egress import Egress
from xdp.fanout_maps import FanoutHandover, Rank, Sender, Step, close_handover
from xdp.fanout_run import FanoutRun

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Hashable, Mapping

    from sprint.addresses import Address
    from sprint.events import Want
    from sprint.ring import Ring
    from sprint.status import Delivery, StatusBlock
    from xdp.fanout_run import RunReport

LOOK_NS: Final = 100 * NS_PER_MS
"""How often a polling loop looks whether something new was handed over: it costs a system call."""
RANKS: Final = {Tier.ENTERPRISE: Rank.FIRST, Tier.TURBO: Rank.SECOND}
TICK_NS: Final = NS_PER_S
UNSETTLED: Final = 1_024
"""Runs whose accounts may wait; the oldest are settled before there are more."""
MISSED: Final = 16
"""Records that are sent when a fan-out is taken over, of those that were published while there was none."""
MISSED_NS: Final = 5 * NS_PER_S
"""How old one of these may be: by then everybody has long had it over TCP."""
RETRY_NS: Final = NS_PER_S
"""After a fan-out that can't be used."""


class _Taken:
    """What was handed over: plain values, and descriptors that end with it."""

    def __init__(self, facts: dict[str, Any], descriptors: list[int]) -> None:
        self.handover = FanoutHandover(contexts=tuple(facts["contexts"]), **dict.fromkeys(_FDS, -1)).with_fds(
            descriptors
        )

    def close(self) -> None:
        close_handover(self.handover)


_FDS: Final = tuple(name for name in FanoutHandover.__dataclass_fields__ if name.endswith("_fd"))


class RelayFanout:
    """The relay's half: a delivery that publishes, and a source that hears nothing, so that the loop looks after it."""

    def __init__(
        self,
        ring: Ring,
        accounts: Delivery,
        status: StatusBlock,
        control: socket.socket,
        write_deadline_ns: Mapping[Tier, int],
        log: Any,
    ) -> None:
        """`control`: the relay's end of a line of its own to the bypass."""
        self._ring = ring
        self._sequence = ring.tail
        self._accounts = accounts
        self._ledgers = {
            tier: TierLedger(accounts.tiers[tier], PROFILES[tier], write_deadline_ns[tier]) for tier in RANKS
        }
        self._udp, self._egress = status.layout.udp, status.layout.egress
        self._line = AskingEnd(control, EGRESS)
        self._log = log
        self._taken: _Taken | None = None
        self._run: FanoutRun | None = None
        self._step: Step | None = None
        self._unsettled: list[tuple[RunReport, int, int, int, int]] = []
        self._look_ns = 0
        self._retry_ns: int | None = None
        self._epoll = select.epoll()
        self._epoll.register(control.fileno(), select.EPOLLIN)
        self._egress.active = 0

    def publish(self) -> None:
        """What is new in the ring, to everybody in the table, enterprise first."""
        ring = self._ring
        if self._run is None:
            return
        while self._sequence < ring.tail:
            self._sequence = max(self._sequence + 1, min(ring.oldest, ring.tail))
            record = ring.copy(self._sequence)
            if record is None:
                continue
            report = self._run.send(record)
            if report.attempted or report.lost:
                first, second = self._udp.fanout_enterprise, self._udp.fanout_turbo
                self._unsettled.append((report, first, second, latency_origin_ns(record), len(record)))
        if len(self._unsettled) > UNSETTLED:
            self._settle()

    def rehearse(self) -> None:
        """Keep the way of a publication warm, if there is anybody to publish to: some 12 µs, and no frame leaves.

        After three seconds without it the first frame is handed to the driver 112 to 118 µs after the call, with it 27
        to 30.
        """
        if self._run is not None and (self._udp.fanout_turbo or self._udp.fanout_enterprise):
            self._run.rehearse()

    def fileno(self) -> int:
        """Readable when something is handed over."""
        return self._epoll.fileno()

    def poll(self, now_ns: int) -> list[Any]:
        """Look whether there is something new; it hears nothing."""
        if self._unsettled:
            self._settle()
        if self._retry_ns is not None and now_ns >= self._retry_ns:
            self._retry_ns = None
            self._line.ask()
        if now_ns >= self._look_ns:
            self._look_ns = now_ns + LOOK_NS
            self._take_over(now_ns)
        return []

    def deadline(self) -> int | None:
        """When a fan-out that couldn't be used is asked for again."""
        return self._retry_ns

    def want(self, want: Want, now_ns: int) -> None:
        """It asks nobody."""

    def account(self) -> None:
        """Bring the accounts up to date, and try again where it had failed, if the worker has seen it mended."""
        self._look_ns = 0
        if self._run is not None:
            self._run.recover()
        self._settle()
        self._show()

    def close(self) -> None:
        """Let go of it."""
        self._drop()
        self._epoll.close()

    def _take_over(self, now_ns: int) -> None:
        came = self._line.take()
        if came is None:
            return
        self._drop()
        self._retry_ns = None
        if came.facts is None:
            close_all(came.descriptors)
            return
        try:
            self._taken = _Taken(came.facts, came.descriptors)
            self._run = FanoutRun(self._taken.handover, Sender.RELAY)
        except OSError as error:
            self._log.warning("Fan-out can't be used", reason=str(error))
            self._drop()
            self._retry_ns = now_ns + RETRY_NS
            return
        self._step = None
        self._show()
        self._send_missed(now_ns)

    def _send_missed(self, now_ns: int) -> None:
        """What was published meanwhile, to those in the table: a relay that was killed and restarted finds there whom
        its predecessor served, and nobody else has sent to them."""
        ring = self._ring
        first = max(self._sequence, ring.tail - MISSED)
        while first < ring.tail:
            record = ring.copy(first + 1)
            if record is not None and decode(record).published_ns > now_ns - MISSED_NS:
                break
            first += 1
        self._sequence = first
        self.publish()

    def _drop(self) -> None:
        if self._run is not None:
            self._run.close()
        if self._taken is not None:
            self._taken.close()
        self._run = self._taken = self._step = None
        self._egress.active = 0

    def _show(self) -> None:
        """Say it when the step has changed."""
        run = self._run
        if run is None or run.step is self._step:
            return
        self._step = run.step
        self._egress.active = run.step is Step.LIVE_FRAMES
        if run.step is Step.LIVE_FRAMES:
            self._log.info("Fan-out at work")
        else:
            self._log.warning("Fan-out has stepped down", step=run.step.name.lower(), reason=run.reason)

    def _settle(self) -> None:
        """Count what was sent. Which tier a frame that was not sent was for, the report doesn't tell: enterprise goes
        first, so what is missing is held to be turbo's, as far as there were any."""
        for report, first, second, seen_ns, size in self._unsettled:
            second_sent = min(second, max(0, report.transmitted - first))
            first_sent = report.transmitted - second_sent
            began = report.first_frame_ns or report.started_ns
            between = report.first_rank_ended_ns or began
            enterprise, turbo = self._ledgers[Tier.ENTERPRISE], self._ledgers[Tier.TURBO]
            enterprise.sent_together(first_sent, began, max(began, between), seen_ns)
            turbo.sent_together(second_sent, max(began, between), max(between, report.ended_ns), seen_ns)
            missing = min(report.lost, second)
            turbo.dropped(missing)
            enterprise.dropped(report.lost - missing)
            egress = self._egress
            egress.runs += 1
            egress.attempted += report.attempted
            egress.sent += report.transmitted
            egress.dropped += report.lost
            self._accounts.bytes_sent += report.transmitted * size
        self._unsettled.clear()


class WorkerFanout:
    """The UDP worker's half: who is on which rung. Its descriptor is readable when look() has something to do."""

    def __init__(self, control: socket.socket, source_port: int, log: Any, *, source_host: str = ANY_HOST[0]) -> None:
        """`control`: the worker's end of a line of its own to the bypass. Raises OSError.

        `source_host` and `source_port`: what the UDP socket is bound to, for that is what subscribers listen to.
        """
        self._line = AskingEnd(control, EGRESS)
        self._source_port = source_port
        self._source = None if source_host in ANY_HOST else pack(source_host)
        self._log = log
        self._taken: _Taken | None = None
        self._members: dict[bytes, _Member] = {}
        self._tick_ns = 0
        self._retry_ns: int | None = None
        self._epoll = select.epoll()
        self._epoll.register(control.fileno(), select.EPOLLIN)
        self._egress = self._open(None)

    @property
    def step(self) -> str:
        """The best rung that there is."""
        return self._egress.step.name.lower()

    @property
    def reason(self) -> str | None:
        """Why somebody isn't on the first."""
        return self._egress.reason

    def fileno(self) -> int:
        """Of an epoll instance."""
        return self._epoll.fileno()

    def join(self, key: bytes, address: Address, tier: Tier) -> Rung:
        """Serve this one from the next publication on, by that rung."""
        member = self._members[key] = _Member(pack(address.host), address.port, RANKS[tier])
        return self._join(key, member)

    def leave(self, key: bytes) -> None:
        """Not any more."""
        self._members.pop(key, None)
        self._egress.leave(key)

    def transmit(self, payload: bytes) -> int:
        """To everybody on the second rung, enterprise first: how many the kernel took."""
        return self._egress.transmit(payload)

    def beat(self, payload: bytes, go_on: Callable[[], bool]) -> int | None:
        """To everybody on the first rung, by a run of this process's own: how many drivers took it; None: it can't."""
        return self._egress.beat(payload, go_on)

    def look(self, now_ns: int) -> list[tuple[bytes, Rung]]:
        """What has changed: who is served by another rung than before. To be called each second, too."""
        changes: list[tuple[Hashable, Step]] = []
        if self._retry_ns is not None and now_ns >= self._retry_ns:
            self._retry_ns = None
            self._line.ask()
        came = self._line.take()
        if came is not None:
            self._take_over(came.facts, came.descriptors, now_ns)
            with self._egress.batch():
                for key, member in self._members.items():
                    self._join(key, member)
            changes += [(key, Step(member.rung)) for key, member in self._members.items()]
        changes += self._egress.poll()
        if now_ns >= self._tick_ns:
            self._tick_ns = now_ns + TICK_NS
            changes += self._egress.tick(now_ns)
        return [(key, Rung(step)) for key, step in changes if isinstance(key, bytes)]

    def close(self) -> None:
        """Serve nobody."""
        self._close()
        self._epoll.close()

    def _join(self, key: bytes, member: _Member) -> Rung:
        try:
            member.rung = Rung(self._egress.join(key, member.address, member.port, member.rank))
        except ValueError:  # as many as there can be
            member.rung = Rung.SENDMMSG
        return member.rung

    def _take_over(self, facts: dict[str, Any] | None, descriptors: list[int], now_ns: int) -> None:
        self._close()
        self._retry_ns = None
        if facts is None:
            close_all(descriptors)
        else:
            self._taken = _Taken(facts, descriptors)
        try:
            self._egress = self._open(self._taken.handover if self._taken is not None else None)
        except OSError as error:
            self._log.warning("Fan-out can't be used", reason=str(error))
            self._close_taken()
            self._egress = self._open(None)
            self._retry_ns = now_ns + RETRY_NS

    def _open(self, handover: FanoutHandover | None) -> Egress:
        egress = Egress(handover, self._source_port, self._source)
        self._epoll.register(egress.fileno(), select.EPOLLIN)
        self._tick_ns = 0
        return egress

    def _close(self) -> None:
        self._epoll.unregister(self._egress.fileno())
        self._egress.close()
        self._close_taken()

    def _close_taken(self) -> None:
        if self._taken is not None:
            self._taken.close()
            self._taken = None


@dataclass(slots=True)
class _Member:
    address: bytes
    port: int
    rank: Rank
    rung: Rung = Rung.SENDMMSG
