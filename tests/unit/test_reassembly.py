"""Passive reassembly: what is told of captured segments, whatever happened to them on their way, and what is kept."""

from __future__ import annotations

import random
import struct
import tracemalloc
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from sprint.bitcoin.codec import MAX_PAYLOAD_SIZE, encode_compact_size
from sprint.bitcoin.messages import MSG_BLOCK, MSG_TX, Headers, Inv, Ping
from sprint.events import Announcement, Sighting, Source
from sprint.overheard import MAX_INV_SIZE, MAX_TOLD
from sprint.reassembly import (
    CLOSED_AGE_NS,
    FLOW_AGE_NS,
    MAX_DECOYS,
    MAX_FLOW_BYTES,
    MAX_FLOWS,
    MAX_GATHERED,
    MAX_STRAYS,
    MAX_TOTAL_BYTES,
    MAX_TRUSTED_BODY,
    Reassembler,
)
from tests.unit.chains import MS, SECOND
from tests.unit.segments import (
    BLOCKS,
    KINDS,
    MAGIC,
    announcement,
    cut,
    flow_of,
    forged,
    frame,
    needed,
    segment,
    told,
)
from xdp.segments import TcpFlags

if TYPE_CHECKING:
    from collections.abc import Iterable

    from xdp.segments import Segment

BLOCK, OTHER = BLOCKS[0], BLOCKS[1]
PING = frame("ping", Ping(7).encode())
PEER = "capture ringbuf"


def reassembler() -> Reassembler:
    return Reassembler(MAGIC, PEER)


def hear(segments: Iterable[Segment], into: Reassembler | None = None) -> list[Sighting]:
    """All that is told of them, a microsecond apart."""
    into = reassembler() if into is None else into
    return [one for now_ns, s in enumerate(segments) for one in into.receive(s, now_ns * 1_000)]


def at_target(bits: int) -> bytes:
    """A cmpctblock whose header claims a target that its hash doesn't meet."""
    body = bytearray(BLOCK.compact(7).encode())
    body[72:76] = struct.pack("<I", bits)
    return frame("cmpctblock", bytes(body))


# What a sighting says


def test_a_cmpctblock_is_told_with_its_header_and_an_estimate_of_its_transactions() -> None:
    (sighting,) = hear([segment(1, announcement(BLOCK), arrival_ns=17)])
    assert sighting == Sighting(
        Source.CAPTURE, PEER, Announcement.CMPCTBLOCK, BLOCK.hash, BLOCK.header.encode(), 17, 1, 0, validated=False
    )


def test_a_block_is_told_with_its_size_and_its_transactions() -> None:
    (sighting,) = hear([segment(1, announcement(BLOCK, Announcement.BLOCK))])
    assert (sighting.hash, sighting.transactions, sighting.size) == (BLOCK.hash, 1, len(BLOCK.payload))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_a_packet_says_counts_as_validated(kind: Announcement) -> None:
    (sighting,) = hear([segment(1, announcement(BLOCK, kind))])
    assert (sighting.announcement, sighting.hash, sighting.validated) == (kind, BLOCK.hash, False)
    assert sighting.header == (None if kind is Announcement.INV else BLOCK.header.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_a_sighting_is_as_old_as_its_segment_or_as_now_where_that_is_unknown(kind: Announcement) -> None:
    for arrival_ns, seen_ns in ((0, 900), (800, 800)):
        one = segment(1, announcement(BLOCK, kind), arrival_ns=arrival_ns)
        assert [s.seen_ns for s in reassembler().announcements.glance(one, 900)] == [seen_ns]
        assert [s.seen_ns for s in reassembler().receive(one, 900)] == [seen_ns]


def test_up_to_eight_headers_are_told_each_and_more_are_no_announcement() -> None:
    for count in (1, 2, 8, 9, 300):
        chosen = [BLOCKS[i % len(BLOCKS)] for i in range(count)]
        into = reassembler()
        heard = hear(
            [segment(1, frame("headers", Headers(b"".join(b.header.encode() for b in chosen)).encode()))], into
        )
        assert [s.hash for s in heard] == ([b.hash for b in chosen] if count <= 8 else [])
        assert into.counters.over_bound == (count > 8)


def test_an_inv_names_its_last_block_and_one_of_transactions_nothing() -> None:
    entries = ((MSG_BLOCK, BLOCK.hash), (MSG_BLOCK, OTHER.hash), (MSG_TX, bytes(32)))
    assert told(hear([segment(1, frame("inv", Inv(entries).encode()))])) == [(Announcement.INV, OTHER.hash)]
    assert hear([segment(1, frame("inv", Inv(((MSG_TX, BLOCK.hash),) * 30).encode()))]) == []


def test_an_empty_headers_says_nothing() -> None:
    assert hear([segment(1, frame("headers", Headers(b"").encode()))]) == []


@pytest.mark.parametrize(
    ("short_ids", "captured", "transactions"),
    [
        (0, 114, 1),
        (0, 113, 0),
        (0, 112, 0),
        (3, 113, 4),
        (3, 1_000, 4),
        (3_000, 115, 3_001),
        (3_000, 114, 0),
        (3_000, 104, 0),
    ],
)
def test_the_transactions_of_a_compact_block_are_told_as_far_as_captured(
    short_ids: int, captured: int, transactions: int
) -> None:
    body = b"".join(
        (
            *(BLOCK.header.encode(), bytes(8), encode_compact_size(short_ids), bytes(6 * short_ids)),
            *(b"\x01\x00", BLOCK.coinbase),
        )
    )
    message = frame("cmpctblock", body)
    (sighting,) = hear([segment(1, message[:captured], length=len(message))])
    assert sighting.transactions == transactions


def test_a_header_that_does_not_meet_its_own_target_is_counted_and_not_told() -> None:
    for bits in (0x1D00_FFFF, 0, 0xFF7F_FFFF):
        into = reassembler()
        assert hear([segment(1, at_target(bits))], into) == []
        assert into.counters.unproven == 1
        assert into.announcements.glance(segment(1, at_target(bits)), 1) == ()


@pytest.mark.parametrize("kind", [Announcement.HEADERS, Announcement.INV])
def test_a_bad_checksum_is_counted_and_not_told(kind: Announcement) -> None:
    message = bytearray(announcement(BLOCK, kind))
    message[40] ^= 1
    into = reassembler()
    assert hear([segment(1, bytes(message)), segment(5_000, announcement(BLOCK, kind))], into) == [
        *hear([segment(5_000, announcement(BLOCK, kind), arrival_ns=1_000)])
    ]
    assert into.counters.bad_checksum == 1


def test_a_sound_checksum_over_a_malformed_body_is_counted_and_not_told() -> None:
    into = reassembler()
    assert (
        hear([segment(1, frame("headers", b"\x02" + bytes(81))), segment(500, frame("inv", b"\xfe" + bytes(36)))], into)
        == []
    )
    assert into.counters.malformed == 2


def test_another_networks_magic_says_nothing() -> None:
    message = b"\xf9\xbe\xb4\xd9" + announcement(BLOCK)[4:]
    assert hear([segment(1, message)]) == []
    assert reassembler().announcements.glance(segment(1, message), 1) == ()


# Pieces


@pytest.mark.parametrize("kind", KINDS)
def test_a_glance_tells_a_whole_announcement_at_a_segments_start_and_receive_does_not_repeat_it(
    kind: Announcement,
) -> None:
    into = reassembler()
    one = segment(1, announcement(BLOCK, kind) + PING)
    assert told(into.announcements.glance(one, 1)) == [(kind, BLOCK.hash)]
    assert into.receive(one, 1, glanced=True) == []
    assert into.counters.repeated == 0
    assert into.receive(one, 2) == []
    assert into.counters.repeated == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_announcement_is_told_as_soon_as_enough_of_it_is_there_and_no_sooner(kind: Announcement) -> None:
    message = announcement(BLOCK, kind)
    enough = needed(kind, message)
    for size in range(enough):
        assert hear([segment(1, message[:size])]) == []
        assert reassembler().announcements.glance(segment(1, message[:size]), 1) == ()
    assert told(hear([segment(1, message[:enough])])) == [(kind, BLOCK.hash)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [b"", PING, frame("tx", bytes(300)), b"the end of some body"])
def test_an_announcement_cut_anywhere_is_told_once_in_either_order(kind: Announcement, before: bytes) -> None:
    stream = before + announcement(BLOCK, kind) + PING
    for at in range(1, len(stream)):
        both = cut(stream, [at])
        assert told(hear(both)) == [(kind, BLOCK.hash)], at
        assert told(hear(reversed(both))) == [(kind, BLOCK.hash)], at


@pytest.mark.parametrize("kind", KINDS)
def test_an_announcement_is_told_once_byte_by_byte_and_over_the_wrap_of_sequence_numbers(kind: Announcement) -> None:
    stream = frame("tx", bytes(10)) + announcement(BLOCK, kind) + announcement(OTHER, kind)
    for sequence in (1, 2**32 - 20, 2**32 - 60, 2**32 - 140):
        assert told(hear(cut(stream, range(len(stream)), sequence))) == [(kind, BLOCK.hash), (kind, OTHER.hash)]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_in_reverse_within_the_window_of_reordering_are_told_once(kind: Announcement) -> None:
    stream = announcement(BLOCK, kind)
    pieces = cut(stream, range(0, len(stream), 8), 2**32 - 50)
    assert len(pieces) <= MAX_STRAYS
    assert told(hear(reversed(pieces))) == [(kind, BLOCK.hash)]


@pytest.mark.parametrize("kind", KINDS)
def test_crumbs_that_come_before_what_was_lost_ahead_of_them_is_repeated_are_put_together(kind: Announcement) -> None:
    stream = announcement(BLOCK, kind)[:120]
    crumbs = cut(stream, range(len(stream)))
    after = cut(PING * 3, range(0, 96, 16), 1_000 + len(stream))
    assert told(hear([*crumbs[1:], crumbs[0], *after])) == told(hear([segment(1_000, stream)]))
    assert told(hear([*crumbs[:9], *crumbs[10:], *after, crumbs[9]])) == told(hear([segment(1_000, stream)]))


def test_a_retransmission_is_told_once_a_flow_and_once_a_backend() -> None:
    one, other = reassembler(), reassembler()
    first, elsewhere = segment(1, announcement(BLOCK)), segment(1, announcement(BLOCK), flow=flow_of(1))
    assert told(hear([first, first, elsewhere, first, elsewhere], one)) == [(Announcement.CMPCTBLOCK, BLOCK.hash)] * 2
    assert told(hear([first], other)) == [(Announcement.CMPCTBLOCK, BLOCK.hash)]


def test_a_retransmission_cut_otherwise_is_not_told_again() -> None:
    stream = PING + announcement(BLOCK) + announcement(OTHER, Announcement.HEADERS) + PING
    into = reassembler()
    assert len(hear(cut(stream, [50, 170]), into)) == 2
    for at in range(1, len(stream)):
        assert hear(cut(stream, [at]), into) == []


def test_the_same_announcement_sent_twice_is_two() -> None:
    assert len(hear([segment(1, announcement(BLOCK)), segment(1_000, announcement(BLOCK))])) == 2


def test_what_was_told_is_remembered_for_a_bounded_number() -> None:
    into = reassembler()
    for number in range(MAX_TOLD + 1):
        hear([segment(1, announcement(BLOCK), flow=flow_of(number))], into)
    assert hear([segment(1, announcement(BLOCK), flow=flow_of(MAX_TOLD))], into) == []
    assert len(hear([segment(1, announcement(BLOCK), flow=flow_of(0))], into)) == 1


def test_bytes_that_are_never_captured_hold_nothing_up() -> None:
    compact = announcement(BLOCK)[:128]
    claimed = forged("cmpctblock", compact[24:], 20_000)
    heard = hear(
        [
            segment(1_000, claimed, length=1_448),
            segment(1_000 + 20_024, announcement(OTHER, Announcement.HEADERS)),
            segment(900_000, announcement(BLOCKS[2], Announcement.INV)),
            segment(3_000_000_000, announcement(BLOCKS[3])),
        ]
    )
    assert [s.hash for s in heard] == [block.hash for block in BLOCKS[:4]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_cut_short_behind_what_is_needed_is_enough(kind: Announcement) -> None:
    stream = frame("tx", bytes(50)) + announcement(BLOCK, kind)
    captured = 74 + needed(kind, announcement(BLOCK, kind))
    into = reassembler()
    short = segment(1, stream[:captured], length=9_000)
    assert told(hear([short, segment(9_001, announcement(OTHER, kind))], into)) == [
        (kind, BLOCK.hash),
        (kind, OTHER.hash),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_cut_segment_lacks_may_come_by_a_retransmission(kind: Announcement) -> None:
    message = announcement(BLOCK, kind)
    for captured in range(1, needed(kind, message)):
        heard = hear([segment(1, message[:captured], length=len(message)), segment(1, message)])
        assert told(heard) == [(kind, BLOCK.hash)]


def test_a_long_inv_in_pieces_is_told_and_one_over_the_bound_is_not() -> None:
    for count, expected in ((3_600, 1), (MAX_INV_SIZE // 36 + 1, 0)):
        into = reassembler()
        stream = frame("inv", Inv((*(((MSG_TX, bytes(32)),) * (count - 1)), (MSG_BLOCK, BLOCK.hash))).encode())
        assert len(hear(cut(stream, range(0, len(stream), 1_448)), into)) == expected
        assert into.counters.over_bound == 1 - expected
        assert into.counters.abandoned == 0


# The magic in bodies


def in_order(stream: bytes, size: int, sequence: int = 1_000) -> list[Segment]:
    """From the connection's first segment on."""
    return [segment(sequence, b"", flags=TcpFlags.SYN), *cut(stream, range(0, len(stream), size), sequence)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [200, 333, 1_448, 60_000])
def test_a_whole_announcement_inside_a_body_is_none_while_the_flow_is_followed(kind: Announcement, size: int) -> None:
    hidden = frame("tx", bytes(37) + announcement(BLOCK, kind) + bytes(1_000) + announcement(BLOCK, kind) + bytes(37))
    assert len(hidden) > 1_200
    stream = hidden + announcement(OTHER, kind) + hidden + PING + announcement(BLOCKS[2], kind)
    assert told(hear(in_order(stream, size))) == [(kind, OTHER.hash), (kind, BLOCKS[2].hash)]


def test_a_message_of_sound_checksum_is_where_following_begins() -> None:
    hidden = frame("tx", bytes(500) + announcement(BLOCK) + bytes(500))
    stream = hidden + announcement(OTHER)
    tail = b"the end of some body"
    assert told(hear(cut(tail + PING + stream, [300, 800, 1_100]))) == [(Announcement.CMPCTBLOCK, OTHER.hash)]
    assert len(hear(cut(tail + forged("ping", bytes(8)) + stream, [300, 800, 1_100]))) == 2


def test_a_false_announcement_inside_a_body_is_never_told_and_hides_nothing() -> None:
    for kind in KINDS:
        for decoy in (
            forged("tx", b"", MAX_PAYLOAD_SIZE),
            forged("cmpctblock", bytes(300), MAX_PAYLOAD_SIZE),
            forged("block", bytes(300)),
            forged("headers", bytes(90), 8 * 81 + 1),
            forged("inv", bytes(90), MAX_INV_SIZE),
            announcement(OTHER, kind)[:60],
            MAGIC * 5,
        ):
            stream = bytes(30) + decoy + b"tail" + announcement(BLOCK, kind) + PING
            for at in range(1, len(stream), 3):
                assert told(hear(cut(stream, [at]))) == [(kind, BLOCK.hash)]


def test_more_decoys_than_are_looked_at_hide_no_more_than_their_own_segment() -> None:
    decoys = forged("tx", b"", 4_000) * (MAX_DECOYS + 10)
    into = reassembler()
    assert hear([segment(1, decoys + announcement(BLOCK)[:100] + bytes(4))], into) == []
    assert len(hear([segment(1 + len(decoys) + 104, announcement(OTHER))], into)) == 1


# Forged segments


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["syn", "ping", "nothing"])
def test_a_forged_length_hides_no_real_message(kind: Announcement, start: str) -> None:
    """The forged segment comes first, in order; then the real one for the same bytes, and all that follows."""
    for length in (100, 3_000, 60_000, MAX_PAYLOAD_SIZE):
        real = [segment(1_000, frame("tx", bytes(30)) + announcement(BLOCK, kind)[:70])]
        real += [segment(1_000 + 54 + 70, announcement(BLOCK, kind)[70:] + announcement(OTHER, kind) + PING)]
        before = {
            "syn": [segment(1_000, b"", flags=TcpFlags.SYN)],
            "ping": [segment(1_000 - len(PING), PING)],
            "nothing": [],
        }[start]
        heard = hear([*before, segment(1_000, forged("tx", bytes(100), length)), *real])
        assert told(heard) == [(kind, BLOCK.hash), (kind, OTHER.hash)], length


@pytest.mark.parametrize("kind", KINDS)
def test_a_forged_body_hides_nothing_that_begins_a_segment_and_nothing_behind_its_trusted_length(
    kind: Announcement,
) -> None:
    """The worst case: the real segment, of the forged one's very length, is not captured."""
    first = forged("tx", bytes(100), MAX_PAYLOAD_SIZE)
    here = 1_000 + len(first)
    into = reassembler()
    heard = hear([segment(1_000, b"", flags=TcpFlags.SYN), segment(1_000, first)], into)
    heard += hear([segment(here, announcement(BLOCK, kind))], into)
    here += len(announcement(BLOCK, kind))
    heard += hear([segment(here, bytes(20) + announcement(OTHER, kind))], into)
    assert told(heard) == [(kind, BLOCK.hash), (kind, OTHER.hash)]
    short = forged("tx", bytes(100), MAX_TRUSTED_BODY)
    into = reassembler()
    assert hear([segment(1_000, b"", flags=TcpFlags.SYN), segment(1_000, short)], into) == []
    here = 1_000 + len(short)
    assert told(hear([segment(here, announcement(BLOCK, kind))], into)) == [(kind, BLOCK.hash)]
    here += len(announcement(BLOCK, kind))
    assert hear([segment(here, bytes(20) + announcement(OTHER, kind))], into) == []
    here += MAX_TRUSTED_BODY
    assert told(hear([segment(here, bytes(20) + announcement(OTHER, kind))], into)) == [(kind, OTHER.hash)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_passed_over_on_a_forged_lengths_word_is_told_once_that_is_contradicted(kind: Announcement) -> None:
    """The real segment for the forged one's bytes is late: the next one continues the lie, by its very place."""
    first, second = frame("tx", bytes(60)), bytes(20) + announcement(BLOCK, kind)
    into = reassembler()
    assert hear([segment(1_000, b"", flags=TcpFlags.SYN)], into) == []
    assert hear([segment(1_000, forged("tx", bytes(60), 3_000))], into) == []
    assert hear([segment(1_084, second)], into) == []
    assert told(hear([segment(1_000, first)], into)) == [(kind, BLOCK.hash)]


@pytest.mark.parametrize("kind", KINDS)
def test_where_no_message_starts_as_a_forged_length_says_all_of_the_segment_is_read(kind: Announcement) -> None:
    real = bytes(10) + announcement(BLOCK, kind) + bytes(10)
    for length in range(61, 60 + len(real)):
        into = reassembler()
        assert hear([segment(1_000, b"", flags=TcpFlags.SYN)], into) == []
        assert hear([segment(1_000, forged("tx", bytes(60), length))], into) == []
        assert told(hear([segment(1_084, real)], into)) == ([(kind, BLOCK.hash)]), length


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_comes_late_is_followed(kind: Announcement) -> None:
    """A forged repetition of sound checksum ends where the real flow stands, and would hide what comes next."""
    into = reassembler()
    assert hear([segment(1_000, PING + frame("tx", bytes(32)))], into) == []
    lie = PING + forged("tx", bytes(32), 60_000)
    assert hear([segment(1_000, lie)], into) == []
    assert told(hear([segment(1_000 + len(lie), bytes(20) + announcement(BLOCK, kind))], into)) == [(kind, BLOCK.hash)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_forged_sequence_number_disturbs_nothing(kind: Announcement) -> None:
    for sequence in (0, 990, 1_050, 1_500, 2**31, 2**32 - 1):
        into = reassembler()
        stream = frame("tx", bytes(30)) + announcement(BLOCK, kind) + announcement(OTHER, kind)
        real = cut(stream, [20, 90, 150])
        lie = segment(sequence, forged("tx", bytes(20), MAX_PAYLOAD_SIZE))
        for at in range(len(real) + 1):
            heard = hear([*real[:at], lie, *real[at:]], reassembler())
            if not 950 < sequence < 1_200:
                assert told(heard) == [(kind, BLOCK.hash), (kind, OTHER.hash)], (sequence, at)
            else:
                assert [one for one in told(heard) if one[1] not in {BLOCK.hash, OTHER.hash}] == []
        assert into.counters.sightings == 0


@pytest.mark.parametrize("flags", [TcpFlags.SYN, TcpFlags.FIN, TcpFlags.RST, TcpFlags.SYN | TcpFlags.RST])
@pytest.mark.parametrize("kind", KINDS)
def test_a_forged_flag_loses_nothing(kind: Announcement, flags: TcpFlags) -> None:
    stream = announcement(BLOCK, kind) + announcement(OTHER, kind)
    for at in range(1, len(stream), 5):
        for sequence in (1_000, 1_000 + at, 77):
            first, second = cut(stream, [at])
            heard = hear([first, segment(sequence, b"", flags=flags), second])
            assert told(heard) == [(kind, BLOCK.hash), (kind, OTHER.hash)]


@pytest.mark.parametrize("kind", KINDS)
def test_segments_that_contradict_make_no_message_that_neither_sent(kind: Announcement) -> None:
    """Two senders, two messages of the same length at the same place; both in pieces."""
    one, two = announcement(BLOCK, kind), announcement(OTHER, kind)
    assert len(one) == len(two)
    allowed = {(kind, BLOCK.hash), (kind, OTHER.hash)}
    for first, second in ((30, 60), (60, 30), (90, 90), (96, 28)):
        theirs, real = cut(one, [first]), cut(two, [second])
        assert set(told(hear([*theirs, *real]))) == allowed
        assert set(told(hear([theirs[0], *real]))) == {(kind, OTHER.hash)}
        for mixed in ([theirs[0], real[0], theirs[1], real[1]], [real[0], theirs[0], real[1], theirs[1]]):
            assert set(told(hear(mixed))) <= allowed


def test_a_contradiction_inside_a_message_is_counted_and_what_came_first_stays() -> None:
    message = announcement(BLOCK, Announcement.HEADERS)
    liar = bytearray(message)
    liar[30:50] = bytes(20)
    into = reassembler()
    segments = [segment(1, message[:50]), segment(21, bytes(liar[20:])), segment(51, message[50:])]
    assert told(hear(segments, into)) == [(Announcement.HEADERS, BLOCK.hash)]
    assert into.counters.contradictions == 1


def test_forged_pieces_of_messages_push_out_the_oldest_first() -> None:
    into = reassembler()
    message = announcement(BLOCK, Announcement.HEADERS)
    pieces = [segment(10_000 * n, forged("inv", bytes(50), 5_000)) for n in range(1, MAX_GATHERED)]
    heard = hear([segment(1, message[:50]), *pieces], into)
    assert into.counters.abandoned == 0
    heard += hear([segment(51, message[50:])], into)
    assert told(heard) == [(Announcement.HEADERS, BLOCK.hash)]
    heard = hear([segment(400_000, message[:50]), *pieces, segment(500_000, forged("inv", b"", 5_000))], into)
    assert heard == []
    assert into.counters.abandoned == 1


# Bounds


def test_a_silent_flow_is_forgotten_and_a_closed_one_soon() -> None:
    into = reassembler()
    for number, flags in enumerate((0, TcpFlags.FIN, TcpFlags.RST)):
        into.receive(segment(1, announcement(BLOCK)[:50], flow=flow_of(number), flags=flags), 5 * SECOND)
    assert into.flows == 3
    into.forget(5 * SECOND + CLOSED_AGE_NS - 1)
    assert into.flows == 3
    into.forget(5 * SECOND + CLOSED_AGE_NS)
    assert into.flows == 1
    into.forget(5 * SECOND + FLOW_AGE_NS)
    assert (into.flows, into.kept_bytes) == (0, 0)
    assert into.counters.abandoned == 3


def test_the_flow_least_recently_heard_of_makes_room() -> None:
    into = reassembler()
    message = announcement(BLOCK)
    for number in range(MAX_FLOWS):
        into.receive(segment(1, message[:50], flow=flow_of(number)), number)
    into.receive(segment(51, message[50:60], flow=flow_of(0)), MAX_FLOWS)
    into.receive(segment(1, b"x", flow=flow_of(MAX_FLOWS)), MAX_FLOWS)
    assert into.flows == MAX_FLOWS
    assert into.receive(segment(51, message[50:], flow=flow_of(1)), MAX_FLOWS) == []
    assert len(into.receive(segment(61, message[60:], flow=flow_of(0)), MAX_FLOWS)) == 1


def test_a_segment_without_payload_is_not_remembered() -> None:
    into = reassembler()
    for flags in (0, TcpFlags.FIN, TcpFlags.RST):
        into.receive(segment(1, b"", flags=flags), 1)
    assert into.flows == 0


def test_one_flow_keeps_no_more_than_its_bound_and_still_hears() -> None:
    into = reassembler()
    rng = random.Random(1)
    for number in range(300):
        body = forged("inv", rng.randbytes(1_000), MAX_INV_SIZE) if number % 3 else rng.randbytes(60_000)
        into.receive(segment(number * 200_000, body), number)
        assert into.kept_bytes <= MAX_FLOW_BYTES
    assert len(into.receive(segment(4_000_000_000, announcement(BLOCK)), 300)) == 1


def test_a_flow_that_cannot_be_read_costs_its_strays_and_is_forgotten() -> None:
    into = reassembler()
    rng = random.Random(2)
    heard = [one for n in range(2_000) for one in into.receive(segment(n * 1_448, rng.randbytes(1_448)), n * MS)]
    assert heard == []
    assert into.kept_bytes <= (MAX_STRAYS + MAX_GATHERED + 1) * 2_048
    into.forget(2 * SECOND + FLOW_AGE_NS)
    assert into.kept_bytes == 0


STATED_BYTES = MAX_TOTAL_BYTES + MAX_TOLD * 1_024
"""All that a reassembler may hold: payload and what keeping it costs, and what was told."""


def _peak(segments: Iterable[Segment], into: Reassembler) -> int:
    """Tracing makes it several times slower, so it is done for the last part only, which replaces all that was kept."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number, one in enumerate(segments):
            into.receive(one, number)
            assert into.kept_bytes <= MAX_TOTAL_BYTES
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_a_hundred_thousand_flows_take_no_more_memory_than_stated() -> None:
    into = reassembler()
    partial, tiny, whole = forged("inv", bytes(600), 60_000), MAGIC[:2], announcement(BLOCK)
    segments = [segment(1, (partial, tiny, whole)[number % 3], flow=flow_of(number)) for number in range(100_000)]
    hear(segments[:80_000], into)
    peak = _peak(segments[80_000:], into)
    assert into.flows == MAX_FLOWS
    assert into.counters.forgotten == 100_000 - MAX_FLOWS
    assert into.kept_bytes // 2 < peak < STATED_BYTES


def test_a_gigabyte_of_junk_takes_no_more_memory_than_stated_and_does_not_deafen() -> None:
    into = reassembler()
    rng = random.Random(3)
    packet, large = rng.randbytes(1_448), rng.randbytes(65_000)
    decoys = b"".join(forged("inv", rng.randbytes(40), rng.randrange(37, MAX_INV_SIZE)) for _ in range(1_000))
    flows = [flow_of(number) for number in range(500)]

    def segments(until: int) -> Iterable[Segment]:
        sequence = into.counters.segments * 65_536
        while into.counters.bytes <= until:
            for number in range(500):
                junk = decoys if number % 50 == 0 else packet if number % 4 == 0 else large
                sequence += len(junk) + number % 7
                yield segment(sequence, junk, flow=flows[number * 17 % 500])

    hear(segments(900_000_000), into)
    peak = _peak(segments(1 << 30), into)
    assert into.counters.bytes > 1 << 30
    assert MAX_TOTAL_BYTES // 2 < peak < STATED_BYTES
    assert len(hear([segment(1, announcement(BLOCK))], into)) == 1


def test_the_bounds_fit_into_one_another() -> None:
    for smaller, larger in pairwise((MAX_TRUSTED_BODY, MAX_INV_SIZE, MAX_FLOW_BYTES, MAX_TOTAL_BYTES)):
        assert smaller < larger
