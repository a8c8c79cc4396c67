"""A subscription over TCP without a socket or a clock: bytes and `now` in, items out.

The server is not trusted: each header's proof of work is checked against its own nBits, a record comes at most once,
and nothing that the server sends can make more than one frame be held. Not detected here: a chain of cheap headers with
easy nBits; whoever must know checks nBits against his own node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sprint.bitcoin.block import double_sha256, meets_target
from sprint.errors import RemoteProtocolError, SprintError
from sprint.events import Lapped
from sprint.frames import FrameDecoder, Heartbeat, Item, UdpChange, json_line
from sprint.subscription import ANSWER_TIMEOUT_NS, MAX_ANSWER, read_answer

if TYPE_CHECKING:
    from sprint.record import Record

SILENCE_TIMEOUT_NS: Final = 3_000_000_000
"""Three heartbeats."""

_BITS: Final = slice(72, 76)


class UnprovenRecordError(RemoteProtocolError):
    """A record whose header doesn't hash to its hash, or whose hash misses the header's own target."""


@dataclass(frozen=True, slots=True)
class Subscribed:
    """The server accepted the hello."""

    tier: str
    write_deadline: str
    oldest: int
    next: int
    """The first sequence that is not a replay."""
    session: int
    network: str


class ClientProtocol:
    """One subscription over any number of connections, one after the other."""

    def __init__(self, *, key: str | None = None, since: int | None = None, check_proof: bool = True) -> None:
        self.session: int | None = None
        """The numbering that `last` belongs to; None until a server has answered."""
        self.last: int | None = None if since is None else since - 1
        """The newest sequence that was received, or told as lost."""
        self._key = key
        self._check_proof = check_proof
        self._decoder = FrameDecoder()
        self._answer = b""
        self._answered = False
        self._deadline_ns = 0
        self._broken: SprintError | None = None

    def connected(self, now_ns: int) -> bytes:
        """A connection stands: the hello to send on it. It asks for what came after the last record received."""
        self._decoder = FrameDecoder()
        self._answer = b""
        self._answered = False
        self._broken = None
        self._deadline_ns = now_ns + ANSWER_TIMEOUT_NS
        return json_line(self._hello())

    def deadline(self) -> int:
        """When silence means that the connection is dead, in the time of `now`."""
        return self._deadline_ns

    def receive(self, data: bytes, now_ns: int) -> list[Item | Subscribed]:
        """What these bytes say: Subscribed first, then records, losses and heartbeats.

        Raises SubscriptionRefusedError or ServerFullError when the server doesn't want us, UnprovenRecordError for a
        record without proof of work, and RemoteProtocolError for anything else that breaks the protocol, heartbeats
        included that tell of records which never came: the connection must be given up, and a new one resumes. What
        came before the error is returned first; the next call, with no bytes if need be, then raises it.
        """
        if self._broken is not None:
            raise self._broken
        items: list[Item | Subscribed] = []
        try:
            self._receive(data, now_ns, items)
        except SprintError as error:
            if not items:
                raise
            self._broken = error
        return items

    def _hello(self) -> dict[str, object]:
        hello: dict[str, object] = {}
        if self._key is not None:
            hello["key"] = self._key
        if self.last is not None:
            hello["since"] = self.last + 1
        return hello

    def _receive(self, data: bytes, now_ns: int, items: list[Item | Subscribed]) -> None:
        if not self._answered:
            self._answer += data
            line, newline, data = self._answer.partition(b"\n")
            if len(line) > MAX_ANSWER:
                raise RemoteProtocolError(f"answer to the hello longer than {MAX_ANSWER} bytes")
            if not newline:
                return
            self._answer = b""
            answer = read_answer(line)
            subscribed = self._subscribed(answer)
            self._accepted(subscribed, answer)
            items.append(subscribed)
            self._answered = True
            self._deadline_ns = now_ns + SILENCE_TIMEOUT_NS
        came = bool(data)
        while decoded := self._decoder.receive(data):
            data = b""
            self._deadline_ns = now_ns + SILENCE_TIMEOUT_NS
            for item in decoded:
                items.extend(self._checked(item))
        if came and now_ns >= self._deadline_ns:
            raise RemoteProtocolError("bytes came, but for too long no frame that says anything")

    def _subscribed(self, answer: dict[str, Any]) -> Subscribed:
        try:
            subscribed = Subscribed(
                str(answer["tier"]),
                str(answer["writeDeadline"]),
                int(answer["oldest"]),
                int(answer["next"]),
                int(answer["session"], 16),
                str(answer["network"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            raise RemoteProtocolError(f"answer to the hello lacks a field: {str(answer)[:200]!r}") from None
        if self.session is not None and self.session != subscribed.session:
            # Another numbering: where we stood means nothing in it. Ask anew, for all that it still holds.
            self.session = None
            self.last = 0
            raise RemoteProtocolError("the server began a new session")
        return subscribed

    def _accepted(self, subscribed: Subscribed, answer: dict[str, Any]) -> None:  # noqa: ARG002 - for subclasses
        self.session = subscribed.session
        if self.last is None or self.last >= subscribed.next:
            self.last = subscribed.next - 1

    def _checked(self, item: Item) -> list[Item]:
        last = 0 if self.last is None else self.last
        if isinstance(item, UdpChange):
            return []
        if isinstance(item, Heartbeat):
            if item.session != self.session or item.sequence > last:
                raise RemoteProtocolError(f"heartbeat of record {item.sequence}: {last} was the last that came")
            return [item]
        if isinstance(item, Lapped):
            end = item.first + item.lost
            if end <= last + 1:
                return []
            self.last = end - 1
            return [Lapped(last + 1, end - last - 1)]
        if item.session != self.session:
            raise RemoteProtocolError(f"record of session {item.session:016x} in another's stream")
        if item.sequence <= last:
            return []  # had it before the reconnect
        if self._check_proof:
            check_proof(item)
        self.last = item.sequence
        gap = item.sequence - last - 1
        return [Lapped(last + 1, gap), item] if gap else [item]


def check_proof(record: Record) -> None:
    """Raises UnprovenRecordError unless the header hashes to the record's hash, and that meets the header's nBits."""
    if double_sha256(record.header) != record.hash:
        raise UnprovenRecordError(f"record {record.sequence}: its header does not hash to {record.hash[::-1].hex()}")
    bits = int.from_bytes(record.header[_BITS], "little")
    if not meets_target(record.hash, bits):
        raise UnprovenRecordError(f"record {record.sequence}: {record.hash[::-1].hex()} misses the target {bits:08x}")
