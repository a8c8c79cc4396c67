"""How soon the programs know again where messages start, after a loss in a stream that is sent without a pause.

In such a stream a segment begins with a message by chance only, and until one does everything in it would be captured.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.net import packets
from tests.net.packets import Wire
from tests.net.test_capture_program import CONSTANTS, FORGED, UNPLACED, Bench, Captured, Coverage
from xdp.ringbuf import RingBuffer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xdp import loader

MSS = 1448
LOST_AT = 20


@pytest.fixture(scope="module")
def ring(loaded: loader.Loaded) -> Iterator[RingBuffer]:
    with RingBuffer.open(loaded.maps["express"]) as ring:
        yield ring


@pytest.fixture
def bench(loaded: loader.Loaded, ring: RingBuffer) -> Bench:
    return Bench(loaded, ring)


def stream_of(sizes: Callable[[random.Random], int], whole: int) -> tuple[bytes, list[int]]:
    """Messages of such sizes, an announcement behind each tenth of them, and where those are."""
    chance = random.Random(whole)
    stream, announced = bytearray(), []
    while len(stream) < whole:
        if chance.random() < 0.1:
            announced.append(len(stream))
            stream += packets.cmpctblock(chance.randrange(200, 900))
        else:
            stream += packets.message("tx", chance.randbytes(sizes(chance)))
    return bytes(stream), announced


def losing(segments: list[bytes], lost: int, window: int) -> list[bytes]:
    """One of these is lost, and comes again behind as many others."""
    behind = lost + 1 + window
    return [*segments[:lost], *segments[lost + 1 : behind], segments[lost], *segments[behind:]]


def unplaced(found: list[Captured]) -> int:
    return sum(bool(one.reasons & UNPLACED) for one in found)


@pytest.mark.parametrize("window", [3, 30, 300])
@pytest.mark.parametrize(
    ("sizes", "until_next"),
    [
        (lambda chance: chance.randrange(150, 500), 1),
        (lambda chance: chance.randrange(150, 9_000), 8),
        (lambda chance: chance.randrange(20_000, 40_000), 60),
    ],
    ids=["short", "mixed", "long"],
)
def test_after_a_loss_amid_messages_without_a_pause_no_more_is_unplaced_than_the_next_message(
    bench: Bench, sizes: Callable[[random.Random], int], until_next: int, window: int
) -> None:
    stream, announced = stream_of(sizes, 3_000_000)
    wire = Wire(sequence=0xFFF00000)
    syn, segments = wire.syn(), wire.cut(stream, MSS)
    # What is lost holds an announcement's beginning.
    lost = next(at // MSS for at in announced if at // MSS >= LOST_AT)
    coverage = Coverage(stream, 0xFFF00000)
    found = bench.all([syn, *losing(segments, lost, window)])
    coverage.add(found)
    assert all(coverage.has(at, at + packets.PREFIX) for at in announced)
    assert unplaced(found) <= min(window, until_next) + 1 + until_next
    assert bench.counts("opaque_flows", "dropped") == (0, 0)


def test_a_flow_seen_from_its_middle_is_placed_by_its_next_messages_wherever_they_start(bench: Bench) -> None:
    stream, announced = stream_of(lambda chance: chance.randrange(3_000, 9_000), 1_000_000)
    wire = Wire()
    segments = wire.cut(stream, MSS)[10:]
    found = bench.all(segments)
    coverage = Coverage(stream, 1000)
    coverage.add(found)
    assert all(coverage.has(at, at + packets.PREFIX) for at in announced if at >= 10 * MSS)
    assert unplaced(found) <= 16
    assert bench.counts("opaque_flows") == (0,)


@pytest.mark.parametrize("forged", FORGED, ids=lambda forged: forged[0])
def test_a_forged_message_in_a_body_that_comes_while_nothing_can_be_placed_hides_nothing(
    bench: Bench, forged: tuple[str, bytes]
) -> None:
    """It is taken for one, being the first magic; nobody believes its length before a message is where that says."""
    wire = Wire()
    beginning = packets.message("tx", packets.filler(3_000))
    decoy = packets.message("tx", packets.filler(500) + forged[1] + packets.filler(700))
    rest = b"".join(packets.message("tx", packets.filler(900)) + packets.headers() for _ in range(20))
    syn, segments = wire.syn(), wire.cut(beginning + decoy + rest, 1000)
    found = bench.all([syn, *segments[:3], *segments[4:]])  # the one that is lost has the decoy's own header
    coverage = Coverage(beginning + decoy + rest, 1000)
    coverage.add(found)
    at = len(beginning + decoy)
    for _ in range(20):
        at += 924
        assert coverage.has(at, at + len(packets.headers()))
        at += len(packets.headers())


def test_of_a_flow_that_never_says_anything_the_bytes_are_searched_and_it_counts_as_opaque(bench: Bench) -> None:
    wire = Wire()
    chance = random.Random(3)
    found = bench.all([wire.send(chance.randbytes(MSS)) for _ in range(CONSTANTS["UNPLACED_LIMIT"] + 10)])
    assert unplaced(found) == CONSTANTS["UNPLACED_LIMIT"]
    assert bench.counts("opaque_flows") == (1,)


def test_a_connection_that_is_ciphertext_by_the_ports_of_one_that_was_not_is_soon_opaque(bench: Bench) -> None:
    v1 = Wire(sequence=1000)
    bench.all([v1.syn(), v1.send(packets.message("verack")), v1.send(packets.message("ping", bytes(8)))])
    v2 = Wire(sequence=900_000_000)
    chance = random.Random(5)
    limit = CONSTANTS["UNPLACED_LIMIT"]
    found = bench.all([v2.syn(), *(v2.send(chance.randbytes(300)) for _ in range(2 * limit))])
    assert len(found) <= limit + 1
    assert bench.counts("opaque_flows") == (1,)


def test_a_forged_syn_makes_no_flow_opaque_that_goes_on_to_speak(bench: Bench) -> None:
    wire = Wire()
    bench.all([wire.syn(), wire.send(packets.message("verack"))])
    chance = random.Random(6)
    for _ in range(5):
        bench.all([wire.at(chance.getrandbits(32), b"", packets.SYN)])
        junk = [wire.at(wire.sequence - 9_000, packets.filler(100)) for _ in range(200)]  # repeated, say
        found = bench.all([*junk, wire.send(packets.message("ping", bytes(8)) + packets.headers())])
        assert found[-1].payload == packets.headers()
    assert bench.counts("opaque_flows") == (0,)


@pytest.mark.parametrize("at", [1, 2, 7, 8, 9, 1_000, 1_447, 3_000])
@pytest.mark.parametrize("seen", [4, 23, 24, 60])
def test_a_message_is_followed_from_wherever_it_starts_in_a_segment(bench: Bench, at: int, seen: int) -> None:
    wire = Wire()
    tx = packets.message("tx", packets.filler(100))
    (first,) = bench.all([wire.send(packets.filler(at) + tx[:seen])])
    assert (first.reasons & UNPLACED, len(first.payload)) == (UNPLACED, at + seen)
    second = bench.all([wire.send(tx[seen:] + packets.headers())])[-1]
    assert not second.reasons & UNPLACED
    assert second.payload.endswith(packets.headers())
    assert second.skipped == 124 - seen
