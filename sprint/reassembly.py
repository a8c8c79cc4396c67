"""Passive reassembly: captured TCP segments in, sightings out, as far as announcements need it.

A capture is selective (boring segments never come), unordered, and forgeable by whoever can put a packet on the wire.
So nothing here waits for a gap to close, and no single claim is believed:

- A message is looked for wherever the magic stands, and each one found is gathered by itself, from its own start on.
  No other message's length, real or forged, can hide it; what a false one says doesn't stand the proof (overheard.py).
- A message is put together only from segments that agree wherever they overlap; there, the first to come stays. A
  segment that contradicts is left out, and begins a rival of its own if it holds the message's start. Once a message is
  disputed, it is told from one segment alone or by the checksum of its whole, so never as a mixture of two senders'.
- Where a flow comes whole and in order, from a SYN or a message of sound checksum on, it is followed from message to
  message by the length field, and the magic inside a body means nothing; only at a segment's start it is still looked
  at, as is everything once a body claims more than MAX_TRUSTED_BODY. Any gap, overlap or disorder ends the following,
  and what was passed over is read after all.

Everything is bounded: bytes, messages and segments kept for a flow, bytes in all, flows (least recently heard of go
first) and their age. No flow is special: what can't be parsed (BIP324) costs one search for the magic a segment.

Pure: `now_ns` is CLOCK_MONOTONIC; sequence numbers are modulo 2**32 (RFC 9293).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from sprint.bitcoin.block import double_sha256
from sprint.bitcoin.codec import MAX_PAYLOAD_SIZE
from sprint.bitcoin.framing import FRAME_HEADER_SIZE
from sprint.overheard import EARLY_SIZE, FRAME, KINDS, MAX_INV_SIZE, Announcements, Gathered, is_command

if TYPE_CHECKING:
    from sprint.events import Sighting
    from xdp.segments import Flow, Segment

MAX_FLOWS = 4_096
"""A node has 125 peers unless told otherwise; the rest is room for a host with several, and for forged addresses."""
FLOW_AGE_NS = 10_000_000_000
"""A silent flow is forgotten: by then TCP has repeated what was lost, or nobody is early any more."""
CLOSED_AGE_NS = 1_000_000_000
"""After FIN or RST, which may be forged, so that what is half gathered has its chance."""
MAX_GATHERED = 8
"""Messages half there, a flow: one or two are real. The oldest makes room."""
MAX_STRAYS = 128
"""Segments kept, a flow: where they begin may come late, behind all the crumbs until TCP repeats what was lost."""
MAX_FLOW_BYTES = 256 * 1024
"""The longest inv that is read, and beside it strays as large as generic XDP's packets of 64 kB."""
MAX_TOTAL_BYTES = 16 * 1024 * 1024
MAX_TRUSTED_BODY = 64 * 1024
"""How far ahead a length is believed to hide the magic: a forged one hides no more, nor what begins a segment."""
ENTRY_COST = 256
"""Bytes that a kept segment or a message half there takes up beside its payload."""
FLOW_COST = 1_024
"""Bytes that a flow takes up with nothing in it."""

MAX_DECOYS = 16
"""Magics in a segment behind which nothing sound stands, and one more for each 256 bytes: then its rest goes unread."""

_MASK = 0xFFFF_FFFF
_HALF = 1 << 31
_FIN_OR_RST, _SYN = 0x05, 0x02
_HASH_ALLOWANCE = 4_096


class _FlowState:
    """What is kept of one flow."""

    __slots__ = ("charge", "gathered", "heard_ns", "here", "key", "next", "passed", "reach", "stray_bytes", "strays")

    def __init__(self, key: Flow) -> None:
        self.key = key
        self.here: int | None = None
        """While the flow is followed: the sequence number of the next segment in order."""
        self.next = 0
        """While the flow is followed: where the next message starts; before `here` if its header is half there."""
        self.reach: int | None = None
        """The end of the furthest segment so far. What comes from before it may be late or false: it isn't followed."""
        self.gathered: list[Gathered] = []
        self.strays: list[tuple[int, bytes]] = []
        """Segments that came out of order, or of a flow that isn't followed."""
        self.passed: list[tuple[int, bytes]] = []
        """Segments of the body at hand, unread: should its length prove to be false, they still can be."""
        self.stray_bytes = 0
        """What these two take up."""
        self.charge = 0
        self.heard_ns = 0

    def is_ahead(self, sequence: int) -> bool:
        """Whether nothing has been seen at or behind that place."""
        return self.reach is None or (sequence - self.reach) & _MASK < _HALF

    def keep(self, segments: list[tuple[int, bytes]], sequence: int, data: bytes) -> None:
        """Put a segment to the strays or to those passed over."""
        segments.append((sequence, data))
        self.stray_bytes += len(data) + ENTRY_COST

    def drop_passed(self) -> None:
        """The body that these lay in was one."""
        if self.passed:
            self.stray_bytes -= sum(len(data) + ENTRY_COST for _, data in self.passed)
            self.passed = []


class Reassembler:
    """One backend's flows.

    `announcements.glance(segment)` is the short way for what a segment begins with; receive() does the rest.
    """

    def __init__(self, magic: bytes, peer: str) -> None:
        """`magic`: the network's 4 bytes; `peer`: the name in the sightings."""
        self.announcements = Announcements(magic, peer)
        self.counters = self.announcements.counters
        self._magic = magic
        self._beginnings = [magic[:3], magic[:2], magic[:1]]
        self._flows: OrderedDict[Flow, _FlowState] = OrderedDict()
        self._kept_bytes = 0
        # Of the segment at hand:
        self._at_hand: tuple[int, bytes] = (0, b"")
        self._heard: list[Sighting] = []
        self._seen_ns, self._glanced = 0, False
        self._sought: tuple[int, int, list[tuple[int, bytes]]] = (-1, 0, [])  # of _strays_at() last, and its answer
        self._hashable = 0
        """Bytes that may still be hashed: decoys inside one another don't cost more than a few times their size."""

    @property
    def flows(self) -> int:
        """Flows that something is kept of."""
        return len(self._flows)

    @property
    def kept_bytes(self) -> int:
        """Payload kept, and ENTRY_COST or FLOW_COST for each thing it is kept in: at most MAX_TOTAL_BYTES."""
        return self._kept_bytes

    def receive(self, segment: Segment, now_ns: int, *, glanced: bool = False) -> list[Sighting]:
        """Take in one segment; returns what it completes, in the order found.

        `glanced`: glance() was called for this segment, so that what it found isn't looked at again.
        """
        _, arrival_ns, key, sequence, flags, length, payload = segment
        heard = self._heard = []
        data = bytes(payload)
        bits = int(flags)  # the operators of IntFlag take a microsecond each
        self.counters.segments += 1
        self.counters.bytes += len(data)
        flow = self._flows.get(key)
        if flow is None:
            if not data and not bits & _SYN:
                return heard
            flow = self._flows[key] = _FlowState(key)
        else:
            self._flows.move_to_end(key)
        flow.heard_ns = now_ns
        if bits & _SYN:
            self._let_go(flow)
            if flow.is_ahead(sequence):
                flow.here = flow.next = flow.reach = sequence
        if data:
            self._at_hand = (sequence, data)
            self._sought = (-1, 0, [])
            self._seen_ns = arrival_ns or now_ns
            self._glanced = glanced
            self._hashable = 4 * len(data) + _HASH_ALLOWANCE
            for gathered in tuple(flow.gathered):
                if gathered.contradicts(sequence, data):
                    self.counters.contradictions += 1
                elif gathered.take(sequence, data):
                    self._grow(flow, gathered)
            self._place(flow, sequence, length, data)
            if flow.is_ahead(sequence + length):
                flow.reach = (sequence + length) & _MASK
        if bits & _FIN_OR_RST:
            flow.heard_ns = now_ns - FLOW_AGE_NS + CLOSED_AGE_NS
            self._flows.move_to_end(key, last=False)
        self._settle(flow)
        self.forget(now_ns)
        return heard

    def forget(self, now_ns: int) -> None:
        """Let go of flows that have been silent too long, and of the oldest while there is too much."""
        flows = self._flows
        while flows:
            key, flow = next(iter(flows.items()))
            crowded = len(flows) > MAX_FLOWS or self._kept_bytes > MAX_TOTAL_BYTES
            if not crowded and now_ns - flow.heard_ns < FLOW_AGE_NS:
                return
            self.counters.forgotten += 1
            self.counters.abandoned += len(flow.gathered)
            self._kept_bytes -= flow.charge
            del flows[key]

    # Where messages start.

    def _place(self, flow: _FlowState, sequence: int, length: int, data: bytes) -> None:
        """Find the messages that start in this segment: by following the flow if it is next in order, else anywhere."""
        at = (flow.next - sequence) & _MASK
        if sequence != flow.here:
            self._read(flow, sequence, length, data, None)
        elif at < len(data):
            if self._read(flow, sequence, length, data, at):
                return
        elif at >= _HALF:  # a header that began in an earlier segment isn't complete even now
            flow.here = (sequence + length) & _MASK
            return
        elif length <= at <= MAX_TRUSTED_BODY:
            flow.here = (sequence + length) & _MASK
            if data.startswith(self._magic):
                self._look(flow, sequence, data, 0)
            flow.keep(flow.passed, sequence, data)
            return
        else:
            self._read(flow, sequence, length, data, None)
        flow.keep(flow.strays, sequence, data)

    def _read(self, flow: _FlowState, sequence: int, length: int, data: bytes, start: int | None) -> bool:
        """Walk from message to message; `start`: where one should begin, None where that has to be found out.

        Returns whether the flow is followed to the segment's end.
        """
        size, decoys = len(data), MAX_DECOYS + len(data) // 256
        at, followed, borne_out = start or 0, start is not None, False
        may_follow = followed or flow.is_ahead(sequence)
        while at < size and decoys:
            if not followed:
                at = data.find(self._magic, at)
                if at < 0:
                    break
            end = self._look(flow, sequence, data, at)
            if followed and end == 0:
                break
            if end > 0 and (followed or (end <= size and self._is_sound(data, at, end))):
                followed = borne_out = True
                at = end
            else:
                at = at + 1 if borne_out or not followed else 0
                followed = False
                decoys -= 1
        if followed and may_follow and (at >= length or size == length):
            flow.here, flow.next = (sequence + length) & _MASK, (sequence + at) & _MASK
            if borne_out:
                flow.drop_passed()
            else:
                flow.keep(flow.passed, sequence, data)
            return True
        self._let_go(flow)
        if not followed:
            for beginning in self._beginnings:
                if data.endswith(beginning):
                    self._open(flow, (sequence + size - len(beginning)) & _MASK, beginning)
        return False

    def _let_go(self, flow: _FlowState) -> None:
        """Follow the flow no longer, and read what was passed over on the strength of a length that may be false."""
        flow.here = None
        passed, flow.passed = flow.passed, []
        at_hand = self._at_hand
        for sequence, data in passed:
            self._at_hand = (sequence, data)
            self._hashable += 4 * len(data)
            self._read(flow, sequence, len(data), data, None)
            flow.strays.append((sequence, data))
        self._at_hand = at_hand
        flow.here = None

    def _look(self, flow: _FlowState, sequence: int, data: bytes, at: int) -> int:
        """Take what a message at `at` says, or begin to gather it; returns the offset of its end.

        0: its header isn't complete; -1: this is no message.
        """
        left = len(data) - at
        start = (sequence + at) & _MASK
        if left < FRAME_HEADER_SIZE:
            if data[at : at + 4] != self._magic[:left]:
                return -1
            self._open(flow, start, data[at:])
            return 0
        magic, command, length, checksum = FRAME.unpack_from(data, at)
        if magic != self._magic or length > MAX_PAYLOAD_SIZE:
            return -1
        end: int = at + FRAME_HEADER_SIZE + length
        kind = KINDS.get(command)
        if kind is None:
            return end if is_command(command) else -1
        if not kind.least <= length <= kind.most:
            self.counters.over_bound += 1
        elif left < EARLY_SIZE if kind.early else end > len(data):
            self._open(flow, start, data[at:])
        elif at or not self._glanced:
            if kind.early:
                self._heard += self.announcements.early(flow.key, start, kind, length, data, at, self._seen_ns)
            elif self._may_hash(length):
                payload = data[at + FRAME_HEADER_SIZE : end]
                self._heard += self.announcements.whole(flow.key, start, kind, payload, checksum, self._seen_ns)
        return end

    def _is_sound(self, data: bytes, at: int, end: int) -> bool:
        """Whether the message in data[at:end] has the checksum that its header claims."""
        if not self._may_hash(end - at):
            return False
        body = data[at + FRAME_HEADER_SIZE : end]
        return double_sha256(body)[:4] == data[at + 20 : at + FRAME_HEADER_SIZE]

    def _may_hash(self, size: int) -> bool:
        self._hashable -= size
        return self._hashable >= 0

    # Messages that come in pieces.

    def _open(self, flow: _FlowState, start: int, data: bytes) -> None:
        """Gather the message at `start`, of which `data` is there, unless that is being done."""
        opened = Gathered(start, data)
        for rival in flow.gathered:
            if rival.start == start:
                if not rival.contradicts(start, data):
                    return
                opened.disputed = True
        flow.gathered.append(opened)
        if len(flow.gathered) > MAX_GATHERED:
            del flow.gathered[0]
            self.counters.abandoned += 1
        self._grow(flow, opened)

    def _grow(self, flow: _FlowState, gathered: Gathered) -> None:
        """Go on with a message as far as this segment allows, and the strays, if all agree."""
        while True:
            if len(gathered.data) < gathered.need:
                if gathered.take(*self._at_hand):
                    continue
                behind = self._strays_at(flow, gathered.start + len(gathered.data) & _MASK)
                if not behind or gathered.disputed or any(gathered.contradicts(*stray) for stray in flow.strays):
                    return
                gathered.take(*behind[0])
            elif not self._need_more(flow, gathered):
                break
        flow.gathered.remove(gathered)
        kind = gathered.kind
        if kind is None:
            return
        data, start, body = bytes(gathered.data), gathered.start, bytes(gathered.data[FRAME_HEADER_SIZE:])
        _, _, length, checksum = FRAME.unpack_from(data)
        if not kind.early:
            self._heard += self.announcements.whole(flow.key, start, kind, body, checksum, self._seen_ns)
        elif not gathered.disputed or double_sha256(body)[:4] == checksum:
            self._heard += self.announcements.early(flow.key, start, kind, length, data, 0, self._seen_ns)

    def _strays_at(self, flow: _FlowState, end: int) -> list[tuple[int, bytes]]:
        """The strays that hold the byte of that sequence number."""
        if self._sought[:2] != (end, len(flow.strays)):  # all that a segment claims to begin ends with it: one look
            found = [stray for stray in flow.strays if (end - stray[0]) & _MASK < len(stray[1])]
            self._sought = (end, len(flow.strays), found)
        return self._sought[2]

    def _need_more(self, flow: _FlowState, gathered: Gathered) -> bool:
        """What was needed so far is there; whether that has shown that more is needed."""
        if gathered.kind is None:
            return self._begin(flow, gathered)
        whole = FRAME_HEADER_SIZE + int(FRAME.unpack_from(gathered.data)[2])
        if gathered.need == whole or not (
            gathered.disputed or any(gathered.contradicts(*stray) for stray in flow.strays)
        ):
            return False
        gathered.need = whole
        if whole > MAX_INV_SIZE:
            gathered.kind = None
            self.counters.abandoned += 1
            return False
        return True

    def _begin(self, flow: _FlowState, gathered: Gathered) -> bool:
        """Read the header of a message; whether more of it is needed. If the flow is followed, that goes on behind."""
        magic, command, length, _ = FRAME.unpack_from(gathered.data)
        kind = KINDS.get(command)
        plausible = magic == self._magic and length <= MAX_PAYLOAD_SIZE and (kind is not None or is_command(command))
        if flow.here is not None and gathered.start == flow.next:
            if plausible:
                flow.next = (gathered.start + FRAME_HEADER_SIZE + length) & _MASK
            else:
                self._let_go(flow)
        if not plausible or kind is None:
            return False
        if not kind.least <= length <= kind.most:
            self.counters.over_bound += 1
            return False
        gathered.kind = kind
        gathered.need = EARLY_SIZE if kind.early else FRAME_HEADER_SIZE + length
        return True

    def _settle(self, flow: _FlowState) -> None:
        """Keep a flow within its bounds, and count what it takes up."""
        gathered = flow.gathered
        held = sum(len(one.data) + ENTRY_COST for one in gathered) + FLOW_COST
        for segments in (flow.strays, flow.passed):
            while segments and (len(segments) > MAX_STRAYS or held + flow.stray_bytes > MAX_FLOW_BYTES):
                flow.stray_bytes -= len(segments.pop(0)[1]) + ENTRY_COST
        while held > MAX_FLOW_BYTES:
            held -= len(gathered.pop(0).data) + ENTRY_COST
            self.counters.abandoned += 1
        self._kept_bytes += held + flow.stray_bytes - flow.charge
        flow.charge = held + flow.stray_bytes
