"""One TCP subscriber of the stream: its session, its socket, and its places in the delivery's lists."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from sprint.deliveries.requests import Requests
from sprint.deliveries.session import Feed, Session

if TYPE_CHECKING:
    from sprint.admission import Ticket
    from sprint.deliveries.accounts import TierLedger
    from sprint.deliveries.hello import Hello
    from sprint.deliveries.udp_sessions import ByUdp


class Subscriber(Session[socket.socket]):
    """A session with its socket, and its place in the delivery's lists."""

    __slots__ = ("beat_ns", "blocked", "closed", "half_closed", "ledger", "network", "place", "queued", "requests",
        "ticket", "tier", "timer_ns", "udp")  # fmt: skip

    def __init__(
        self,
        feed: Feed,
        ledger: TierLedger,
        hello: Hello,
        sock: socket.socket,
        network: str,
        extra: int,
        ticket: Ticket,
    ) -> None:
        super().__init__(feed, ledger, hello.format, sock, hello.since)
        self.network = network
        self.ticket = ticket
        self.ledger = ledger
        self.tier = ledger.profile.tier
        self.requests = Requests(feed.clock())
        self.requests.surplus = extra
        self.udp: ByUdp | None = None
        self.place = 0  # in its tier's roster
        self.beat_ns = 0
        self.timer_ns = 0
        self.blocked = False  # waits for the socket to become writable
        self.queued = False  # waits for its slice
        self.half_closed = False
        self.closed = False
