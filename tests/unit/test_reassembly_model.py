"""Passive reassembly against a model: random conversations, cut, lost, repeated, shuffled and lied about on the way.

The model knows the stream and which of its bytes each announcement needs. What reassembly tells may only be what was
sent, and must be all of it whose bytes arrived unspoilt.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import hypothesis.strategies as st
from hypothesis import given, settings

from sprint.bitcoin.codec import MAX_PAYLOAD_SIZE
from sprint.overheard import MAX_INV_SIZE
from sprint.reassembly import MAX_GATHERED, Reassembler
from tests.unit.chains import blocks
from tests.unit.segments import KINDS, MAGIC, announcement, flow_of, forged, frame, needed, segment, told
from xdp.segments import TcpFlags

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sprint.events import Announcement, Sighting
    from xdp.segments import Segment

WINDOW = 8
"""By how many places a segment may come late."""
BLOCKS = blocks(40, 0x1F0F_FFFF)
"""At 4,000 hashes each. On regtest's own terms every second mixture of two senders' bytes would prove itself."""
FILLER = b"\x11"
"""As nBits, 0x11111111 is a target that nothing meets, so that no decoy proves itself by chance."""
Told = tuple["Announcement", bytes]

decoys = st.sampled_from(
    [
        MAGIC,
        MAGIC[:3],
        forged("tx", b"", MAX_PAYLOAD_SIZE),
        forged("cmpctblock", FILLER * 120, MAX_PAYLOAD_SIZE),
        forged("block", FILLER * 120, 300_000),
        forged("headers", b"\x01" + FILLER * 81),
        forged("inv", FILLER * 10, MAX_INV_SIZE),
        forged("inv", FILLER * 37),
        announcement(BLOCKS[30])[:80],
        announcement(BLOCKS[31], KINDS[2])[:100],
    ]
)
fillers = st.integers(0, 400).map(lambda size: FILLER * size)
bodies = st.lists(st.one_of(fillers, decoys), max_size=3).map(b"".join)
others = st.tuples(st.sampled_from(["tx", "ping", "addrv2", "blocktxn", "sendtxrcncl"]), bodies)
told_of = st.tuples(st.sampled_from(KINDS), st.integers(0, 29))


@dataclass(frozen=True)
class Conversation:
    """A stream, and for each announcement in it the range of bytes that it needs."""

    stream: bytes
    announced: list[tuple[Told, int, int]]
    sequence: int


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    stream = bytearray(draw(bodies))  # the end of a message that began before we listened
    announced = []
    decoyed = 0
    for item in draw(st.lists(st.one_of(told_of, others), min_size=1, max_size=12)):
        if isinstance(item[1], int):
            kind, block = item[0], BLOCKS[item[1]]
            assert not isinstance(kind, str)
            message = announcement(block, kind)
            announced.append(((kind, block.hash), len(stream), len(stream) + needed(kind, message)))
        else:
            assert isinstance(item[0], str)
            decoyed += item[1].count(MAGIC)
            # More pieces of messages than are gathered at a time are a case of their own.
            message = frame(item[0], item[1] if decoyed < MAX_GATHERED // 2 else FILLER * len(item[1]))
        stream += message
    sequence = draw(st.sampled_from([0, 1, 77_777, 2**32 - 300, 2**32 - 1_500, 2**31 - 200]))
    return Conversation(bytes(stream), announced, sequence)


Piece = tuple[int, int]
"""The bytes from the first to before the second offset of the stream."""


@st.composite
def cuts(draw: st.DrawFn, conversation: Conversation, *, least: int = 1) -> list[Piece]:
    """All of the stream in order, in pieces."""
    sizes = draw(st.lists(st.integers(least, 500), min_size=1, max_size=30))
    pieces: list[Piece] = []
    at = 0
    while at < len(conversation.stream):
        end = min(at + sizes[len(pieces) % len(sizes)], len(conversation.stream))
        pieces.append((at, end))
        at = end
    return pieces


def shuffled(data: st.DataObject, pieces: list[Piece]) -> list[Piece]:
    """Some come later than they were sent."""
    late = data.draw(st.lists(st.integers(0, WINDOW - 1), min_size=len(pieces), max_size=len(pieces)))
    order = sorted(range(len(pieces)), key=lambda index: (index + late[index], index))
    return [pieces[index] for index in order]


def repeated(data: st.DataObject, pieces: list[Piece], size: int) -> list[Piece]:
    """Some come again, and ranges of any bounds come too, as TCP cuts anew what it repeats."""
    pieces = list(pieces)
    for _ in range(data.draw(st.integers(0, 4))):
        pieces.insert(data.draw(st.integers(0, len(pieces))), data.draw(st.sampled_from(pieces)))
    for _ in range(data.draw(st.integers(0, 3))):
        first = data.draw(st.integers(0, size - 1))
        pieces.insert(
            data.draw(st.integers(0, len(pieces))), (first, data.draw(st.integers(first + 1, min(first + 500, size))))
        )
    return pieces


def segments_of(conversation: Conversation, pieces: Iterable[Piece], flow: int = 0) -> list[Segment]:
    return [
        segment(conversation.sequence + first, conversation.stream[first:end], flow=flow_of(flow))
        for first, end in pieces
    ]


def hear(segments: Iterable[Segment], *, glance: bool = True) -> Counter[Told]:
    """What is told, the way the source goes about it: a batch at first glance, then in full."""
    into = Reassembler(MAGIC, "capture ringbuf")
    heard: list[Sighting] = []
    for now_ns, one in enumerate(segments):
        if glance:
            heard += into.announcements.glance(one, now_ns)
        heard += into.receive(one, now_ns, glanced=glance)
    assert into.counters.sightings == len(heard)
    return Counter(told(heard))


def sent(conversation: Conversation) -> Counter[Told]:
    return Counter(what for what, _, _ in conversation.announced)


def arrived(piece: Piece, pieces: Iterable[Piece]) -> bool:
    """Whether all bytes of a range are in these pieces."""
    at = piece[0]
    for first, end in sorted(pieces):
        if first <= at:
            at = max(at, end)
    return at >= piece[1]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_exactly_what_was_announced_is_told_once_a_backend_whatever_happens_to_the_segments(
    data: st.DataObject,
) -> None:
    conversation = data.draw(conversations())
    for glance in (True, False):
        pieces = shuffled(data, data.draw(cuts(conversation)))
        pieces = repeated(data, pieces, len(conversation.stream))
        assert hear(segments_of(conversation, pieces), glance=glance) == sent(conversation)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_in_order_from_the_connections_beginning_even_whole_announcements_in_bodies_are_not_told(
    data: st.DataObject,
) -> None:
    hidden = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    body = b"".join(FILLER * 40 + announcement(BLOCKS[35], kind) for kind in hidden) + FILLER * 40
    before = data.draw(conversations())
    after = data.draw(conversations())
    whole = frame("version", FILLER * 90)
    parts = [whole, frame("tx", body), frame("addr", before.stream), frame("tx", body), frame("tx", after.stream)]
    last = announcement(BLOCKS[0])
    conversation = Conversation(b"".join([*parts, last]), [], before.sequence)
    pieces = data.draw(cuts(conversation))
    # The magic at a segment's very start is looked at even inside a body, so none is cut there.
    starts = {at for at in range(len(conversation.stream)) if conversation.stream.startswith(MAGIC, at)}
    legal = {0, len(whole), len(conversation.stream) - len(last)}
    ends = sorted({end for _, end in pieces if end not in starts - legal})
    joined = list(zip([0, *ends[:-1]], ends, strict=True))
    syn = segment(conversation.sequence, b"", flags=TcpFlags.SYN)
    assert hear([syn, *segments_of(conversation, joined)]) == {(KINDS[0], BLOCKS[0].hash): 1}


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_segments_without_announcements_may_be_lost_and_nothing_else_is(data: st.DataObject) -> None:
    """As the program in the kernel selects: whole segments go, and of others what is behind the last byte needed."""
    conversation = data.draw(conversations())
    captured: list[Segment] = []
    for first, end in shuffled(data, data.draw(cuts(conversation))):
        wanted = [min(end, last) for _, start, last in conversation.announced if start < end and last > first]
        chosen: bool = data.draw(st.booleans())
        if wanted or chosen:
            kept = conversation.stream[first : max(wanted) if wanted and chosen else end]
            captured.append(segment(conversation.sequence + first, kept, length=end - first))
    assert hear(captured) == sent(conversation)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_with_announcements_lost_nothing_is_invented_and_all_that_arrived_is_told(data: st.DataObject) -> None:
    conversation = data.draw(conversations())
    pieces = [piece for piece in data.draw(cuts(conversation)) if data.draw(st.integers(0, 3))]
    heard = hear(segments_of(conversation, shuffled(data, pieces)))
    whole = Counter(what for what, first, end in conversation.announced if arrived((first, end), pieces))
    assert heard == whole


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_forged_segments_invent_nothing_and_spoil_only_messages_whose_bytes_they_claim(data: st.DataObject) -> None:
    conversation = data.draw(conversations())
    size = len(conversation.stream)
    genuine = [(piece, False) for piece in shuffled(data, data.draw(cuts(conversation, least=20)))]
    arrivals: list[tuple[Piece, bool]] = list(genuine)
    lies: dict[Piece, tuple[bytes, int]] = {}
    boundaries = [0, *(first for (first, _), _ in genuine), *(start for _, start, _ in conversation.announced)]
    for _ in range(data.draw(st.integers(1, 3))):
        first = data.draw(st.one_of(st.integers(-500, size + 500), st.sampled_from(boundaries)))
        content = data.draw(st.one_of(decoys, fillers, st.just(frame("ping", bytes(8)) + forged("tx", b"", 60_000))))
        # The worst guess of all is one as long as what it supplants.
        content = content.ljust(data.draw(st.sampled_from([0, *(end - start for (start, end), _ in genuine)])), FILLER)
        flags = data.draw(st.sampled_from([0, 0, 0, TcpFlags.SYN, TcpFlags.FIN, TcpFlags.RST]))
        lie = (first, first + len(content))
        if lie not in lies:
            lies[lie] = (content, flags)
            arrivals.insert(data.draw(st.integers(0, len(arrivals))), (lie, True))
    segments = [
        segment(conversation.sequence + piece[0], lies[piece][0], flags=lies[piece][1])
        if is_lie
        else segment(conversation.sequence + piece[0], conversation.stream[slice(*piece)])
        for piece, is_lie in arrivals
    ]
    heard = hear(segments)
    assert not heard - sent(conversation)
    unspoilt = Counter(
        what
        for what, start, end in conversation.announced
        if not any(first < end and last > start for first, last in lies)
    )
    assert not unspoilt - heard
    assert sum((sent(conversation) - heard).values()) <= sum(
        sum(first < end and last > start for _, start, end in conversation.announced) for first, last in lies
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=80), st.integers(0, 7), st.integers(0, 3))))
def test_any_segments_at_all_are_survived_within_the_bounds(raw: list[tuple[int, bytes, int, int]]) -> None:
    into = Reassembler(MAGIC, "capture ringbuf")
    for now_ns, (sequence, payload, flags, flow) in enumerate(raw):
        content = payload.replace(b"\x00", MAGIC).replace(b"\x01", forged("inv", b"", 100))
        one = segment(sequence, content, flags=flags, flow=flow_of(flow), length=len(content) + sequence % 3)
        assert not into.announcements.glance(one, now_ns)
        assert not into.receive(one, now_ns)
    into.forget(10**12)
    assert (into.flows, into.kept_bytes) == (0, 0)
