"""What a subscriber says after its hello: requests, bytes that mean nothing, and that it has no more to say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sprint.deliveries.requests import MAX_EXTRA, GiveUp, answer
from sprint.tiers import NS_PER_MS

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from sprint.deliveries.catch_up import CatchUp
    from sprint.deliveries.deadlines import Deadlines
    from sprint.deliveries.requests import Resend
    from sprint.deliveries.session import Feed
    from sprint.deliveries.subscriber import Subscriber
    from sprint.deliveries.udp_sessions import UdpSessions

_PROBE_NS: Final = 100 * NS_PER_MS
"""After a client has half-closed: by then, the answer to a heartbeat has told whether it is gone altogether."""


class Hearing:
    """Reads from all subscribers of one delivery; `end` and `heartbeat` are the delivery's."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        feed: Feed,
        catching_up: CatchUp,
        deadlines: Deadlines[Subscriber],
        udp: UdpSessions | None,
        *,
        end: Callable[[Subscriber], None],
        heartbeat: Callable[[Subscriber], None],
    ) -> None:
        self._loop = loop
        self._feed = feed
        self._catching_up = catching_up
        self._deadlines = deadlines
        self._udp = udp
        self._end = end
        self._heartbeat = heartbeat

    def add(self, subscriber: Subscriber) -> None:
        """Listen to this one too, until the loop is told otherwise."""
        self._loop.add_reader(subscriber.sock, self._readable, subscriber)

    def _readable(self, subscriber: Subscriber) -> None:
        try:
            data = subscriber.sock.recv(MAX_EXTRA + 1)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._end(subscriber)
            return
        if data:
            for request in subscriber.requests.receive(data, self._feed.clock()):
                if not isinstance(request, GiveUp):
                    self._send_again(subscriber, request)
                elif self._udp is not None:
                    self._udp.give_up(subscriber)
            if subscriber.requests.surplus > MAX_EXTRA:
                self._end(subscriber)
            return
        # End of file is a close, or only the sending half's (`printf … | nc -N`). A heartbeat tells which: a peer that
        # is gone answers it with a reset.
        self._loop.remove_reader(subscriber.sock)
        subscriber.half_closed = True
        if subscriber.idle:
            self._heartbeat(subscriber)
        if not subscriber.closed:
            self._deadlines.set(subscriber, self._feed.clock() + _PROBE_NS)

    def _send_again(self, subscriber: Subscriber, request: Resend) -> None:
        """Answer a request; while an earlier answer is still under way, one more is as good as lost."""
        if subscriber.in_mid_frame:
            return
        frames, records = answer(request, self._feed.ring, self._feed.sequence, subscriber.form)
        if frames:
            subscriber.ledger.accounts.repaired += records
            subscriber.insert(frames)
            self._catching_up.add(subscriber)
