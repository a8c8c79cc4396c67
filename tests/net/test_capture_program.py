"""The programs of capture.c, packet by packet through BPF_PROG_TEST_RUN: no interface has a part in it."""

from __future__ import annotations

import itertools
import os
import random
import struct
from typing import TYPE_CHECKING, NamedTuple

import pytest
from scapy.layers.inet import ICMP, UDP, IPOption
from scapy.layers.inet6 import (
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q

from tests.net import packets
from tests.net.conftest import REGTEST_MAGIC, REGTEST_PORT
from tests.net.packets import ANNOUNCEMENTS, OTHERS, Announcement, Wire, from_peer, ipv4, ipv6
from tests.net.slowness import SLOWNESS
from xdp import kernel, loader
from xdp.frames import parse_frame
from xdp.ringbuf import RingBuffer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from scapy.packet import Packet

XDP_DROP, XDP_PASS = 1, 2
TC_ACT_UNSPEC = 0xFFFFFFFF
CONSTANTS, LAYOUTS = loader.COMMON
ENTRY = LAYOUTS["express_entry"]
ANNOUNCED, CONTINUED, PARTIAL, BEGINS, UNPLACED = (
    CONSTANTS[f"CAPTURED_{reason}"] for reason in ("ANNOUNCEMENT", "CONTINUED", "PARTIAL", "BEGINS", "UNPLACED")
)
EVERY_CPU = kernel.possible_cpus()


class Captured(NamedTuple):
    """A record of the ring buffer."""

    sequence: int
    length: int
    skipped: int
    reasons: int
    payload: bytes
    fields: dict[str, int | bytes]


class Outcome(NamedTuple):
    """What became of one packet."""

    verdict: int
    marked: bool
    captured: list[Captured]
    data: bytes


class Bench:
    """The programs, with nothing remembered from another test."""

    epochs = itertools.count(0, 1 << 16)
    """Apart by more than the programs themselves count up in a test."""

    def __init__(self, loaded: loader.Loaded, ring: RingBuffer) -> None:
        self.loaded, self.ring = loaded, ring
        loaded.configure(express=1, wakeup=0, mirror_ifindex=1, every_magic=0)
        loaded.watch([REGTEST_PORT])
        self.forget()

    def forget(self) -> None:
        """Flows, counters and the ring as after loading."""
        maps = self.loaded.maps
        for key in kernel.map_keys(maps["flows"], LAYOUTS["flow_key"].size):
            kernel.map_delete(maps["flows"], key)
        kernel.map_update(maps["counters"], bytes(4), bytes(LAYOUTS["counters"].size * EVERY_CPU))
        self.loaded.configure(epoch=next(self.epochs))
        self.drain()

    def drain(self) -> list[Captured]:
        """All records."""
        found: list[Captured] = []
        while records := self.ring.poll(1000):
            for record in records:
                fields = ENTRY.unpack(record)
                payload = bytes(record[ENTRY.size :])
                assert len(payload) == fields["captured"] <= fields["length"]
                found.append(
                    Captured(
                        fields["sequence"], fields["length"], fields["skipped"], fields["reasons"], payload, fields
                    )
                )
            self.ring.release()
        return found

    def classify(self, packet: bytes) -> Outcome:
        """One packet through the interface's XDP program."""
        context = kernel.XDP_MD.pack(0, len(packet), 0, 0, 0, 0)
        run = kernel.run_program(self.loaded.programs["classify"], packet, context=context)
        metadata = kernel.XDP_MD.unpack(run.context)[0]
        assert run.data[metadata:] == packet  # untouched, whatever else it did
        assert metadata in (0, 4)
        marked = metadata == 4
        assert not marked or run.data[:4] == struct.pack("=I", CONSTANTS["MARK"])
        return Outcome(run.verdict, marked, self.drain(), run.data)

    def classify_tc(self, packet: bytes) -> Outcome:
        """The same through the program for tc, which has no mirror here."""
        run = kernel.run_program(self.loaded.programs["classify_tc"], packet)
        assert run.data == packet
        return Outcome(run.verdict, False, self.drain(), run.data)

    def all(self, segments: Iterable[bytes]) -> list[Captured]:
        """What was captured of these, in order."""
        found = []
        for packet in segments:
            outcome = self.classify(packet)
            assert outcome.verdict == XDP_PASS
            assert outcome.marked == bool(outcome.captured)
            found += outcome.captured
        return found

    def counts(self, *names: str) -> tuple[int, ...]:
        """These counters."""
        counters = self.loaded.counters()
        return tuple(counters[name] for name in names)


@pytest.fixture(scope="module")
def ring(loaded: loader.Loaded) -> Iterator[RingBuffer]:
    with RingBuffer.open(loaded.maps["express"]) as ring:
        yield ring


@pytest.fixture
def bench(loaded: loader.Loaded, ring: RingBuffer) -> Bench:
    return Bench(loaded, ring)


class Coverage:
    """Which bytes of a stream have been captured; they must be the stream's."""

    def __init__(self, stream: bytes, first_sequence: int) -> None:
        self.stream, self.first, self.seen = stream, first_sequence, bytearray(len(stream))

    def add(self, captured: Iterable[Captured]) -> None:
        for one in captured:
            at = (one.sequence - self.first) & 0xFFFFFFFF
            assert self.stream[at : at + len(one.payload)] == one.payload
            self.seen[at : at + len(one.payload)] = b"\1" * len(one.payload)

    def has(self, start: int, end: int) -> bool:
        return all(self.seen[start:end])


# ── shapes of headers ──

ANNOUNCED_HEADERS = packets.headers()
PADDING = [PadN(optdata=bytes(4))]


class Shape(NamedTuple):
    """Headers, and whether an announcement behind them is to be found."""

    description: str
    headers: Packet
    is_captured: bool


SHAPES = (
    Shape("plain IPv4", ipv4() / from_peer(), True),
    Shape("to our port, from a peer that connected to us", ipv4() / from_peer(sport=40000, dport=REGTEST_PORT), True),
    Shape("IPv4 with 40 bytes of options", ipv4(options=[IPOption(b"\x01")] * 40) / from_peer(), True),
    Shape("TCP with 40 bytes of options", ipv4() / from_peer(options=[("NOP", None)] * 40), True),
    Shape("IPv4 that must not be fragmented", ipv4(flags="DF") / from_peer(), True),
    Shape("a VLAN tag", packets.ethernet() / Dot1Q(vlan=7) / ipv4().payload / from_peer(), True),
    Shape("a service tag and a VLAN tag", packets.ethernet() / Dot1AD() / Dot1Q() / ipv4().payload / from_peer(), True),
    Shape("IPv6", ipv6() / from_peer(), True),
    Shape("IPv6 behind a VLAN tag", packets.ethernet() / Dot1Q() / ipv6().payload / from_peer(), True),
    Shape("IPv6 with hop-by-hop options", ipv6() / IPv6ExtHdrHopByHop(options=PADDING) / from_peer(), True),
    Shape(
        "IPv6 with a routing header", ipv6() / IPv6ExtHdrRouting(addresses=["fd77::9", "fd77::8"]) / from_peer(), True
    ),
    Shape(
        "IPv6 with six extension headers",
        ipv6()
        / IPv6ExtHdrHopByHop(options=PADDING)
        / IPv6ExtHdrRouting()
        / IPv6ExtHdrFragment()
        / AH(payloadlen=4, icv=bytes(12), nh=60)
        / IPv6ExtHdrDestOpt(options=PADDING)
        / IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(60))])
        / from_peer(),
        True,
    ),
    Shape("three VLAN tags", packets.ethernet() / Dot1Q() / Dot1Q() / Dot1Q() / ipv4().payload / from_peer(), False),
    Shape("a fragment's beginning", ipv4(flags="MF") / from_peer(), False),
    Shape("a fragment's end", ipv4(frag=100) / from_peer(), False),
    Shape("an IPv6 fragment", ipv6() / IPv6ExtHdrFragment(m=1) / from_peer(), False),
    Shape("a later IPv6 fragment", ipv6() / IPv6ExtHdrFragment(offset=3) / from_peer(), False),
    Shape("other ports", ipv4() / from_peer(sport=443), False),
    Shape("a port next to ours", ipv4() / from_peer(sport=REGTEST_PORT + 1, dport=REGTEST_PORT - 1), False),
    Shape("UDP", ipv4() / UDP(sport=REGTEST_PORT, dport=40000), False),
    Shape("ICMP", ipv4() / ICMP(), False),
    Shape("ARP", packets.ethernet() / ARP(), False),
    Shape("no IP version that there is", ipv4(version=5) / from_peer(), False),
    Shape("an IPv4 header that says it is too short", ipv4(ihl=4) / from_peer(), False),
    Shape("a TCP header that says it is too short", ipv4() / from_peer(dataofs=4), False),
    Shape("a TCP header that says it is longer than the packet", ipv4(len=44) / from_peer(dataofs=15), False),
    Shape("a length beyond the packet", ipv4(len=1500) / from_peer(), False),
)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.description)
def test_an_announcement_is_found_behind_every_shape_of_headers_that_can_carry_one(bench: Bench, shape: Shape) -> None:
    outcome = bench.classify(packets.raw(shape.headers, ANNOUNCED_HEADERS))
    assert outcome.verdict == XDP_PASS
    assert outcome.marked == shape.is_captured
    assert [one.payload for one in outcome.captured] == [ANNOUNCED_HEADERS] * shape.is_captured
    assert bench.counts("packets", "announcements") == (1, int(shape.is_captured))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.description)
def test_tc_classifies_as_xdp_does(bench: Bench, shape: Shape) -> None:
    bench.loaded.configure(mirror_ifindex=0)
    outcome = bench.classify_tc(packets.raw(shape.headers, ANNOUNCED_HEADERS))
    assert outcome.verdict == TC_ACT_UNSPEC
    assert [one.payload for one in outcome.captured] == [ANNOUNCED_HEADERS] * shape.is_captured


def test_an_entry_names_the_flow_the_sequence_and_the_time(bench: Bench) -> None:
    (first,) = bench.all([Wire(sequence=77).send(ANNOUNCED_HEADERS)])
    (second,) = bench.all([Wire(ipv6() / from_peer(), sequence=78).send(ANNOUNCED_HEADERS)])
    mapped = bytes(10) + b"\xff\xff"
    assert first.fields["flow.source"] == mapped + bytes([10, 77, 0, 2])
    assert first.fields["flow.destination"] == mapped + bytes([10, 77, 0, 1])
    assert (first.fields["flow.source_port"], first.fields["flow.destination_port"]) == (REGTEST_PORT, 40000)
    assert second.fields["flow.source"] == bytes.fromhex("fd77") + bytes(13) + b"\2"
    assert (first.sequence, second.sequence) == (77, 78)
    assert first.fields["flags"] == packets.PSH_ACK
    assert int(first.fields["arrival_ns"]) < int(second.fields["arrival_ns"])


def test_padding_of_a_short_frame_is_no_payload(bench: Bench) -> None:
    wire = Wire()
    ping = packets.message("ping", bytes(8))
    assert bench.all([wire.syn(), wire.send(ping) + bytes(30), wire.send(ANNOUNCED_HEADERS) + bytes(3)])[0].payload == (
        ANNOUNCED_HEADERS
    )


# ── announcements in a stream ──


@pytest.mark.parametrize("announcement", ANNOUNCEMENTS, ids=lambda announcement: announcement.name)
def test_an_announcement_is_captured_at_every_offset(bench: Bench, announcement: Announcement) -> None:
    size = 1448
    for offset in range(24, size, 3):
        bench.forget()
        wire = Wire(sequence=0xFFFFFF00)  # the sequence wraps on the way
        stream = (
            packets.message("tx", packets.filler(offset - 24)) + announcement.bytes + packets.message("ping", bytes(8))
        )
        coverage = Coverage(stream, wire.sequence)
        coverage.add(bench.all([wire.syn(), *wire.cut(stream, size)]))
        assert coverage.has(offset, offset + announcement.needed), offset
        assert not any(coverage.seen[:offset]), offset
        assert bench.counts("announcements", "opaque_flows") == (1, 0)


@pytest.mark.parametrize("announcement", ANNOUNCEMENTS, ids=lambda announcement: announcement.name)
def test_an_announcement_is_captured_wherever_it_is_split(bench: Bench, announcement: Announcement) -> None:
    before = packets.message("ping", bytes(8))
    stream = before + announcement.bytes + before
    for first in range(1, len(before) + announcement.needed + 5):
        for second in (first + 1, first + 5, first + 30, len(stream) - 1):
            bench.forget()
            wire = Wire()
            coverage = Coverage(stream, wire.sequence)
            pieces = [stream[:first], stream[first:second], stream[second:]]
            coverage.add(bench.all([wire.syn(), *(wire.send(piece) for piece in pieces if piece)]))
            assert coverage.has(len(before), len(before) + announcement.needed), (first, second)
            assert bench.counts("announcements") == (1,)


def test_an_announcement_is_captured_byte_by_byte(bench: Bench) -> None:
    wire = Wire()
    stream = packets.message("ping", bytes(8)) + packets.cmpctblock() + packets.headers()
    coverage = Coverage(stream, wire.sequence)
    coverage.add(bench.all([wire.syn(), *wire.cut(stream, 1)]))
    assert coverage.has(32, 32 + packets.PREFIX)
    assert coverage.has(32 + 724, len(stream))
    assert not any(coverage.seen[32 + packets.PREFIX : 32 + 724])
    assert bench.counts("announcements") == (2,)


def test_of_a_long_block_only_the_beginning_is_captured(bench: Bench) -> None:
    wire = Wire()
    stream = packets.block(1_000_000)
    (entry,) = bench.all([wire.syn(), *wire.cut(stream, 1448)])
    assert entry.payload == stream[: packets.PREFIX]
    assert (entry.length, entry.reasons) == (1448, ANNOUNCED)
    assert bench.counts("captured", "surplus") == (1, 0)


def test_long_headers_are_captured_to_their_end(bench: Bench) -> None:
    wire = Wire()
    stream = packets.message("ping", bytes(8)) + packets.headers(2000) + packets.message("ping", bytes(8))
    found = bench.all([wire.syn(), *wire.cut(stream, 1448)])
    assert b"".join(one.payload for one in found) == stream[32:-32]
    assert {one.reasons for one in found[1:]} == {CONTINUED}


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other[4:16].rstrip(b"\0").decode())
def test_another_message_is_not_captured(bench: Bench, other: bytes) -> None:
    wire = Wire()
    assert not bench.all([wire.syn(), *wire.cut(other * 3, 1448), wire.send(other)])
    assert bench.counts("segments", "announcements", "captured") == (2, 0, 0)


def test_every_segment_that_begins_with_the_magic_is_captured_on_demand_and_is_surplus(bench: Bench) -> None:
    bench.loaded.configure(every_magic=1)
    wire = Wire()
    ping, whole = packets.message("ping", bytes(8)), packets.headers()
    found = bench.all([wire.syn(), wire.send(ping), wire.send(whole), wire.send(ping[:28]), wire.send(ping[28:])])
    assert [(one.reasons, one.payload) for one in found] == [
        (BEGINS, ping[:24]),
        (BEGINS | ANNOUNCED, whole),
        (BEGINS, ping[:24]),
    ]
    assert bench.counts("captured", "surplus") == (3, 2)


def test_a_connection_that_was_there_before_is_picked_up_with_its_next_message(bench: Bench) -> None:
    wire = Wire()
    middle, whole = packets.filler(500), packets.message("ping", bytes(8)) + packets.cmpctblock()
    first, second = bench.all([wire.send(middle), wire.send(whole)])
    assert (first.payload, first.reasons) == (middle, UNPLACED)
    assert second.payload == whole
    assert second.reasons == BEGINS | ANNOUNCED


@pytest.mark.parametrize("count", [24, 63])
def test_many_messages_in_a_segment_are_followed(bench: Bench, count: int) -> None:
    wire = Wire()
    stream = packets.message("verack") * count + packets.headers()
    found = bench.all([wire.syn(), wire.send(stream), wire.send(packets.headers())])
    assert [one.reasons for one in found] == [ANNOUNCED, ANNOUNCED]
    assert found[0].skipped == count * 24


@pytest.mark.parametrize("count", [64, 65, 90])
def test_what_is_behind_too_many_messages_is_captured_unframed(bench: Bench, count: int) -> None:
    wire = Wire()
    stream = packets.message("verack") * count + packets.headers()
    found = bench.all([wire.syn(), wire.send(stream), wire.send(packets.filler(10)), wire.send(packets.headers())])
    assert [one.reasons for one in found] == [UNPLACED, UNPLACED, BEGINS | ANNOUNCED]
    assert found[0].payload == stream[64 * 24 :]


@pytest.mark.parametrize("seed", range(20))
def test_every_announcement_that_arrives_is_captured_through_loss_repetition_and_disorder(
    bench: Bench, seed: int
) -> None:
    dice = random.Random(seed)
    wire = Wire(sequence=dice.randrange(1 << 32))
    stream, wanted = bytearray(), []
    for _ in range(400):
        if dice.random() < 0.3:
            announcement = dice.choice(ANNOUNCEMENTS)
            wanted.append((len(stream), len(stream) + announcement.needed))
            stream += announcement.bytes
        else:
            stream += dice.choice([*OTHERS, packets.message("tx", packets.filler(5000))])
    whole = bytes(stream)
    coverage, arrived = Coverage(whole, wire.sequence), bytearray(len(whole))
    flight, at = [], 0
    while at < len(whole):
        size = dice.choice([1448, 1448, 500, 24, 7])
        flight.append((at, wire.at(wire.sequence + at, whole[at : at + size]), min(size, len(whole) - at)))
        at += size
    at = 0
    while at < len(flight):
        if dice.random() < 0.05:
            flight[at : at + 3] = reversed(flight[at : at + 3])
        if dice.random() < 0.05:
            flight.insert(at + dice.randrange(5), flight[at])
        at += 1
    # The first header comes again until it has come: a flow that hides its beginning for long counts as opaque.
    flight = [one for one in flight if one[0] < 24 or dice.random() < 0.95]
    coverage.add(bench.all([wire.syn(), *(packet for _, packet, _ in flight)]))
    for start, _, size in flight:
        arrived[start : start + size] = b"\1" * size
    # Of an announcement whose header has not arrived nobody can tell that it is one.
    for start, end in wanted:
        if all(arrived[start:end]):
            assert coverage.has(start, end), (start, end)
    assert bench.counts("opaque_flows", "dropped") == (0, 0)


# ── what an attacker can put on the wire ──

FORGED = (
    ("a length that hides four megabytes", packets.message("tx", packets.filler(100), length=4_000_000)),
    ("a length beyond the protocol", packets.message("tx", packets.filler(100), length=4_000_001)),
    ("headers longer than there are", packets.message("headers", packets.filler(100), length=4_000_000)),
    ("a block that goes on", packets.message("block", packets.filler(100), length=3_999_999)),
    ("no message", packets.filler(124)),
)


@pytest.mark.parametrize("forged", FORGED, ids=lambda forged: forged[0])
@pytest.mark.parametrize("ahead", [0, 1, 1000, -1000, 3_000_000, 1 << 31])
def test_a_forged_segment_hides_no_announcement_that_begins_a_segment(
    bench: Bench, forged: tuple[str, bytes], ahead: int
) -> None:
    wire = Wire()
    bench.all([wire.syn(), wire.send(packets.message("verack")), wire.send(packets.message("ping", bytes(8)))])
    for _ in range(5):
        bench.all([wire.at(wire.sequence + ahead, forged[1])])
        found = bench.all([wire.send(packets.cmpctblock())])
        assert any(one.payload[:24] == packets.cmpctblock()[:24] for one in found)


@pytest.mark.parametrize("forged", FORGED, ids=lambda forged: forged[0])
def test_a_forged_segment_where_none_is_due_hides_nothing(bench: Bench, forged: tuple[str, bytes]) -> None:
    wire = Wire()
    bench.all([wire.syn(), wire.send(packets.message("verack")), wire.send(packets.message("ping", bytes(8)))])
    inside = packets.message("tx", packets.filler(300)) + packets.headers()
    for ahead in (1, 100, 5000, 3_000_000, -1, -4000, 1 << 31):
        begun, ended = inside[:200], inside[200:]
        bench.all([wire.send(begun), wire.at(wire.sequence + ahead, forged[1])])
        found = bench.all([wire.send(ended)])
        assert any(packets.headers() in one.payload for one in found), ahead


def test_a_forged_length_where_a_message_is_due_hides_one_segment_at_most(bench: Bench) -> None:
    wire = Wire()
    bench.all([wire.syn(), wire.send(packets.message("verack"))])
    bench.all([wire.at(wire.sequence, FORGED[0][1])])
    inside = packets.message("tx", packets.filler(300)) + packets.headers()
    found = bench.all(
        [wire.send(inside), wire.send(inside[:100]), wire.send(inside[100:]), wire.send(packets.headers())]
    )
    assert b"".join(one.payload for one in found).count(packets.headers()) == 3


def test_a_forged_syn_hides_nothing(bench: Bench) -> None:
    wire = Wire()
    bench.all([wire.syn(), wire.send(packets.message("verack"))])
    inside = packets.message("tx", packets.filler(300)) + packets.headers()
    bench.all([wire.send(inside[:200]), wire.at(12345, b"", packets.SYN)])
    found = bench.all([wire.send(inside[200:])])
    assert any(packets.headers() in one.payload for one in found)


def test_nothing_but_pass_comes_of_a_hundred_thousand_random_packets(bench: Bench) -> None:
    dice = random.Random(4)
    shapes = [packets.raw(shape.headers, ANNOUNCED_HEADERS) for shape in SHAPES]
    classify = bench.loaded.programs["classify"]
    verdicts = set()
    for number in range(100_000):
        if number % 4 == 0:
            packet = dice.randbytes(dice.randrange(14, 400))
        else:
            mutant = bytearray(dice.choice(shapes))
            for _ in range(dice.randrange(1, 6)):
                mutant[dice.randrange(len(mutant))] = dice.randrange(256)
            packet = bytes(mutant[: max(14, len(mutant) - dice.choice([0, 0, 0, 1, 50]))])
        verdicts.add(kernel.run_program(classify, packet).verdict)
        if number % 1000 == 0:
            bench.drain()
    assert verdicts == {XDP_PASS}
    assert bench.counts("packets", "dropped") == (100_000, 0)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[6], SHAPES[11]], ids=lambda shape: shape.description)
def test_a_packet_cut_short_anywhere_passes_and_is_not_read_beyond_its_end(bench: Bench, shape: Shape) -> None:
    whole = packets.raw(shape.headers, ANNOUNCED_HEADERS)
    for size in range(14, len(whole)):
        outcome = bench.classify(whole[:size])
        assert outcome.verdict == XDP_PASS
        assert not outcome.captured
        assert not outcome.marked
    assert bench.classify(whole).captured


# ── what is remembered of a flow ──


def on_cpu(bench: Bench, cpu: int, packet: bytes) -> list[Captured]:
    """What is captured of a packet that comes in there."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        return bench.all([packet])
    finally:
        os.sched_setaffinity(0, allowed)


def test_the_message_behind_a_long_body_is_found_however_much_of_that_was_passed_by(bench: Bench) -> None:
    wire = Wire(sequence=0xFFF00000)
    stream = packets.block(3_000_000) + packets.headers() + packets.block(400_000) + packets.cmpctblock()
    coverage = Coverage(stream, wire.sequence)
    coverage.add(bench.all([wire.syn(), *wire.cut(stream, 1448)]))
    for at in (0, 3_000_024, 3_000_024 + len(packets.headers()), len(stream) - len(packets.cmpctblock())):
        assert coverage.has(at, at + len(packets.headers())), at
    assert bench.counts("announcements", "surplus") == (4, 0)
    assert bench.counts("segments") == (-(-len(stream) // 1448),)


def test_of_a_flow_that_is_remembered_a_segment_that_begins_with_the_magic_is_captured(bench: Bench) -> None:
    wire = Wire()
    body = packets.block(200_000)
    bench.all([wire.syn(), *wire.cut(body[:50_000], 1448)])
    assert not bench.all([wire.at(wire.sequence, packets.filler(1448))])
    (found,) = bench.all([wire.at(wire.sequence, packets.headers())])
    assert found.reasons == BEGINS | ANNOUNCED


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_what_one_cpu_remembers_of_a_forged_length_is_forgotten_when_another_sees_it_contradicted(
    bench: Bench,
) -> None:
    here, there = sorted(os.sched_getaffinity(0))[:2]
    wire = Wire()
    inside = packets.message("tx", packets.filler(2000)) + packets.headers()
    for packet in (wire.syn(), wire.send(packets.message("verack")), wire.at(wire.sequence, FORGED[0][1])):
        on_cpu(bench, here, packet)
    assert not on_cpu(bench, here, wire.at(wire.sequence + 24, packets.filler(100)))
    assert not on_cpu(bench, here, wire.at(wire.sequence + 124, packets.filler(100)))
    assert on_cpu(bench, there, wire.send(inside[:1000]))
    assert not on_cpu(bench, here, wire.send(inside[1000:1500]))
    (found,) = on_cpu(bench, here, wire.send(inside[1500:]))
    assert found.payload.startswith(packets.headers())


def test_another_connection_by_the_same_ports_is_not_taken_for_the_body_of_the_last(bench: Bench) -> None:
    wire = Wire(sequence=1000)
    bench.all([wire.syn(), *wire.cut(packets.block(1_000_000)[:30_000], 1448)])
    anew = Wire(sequence=wire.sequence + 5000)
    stream = packets.message("ping", bytes(8)) + packets.headers()
    found = bench.all([anew.syn(), anew.send(stream[:20]), anew.send(stream[20:])])
    assert found[-1].payload.endswith(packets.headers())


def test_other_flows_are_not_taken_for_one_that_is_remembered(bench: Bench) -> None:
    wire = Wire()
    bench.all([wire.syn(), *wire.cut(packets.block(1_000_000)[:30_000], 1448)])
    for headers in (
        ipv4() / from_peer(dport=40000 + 64),
        ipv4(id=7) / from_peer(dport=40000, sport=REGTEST_PORT + 64),
        ipv6() / from_peer(),
    ):
        other = Wire(headers, sequence=wire.sequence)
        bench.loaded.watch([REGTEST_PORT, REGTEST_PORT + 64])
        (found,) = bench.all([other.send(packets.filler(500))])
        assert found.reasons == UNPLACED


def test_parts_of_a_long_body_that_come_after_the_next_message_are_no_surplus(bench: Bench) -> None:
    wire = Wire()
    syn, body, behind = wire.syn(), packets.block(100_000), packets.message("ping", bytes(8)) * 3
    segments = wire.cut(body + behind + behind, 1448)
    late = segments[20:30]
    found = bench.all([syn, *segments[:20], *segments[30:], *late, wire.send(packets.headers())])
    assert [one.reasons for one in found] == [ANNOUNCED, ANNOUNCED]
    assert bench.counts("surplus") == (0,)


# ── flows that can't be read ──


def test_a_flow_whose_first_bytes_are_no_magic_is_opaque_once(bench: Bench) -> None:
    wire = Wire()
    dice = random.Random(1)
    assert not bench.all([wire.syn(), *(wire.send(dice.randbytes(300)) for _ in range(10))])
    assert bench.counts("opaque_flows", "captured") == (1, 0)
    again = Wire(ipv4() / from_peer(dport=40001))
    bench.all([again.syn(), *(again.send(dice.randbytes(300)) for _ in range(10))])
    assert bench.counts("opaque_flows") == (2,)


def test_a_flow_seen_from_the_middle_is_opaque_when_no_message_comes_for_long(bench: Bench) -> None:
    wire = Wire()
    limit = CONSTANTS["UNPLACED_LIMIT"]
    found = bench.all([wire.send(packets.filler(100)) for _ in range(limit + 20)])
    assert len(found) == limit
    assert bench.counts("opaque_flows", "surplus") == (1, limit)
    found = bench.all([wire.send(packets.headers())])
    assert [one.payload for one in found] == [packets.headers()]
    assert bench.counts("opaque_flows") == (0,)  # it does speak v1


def test_a_connection_by_the_same_ports_starts_anew(bench: Bench) -> None:
    opaque = Wire(sequence=1000)
    bench.all([opaque.syn(), opaque.send(packets.filler(300))])
    anew = Wire(sequence=900_000)
    ping = packets.message("ping", bytes(8))
    (found,) = bench.all([anew.syn(), anew.send(ping[:10]), anew.send(ping[10:] + packets.headers())])[-1:]
    assert found.payload.endswith(packets.headers())
    assert found.reasons == ANNOUNCED


# ── the ways out ──


def test_without_the_express_lane_only_the_mark_is_left(bench: Bench) -> None:
    bench.loaded.configure(express=0)
    outcome = bench.classify(Wire().send(ANNOUNCED_HEADERS))
    assert (outcome.marked, outcome.captured) == (True, [])
    assert bench.counts("captured", "express", "marked") == (1, 0, 1)


def test_without_the_mirror_nothing_is_marked(bench: Bench) -> None:
    bench.loaded.configure(mirror_ifindex=0)
    outcome = bench.classify(Wire().send(ANNOUNCED_HEADERS))
    assert not outcome.marked
    assert len(outcome.captured) == 1
    assert bench.counts("express", "marked") == (1, 0)


def test_a_full_ring_is_counted_and_the_packet_passes_marked(bench: Bench) -> None:
    packet = Wire().send(packets.headers(8))
    room = 8 + ENTRY.size + len(packets.headers(8))
    size = loader.RING_PAGES * 4096
    context = kernel.XDP_MD.pack(0, len(packet), 0, 0, 0, 0)
    for _ in range(size // room + 50):
        run = kernel.run_program(bench.loaded.programs["classify"], packet, context=context)
        assert run.verdict == XDP_PASS
        assert kernel.XDP_MD.unpack(run.context)[0] == 4
    express, dropped = bench.counts("express", "dropped")
    assert dropped > 40
    assert len(bench.drain()) == express
    assert bench.classify(packet).captured


def test_the_arrival_stamp_travels_with_the_mirrored_frame(bench: Bench) -> None:
    wire = Wire()
    inside = packets.message("ping", bytes(8)) + packets.headers()
    bench.all([wire.syn()])
    packet = wire.send(inside)
    (entry,) = bench.all([packet])
    context = kernel.XDP_MD.pack(0, len(packet), 0, 0, 0, 0)
    run = kernel.run_program(bench.loaded.programs["to_xsk"], packet, context=context)
    layout = LAYOUTS["mirror_stamp"]
    assert kernel.XDP_MD.unpack(run.context)[0] == layout.size
    assert run.data[layout.size :] == packet
    stamp = layout.unpack(run.data)
    assert stamp == {"arrival_ns": entry.fields["arrival_ns"], "skipped": 32, "mark": CONSTANTS["MARK"]}
    assert run.verdict == XDP_DROP  # no socket
    assert bench.counts("unredirected") == (1,)


def test_a_frame_that_was_not_captured_carries_no_stamp(bench: Bench) -> None:
    packet = Wire(sequence=31337).send(packets.headers())
    context = kernel.XDP_MD.pack(0, len(packet), 0, 0, 0, 0)
    run = kernel.run_program(bench.loaded.programs["to_xsk"], packet, context=context)
    assert LAYOUTS["mirror_stamp"].unpack(run.data) == {"arrival_ns": 0, "skipped": 0, "mark": CONSTANTS["MARK"]}


def test_noise_on_the_mirror_link_is_dropped(bench: Bench) -> None:
    for shape in SHAPES:
        if not shape.is_captured:
            packet = packets.raw(shape.headers, ANNOUNCED_HEADERS)
            assert kernel.run_program(bench.loaded.programs["to_xsk"], packet).verdict == XDP_DROP
    assert bench.counts("redirected", "unredirected") == (0, 0)


JOINED = bytes(176) + struct.pack("=I", 1448) + bytes(12)
"""struct __sk_buff of what GRO has joined: gso_size is set."""


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[8]], ids=lambda shape: shape.description)
def test_a_clone_that_gro_had_joined_is_shortened_to_what_is_needed(bench: Bench, shape: Shape) -> None:
    wire = Wire(shape.headers)
    before = packets.message("tx", packets.filler(700))
    packet = wire.at(wire.sequence, before + packets.block(5000)[:2000])
    bench.all([wire.syn()])
    (entry,) = bench.all([packet])
    shorten = bench.loaded.programs["shorten"]
    run = kernel.run_program(shorten, packet, context=JOINED)
    assert run.verdict == TC_ACT_UNSPEC
    assert len(run.data) == len(packet) - len(before) - 2000 + packets.PREFIX
    segment = parse_frame(memoryview(run.data))
    assert segment is not None
    assert (segment.sequence, bytes(segment.payload)) == (entry.sequence, packets.block(5000)[: packets.PREFIX])
    assert (segment.flow.source, segment.flow.destination_port) == (entry.fields["flow.source"], 40000)
    assert bench.counts("shortened") == (1,)
    redirected = kernel.run_program(
        bench.loaded.programs["to_xsk"], run.data, context=kernel.XDP_MD.pack(0, len(run.data), 0, 0, 0, 0)
    )
    stamp = LAYOUTS["mirror_stamp"].unpack(redirected.data)
    assert stamp == {"arrival_ns": entry.fields["arrival_ns"], "skipped": 0, "mark": CONSTANTS["MARK"]}


def test_a_clone_of_one_packet_and_one_that_was_not_captured_stay_as_they_are(bench: Bench) -> None:
    wire = Wire()
    captured, other = wire.send(packets.block(1200)), wire.send(packets.block(1200))
    bench.all([wire.syn(), captured])
    shorten = bench.loaded.programs["shorten"]
    assert kernel.run_program(shorten, captured).data == captured
    assert kernel.run_program(shorten, other, context=JOINED).data == other
    assert bench.counts("shortened") == (0,)


# ── loading ──


def test_the_kernel_has_the_layouts_that_python_read_from_the_header(loaded: loader.Loaded) -> None:
    for name, key, value in (("config", None, "config"), ("counters", None, "counters"), ("flows", "flow_key", "flow")):
        info = kernel.map_info(loaded.maps[name])
        assert info.value_size == LAYOUTS[value].size
        assert key is None or info.key_size == LAYOUTS[key].size
    assert kernel.map_info(loaded.maps["express"]).max_entries == loader.RING_PAGES * 4096
    assert kernel.program_info(loaded.programs["classify"]).name == "classify"


def test_ports_can_be_changed_while_loaded(bench: Bench) -> None:
    wire = Wire(ipv4() / from_peer(sport=8333))
    assert not bench.all([wire.send(ANNOUNCED_HEADERS)])
    bench.loaded.watch([8333])
    assert bench.all([wire.send(ANNOUNCED_HEADERS)])
    with pytest.raises(ValueError, match="port 65536"):
        bench.loaded.watch([65536])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("int f(struct xdp_md *ctx) { return nowhere; }", r"error: use of undeclared identifier 'nowhere'"),
        ("int f(struct xdp_md *ctx) { return *(int *)(long)ctx->data; }", "invalid access to packet"),
    ],
)
def test_what_the_compiler_or_the_verifier_refuses_is_told_in_one_line(
    bpf_loadable: None, tmp_path: Path, source: str, reason: str
) -> None:
    path = tmp_path / "bad.c"
    path.write_text(f"#include <uapi/linux/bpf.h>\n{source}\n")
    with pytest.raises(loader.LoadError, match=reason) as caught:
        loader.load_in_child(str(path), {"f": "XDP"}, [], {}, loader.TIMEOUT_S * SLOWNESS)
    assert "\n" not in str(caught.value)


def test_missing_headers_are_told_in_one_line(bpf_loadable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCC_KERNEL_SOURCE", "/nowhere")
    with pytest.raises(loader.LoadError, match=r"^BCC_KERNEL_SOURCE is /nowhere, where there are no kernel headers$"):
        loader.load(REGTEST_MAGIC, [REGTEST_PORT])


def test_a_struct_member_of_unknown_type_is_refused() -> None:
    with pytest.raises(loader.LoadError, match="struct x has y of unknown type float"):
        loader.parse_common("struct x {\n    float y;\n};\n")


def test_python_lays_structs_out_as_c_does() -> None:
    text = "#define N 3\nstruct a {\n    u8 x;\n    u16 y[N];\n};\n"
    text += "struct b {\n    u8 z[5];\n    struct a in[2];\n    u64 w;\n};\n"
    outer = loader.parse_common(text).layouts["b"]
    assert [(member.name, member.offset) for member in outer.members] == [
        ("z", 0),
        *((f"in[0].{name}", at) for name, at in (("x", 6), ("y[0]", 8), ("y[1]", 10), ("y[2]", 12))),
        *((f"in[1].{name}", at) for name, at in (("x", 14), ("y[0]", 16), ("y[1]", 18), ("y[2]", 20))),
        ("w", 24),
    ]
    assert (outer.size, outer.packing.size) == (32, 32)
