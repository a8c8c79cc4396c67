"""The TCP side of the UDP feed: which sessions want their records by UDP, and which get them there.

A session keeps its records over TCP until the UDP side says that its address is proven, and gets them over TCP again
when that ends; in between it is parked, and TCP carries heartbeats and what is asked for again. Nothing falls between
the two: a session is parked only when it has been sent everything before the first record that goes by UDP.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from sprint.addresses import Address
from sprint.datagrams import TOKEN_SIZE
from sprint.deliveries.hello import UDP_NOT_SERVED, Refusal, UdpOffer
from sprint.deliveries.udp_link import Active, Began, Ended, Inactive, Link, Wanted
from sprint.frames import UdpChange, UdpReason, UdpState, udp_frame
from sprint.tiers import Tier

if TYPE_CHECKING:
    import asyncio
    import socket

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


class Serves(Protocol):
    """The stream, as this sees it."""

    def park(self, subscriber: Subscriber) -> None:
        """No records any more."""

    def unpark(self, subscriber: Subscriber) -> None:
        """Records again, from the next one on."""

    def insert(self, subscriber: Subscriber, frames: bytes) -> None:
        """These frames as soon as possible."""


class UdpSessions:
    """All sessions of one stream delivery that asked for UDP."""

    def __init__(self, service: UdpService, stream: Serves) -> None:
        self._service = service
        self._stream = stream
        self._sessions: dict[bytes, Subscriber] = {}
        self._link: Link | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Listen to the UDP side."""
        self._link = Link(loop, self._service.link, self._received)

    def close(self) -> None:
        """Every session is over."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def want(self, subscriber: Subscriber, wish: Address) -> UdpOffer | Refusal:
        """This session asks for its records at that address; what it is to be told."""
        if subscriber.tier not in UDP_TIERS:
            names = " and ".join(tier.label for tier in UDP_TIERS)
            return Refusal(f"udp: tier {subscriber.tier.label} has none, {names} have: subscribe without it")
        if self._link is None:
            return Refusal(UDP_NOT_SERVED)
        peer, local = (unmapped(end[0]) for end in (subscriber.sock.getpeername(), subscriber.sock.getsockname()))
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
            self._stream.park(subscriber)
            self._tell(subscriber, UdpState.ACTIVE, UdpReason.NONE)

    def end(self, subscriber: Subscriber) -> None:
        """Its connection is over."""
        if subscriber.udp is not None and self._sessions.pop(subscriber.udp.wanted.token, None) and self._link:
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
            if subscriber.idle:
                self.caught_up(subscriber)
        elif isinstance(message, Inactive):
            self._inactive(subscriber, message.reason)

    def _began(self) -> None:
        """The UDP side is new, and knows of none of our sessions."""
        assert self._link is not None
        for subscriber in list(self._sessions.values()):
            assert subscriber.udp is not None
            if subscriber.udp.first:
                self._inactive(subscriber, UdpReason.RESTARTED)
            self._link.send(subscriber.udp.wanted)

    def _inactive(self, subscriber: Subscriber, reason: UdpReason) -> None:
        assert subscriber.udp is not None
        subscriber.udp.first = 0
        if subscriber.parked:
            self._stream.unpark(subscriber)
        self._tell(subscriber, UdpState.INACTIVE, reason)

    def _tell(self, subscriber: Subscriber, state: UdpState, reason: UdpReason) -> None:
        self._stream.insert(subscriber, udp_frame(UdpChange(state, reason, subscriber.cursor), subscriber.form))


def unmapped(host: str) -> str:
    """An IPv4 address as such, where a socket of both families shows it mapped into IPv6 (RFC 4291, 2.5.5.2)."""
    return host[7:] if host.startswith("::ffff:") and "." in host else host
