"""Capture on an interface of large frames, which the mirror link can't carry in one piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.net import packets
from tests.net.netns import Namespace
from tests.net.overhearing import as_the_product_has_it
from tests.net.test_capture import BOTH, Cable, collect, receive, saw
from xdp.attachment import Mode, attach
from xdp.capture import Capture
from xdp.segments import Backend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xdp.loader import Loaded

JUMBO_MTU = 9000


@pytest.fixture
def cable(loaded: Loaded) -> Iterator[Cable]:
    as_the_product_has_it(loaded)
    with Namespace() as near, Namespace() as far, near.entered():
        yield Cable(near, far, JUMBO_MTU)


@pytest.fixture
def ways(tcx: bool) -> tuple[Backend, ...]:
    """What brings it: the mirror only where a clone can be shortened on its way."""
    return BOTH if tcx else (Backend.RINGBUF,)


@pytest.mark.parametrize("mode", ["generic", "tc"])
@pytest.mark.parametrize("before", [b"", packets.message("tx", packets.filler(5_000))], ids=["first", "behind"])
def test_an_announcement_in_a_jumbo_frame_is_seen_by_both_backends(
    loaded: Loaded, cable: Cable, ways: tuple[Backend, ...], mode: Mode, before: bytes
) -> None:
    stream = before + packets.cmpctblock(8_500 - len(before))
    with (
        attach(loaded, "nic", modes=(mode,)) as attachment,
        Capture(attachment.handover()) as capture,
        cable.connection() as (peer, ours),
    ):
        peer.sendall(stream)
        assert receive(ours, len(stream)) == stream
        collect(capture, saw(packets.cmpctblock(8_500 - len(before))[:152], *ways))
        assert attachment.counters()["mirrored"] == len(ways) - 1


@pytest.mark.parametrize("mode", ["generic", "tc"])
def test_of_a_jumbo_frame_that_is_needed_whole_the_mirror_carries_the_beginning(
    loaded: Loaded, cable: Cable, ways: tuple[Backend, ...], mode: Mode
) -> None:
    whole = packets.headers(100)
    with (
        attach(loaded, "nic", modes=(mode,)) as attachment,
        Capture(attachment.handover()) as capture,
        cable.connection() as (peer, ours),
    ):
        peer.sendall(whole)
        assert receive(ours, len(whole)) == whole
        found = collect(capture, saw(whole[:3_000], *ways))
        assert [one.payload == whole for one in found if one.backend is Backend.RINGBUF] == [True]
        peer.sendall(packets.headers())
        collect(capture, saw(packets.headers(), *BOTH))
