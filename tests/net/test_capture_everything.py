"""What a plain socket hears, each way out of the kernel hears: every announcement, once, in its peer's order."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.net.announcer import Script, announce_all, cut, mine_chain, small_talk
from tests.net.conftest import REGTEST_PORT
from tests.net.netns import Namespace, Veth, veth_pair
from tests.net.overhearing import as_the_product_has_it, overhearing
from xdp.attachment import Mode, attach
from xdp.segments import Backend

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from xdp.loader import Loaded

BLOCKS = 10_000
BURST = 50
"""Announcements after which the sender waits until the plain socket has them: no more than the rings hold."""
OURS, THEIRS = ("10.77.0.1", REGTEST_PORT), ("10.77.0.2", REGTEST_PORT)


@pytest.fixture
def wire(loaded: Loaded) -> Iterator[tuple[Veth, Veth]]:
    """The captured interface, in a namespace that the test is in, and its other end."""
    as_the_product_has_it(loaded)
    with Namespace() as near, Namespace() as far, near.entered():
        yield veth_pair(near, far, ("nic", "wire"), addresses=(f"{OURS[0]}/24", f"{THEIRS[0]}/24"))


def one_peer(count: int, chance: random.Random) -> Script:
    """That tells of so many blocks, by all kinds of messages, coalesced and split."""
    script = Script(1, 0, THEIRS, OURS)
    messages = list(announce_all(mine_chain(count), chance))
    for at in range(0, len(messages), BURST):
        stream = b"".join(one + small_talk(chance) for one in messages[at : at + BURST])
        script.bursts.append([(0, piece) for piece in cut(stream, chance)])
    return script


@pytest.mark.parametrize("backend", Backend)
def test_of_ten_thousand_blocks_each_backend_alone_hears_every_announcement_in_order(
    loaded: Loaded, wire: tuple[Veth, Veth], tmp_path: Path, backend: Backend
) -> None:
    script = one_peer(BLOCKS, random.Random(4))
    near, far = wire[0].namespace, wire[1].namespace
    with (
        attach(loaded, "nic", backends={backend}) as attachment,
        overhearing(script, near, far, tmp_path) as ears,
        ears.capturing(attachment.handover()) as source,
    ):
        for burst in range(len(script.bursts)):
            ears.play(burst)
        ears.overhear_all([backend])
        (told,) = ears.told()
        assert len(told) == BLOCKS
        heard = ears.heard(backend)
        assert set(told) - set(heard) == set()
        assert Counter(heard) == Counter(told)
        assert heard == told
        counters = source.counters()
        assert counters["dropped"] == counters["mirrorLost"] == counters["socketDropped"] == 0


@pytest.mark.parametrize("mode", ["generic", "tc"])
def test_on_the_lower_rungs_both_hear_the_same_in_packets_that_the_kernel_has_joined(
    loaded: Loaded, wire: tuple[Veth, Veth], tmp_path: Path, mode: Mode
) -> None:
    script = one_peer(2_000, random.Random(6))
    near, far = wire[0].namespace, wire[1].namespace
    with (
        attach(loaded, "nic", modes=(mode,)) as attachment,
        overhearing(script, near, far, tmp_path) as ears,
        ears.capturing(attachment.handover()),
    ):
        for burst in range(len(script.bursts)):
            ears.play(burst)
        ears.overhear_all(Backend)
        (told,) = ears.told()
        assert len(told) == 2_000
        for backend in Backend:
            assert ears.heard(backend) == told


PEERS_EACH_WAY = 25
OWN_BLOCKS, COMMON_BLOCKS = 40, 40


def test_of_fifty_peers_at_once_nothing_is_lost_and_nothing_told_twice_for_a_flow(
    loaded: Loaded, wire: tuple[Veth, Veth], tmp_path: Path
) -> None:
    chance = random.Random(5)
    peers = 2 * PEERS_EACH_WAY
    script = Script(PEERS_EACH_WAY, PEERS_EACH_WAY, THEIRS, OURS)
    common = mine_chain(COMMON_BLOCKS, b"/everybody's/")
    # Each peer tells of blocks that only it has, so that a sighting's flow is known, and of those that all have.
    streams = []
    for number in range(peers):
        blocks = [*common, *mine_chain(OWN_BLOCKS, b"/%d's/" % number)]
        chance.shuffle(blocks)
        streams.append(list(announce_all(blocks, chance)))
    while any(streams):
        pieces: list[list[tuple[int, bytes]]] = []
        for number in chance.sample(range(peers), 20):
            said, streams[number] = streams[number][:3], streams[number][3:]
            stream = b"".join(one + small_talk(chance) for one in said)
            pieces.append([(number, piece) for piece in cut(stream, chance)])
        script.bursts.append(interleaved(pieces, chance))
    near, far = wire[0].namespace, wire[1].namespace
    with (
        attach(loaded, "nic") as attachment,
        overhearing(script, near, far, tmp_path) as ears,
        ears.capturing(attachment.handover()) as source,
    ):
        for burst in range(len(script.bursts)):
            ears.play(burst)
        ears.overhear_all(Backend)
        told = ears.told()
        assert [len(said) for said in told] == [COMMON_BLOCKS + OWN_BLOCKS] * peers
        everything = Counter(said for by_peer in told for said in by_peer)
        for backend in Backend:
            heard = ears.heard(backend)
            assert Counter(heard) == everything
            for by_peer in told:
                own = {said for said in by_peer if everything[said] == 1}
                assert [said for said in heard if said in own] == [said for said in by_peer if said in own]
        counters = source.counters()
        assert counters["dropped"] == counters["mirrorLost"] == counters["socketDropped"] == 0
        assert counters["opaqueFlows"] == 0


def interleaved(pieces: list[list[tuple[int, bytes]]], chance: random.Random) -> list[tuple[int, bytes]]:
    """One list of all, each one's own order kept."""
    order = [number for number, own in enumerate(pieces) for _ in own]
    chance.shuffle(order)
    rest = [iter(own) for own in pieces]
    return [next(rest[number]) for number in order]
