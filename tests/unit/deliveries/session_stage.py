"""What tests of a session share: a pipe with so much room for a socket, and a ring with a clock in the test's hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sprint.deliveries.accounts import TierLedger
from sprint.deliveries.session import Feed, Session, Written
from sprint.events import Event, Lapped, Source, State
from sprint.frames import Format, FrameDecoder, record_frame
from sprint.record import Record
from sprint.ring import Ring, RingWriter, size_for
from sprint.status import StatusBlock
from sprint.tiers import PROFILES, Tier

if TYPE_CHECKING:
    from sprint.frames import Item
    from sprint.status import TierAccounts

DEADLINE = 1_000


class Pipe:
    """A non-blocking socket that takes `room` bytes and then no more."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.room = room
        self.taken = b""

    def send(self, data: bytes, /) -> int:
        if not self.room:
            raise BlockingIOError
        sent = min(self.room, len(data))
        self.room -= sent
        self.taken += data[:sent]
        return sent

    def items(self) -> list[Item]:
        decoder = FrameDecoder()
        items = decoder.receive(self.taken)
        assert decoder.unfinished == 0
        return items

    def told(self) -> list[int | tuple[int, int]]:
        """Records as their sequences, losses as (first, count), in the order told."""
        told: list[int | tuple[int, int]] = []
        for item in self.items():
            if isinstance(item, Record):
                told.append(item.sequence)
            elif isinstance(item, Lapped):
                told.append((item.first, item.lost))
        return told


class Bench:
    """One ring, one tier, a clock in the test's hand."""

    def __init__(self, tier: Tier = Tier.FREE, slots: int = 16) -> None:
        self.now = 1_000_000
        self.ring = Ring.create(bytearray(size_for(slots)), slots, session=7)
        self.writer = RingWriter(self.ring)
        self.feed = Feed(self.ring, lambda: self.now)
        status = StatusBlock.create(7, {})
        self.accounts: TierAccounts = status.delivery(0, "stream").tiers[tier]
        self.ledger = TierLedger(self.accounts, PROFILES[tier], DEADLINE)

    def session(self, pipe: Pipe, since: int | None = None) -> Session[Pipe]:
        session = Session(self.feed, self.ledger, Format.BINARY, pipe, since)
        session.write(16)
        return session

    def put(self, *, best: bool = True, state: State = State.PROVEN) -> bytes:
        sequence = self.writer.next_sequence
        if best:
            state |= State.BEST
        record = Record(
            b"\xfa\xbf\xb5\xda", 7, sequence, Event.PROVEN, Source.P2P, state, sequence, 0, 0, 0, 0, 0, 0,
            bytes(32), bytes(80), self.now - 10, self.now,
        ).encode()  # fmt: skip
        self.writer.claim()[:] = record
        self.writer.commit(best=best)
        self.feed.publish(sequence, self.now)
        return record

    def publish(self, session: Session[Pipe], *, best: bool = True) -> int:
        """As the delivery does: straight to an idle session, else it waits."""
        record = self.put(best=best)
        sequence = self.feed.sequence
        if session.idle and session.cursor == sequence:
            frame = record_frame(record, Format.BINARY)
            try:
                sent = session.sock.send(frame)
            except BlockingIOError:
                sent = 0
            if sent == len(frame):
                session.cursor = sequence + 1
                self.ledger.delivered(self.now, self.now, self.now)
            else:
                session.interrupted(sequence, frame, sent, self.now, self.now)
        return sequence

    def pass_deadline(self, session: Session[Pipe]) -> None:
        """The timer's work: ask the socket once more, then give up what is due."""
        self.now += DEADLINE
        if session.write(16) is Written.REFUSED:
            session.expire(self.now)

    def ended(self) -> dict[str, int]:
        return {name: getattr(self.accounts, name) for name in ("on_time", "late", "dropped", "overwritten")}
