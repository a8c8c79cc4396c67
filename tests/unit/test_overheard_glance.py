"""The hot path of the capture says exactly what the long way says, whatever stands in the segment."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sprint.bitcoin.codec import encode_compact_size
from sprint.reassembly import Reassembler
from tests.unit.segments import BLOCKS, MAGIC, announcement, frame, segment, told

BLOCK = BLOCKS[0]
COUNTS = st.one_of(
    st.integers(0, 70_000).map(encode_compact_size),
    st.integers(0, 0xFFFF).map(lambda count: b"\xfd" + count.to_bytes(2, "little")),  # also what is no canonical size
    st.binary(min_size=1, max_size=9),
)


@settings(deadline=None, max_examples=400)
@given(
    count=COUNTS,
    behind=st.binary(max_size=40),
    short_ids=st.integers(0, 300),
    captured=st.integers(60, 2_000),
    nonce=st.integers(0, 3),
)
def test_a_compact_blocks_glance_and_the_long_way_agree(
    count: bytes, behind: bytes, short_ids: int, captured: int, nonce: int
) -> None:
    header = bytearray(BLOCK.header.encode())
    header[76] ^= nonce  # three of four have to prove their work anew, which every second does
    message = frame("cmpctblock", bytes(header) + bytes(8) + count + bytes(6 * short_ids) + behind)
    one = segment(1, message[:captured], length=len(message), arrival_ns=7)
    at_once, in_full = Reassembler(MAGIC, "capture"), Reassembler(MAGIC, "capture")
    glanced = list(at_once.announcements.glance(one, 9))
    assert glanced == in_full.receive(one, 9)
    assert at_once.counters.unproven == in_full.counters.unproven
    assert at_once.counters.sightings == len(glanced)
    assert at_once.receive(one, 9, glanced=True) == []


def test_what_was_told_is_forgotten_oldest_first() -> None:
    into = Reassembler(MAGIC, "capture")
    told_of = [segment(1_000 * number, announcement(BLOCK)) for number in range(4_096 + 2)]
    assert all(told(list(into.announcements.glance(one, 1))) for one in told_of)
    assert [len(into.announcements.glance(one, 1)) for one in told_of[-4_096:]] == [0] * 4_096
    assert [len(into.announcements.glance(one, 1)) for one in told_of[:2]] == [1, 1]
