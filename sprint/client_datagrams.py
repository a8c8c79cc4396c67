"""A subscription by UDP beside its TCP session, without a socket or a clock: bytes, datagrams and `now` in, items out.

Records come by whichever way is first, each once, in the order of their coming: one that was lost on the way follows
later, and its sequence tells. A gap is noticed by the next record or the next heartbeat, on either way, and asked for
over TCP after a short while; what the server no longer holds is told as lost. When nothing comes by datagram for
several heartbeats on end, or one gap after the other is filled by TCP alone, datagrams don't get here: records are
wanted over TCP again, and UDP is tried anew a minute later.

A datagram proves little. It counts only with this session's number, which was told over TCP, and a record besides only
with its network, its header's work, and a sequence not far beyond what TCP has told of; everything else is passed over
and counted. Nothing that comes by datagram ends the connection.
"""

from __future__ import annotations

import ipaddress
from typing import Any, Final

from sprint.addresses import Address, parse_address
from sprint.arrivals import Arrivals
from sprint.bitcoin.networks import NETWORKS
from sprint.client_protocol import ClientProtocol, Subscribed, check_proof
from sprint.datagrams import TOKEN_SIZE, Challenge, Echo, KeepAlive, from_server
from sprint.errors import RemoteProtocolError
from sprint.events import Lapped
from sprint.frames import Heartbeat, Item, UdpChange, UdpReason, UdpState, json_line
from sprint.record import Record, decode

KEEP_ALIVE_NS: Final = 10_000_000_000
"""Three and a half of them in a lease; NATs forget a flow of datagrams after half a minute (RFC 4787: two minutes)."""
FIRST_KEEP_ALIVE_NS: Final = 250_000_000
"""After this long the server's challenge isn't on its way any more, or a NAT has kept it out."""
GRACE_NS: Final = 30_000_000
"""How long a gap may be nothing but datagrams that have overtaken each other, or TCP."""
RETRY_NS: Final = 250_000_000
MAX_REQUESTS: Final = 8
"""Unanswered, for the same record: then a new connection."""
MAX_RESEND: Final = 128
"""Records in one request."""
MAX_UNHEARD: Final = 4
"""Heartbeats over TCP on end, with one a second by UDP that didn't come."""
MAX_REPAIRED: Final = 3
"""Gaps on end that TCP had to fill, with no record by datagram between them."""
RETREAT_NS: Final = 60_000_000_000
"""Over TCP, before UDP is tried again."""
_APART_NS: Final = 500_000_000
"""Between two heartbeats that count: what waited to be read while we slept tells nothing."""
AHEAD: Final = 1_024
"""Records between what TCP has told of, each second, and what a datagram is believed."""


class DatagramProtocol(ClientProtocol):
    """One subscription by UDP, over any number of TCP sessions, one after the other."""

    def __init__(self, *, key: str | None = None, since: int | None = None, check_proof: bool = True) -> None:
        super().__init__(key=key, since=since, check_proof=check_proof)
        self.active = False
        """The server sends records by UDP."""
        self.server: Address | None = None
        """Where datagrams come from, and are to be sent; an empty host: this connection's other end."""
        self.by_datagram = 0
        """Records that came by UDP first."""
        self.ignored = 0
        """Datagrams that meant nothing, or nothing new."""
        self.requests = 0
        """Lines that asked for records again."""
        self._port = 0
        self._token = b""
        self._arrivals: Arrivals | None = None
        self._verified = 0
        """The newest record that TCP has told of."""
        self._replayed = False
        """What `since` asked for has come: a gap is a loss, and no longer what is still being sent."""
        self._magic: bytes | None = None
        self._keep_alive_ns = 0
        self._pause_ns = FIRST_KEEP_ALIVE_NS
        self._repair_ns = 0
        self._asked = (0, 0)
        """The first sequence asked for, and how often on end."""
        self._unheard = self._repaired = 0
        """Heartbeats, and gaps, since the last datagram, or the last record by datagram."""
        self._counted_ns = 0
        self._early: Challenge | None = None
        """One that came before the answer over TCP."""
        self._datagrams: list[bytes] = []
        self._lines = b""

    def connected(self, now_ns: int, udp_port: int = 0) -> bytes:
        """As ClientProtocol's; records are wanted at this connection's own address, on that port."""
        self._port = udp_port
        self._token, self._lines, self._early = b"", b"", None
        self._datagrams.clear()
        self.active = self._replayed = False
        self._keep_alive_ns = self._repair_ns = 0
        self._asked = (0, 0)
        self._unheard = self._repaired = 0
        return super().connected(now_ns)

    def deadline(self) -> int:
        """When on_timer() has something to do, in the time of `now`."""
        return min([self._deadline_ns, *(due for due in (self._keep_alive_ns, self._repair_ns) if due)])

    def receive(self, data: bytes, now_ns: int) -> list[Item | Subscribed]:
        """As ClientProtocol's, except that a gap is asked for and no error; UdpChange among the items."""
        items = super().receive(data, now_ns)
        for item in items:
            if isinstance(item, Subscribed) and self._token:
                self._keep_alive_ns, self._pause_ns = now_ns + FIRST_KEEP_ALIVE_NS, FIRST_KEEP_ALIVE_NS
                if self._early is not None:
                    self._answer_challenge(self._early)
            elif isinstance(item, UdpChange):
                self._unheard = self._repaired = 0
                self._pause_ns = KEEP_ALIVE_NS if self.active else FIRST_KEEP_ALIVE_NS
                self._keep_alive_ns = now_ns + (RETREAT_NS if item.reason is UdpReason.UNHEARD else self._pause_ns)
            elif isinstance(item, Heartbeat) and self.active and now_ns >= self._counted_ns + _APART_NS:
                self._counted_ns = now_ns
                self._unheard += 1
        self._plan(now_ns)
        self._judge()
        return items

    def receive_datagram(self, data: bytes, now_ns: int) -> list[Item]:
        """The record that a datagram from `server` brings, if it is one, and news."""
        said = from_server(data)
        items: list[Item] = []
        if isinstance(said, bytes):
            record = self._believed(said)
            meant = record is not None
            if record is not None:
                self.by_datagram += 1
                self._repaired = 0
                items.append(record)
        elif isinstance(said, Challenge):
            meant = self._answer_challenge(said)
        else:
            meant = said is not None and said.session == self.session and self._expected(said.sequence)
        self.ignored += not meant
        if meant:
            self._unheard = 0
        self._plan(now_ns)
        return items

    def on_timer(self, now_ns: int) -> None:
        """deadline() has come. Raises RemoteProtocolError when the connection must be given up."""
        if now_ns >= self._deadline_ns:
            raise RemoteProtocolError("nothing came over TCP for too long")
        if self._keep_alive_ns and now_ns >= self._keep_alive_ns:
            self._datagrams.append(KeepAlive(self._token).encode())
            self._pause_ns = min(2 * self._pause_ns, KEEP_ALIVE_NS)
            self._keep_alive_ns = now_ns + self._pause_ns
        if self._repair_ns and now_ns >= self._repair_ns:
            self._ask_again(now_ns)

    def data_to_send(self) -> bytes:
        """What is to go out over TCP now."""
        lines, self._lines = self._lines, b""
        return lines

    def datagrams_to_send(self) -> list[bytes]:
        """What is to go to `server` by UDP now."""
        datagrams, self._datagrams = self._datagrams, []
        return datagrams

    def _hello(self) -> dict[str, object]:
        hello = super()._hello()
        return {**hello, "udp": f":{self._port}"} if self._port else hello

    def _accepted(self, subscribed: Subscribed, answer: dict[str, Any]) -> None:
        arrivals = self._arrivals
        if arrivals is not None and arrivals.settled >= subscribed.next + AHEAD:
            arrivals = self._arrivals = None  # somebody told of losses that nobody can have had
        if arrivals is None or subscribed.session != self.session:
            super()._accepted(subscribed, answer)
            assert self.last is not None
            arrivals = self._arrivals = Arrivals(self.last)
        arrivals.doubt(subscribed.next - 1)
        self._verified = max(arrivals.known, subscribed.next - 1)
        self._magic = NETWORKS[subscribed.network].magic if subscribed.network in NETWORKS else None
        offer = answer.get("udp")
        if offer is None:
            return
        try:
            self.server = _server_address(offer["address"])
            self._token = bytes.fromhex(offer["token"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise RemoteProtocolError(f"the server's offer of UDP lacks a field: {str(offer)[:200]!r}") from None
        if len(self._token) != TOKEN_SIZE:
            raise RemoteProtocolError(f"token of {len(self._token)} bytes: expected {TOKEN_SIZE}")

    def _subscribed(self, answer: dict[str, Any]) -> Subscribed:
        try:
            return super()._subscribed(answer)
        finally:
            if self.session is None:
                self._arrivals = None

    def _checked(self, item: Item) -> list[Item]:
        """What comes over TCP."""
        arrivals = self._arrivals
        assert arrivals is not None
        items: list[Item] = []
        if isinstance(item, UdpChange):
            self.active = item.state is UdpState.ACTIVE
            self._replayed = True
            self._know(arrivals, item.next - 1)
            items = [item]
        elif isinstance(item, Heartbeat):
            if item.session != self.session:
                raise RemoteProtocolError(f"heartbeat of session {item.session:016x} in another's stream")
            self._replayed = True
            arrivals.doubt(item.sequence)
            self._know(arrivals, item.sequence)
            items = [item]
        elif isinstance(item, Lapped):
            items.extend(arrivals.lose(item.first, item.lost))
            self._verified = max(self._verified, item.first + item.lost - 1)
        else:
            if item.session != self.session:
                raise RemoteProtocolError(f"record of session {item.session:016x} in another's stream")
            if self._check_proof:
                check_proof(item)
            self._verified = max(self._verified, item.sequence)
            if arrivals.take(item.sequence):
                items = [item]
        self.last = arrivals.settled
        return items

    def _know(self, arrivals: Arrivals, sequence: int) -> None:
        arrivals.expect(sequence)
        self._verified = max(self._verified, sequence)

    def _plausible(self, sequence: int) -> bool:
        return self._arrivals is not None and sequence <= self._verified + AHEAD

    def _answer_challenge(self, challenge: Challenge) -> bool:
        if not self._token:
            self._early = challenge
        elif challenge.session == self.session:
            self._datagrams.append(Echo(self._token, challenge.cookie).encode())
        else:
            return False
        return True

    def _expected(self, sequence: int) -> bool:
        """Note that a record exists, if that can be believed."""
        if self._arrivals is None or not self._plausible(sequence):
            return False
        try:
            self._arrivals.expect(sequence)
        except RemoteProtocolError:
            return False
        return True

    def _believed(self, data: bytes) -> Record | None:
        try:
            record = decode(data)
            if record.session != self.session or not self._plausible(record.sequence):
                return None
            if self._magic is not None and record.network != self._magic:
                return None
            if self._check_proof:
                check_proof(record)
            if self._arrivals is None or not self._arrivals.take(record.sequence):
                return None
        except RemoteProtocolError:
            return None
        self.last = self._arrivals.settled
        return record

    def _plan(self, now_ns: int) -> None:
        """When to ask for what is missing."""
        if not self._replayed or self._arrivals is None or self._arrivals.missing(1) is None:
            self._repair_ns = 0
            self._asked = (0, 0)
        elif not self._repair_ns:
            self._repair_ns = now_ns + GRACE_NS

    def _judge(self) -> None:
        """Whether datagrams still get here."""
        if self._unheard >= MAX_UNHEARD or self._repaired >= MAX_REPAIRED:
            self._unheard = self._repaired = 0
            self._lines += json_line({"udp": False})

    def _ask_again(self, now_ns: int) -> None:
        missing = self._arrivals.missing(MAX_RESEND) if self._arrivals is not None else None
        if missing is None:
            self._repair_ns = 0
            return
        first, times = self._asked
        times = times + 1 if first == missing.first else 1
        if times > MAX_REQUESTS:
            raise RemoteProtocolError(f"record {missing.first} was asked for {MAX_REQUESTS} times, and didn't come")
        self._asked = (missing.first, times)
        if times == 1 and self.active:
            self._repaired += 1
            self._judge()
        self._lines += json_line({"resend": {"first": missing.first, "count": missing.lost}})
        self.requests += 1
        self._repair_ns = now_ns + RETRY_NS


def _server_address(text: str) -> Address:
    """`host:port`, or `:port`, which is the host that the connection leads to. Raises ValueError.

    The host is a number, in the spelling that sockets tell: a name would be looked up with each datagram.
    """
    if text.startswith(":"):
        return Address("", parse_address(f"0.0.0.0{text}").port)
    host, port = parse_address(text)
    return Address(str(ipaddress.ip_address(host)), port)
