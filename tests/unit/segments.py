"""What tests of the capture share: regtest blocks as the messages that announce them, and streams cut into segments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sprint.bitcoin.framing import encode_frame
from sprint.bitcoin.messages import MSG_BLOCK, MSG_WTX, Headers, Inv
from sprint.bitcoin.networks import REGTEST
from sprint.events import Announcement
from tests.unit.chains import blocks
from xdp.segments import Backend, Flow, Segment, TcpFlags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sprint.events import Sighting
    from sprint.regtest import MinedBlock

MAGIC = REGTEST.magic
MASK = 0xFFFF_FFFF
KINDS = (Announcement.CMPCTBLOCK, Announcement.BLOCK, Announcement.HEADERS, Announcement.INV)
BLOCKS = blocks(40)


def flow_of(number: int = 0) -> Flow:
    """One of many flows."""
    return Flow(number.to_bytes(16, "big"), b"\xff" * 16, 18444, 50_000)


def frame(command: str, payload: bytes) -> bytes:
    """A whole message."""
    return encode_frame(MAGIC, command, payload)


def forged(command: str, payload: bytes, length: int | None = None) -> bytes:
    """A message that begins well and has neither the length nor the checksum that its header claims."""
    claimed = len(payload) if length is None else length
    return MAGIC + command.encode().ljust(12, b"\0") + claimed.to_bytes(4, "little") + b"\xde\xad\xbe\xef" + payload


def announcement(block: MinedBlock, kind: Announcement = Announcement.CMPCTBLOCK) -> bytes:
    """The message that announces a block in this way."""
    if kind is Announcement.CMPCTBLOCK:
        return frame("cmpctblock", block.compact(7).encode())
    if kind is Announcement.BLOCK:
        return frame("block", block.payload)
    if kind is Announcement.HEADERS:
        return frame("headers", Headers(block.header.encode()).encode())
    return frame("inv", Inv(((MSG_WTX, bytes(32)), (MSG_BLOCK, block.hash))).encode())


def needed(kind: Announcement, message: bytes) -> int:
    """How many bytes of that message must have been captured before it is told."""
    return 104 if kind in {Announcement.CMPCTBLOCK, Announcement.BLOCK} else len(message)


def segment(
    sequence: int,
    payload: bytes,
    *,
    flow: Flow | None = None,
    backend: Backend = Backend.RINGBUF,
    flags: int = 0,
    length: int | None = None,
    arrival_ns: int = 0,
) -> Segment:
    """`length`: on the wire, where the payload has been cut short."""
    on_wire = len(payload) if length is None else length
    return Segment(
        backend, arrival_ns, flow or flow_of(), sequence & MASK, TcpFlags(flags), on_wire, memoryview(payload)
    )


def cut(stream: bytes, at: Sequence[int], sequence: int = 1_000, flow: Flow | None = None) -> list[Segment]:
    """The stream in segments that end at these offsets, and at its end."""
    ends = [*sorted({end for end in at if 0 < end < len(stream)}), len(stream)]
    starts = [0, *ends[:-1]]
    return [
        segment(sequence + start, stream[start:end], flow=flow) for start, end in zip(starts, ends, strict=True)
    ]  # fmt: skip


def told(sightings: Sequence[Sighting]) -> list[tuple[Announcement, bytes]]:
    """What was said, in brief."""
    return [(sighting.announcement, sighting.hash) for sighting in sightings]
