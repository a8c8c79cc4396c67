"""One stream subscriber's state: a cursor into the ring and at most one begun frame, whatever the subscriber does.

Knows no event loop, and of its socket only send(): it takes bytes, returns how many it took, and raises BlockingIOError
where it would block. Rules:

- A begun frame is always finished before anything else is sent.
- A record that was published while the session stands is a delivery, and ends on_time, late, dropped or overwritten. A
  record that was there before is a replay: it has no deadline, and only `replayed` counts it.
- A delivery's write starts when it is first tried or, while the socket refuses bytes, when the record is published.
- expire() is called at a deadline, right after the socket was found unwritable: lower tiers drop what is past its
  deadline; on the top tiers it is overwritten by the newest record and the newest best tip, which are kept.
- A loss is told before the next record. Lost records always lie right before the cursor: `first` is cursor - lost.
- While parked, records come to the subscriber another way (UDP): the session sends only what is inserted.
"""

from __future__ import annotations

import struct
from array import array
from enum import Enum
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from sprint.events import Event, Lapped, State
from sprint.frames import Format, lost_frame, record_frame
from sprint.record import state_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from sprint.deliveries.accounts import TierLedger
    from sprint.ring import Ring

_SEEN: Final = struct.Struct("<Q")
_SEEN_OFFSET: Final = 176
_EVENT_OFFSET: Final = 24
_CATCHUP: Final = int(State.CATCHUP)


def latency_origin_ns(record: bytes) -> int:
    """When the record's block was first seen; 0 for whatever is not fresh news of a block: its latency means nothing.

    What a record tells later (validated, stale) still carries the first sighting, and a block found in a catch-up was
    seen late.
    """
    if record[_EVENT_OFFSET] != Event.PROVEN or state_of(record) & _CATCHUP:
        return 0
    return int(_SEEN.unpack_from(record, _SEEN_OFFSET)[0])


class Feed:
    """What all sessions of one delivery share: the ring, up to where it is published, and when that was."""

    __slots__ = ("_published_ns", "bytes_sent", "clock", "newest_ns", "ring", "sequence")

    def __init__(self, ring: Ring, clock: Callable[[], int]) -> None:
        self.ring = ring
        self.clock = clock
        self.sequence = ring.tail
        """The newest published record; sessions look no further, even if the ring is ahead."""
        self.newest_ns = 0
        self.bytes_sent = 0
        self._published_ns = array("Q", bytes(8 * ring.slots))

    def publish(self, sequence: int, now_ns: int) -> None:
        """Let the sessions see everything up to `sequence`, published at `now_ns`."""
        for each in range(max(self.sequence + 1, sequence - self.ring.slots + 1), sequence + 1):
            self._published_ns[(each - 1) % self.ring.slots] = now_ns
        self.sequence = sequence
        self.newest_ns = now_ns

    def published_ns(self, sequence: int) -> int:
        """When that record was published; means something while the ring holds it."""
        return self._published_ns[(sequence - 1) % self.ring.slots]


class Sends(Protocol):
    """As much of a non-blocking socket as a session needs."""

    def send(self, data: bytes, /) -> int:
        """How many bytes were taken; BlockingIOError for none, another OSError for a dead connection."""


S = TypeVar("S", bound=Sends)


class Written(Enum):
    """How a write ended."""

    ALL = "all"
    """The session is caught up."""
    SOME = "some"
    """Its slice is used up, and more waits."""
    REFUSED = "refused"
    """The socket takes no more for now."""


class Session(Generic[S]):
    """The state of one subscriber. While `idle`, it is caught up: the cursor stands right behind what is published, and
    publish() may send to it straight away, moving the cursor on."""

    __slots__ = ("_begun", "_begun_seen_ns", "_begun_sequence", "_begun_started_ns", "_behind_ns", "_expired", "_feed",
        "_ledger", "_lost", "_replay_until", "cursor", "form", "idle", "parked", "sock", "stalled_ns")  # fmt: skip

    def __init__(self, feed: Feed, ledger: TierLedger, form: Format, sock: S, since: int | None) -> None:
        """`since` is the first sequence wanted; None or one that isn't published yet: from the next record on."""
        self.form = form
        self.sock = sock
        self.idle = False
        self.parked = False
        self.stalled_ns = 0
        """Since when the socket has taken not one byte; 0: it takes them."""
        self._feed = feed
        self._ledger = ledger
        self._replay_until = feed.sequence
        self.cursor = feed.sequence + 1 if since is None else min(since, feed.sequence + 1)
        self._lost = 0
        self._expired = 0
        self._behind_ns = 0  # since when the socket has kept deliveries waiting
        self._begun = b""
        self._begun_sequence = self._begun_started_ns = self._begun_seen_ns = 0
        if self.cursor < feed.ring.oldest:
            self._lose_before(min(feed.ring.oldest, feed.sequence + 1))

    @property
    def backlog(self) -> int:
        """How many deliveries wait, a begun one included."""
        if self.parked:
            return 0
        waiting = self._feed.sequence - max(self.cursor, self._replay_until + 1) + 1
        return max(0, waiting) + (self._begun_sequence > self._replay_until)

    @property
    def replaying(self) -> bool:
        """Records from before the session's time still wait to be sent."""
        return self.cursor <= self._replay_until

    def due_ns(self) -> int:
        """When the oldest waiting delivery that isn't given up yet reaches its deadline; 0: none waits."""
        waiting = max(self.cursor, self._expired + 1)
        if self.parked or self.replaying or waiting > self._feed.sequence:
            return 0
        return max(self._feed.published_ns(waiting), self._behind_ns) + self._ledger.write_deadline_ns

    def write(self, limit: int) -> Written:
        """Finish a begun frame, then send what waits, but no more than about `limit` frames.

        Raises OSError when the socket is dead.
        """
        while True:
            if self._begun and not self._finish():
                self._fell_behind(self.stalled_ns)
                return Written.REFUSED
            if limit <= 0:
                return Written.SOME
            frames = [] if self.parked else self._waiting(limit)
            limit -= max(1, len(frames))
            if frames:
                if not self._send_frames(frames):
                    return Written.REFUSED
            elif self.parked or self.cursor > self._feed.sequence:
                self.idle = True
                self._behind_ns = self.stalled_ns = 0
                return Written.ALL

    def write_line(self, line: bytes) -> None:
        """Begin with bytes that are no frame: the answer to the hello."""
        self._begun = line

    def insert(self, frames: bytes) -> None:
        """Send these before anything that isn't begun yet; the caller bounds them. No delivery: nothing counts them."""
        self._begun += frames
        self.idle = False

    @property
    def in_mid_frame(self) -> bool:
        """Something begun, or inserted, is not sent to its end yet."""
        return bool(self._begun)

    def park(self) -> None:
        """From here on records come another way. Only a session that is caught up is parked."""
        self.parked = True

    def unpark(self) -> None:
        """From the next record on they come here again."""
        self.parked = self.idle = False
        self._replay_until = self._expired = self._feed.sequence
        self.cursor = self._feed.sequence + 1
        self._lost = self._behind_ns = 0

    def beat(self, frame: bytes) -> Written:
        """Send a heartbeat to an idle session; a socket that won't take it goes without."""
        sent = self._try(frame)
        if sent == len(frame):
            return Written.ALL
        self.idle = False
        self._begun = frame[sent:] if sent else b""
        self._fell_behind(self.stalled_ns)
        return Written.REFUSED

    def interrupted(self, sequence: int, frame: bytes, sent: int, started_ns: int, seen_ns: int) -> None:
        """publish() tried to send this frame to the idle session, and the socket took only the first `sent` bytes."""
        self.idle = False
        self._behind_ns = self.stalled_ns = started_ns
        if sent:
            self.cursor = sequence + 1
            self._begin(sequence, frame[sent:], started_ns, seen_ns)

    def expire(self, now_ns: int) -> None:
        """The socket is unwritable: give up each delivery whose deadline has passed, as the tier's policy says."""
        if self.parked:
            return
        while 0 < self.due_ns() <= now_ns:
            waiting = max(self.cursor, self._expired + 1)
            if self._ledger.overwrites:
                self._expired = waiting
            else:
                self._lose_before(waiting + 1)
        self._skip()

    def abandon(self) -> None:
        """The connection is gone: whatever still waits is dropped."""
        self._ledger.dropped(self.backlog)

    def _try(self, data: bytes) -> int:
        try:
            sent = self.sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        self._feed.bytes_sent += sent
        if sent == len(data):
            self.stalled_ns = 0
        elif sent or not self.stalled_ns:
            self.stalled_ns = self._feed.clock()
        return sent

    def _finish(self) -> bool:
        sent = self._try(self._begun)
        self._begun = self._begun[sent:]
        if self._begun:
            return False
        self._count(self._begun_sequence, self._begun_started_ns, self._feed.clock(), self._begun_seen_ns)
        self._begun_sequence = 0
        return True

    def _begin(self, sequence: int, rest: bytes, started_ns: int, seen_ns: int) -> None:
        self._begun = rest
        self._begun_sequence, self._begun_started_ns, self._begun_seen_ns = sequence, started_ns, seen_ns

    def _waiting(self, limit: int) -> list[tuple[int, bytes, int]]:
        """The next frames to send, with each record's sequence (0: no record) and the origin of its latency."""
        self._skip()
        frames = []
        if self._lost:
            frames.append((0, lost_frame(Lapped(self.cursor - self._lost, self._lost), self.form), 0))
        last = min(self._feed.sequence, self.cursor + limit - 1)
        if self.cursor <= self._expired:
            last = self.cursor  # kept from among the overwritten: what follows it isn't next in line
        for sequence in range(self.cursor, last + 1):
            record = self._feed.ring.copy(sequence)
            if record is None:
                break  # the writer has just overtaken us: the next round says what that cost
            frames.append((sequence, record_frame(record, self.form), latency_origin_ns(record)))
        return frames

    def _send_frames(self, frames: list[tuple[int, bytes, int]]) -> bool:
        data = b"".join([frame for _, frame, _ in frames])
        tried_ns = self._feed.clock()
        sent = left = self._try(data)
        ended_ns = self._feed.clock()
        for sequence, frame, seen_ns in frames:
            if left <= 0:
                break
            started_ns = tried_ns
            if sequence:
                self.cursor = sequence + 1
                if self._behind_ns:
                    started_ns = max(self._feed.published_ns(sequence), self._behind_ns)
            else:
                self._lost = 0
                self._ledger.accounts.lost_notices += 1
            if left >= len(frame):
                self._count(sequence, started_ns, ended_ns, seen_ns)
            else:
                self._begin(sequence, frame[left:], started_ns, seen_ns)
            left -= len(frame)
        if sent == len(data):
            return True
        self._fell_behind(tried_ns)
        return False

    def _fell_behind(self, now_ns: int) -> None:
        if not self._behind_ns and not self.replaying:
            self._behind_ns = now_ns

    def _count(self, sequence: int, started_ns: int, ended_ns: int, seen_ns: int) -> None:
        if sequence > self._replay_until:
            self._ledger.delivered(started_ns, ended_ns, seen_ns)
        elif sequence:
            self._ledger.accounts.replayed += 1

    def _skip(self) -> None:
        """Move the cursor to the next record that this session is still to get."""
        feed = self._feed
        keep = max(self.cursor, min(feed.ring.oldest, feed.sequence + 1))
        if self._ledger.overwrites:
            if keep > self.cursor:
                self._expired = feed.sequence  # lapped: the newest record and the newest best tip are what counts
            if keep <= self._expired:
                best = feed.ring.latest_best
                after = min(self._expired + 1, feed.sequence)
                keep = best if keep <= best <= after else after
        if keep > self.cursor:
            self._lose_before(keep)

    def _lose_before(self, keep: int) -> None:
        deliveries = keep - max(self.cursor, self._replay_until + 1)
        if deliveries > 0:
            self._ledger.lost(deliveries)
        self._lost += keep - self.cursor
        self.cursor = keep
