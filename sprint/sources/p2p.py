"""Source p2p: connections of our own to the configured upstreams, all raced.

Up to three upstreams push compact blocks (BIP152 allows no more), all announce by headers. One epoll descriptor stands
for all sockets, so whatever loop drives the source watches a single one.
"""

from __future__ import annotations

import random
import select
from typing import TYPE_CHECKING

from sprint.events import Source
from sprint.sources.resolver import Resolver, numeric
from sprint.sources.upstream import Upstream
from sprint.status import StatusBlock, writing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sprint.addresses import Address
    from sprint.bitcoin.codec import Message
    from sprint.bitcoin.networks import Network
    from sprint.events import Want
    from sprint.sources import Heard

MAX_HIGH_BANDWIDTH = 3
"""BIP152: ask no more than three peers to push compact blocks."""
_NEVER = 1 << 63
READ_SIZE = 1 << 18
"""One upstream's share of a turn: 4 MB of junk take 16 turns, and every other upstream is heard between them."""


class P2PSource:
    """Keeps a connection to each upstream and says what they say."""

    def __init__(
        self,
        upstreams: Sequence[Address],
        network: Network,
        tip_height: Callable[[], int],
        status: StatusBlock,
        *,
        direct: bool = True,
        make_upstream: Callable[[Address, Network, int, Callable[[], int]], Upstream] = Upstream,
    ) -> None:
        """`tip_height` gives the height that our version message claims.

        `direct`: up to three upstreams are asked to push compact blocks before they have validated them; else all
        announce what they have connected, which is later by the time that takes.
        """
        self._max_pushers = MAX_HIGH_BANDWIDTH if direct else 0
        nonce = random.getrandbits(64)
        self._status = status
        self._upstreams = {
            str(address): make_upstream(address, network, nonce, tip_height) for address in dict.fromkeys(upstreams)
        }
        self._epoll = select.epoll()
        self._resolver = Resolver()
        self._epoll.register(self._resolver.fileno(), select.EPOLLIN)
        self._watched: dict[int, Upstream] = {}
        self._registered: dict[str, tuple[int, int]] = {}
        """By upstream: the descriptor and the mask that epoll has of it."""
        self._buffer = memoryview(bytearray(READ_SIZE))
        self._heard: list[Heard] = []
        self._due_ns = 0
        """The first upstream's deadline when it was last looked at: nothing but sockets is before that."""
        for name in self._upstreams:
            status.peer_index(name)

    def fileno(self) -> int:
        """The epoll descriptor over all sockets."""
        return self._epoll.fileno()

    def poll(self, now_ns: int) -> list[Heard]:
        """Read and write what can be, connect what has to be."""
        heard = self._heard
        self._heard = []
        touched = False
        for _ in range(len(self._watched) + 1):
            # One at a time: epoll then puts it behind the others, so that nobody who talks without end is always first.
            ready = self._epoll.poll(0, 1)
            if not ready:
                break
            touched = True
            descriptor, mask = ready[0]
            upstream = self._watched.get(descriptor)
            if upstream is None:
                self._on_resolved(now_ns)
                continue
            if mask & select.EPOLLOUT or (mask & select.EPOLLERR and not upstream.ready):
                heard += upstream.on_writable(now_ns)
            if mask & ~select.EPOLLOUT:
                heard += upstream.on_readable(self._buffer)
            self._watch(upstream)
            if heard:  # what one upstream says doesn't wait for what the next one may say: epoll reports that again
                break
        if now_ns < self._due_ns and (heard or not touched):
            return heard
        # Even if one of them never stops talking, the others' time-outs and attempts have their turn.
        for upstream in self._upstreams.values():
            due = upstream.deadline()
            if due is not None and now_ns >= due:
                heard += self._on_timer(upstream, now_ns)
        self._note_deadline()
        return heard

    def deadline(self) -> int | None:
        """The first upstream's next time-out, ping or attempt."""
        if self._heard:
            return 0
        return self._note_deadline()

    def _note_deadline(self) -> int | None:
        times = [upstream.deadline() for upstream in self._upstreams.values()]
        due_ns = min((time_ns for time_ns in times if time_ns is not None), default=None)
        self._due_ns = _NEVER if due_ns is None else due_ns
        return due_ns

    def want(self, want: Want, now_ns: int) -> None:
        """Send a getheaders to the upstream of that name."""
        upstream = self._upstreams.get(want.peer)
        if upstream is not None:
            self._heard += upstream.ask_headers(want.locator, now_ns)
            self._watch(upstream)

    def send(self, peer: str, message: Message, now_ns: int) -> None:
        """Send a message to the upstream of that name, if its handshake is complete."""
        upstream = self._upstreams[peer]
        self._heard += upstream.send(message, now_ns)
        self._watch(upstream)

    def close(self) -> None:
        """End all connections."""
        for upstream in self._upstreams.values():
            upstream.close()
        self._resolver.close()
        self._epoll.close()

    def account(self) -> None:
        """Write each upstream's row of the status block."""
        for name, upstream in self._upstreams.items():
            index = self._status.peer_index(name)
            if index is None:
                continue
            upstream.refresh_account()
            row, account = self._status.layout.peers[index], upstream.account
            with writing(row):
                row.source = Source.P2P
                row.agent = account.agent.encode()[:63]
                row.last_error = account.last_error.encode()[:127]
                for field in ("connected", "high_bandwidth", "height", "connects", "failures", "rtt_ns"):
                    setattr(row, field, getattr(account, field))
                row.bytes_received, row.skipped_messages = account.bytes_received, account.skipped_messages

    def _on_timer(self, upstream: Upstream, now_ns: int) -> list[Heard]:
        heard: list[Heard] = []
        if upstream.retry_ns is not None and now_ns >= upstream.retry_ns:
            self._start(upstream, now_ns)
        else:
            heard = upstream.on_timer(now_ns)
        self._watch(upstream)
        return heard

    def _start(self, upstream: Upstream, now_ns: int) -> None:
        if not upstream.candidates:
            found = numeric(upstream.address)
            if found is None:
                upstream.retry_ns = None
                self._resolver.submit(upstream.address)
                return
            upstream.candidates = [found]
        upstream.connect(now_ns, high_bandwidth=self._pushers() < self._max_pushers)

    def _on_resolved(self, now_ns: int) -> None:
        for address, found, error in self._resolver.results():
            upstream = self._upstreams[str(address)]
            upstream.candidates = found
            if found:
                self._start(upstream, now_ns)
            else:
                upstream.postpone(now_ns, error)
            self._watch(upstream)

    def _watch(self, upstream: Upstream) -> None:
        """Bring epoll in line with what the upstream's socket waits for; a closed socket has left epoll by itself."""
        registered = self._registered.get(upstream.name)
        descriptor = -1 if upstream.socket is None else upstream.socket.fileno()
        mask = select.EPOLLIN | (select.EPOLLOUT if upstream.wants_to_write else 0)
        if registered == (descriptor, mask):
            return
        if registered is not None and registered[0] == descriptor:
            self._epoll.modify(descriptor, mask)
        else:
            if registered is not None:
                del self._watched[registered[0]], self._registered[upstream.name]
                self._on_left()
            if descriptor < 0:
                return
            self._epoll.register(descriptor, mask)
            self._watched[descriptor] = upstream
        self._registered[upstream.name] = (descriptor, mask)

    def _on_left(self) -> None:
        """A connection, or an attempt at one, has ended: if its place as pusher is free now, another takes it."""
        if self._pushers() >= self._max_pushers:
            return
        for other in self._upstreams.values():
            if other.ready and not other.account.high_bandwidth:
                self._heard += other.request_high_bandwidth()
                self._watch(other)
                return

    def _pushers(self) -> int:
        """Upstreams that push compact blocks, or will once they are connected."""
        return sum(upstream.account.high_bandwidth for upstream in self._upstreams.values())
