"""What wakes a reader that sleeps: the ring buffer, for what comes both ways; the mirror, where there is no other."""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING

import pytest

from tests.net.conftest import REGTEST_MAGIC, REGTEST_PORT
from tests.net.netns import Namespace, Veth, veth_pair
from tests.net.overhearing import as_the_product_has_it
from tests.net.raw_peer import Peer
from tests.net.slowness import SLOWNESS
from xdp.attachment import attach
from xdp.capture import COPY_DUE_NS, Capture
from xdp.loader import TIMEOUT_S, load
from xdp.ringbuf import RingBuffer
from xdp.rings import RingCorruptError
from xdp.segments import Backend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xdp.loader import Loaded

OURS, THEIRS = "10.85.0.1", "10.85.0.2"
PATIENCE_S = 5.0 * SLOWNESS


@pytest.fixture
def ends() -> Iterator[tuple[Veth, Veth]]:
    """The captured interface, in the namespace that the test is in, and its other end."""
    with Namespace() as near, Namespace() as far, near.entered():
        yield veth_pair(near, far, ("nic", "wire"), addresses=(f"{OURS}/24", f"{THEIRS}/24"))


def is_readable(capture: Capture, wait_s: float = 0.0) -> bool:
    return bool(select.select([capture], [], [], wait_s)[0])


def sleep(capture: Capture) -> bool:
    """As a loop sleeps that minds the deadline, without an end of its own; whether the descriptor woke it."""
    due_ns = capture.deadline()
    if due_ns is None:
        assert is_readable(capture, PATIENCE_S), "asleep for ever"
        return True
    return is_readable(capture, max(0, due_ns - time.monotonic_ns()) / 1e9)


def ways(capture: Capture) -> list[Backend]:
    """The ways that the next poll's segments came."""
    return [segment.backend for segment in capture.poll()]


def test_a_sleeper_is_woken_by_the_ring_buffer_and_reads_the_mirrored_copy_in_its_own_time(
    loaded: Loaded, ends: tuple[Veth, Veth]
) -> None:
    as_the_product_has_it(loaded)
    with (
        Peer(*ends, (OURS, THEIRS)) as peer,
        attach(loaded, "nic") as attachment,
        Capture(attachment.handover()) as capture,
    ):
        assert capture.deadline() is None
        peer.announce()
        assert sleep(capture)
        segments = capture.poll()
        assert [one.backend for one in segments] == [Backend.RINGBUF]
        arrival_ns = segments[0].arrival_ns
        assert ways(capture) == []
        give_up = time.monotonic() + PATIENCE_S
        while attachment.counters()["mirrored"] < 1:
            assert time.monotonic() < give_up
        assert not is_readable(capture)
        assert capture.deadline() in {arrival_ns + due_ns for due_ns in COPY_DUE_NS}
        assert not sleep(capture)
        assert ways(capture) == [Backend.AF_XDP]
        assert capture.deadline() is None


def test_the_mirror_wakes_a_sleeper_where_it_is_the_only_way(loaded: Loaded, ends: tuple[Veth, Veth]) -> None:
    as_the_product_has_it(loaded)
    with (
        Peer(*ends, (OURS, THEIRS)) as peer,
        attach(loaded, "nic", backends={Backend.AF_XDP}) as attachment,
        Capture(attachment.handover()) as capture,
    ):
        for _ in range(3):
            assert capture.deadline() is None
            peer.announce()
            assert sleep(capture)
            assert ways(capture) == [Backend.AF_XDP]
            assert ways(capture) == []


def test_the_mirror_wakes_a_sleeper_once_the_ring_buffer_was_given_up(
    loaded: Loaded, ends: tuple[Veth, Veth], monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupt(_ring: RingBuffer, _limit: int) -> list[tuple[int, int]]:
        raise RingCorruptError("as if somebody else wrote it")

    as_the_product_has_it(loaded)
    with (
        Peer(*ends, (OURS, THEIRS)) as peer,
        attach(loaded, "nic") as attachment,
        Capture(attachment.handover()) as capture,
    ):
        peer.announce()
        assert sleep(capture)
        with monkeypatch.context() as patch:
            patch.setattr(RingBuffer, "peek", corrupt)
            heard = ways(capture)
        assert capture.counters()["givenUp"] == 1
        for _ in range(3):
            while not heard:
                assert sleep(capture)
                heard = ways(capture)
            assert heard == [Backend.AF_XDP]
            assert ways(capture) == []
            peer.announce()
            heard = []
    as_the_product_has_it(loaded)  # what nobody has read of the ring


def test_what_the_ring_buffer_had_no_room_for_a_sleeper_has_from_the_mirror(
    bpf_loadable: None, ends: tuple[Veth, Veth]
) -> None:
    sent = 150  # more than two batches, and several times what a page holds
    timeout_s = TIMEOUT_S * SLOWNESS
    with (
        load(REGTEST_MAGIC, [REGTEST_PORT], every_magic=False, ring_pages=1, timeout_s=timeout_s) as small,
        Peer(*ends, (OURS, THEIRS)) as peer,
        attach(small, "nic") as attachment,
        Capture(attachment.handover()) as capture,
    ):
        peer.announce(sent)
        assert attachment.counters()["dropped"] > 0
        came: list[Backend] = []
        give_up = time.monotonic() + PATIENCE_S
        while came.count(Backend.AF_XDP) < sent:
            assert time.monotonic() < give_up, came
            sleep(capture)
            came += ways(capture)
        assert came.count(Backend.RINGBUF) == sent - attachment.counters()["dropped"]
        while ways(capture):
            pass
        assert capture.deadline() is None
        assert not is_readable(capture)
