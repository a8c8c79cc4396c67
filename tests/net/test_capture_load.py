"""The capture under load: what TCP gets is untouched, losses are counted and never fatal, and it recovers by itself."""

from __future__ import annotations

import random
import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.net.announcer import REGTEST_MAGIC, Said, Script, announce, announce_all, announced, message, mine_chain
from tests.net.bulk import Bulk, bulk
from tests.net.conftest import REGTEST_PORT
from tests.net.netns import Namespace, Veth, veth_pair
from tests.net.overhearing import Overhearing, as_the_product_has_it, overhearing
from xdp.attachment import Mode, attach
from xdp.capture import Capture
from xdp.segments import Backend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from xdp.loader import Loaded

NEAR, FAR = "10.80.0.1", "10.80.0.2"
OTHER_PORT = 5201
CONTENT_BYTES = 8 << 20
MIXED_BYTES = 300_000_000
UNRELATED_BYTES = 2_000_000_000
COMMANDS = ("inv", "headers", "cmpctblock", "block")


@pytest.fixture
def wire(loaded: Loaded) -> Iterator[tuple[Veth, Veth]]:
    """The captured interface, in a namespace that the test is in, and its other end."""
    as_the_product_has_it(loaded)
    with Namespace() as near, Namespace() as far, near.entered():
        yield veth_pair(near, far, ("nic", "wire"), addresses=(f"{NEAR}/24", f"{FAR}/24"))


def namespaces(wire: tuple[Veth, Veth]) -> tuple[Namespace, Namespace]:
    return wire[0].namespace, wire[1].namespace


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Announcements, large messages with magics in their bodies, lengths that are false, and bytes that are no message.

    Repeated, each round begun elsewhere, it has such bytes at every joint as well.
    """
    chance = random.Random(8)
    announcements = list(announce_all(mine_chain(500), chance))
    makers: list[Callable[[], bytes]] = [
        lambda: chance.choice(announcements),
        lambda: message("tx", chance.randbytes(chance.randrange(60, 3_000))),
        lambda: message("blocktxn", chance.randbytes(9_000) + REGTEST_MAGIC * chance.randrange(1, 20)),
        lambda: message("block", chance.randbytes(chance.randrange(1_000, 100_000))),
        lambda: message("block")[:16] + (4_000_000).to_bytes(4, "little") + chance.randbytes(4),
        lambda: chance.randbytes(chance.randrange(1, 20_000)),
    ]
    weights = (40, 40, 10, 9, 0.3, 0.3)
    parts = announcements[:1]
    size = 0
    while size < CONTENT_BYTES:
        (make,) = chance.choices(makers, weights)
        parts.append(make())
        size += len(parts[-1])
    file = tmp_path_factory.mktemp("bulk") / "mixed"
    file.write_bytes(b"".join(parts))
    return file


# ── the original ──


@pytest.mark.parametrize("mode", [None, "native", "generic", "tc"])
def test_tcp_gets_its_stream_byte_for_byte_with_and_without_the_capture(
    loaded: Loaded, wire: tuple[Veth, Veth], mixed: Path, mode: Mode | None
) -> None:
    near, far = namespaces(wire)

    def transfer(capture: Capture | None) -> None:
        with bulk(near, far, (NEAR, REGTEST_PORT), mixed, MIXED_BYTES) as stream:
            while stream.receive():
                while capture is not None and capture.poll():
                    pass
            assert stream.is_whole()

    if mode is None:
        transfer(None)
        return
    with attach(loaded, "nic", modes=(mode,)) as attachment, Capture(attachment.handover()) as capture:
        transfer(capture)
        counters = capture.counters()
        # Behind bytes that are no message, it takes up the next one that it sees.
        assert counters["announcements"] > 1_000
        assert counters["express"] + counters["dropped"] == counters["captured"] > 500


def test_two_gigabytes_of_other_traffic_are_passed_by_and_no_announcement_among_them_is_lost(
    loaded: Loaded, wire: tuple[Veth, Veth], mixed: Path, tmp_path: Path
) -> None:
    near, far = namespaces(wire)
    script = Script(1, 0, (FAR, REGTEST_PORT), (NEAR, REGTEST_PORT))
    chance = random.Random(9)
    script.bursts = [[(0, one)] for one in announce_all(mine_chain(600), chance)]
    with (
        attach(loaded, "nic") as attachment,
        overhearing(script, near, far, tmp_path) as ears,
        ears.capturing(attachment.handover()) as source,
        bulk(near, far, (NEAR, OTHER_PORT), mixed, UNRELATED_BYTES) as stream,
    ):
        reader = threading.Thread(target=receive_all, args=(stream,))
        reader.start()
        played = 0
        while played < len(script.bursts):
            # Spread over the transfer by what is left of it.
            ears.listen()
            while played < len(script.bursts) * (1 - stream.left / stream.size):
                ears.play(played)
                played += 1
        reader.join()
        assert stream.left == 0
        ears.overhear_all(Backend)
        (told,) = ears.told()
        assert len(told) == 600
        for backend in Backend:
            assert ears.heard(backend) == told
        counters = source.counters()
        assert counters["packets"] > UNRELATED_BYTES // (64 << 10)
        assert counters["captured"] <= 2 * len(script.bursts)
        assert counters["dropped"] == counters["mirrorLost"] == counters["socketDropped"] == 0


def receive_all(stream: Bulk) -> None:
    while stream.receive(hashed=False):
        pass


# ── more than there is room for ──


def one_by_one(count: int, seed: int) -> Script:
    """So many blocks, each announced by a message that is a burst, and so a packet, of its own."""
    script = Script(1, 0, (FAR, REGTEST_PORT), (NEAR, REGTEST_PORT))
    chance = random.Random(seed)
    script.bursts = [[(0, announce([block], chance.choice(COMMANDS), chance))] for block in mine_chain(count)]
    return script


@pytest.mark.parametrize("backend", Backend)
def test_what_finds_no_room_is_counted_and_when_there_is_room_again_everything_is_heard(
    loaded: Loaded, wire: tuple[Veth, Veth], tmp_path: Path, backend: Backend
) -> None:
    script = one_by_one(9_000, 10)
    with (
        attach(loaded, "nic", backends={backend}) as attachment,
        overhearing(script, *namespaces(wire), tmp_path) as ears,
        ears.capturing(attachment.handover()) as source,
    ):
        ears.deaf = True  # the ring is full, or all of UMEM in use, after half of these
        for burst in range(8_900):
            ears.play(burst)
        ears.deaf = False
        ears.overhear()
        counters = source.counters()
        lost = counters["dropped"] + counters["mirrorLost"] + counters["socketDropped"]
        assert lost > 1_000
        assert counters[f"{backend.name.lower()}_segments"] == counters["captured"] - lost
        assert 500 < len(ears.heard(backend)) < 8_900
        assert counters["givenUp"] == counters["unparsed"] == 0
        ears.sightings.clear()
        for burst in range(8_900, 9_000):
            ears.play(burst)
        (told,) = ears.told()
        assert len(told) == 9_000  # TCP has had it all
        ears.listen_until(lambda: ears.heard(backend) == told[8_900:], "not all was heard afterwards")
        after = source.counters()
        assert all(after[name] == counters[name] for name in ("dropped", "mirrorLost", "socketDropped"))


def test_a_capture_that_is_closed_with_packets_unread_is_opened_again_at_once_and_hears(
    loaded: Loaded, wire: tuple[Veth, Veth], tmp_path: Path
) -> None:
    script = one_by_one(600, 11)
    bursts = iter(range(600))
    with (
        attach(loaded, "nic") as attachment,
        overhearing(script, *namespaces(wire), tmp_path) as ears,
    ):
        for _ in range(30):
            with ears.capturing(attachment.handover()):
                ears.sightings.clear()
                first = next(bursts)
                ears.play(first)
                due = announced(script.bursts[first][0][1])
                ears.listen_until(partial(have_heard, ears, set(due)), f"burst {first} was not heard")
                ears.deaf = True
                for _ in range(19):
                    ears.play(next(bursts))
                ears.deaf = False


def have_heard(ears: Overhearing, due: set[Said]) -> bool:
    return all(due <= set(ears.heard(backend)) for backend in Backend)
