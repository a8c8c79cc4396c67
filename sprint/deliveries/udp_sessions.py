"""The TCP side of the UDP feed: which sessions want their records by UDP, and which get them there.

A session keeps its records over TCP until the UDP side says that its address is proven, and gets them over TCP again
when that ends; in between it is parked, and TCP carries heartbeats and what is asked for again. Nothing falls between
the two: a session is parked only when it has been sent everything before the first record that goes by UDP.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sprint.addresses import Address
from sprint.datagrams import TOKEN_SIZE
from sprint.deliveries.hello import HUNG_UP, Refusal, UdpOffer
from sprint.deliveries.udp_link import Active, Began, Ended, Inactive, Link, Unheard, Wanted
from sprint.frames import UdpChange, UdpReason, UdpState, udp_frame
from sprint.tiers import Tier

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Iterator

    from sprint.deliveries.catch_up import CatchUp
    from sprint.deliveries.rosters import Rosters
    from sprint.deliveries.subscriber import Subscriber
    from sprint.deliveries.udp_link import Message

UDP_TIERS: Final = (Tier.TURBO, Tier.ENTERPRISE)
ANY_HOST: Final = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class UdpService:
    """Where the UDP side is, and this worker's end of the link to it."""

    address: Address
    """Which datagrams come from, as bound."""
    link: socket.socket


@dataclass(slots=True)
class ByUdp:
    """What a session knows of its subscription by UDP."""

    wanted: Wanted
    first: int = 0
    """The first record that the UDP side sends; 0: it doesn't."""


class UdpSessions:
    """All sessions of one stream delivery that asked for UDP."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, service: UdpService, rosters: Rosters, catching_up: CatchUp
    ) -> None:
        """Parked sessions leave `rosters`; what is to be sent to them goes by `catching_up`."""
        self._service = service
        self._rosters = rosters
        self._catching_up = catching_up
        self._sessions: dict[bytes, Subscriber] = {}
        self._behind: dict[bytes, Subscriber] = {}
        """Proven, and still to be sent something over TCP before they are parked."""
        self._link = Link(loop, service.link, self._received)

    def __iter__(self) -> Iterator[Subscriber]:
        return iter(list(self._sessions.values()))

    def close(self) -> None:
        """Every session is over."""
        self._link.close()

    def want(self, subscriber: Subscriber, wish: Address) -> UdpOffer | Refusal:
        """This session asks for its records at that address; what it is to be told."""
        if subscriber.tier not in UDP_TIERS:
            names = " and ".join(tier.label for tier in UDP_TIERS)
            return Refusal(f"udp: tier {subscriber.tier.label} has none, {names} have: subscribe without it")
        try:
            peer, local = (unmapped(end[0]) for end in (subscriber.sock.getpeername(), subscriber.sock.getsockname()))
        except OSError:  # it has hung up already, and won't read this
            return Refusal(HUNG_UP)
        bound = self._service.address
        token = secrets.token_bytes(TOKEN_SIZE)
        wanted = Wanted(token, subscriber.tier, Address(wish.host or peer, wish.port), peer)
        subscriber.udp = ByUdp(wanted)
        self._sessions[token] = subscriber
        self._link.send(wanted)
        return UdpOffer(Address("" if bound.host in (*ANY_HOST, local) else bound.host, bound.port), token)

    def caught_up(self, subscriber: Subscriber) -> None:
        """It has been sent everything that is published."""
        udp = subscriber.udp
        if udp is not None and not subscriber.parked and 0 < udp.first <= subscriber.cursor:
            self._behind.pop(udp.wanted.token, None)
            subscriber.park()
            self._rosters.remove(subscriber)
            self._tell(subscriber, UdpState.ACTIVE, UdpReason.NONE)

    def published(self) -> None:
        """Whoever is idle has been sent what is new."""
        for subscriber in list(self._behind.values()):
            if subscriber.idle:
                self.caught_up(subscriber)

    def give_up(self, subscriber: Subscriber) -> None:
        """It says that no datagram reaches it: its records come over TCP again, at once."""
        if subscriber.udp is not None and subscriber.udp.first:
            self._link.send(Unheard(subscriber.udp.wanted.token))
            self._inactive(subscriber, UdpReason.UNHEARD)

    def end(self, subscriber: Subscriber) -> None:
        """Its connection is over."""
        if subscriber.udp is not None:
            self._behind.pop(subscriber.udp.wanted.token, None)
        if subscriber.udp is not None and self._sessions.pop(subscriber.udp.wanted.token, None) is not None:
            self._link.send(Ended(subscriber.udp.wanted.token))

    def _received(self, message: Message) -> None:
        if isinstance(message, Began):
            self._began()
            return
        subscriber = self._sessions.get(message.token)
        if subscriber is None or subscriber.udp is None:
            return  # it has ended meanwhile, or was the one's before us
        if isinstance(message, Active):
            subscriber.udp.first = message.first
            if subscriber.parked:  # it has moved, and misses nothing over TCP
                return
            self._behind[message.token] = subscriber
            if subscriber.idle:
                self.caught_up(subscriber)
        elif isinstance(message, Inactive):
            if message.reason is UdpReason.UNHEARD and not subscriber.udp.first:
                return  # as it was told already, unless UDP has become active in between
            self._inactive(subscriber, message.reason)

    def _began(self) -> None:
        """The UDP side is new, and knows of none of our sessions."""
        for subscriber in list(self._sessions.values()):
            assert subscriber.udp is not None
            if subscriber.udp.first:
                self._inactive(subscriber, UdpReason.RESTARTED)
            self._link.send(subscriber.udp.wanted)

    def _inactive(self, subscriber: Subscriber, reason: UdpReason) -> None:
        assert subscriber.udp is not None
        subscriber.udp.first = 0
        self._behind.pop(subscriber.udp.wanted.token, None)
        if subscriber.parked:
            subscriber.unpark()
            self._rosters.add(subscriber)
        self._tell(subscriber, UdpState.INACTIVE, reason)

    def _tell(self, subscriber: Subscriber, state: UdpState, reason: UdpReason) -> None:
        subscriber.insert(udp_frame(UdpChange(state, reason, subscriber.cursor), subscriber.form))
        self._catching_up.add(subscriber)


def unmapped(host: str) -> str:
    """An IPv4 address as such, where a socket of both families shows it mapped into IPv6 (RFC 4291, 2.5.5.2)."""
    return host[7:] if host.startswith("::ffff:") and "." in host else host
