"""What a subscriber may say after its hello: lines that ask for records again, and that UDP doesn't reach it. Pure.

Whoever misses a record (UDP, or a `lost`) asks for it with `{"resend":{"first":12,"count":3}}`, and whoever hears
nothing by UDP any more says `{"udp":false}`. Everything else is
counted in bytes, and so are requests that come too often: the caller ends a connection that says too much of it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, NamedTuple

from sprint.deliveries.udp_limits import Bucket
from sprint.events import Lapped
from sprint.frames import Format, lost_frame, record_frame

if TYPE_CHECKING:
    from sprint.ring import Ring

MAX_EXTRA: Final = 1024
"""Bytes that are no request which a subscriber may send after its hello (a human at nc) before it is closed."""
MAX_REQUEST: Final = 128
"""Bytes of a request's line: two numbers of twenty digits, and room for spaces."""
MAX_RESEND: Final = 128
"""Records in one request: 25 kB in the binary format, about what the kernel takes for a session in one go."""
REQUEST_BURST: Final = 32
REQUESTS_PER_S: Final = 8
"""Twice as many as a client sends that repairs with MAX_RESEND each."""
_MAX_SEQUENCE: Final = (1 << 64) - 1


class Resend(NamedTuple):
    """These records again."""

    first: int
    number: int
    """How many."""


class GiveUp(NamedTuple):
    """Records over TCP, for no datagram arrives."""


Request = Resend | GiveUp


class Requests:
    """One session's lines."""

    __slots__ = ("_bucket", "_rest", "surplus")

    def __init__(self, now_ns: int) -> None:
        self.surplus = 0
        """Bytes that were no request, or one too many."""
        self._rest = b""
        self._bucket = Bucket(REQUEST_BURST, REQUESTS_PER_S, now_ns)

    def receive(self, data: bytes, now_ns: int) -> list[Request]:
        """The requests that these bytes complete. Holds at most MAX_REQUEST bytes of an unfinished line."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        asked: list[Request] = []
        for line in lines:
            request = read_request(line)
            if request is not None and self._bucket.take(now_ns):
                asked.append(request)
            else:
                self.surplus += len(line) + 1
        if len(self._rest) > MAX_REQUEST:
            self.surplus += len(self._rest)
            self._rest = b""
        return asked


def read_request(line: bytes) -> Request | None:
    """What a line asks for; None: nothing that there is."""
    if not 0 < len(line) <= MAX_REQUEST:
        return None
    try:
        said = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or len(said) != 1:
        return None
    if said.get("udp") is False:
        return GiveUp()
    asked = said.get("resend")
    if not isinstance(asked, dict) or asked.keys() != {"first", "count"}:
        return None
    first, count = asked["first"], asked["count"]
    if type(first) is not int or type(count) is not int:  # True is an int to isinstance
        return None
    return Resend(first, count) if 1 <= first <= _MAX_SEQUENCE and 1 <= count <= MAX_RESEND else None


def answer(request: Resend, ring: Ring, newest: int, form: Format) -> tuple[bytes, int]:
    """Frames of what the ring still holds of it, and of a loss for what it doesn't; and how many records that is.

    Nothing is said of records after `newest`, which aren't published yet.
    """
    frames: list[bytes] = []
    records = gone_from = 0
    end = min(request.first + request.number, newest + 1)
    for sequence in range(request.first, end):
        record = ring.copy(sequence)
        if record is None:
            gone_from = gone_from or sequence
            continue
        if gone_from:
            frames.append(lost_frame(Lapped(gone_from, sequence - gone_from), form))
            gone_from = 0
        frames.append(record_frame(record, form))
        records += 1
    if gone_from:
        frames.append(lost_frame(Lapped(gone_from, end - gone_from), form))
    return b"".join(frames), records
