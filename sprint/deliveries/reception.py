"""Where stream connections arrive: accepts them, reads their hello within a time and a length, refuses or admits.

Owns the listening socket and every connection until it is admitted. Nothing here is unbounded: connections by
`max_sessions` and per address, a hello by its length and time, a refused client's last words by a budget. When the
process has no file descriptor left, accepting pauses and the connections wait in the kernel's backlog.
"""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Final

from sprint.addresses import Address
from sprint.binding import listening
from sprint.deliveries.hello import FULL, MAX_HELLO, TOO_LONG, TOO_SLOW, Hello, Refusal, read_hello, refusal_line
from sprint.seats import Seats, private_seats
from sprint.tiers import NS_PER_S

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from sprint.status import Delivery

BACKLOG: Final = 4096
"""Linux's default of net.core.somaxconn: what the kernel holds while thousands of subscribers come back at once."""
ACCEPTS_A_TURN: Final = 16
"""Connections taken in one turn of the loop, so that a rush of them does not delay a publication by more than 1 ms."""
PAUSE_S: Final = 0.25
"""How long accepting rests when the process is out of file descriptors or memory."""
LINGER_BYTES: Final = 1 << 16
"""What a refused client may still send before it is cut off; closing with bytes unread would lose the refusal."""

_OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def listen(host: str, port: int, *, send_buffer: int, user_timeout_ms: int, reuse_port: bool) -> socket.socket:
    """A listening socket whose options every accepted one inherits (Linux). Raises HostError if it can't be bound."""

    def prepare(listener: socket.socket) -> None:
        listener.setblocking(False)
        if reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout_ms)

    return listening("STREAM_BIND", Address(host, port), BACKLOG, prepare)


def network_of(family: int, host: str) -> str:
    """What one holder of addresses is counted by: an IPv4 address, or the /64 that an IPv6 host can choose from."""
    if family != socket.AF_INET6:
        return host
    packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    if packed.startswith(bytes(10) + b"\xff\xff"):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(socket.AF_INET6, packed[:8] + bytes(8))


class _Arrival:
    """One connection that has not said its hello yet, or was refused and is being seen off."""

    __slots__ = ("deadline_ns", "network", "received", "refusal", "refused", "sock", "told")

    def __init__(self, sock: socket.socket, network: str, deadline_ns: int) -> None:
        self.sock = sock
        self.network = network
        self.deadline_ns = deadline_ns
        self.received = b""
        self.refused = 0
        """Bytes that came after its refusal, and one: more than LINGER_BYTES end it. 0: not refused."""
        self.refusal = Refusal(TOO_SLOW)
        """What it is told when its time is up."""
        self.told = False


class Reception:
    """Accepts connections and hands those with a good hello to `admit`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        accounts: Delivery,
        admit: Callable[[socket.socket, str, Hello, int], Refusal | None],
        *,
        clock: Callable[[], int],
        hello_timeout_ns: int,
        max_sessions: int,
        max_sessions_per_address: int | None,
        seats: Seats | None = None,
    ) -> None:
        """`admit` gets the socket, its network, the hello and how many bytes followed it; None means taken over.

        Where several processes share an address, `seats` is where they count together what each address has.
        """
        self.accept_pauses = 0
        self._loop = loop
        self._listener = listener
        self._accounts = accounts
        self._admit = admit
        self._clock = clock
        self._hello_timeout_ns = hello_timeout_ns
        self._max = max_sessions
        self._max_per_network = max_sessions_per_address
        self._sessions = 0
        self._seats = private_seats() if seats is None else seats
        self._arrivals: dict[_Arrival, None] = {}  # in order of arrival, which is the order of deadlines
        self._timer: asyncio.TimerHandle | None = None
        self._resume: asyncio.TimerHandle | None = None
        loop.add_reader(listener, self._accept)

    def release(self, network: str) -> None:
        """An admitted connection has ended."""
        self._sessions -= 1
        if self._max_per_network is not None:
            self._seats.give_back(self._seats.of_network(network))

    def close(self) -> None:
        """Stop listening, and close what was not admitted."""
        for handle in (self._timer, self._resume):
            if handle is not None:
                handle.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for arrival in list(self._arrivals):
            self._end(arrival)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_A_TURN):
            try:
                sock, address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self._pause()
                    return
                continue  # that connection died before it was taken: accept(2) lists the ways
            sock.setblocking(False)
            self._arrived(sock, network_of(sock.family, address[0]))

    def _pause(self) -> None:
        self.accept_pauses += 1
        self._loop.remove_reader(self._listener)
        self._resume = self._loop.call_later(PAUSE_S, self._loop.add_reader, self._listener, self._accept)

    def _arrived(self, sock: socket.socket, network: str) -> None:
        if self._sessions >= self._max or not self._take_seat(network):
            self._accounts.refused += 1
            _send_last(sock, Refusal(FULL, retry=True))
            sock.close()
            return
        self._sessions += 1
        arrival = _Arrival(sock, network, self._clock() + self._hello_timeout_ns)
        self._arrivals[arrival] = None
        self._loop.add_reader(sock, self._readable, arrival)
        if self._timer is None:
            self._timer = self._loop.call_later(self._hello_timeout_ns / 1e9, self._too_slow)

    def _take_seat(self, network: str) -> bool:
        if self._max_per_network is None:
            return True
        return self._seats.take(self._seats.of_network(network), self._max_per_network)

    def _readable(self, arrival: _Arrival) -> None:
        try:
            data = arrival.sock.recv(MAX_HELLO)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._end(arrival)
        elif arrival.refused:
            arrival.refused += len(data)
            if arrival.refused > LINGER_BYTES:
                self._end(arrival)
        else:
            arrival.received += data
            self._look_for_hello(arrival)

    def _look_for_hello(self, arrival: _Arrival) -> None:
        line, newline, more = arrival.received.partition(b"\n")
        if not newline and len(line) < MAX_HELLO:
            return
        asked = read_hello(line) if newline and len(line) < MAX_HELLO else Refusal(TOO_LONG)
        arrival.received = b""
        if isinstance(asked, Hello):
            self._judge(arrival, asked, len(more))
        else:
            self._refuse(arrival, asked)

    def _judge(self, arrival: _Arrival, hello: Hello, extra: int) -> None:
        if arrival not in self._arrivals:
            return  # it has hung up meanwhile
        self._loop.remove_reader(arrival.sock)
        refusal = self._admit(arrival.sock, arrival.network, hello, extra)
        if refusal is None:
            del self._arrivals[arrival]
            return
        self._loop.add_reader(arrival.sock, self._readable, arrival)
        if refusal.undecided:
            arrival.refused, arrival.refusal = max(1, arrival.refused), refusal
            self._loop.call_later(refusal.delay_ns / NS_PER_S, self._judge, arrival, hello, extra)
        elif refusal.delay_ns:
            self._delay(arrival, refusal)
        else:
            self._refuse(arrival, refusal)

    def _delay(self, arrival: _Arrival, refusal: Refusal) -> None:
        """Refuse it later; its time begins anew, or whoever is late with his hello would have his answer at once."""
        arrival.refused = 1  # what else it says is not listened to
        arrival.refusal = refusal
        arrival.deadline_ns = self._clock() + self._hello_timeout_ns
        self._arrivals[arrival] = self._arrivals.pop(arrival)
        self._loop.call_later(refusal.delay_ns / NS_PER_S, self._refuse, arrival, refusal)

    def _refuse(self, arrival: _Arrival, refusal: Refusal) -> None:
        if arrival.told or arrival not in self._arrivals:
            return
        self._accounts.refused += 1
        arrival.refused, arrival.told = 1, True
        _send_last(arrival.sock, refusal)

    def _too_slow(self) -> None:
        self._timer = None
        now = self._clock()
        while self._arrivals:
            oldest = next(iter(self._arrivals))
            if oldest.deadline_ns > now:
                self._timer = self._loop.call_later((oldest.deadline_ns - now) / 1e9, self._too_slow)
                return
            if not oldest.told:
                self._refuse(oldest, oldest.refusal)
            self._end(oldest)

    def _end(self, arrival: _Arrival) -> None:
        del self._arrivals[arrival]
        self._loop.remove_reader(arrival.sock)
        arrival.sock.close()
        self.release(arrival.network)


def _send_last(sock: socket.socket, refusal: Refusal) -> None:
    """Say why and half-close; a socket that can't take one line goes without."""
    try:
        sock.send(refusal_line(refusal))
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass
