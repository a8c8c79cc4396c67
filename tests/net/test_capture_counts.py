"""What is said of how much came by each way: what AF_XDP brought and what it lost add up to what was captured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.net.netns import Namespace, Veth, veth_pair
from tests.net.overhearing import as_the_product_has_it
from tests.net.raw_peer import Peer
from xdp.attachment import attach
from xdp.capture import Capture
from xdp.segments import Backend
from xdp.xsk import Geometry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xdp.loader import Loaded

OURS, THEIRS = "10.84.0.1", "10.84.0.2"
AT_ONCE = 50
"""Packets between two looks: far fewer than a veth's ring holds."""


@pytest.fixture
def ends(loaded: Loaded) -> Iterator[tuple[Veth, Veth]]:
    """The captured interface, in the namespace that the test is in, and its other end."""
    as_the_product_has_it(loaded)
    with Namespace() as near, Namespace() as far, near.entered():
        yield veth_pair(near, far, ("nic", "wire"), addresses=(f"{OURS}/24", f"{THEIRS}/24"))


def read(capture: Capture) -> int:
    """How many segments are there."""
    count = 0
    while segments := capture.poll():
        count += len(segments)
    return count


def test_what_the_socket_has_no_room_for_is_not_counted_as_mirrored(loaded: Loaded, ends: tuple[Veth, Veth]) -> None:
    room = Geometry().chunks
    with (
        Peer(*ends, (OURS, THEIRS)) as peer,
        attach(loaded, "nic", backends={Backend.AF_XDP}) as attachment,
        Capture(attachment.handover()) as capture,
    ):
        for _ in range(room // AT_ONCE + 3):
            peer.announce(AT_ONCE)
        sent = (room // AT_ONCE + 3) * AT_ONCE
        for counters in (capture.counters(), attachment.counters()):
            assert (counters["captured"], counters["mirrored"]) == (sent, room)
            assert (counters["mirrorLost"], counters["socketDropped"]) == (0, sent - room)
        assert read(capture) == room
        peer.announce(AT_ONCE)
        assert read(capture) == AT_ONCE
        assert attachment.counters()["mirrored"] == room + AT_ONCE


def test_what_finds_no_socket_is_lost_and_not_mirrored(loaded: Loaded, ends: tuple[Veth, Veth]) -> None:
    with Peer(*ends, (OURS, THEIRS)) as peer, attach(loaded, "nic", backends={Backend.AF_XDP}) as attachment:
        peer.announce(AT_ONCE)
        with Capture(attachment.handover()) as capture:
            peer.announce(AT_ONCE)
            assert read(capture) == AT_ONCE
        with Capture(attachment.handover()) as capture:
            peer.announce(AT_ONCE)
            assert read(capture) == AT_ONCE
            for counters in (capture.counters(), attachment.counters()):
                assert (counters["captured"], counters["mirrored"]) == (3 * AT_ONCE, 2 * AT_ONCE)
                assert (counters["mirrorLost"], counters["socketDropped"]) == (AT_ONCE, 0)
