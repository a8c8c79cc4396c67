"""AF_XDP sockets over veth pairs of the test's own: native XDP redirects, and every byte arrives."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import socket
import struct
import time
from typing import TYPE_CHECKING

import pytest

from tests.descriptors import open_descriptors
from tests.net.netns import Namespace, Veth, veth_pair
from tests.net.slowness import SLOWNESS
from tests.net.tiny_bpf import (
    XDP,
    XSKMAP,
    Insn,
    attach_xdp,
    create_map,
    load_program,
    monotonic_ns,
    redirect_to_xsk,
    redirect_with_metadata,
    set_entry,
)
from xdp.rings import UnsupportedMachineError
from xdp.xsk import BindFlag, Geometry, Xsk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: namespaces, XDP and AF_XDP")

SMALL = Geometry(chunks=16, chunk_bytes=2048, rx_entries=16)
PATIENCE_S = 5.0 * SLOWNESS


class Bench:
    """A veth pair in a namespace, with native XDP on `far` that redirects what `near` sends into the XSKMAP."""

    def __init__(self, near: Veth, far: Veth, xsks: int) -> None:
        self.near, self.far, self.xsks = near, far, xsks
        self.sender = near.namespace.raw_socket(near.name)

    def socket(self, geometry: Geometry | None = None, flags: BindFlag = BindFlag.COPY, metadata_bytes: int = 0) -> Xsk:
        with self.far.namespace.entered():
            xsk = Xsk(self.far.index, 0, flags=flags, geometry=geometry, metadata_bytes=metadata_bytes)
        set_entry(self.xsks, 0, xsk.fileno())
        return xsk

    def send(self, *frames: bytes) -> None:
        for frame in frames:
            self.sender.send(frame)


@contextlib.contextmanager
def bench(program: Callable[[int], list[Insn]], mtu: int = 1500) -> Iterator[Bench]:
    with Namespace() as space, create_map(XSKMAP, 4, 4, 4) as xsks, load_program(XDP, program(xsks)) as fd:
        near, far = veth_pair(space, space, mtu=mtu)
        with space.entered(), attach_xdp(fd, far.index):
            made = Bench(near, far, xsks)
            try:
                yield made
            finally:
                made.sender.close()


@pytest.fixture
def redirecting() -> Iterator[Bench]:
    with bench(redirect_to_xsk) as made:
        yield made


def frame(number: int, size: int = 60) -> bytes:
    """An Ethernet frame of a local experimental type (IEEE 802), all of whose bytes depend on its number."""
    body = random.Random(number).randbytes(size - 18)
    return b"\x02\0\0\0\0\1\x02\0\0\0\0\2\x88\xb5" + struct.pack("<I", number) + body


def number_of(view: memoryview) -> int:
    return int(struct.unpack_from("<I", view, 14)[0])


def receive(xsk: Xsk, count: int, limit: int = 64) -> list[bytes]:
    """That many frames, copied, waiting by poll()."""
    poll = select.poll()
    poll.register(xsk, select.POLLIN)
    got: list[bytes] = []
    while len(got) < count:
        assert poll.poll(PATIENCE_S * 1000), f"{len(got)} of {count} frames, then none: {xsk.statistics()}"
        got += [bytes(view) for view in xsk.peek(limit)]
        xsk.release()
    return got


def settle(xsk: Xsk, sent: int) -> None:
    """Wait until the kernel has dealt with so many frames since the socket was made: its softirq may lag behind."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        statistics = xsk.statistics()
        if xsk._rx._producer[0] + statistics.rx_dropped + statistics.rx_ring_full >= sent:
            return
        assert time.monotonic() < deadline, (xsk._rx._producer[0], statistics)
        os.sched_yield()


def test_every_frame_arrives_in_order_and_byte_for_byte(redirecting: Bench) -> None:
    sizes = [60, 61, 64, 590, 1513, 1514, 1400]
    with redirecting.socket() as xsk:
        for start in range(0, 700, 100):
            sent = [frame(n, sizes[n % len(sizes)]) for n in range(start, start + 100)]
            redirecting.send(*sent)
            assert receive(xsk, 100) == sent
        assert xsk.received == 700
        assert xsk.peek() == []
        assert set(xsk.statistics()) == {0}


def test_chunks_go_round_many_times_when_there_are_few(redirecting: Bench) -> None:
    with redirecting.socket(SMALL) as xsk:
        for number in range(500):
            redirecting.send(frame(number))
            assert receive(xsk, 1) == [frame(number)]
        assert set(xsk.statistics()) == {0}


def test_peek_takes_no_more_than_its_limit_and_goes_on_where_it_stopped(redirecting: Bench) -> None:
    with redirecting.socket(SMALL) as xsk:
        redirecting.send(*(frame(n) for n in range(12)))
        settle(xsk, 12)
        first = xsk.peek(5)
        second = xsk.peek(5)
        assert [number_of(view) for view in first + second] == list(range(10))
        assert [bytes(view) for view in first + second] == [frame(n) for n in range(10)]
        xsk.release()
        assert [number_of(view) for view in xsk.peek(5)] == [10, 11]


def test_a_view_cannot_be_read_after_its_release(redirecting: Bench) -> None:
    with redirecting.socket(SMALL) as xsk:
        redirecting.send(frame(1))
        settle(xsk, 1)
        (view,) = xsk.peek()
        xsk.release()
        with pytest.raises(ValueError, match="released"):
            view[0]
        xsk.release()


def test_the_socket_is_readable_exactly_while_frames_wait(redirecting: Bench) -> None:
    poll = select.poll()
    with redirecting.socket(SMALL) as xsk:
        poll.register(xsk, select.POLLIN)
        assert poll.poll(0) == []
        redirecting.send(frame(1))
        assert poll.poll(PATIENCE_S * 1000) == [(xsk.fileno(), select.POLLIN)]
        xsk.peek()
        xsk.release()
        assert poll.poll(0) == []


def test_a_umem_whose_chunks_are_all_held_drops_counts_and_recovers(redirecting: Bench) -> None:
    with redirecting.socket(Geometry(chunks=16, chunk_bytes=2048, rx_entries=64)) as xsk:
        redirecting.send(*(frame(n) for n in range(40)))
        settle(xsk, 40)
        held = xsk.peek(100)
        assert [bytes(view) for view in held] == [frame(n) for n in range(16)]
        statistics = xsk.statistics()
        assert statistics.rx_dropped == 24
        assert statistics.fill_ring_empty >= 1
        assert statistics.rx_ring_full == 0
        redirecting.send(frame(50))
        settle(xsk, 41)
        assert xsk.peek() == []
        xsk.release()
        redirecting.send(frame(51))
        assert receive(xsk, 1) == [frame(51)]
        assert xsk.statistics().rx_dropped == 25


def test_a_full_rx_ring_drops_counts_and_recovers(redirecting: Bench) -> None:
    with redirecting.socket(Geometry(chunks=64, chunk_bytes=2048, rx_entries=8)) as xsk:
        redirecting.send(*(frame(n) for n in range(30)))
        settle(xsk, 30)
        statistics = xsk.statistics()
        assert statistics.rx_ring_full == 22
        assert statistics.fill_ring_empty == 0
        assert receive(xsk, 8) == [frame(n) for n in range(8)]
        for start in range(100, 200, 5):
            redirecting.send(*(frame(n) for n in range(start, start + 5)))
            assert receive(xsk, 5) == [frame(n) for n in range(start, start + 5)]
        assert xsk.statistics().rx_ring_full == 22


def test_chunks_lost_to_a_full_rx_ring_come_back(redirecting: Bench) -> None:
    with redirecting.socket(Geometry(chunks=16, chunk_bytes=2048, rx_entries=8)) as xsk:
        for start in range(0, 2000, 20):
            redirecting.send(*(frame(n) for n in range(start, start + 20)))
            settle(xsk, start + 20)
            assert [number_of(view) for view in xsk.peek(100)] == list(range(start, start + 8))
            xsk.release()
        assert xsk.statistics().fill_ring_empty == 0


def test_a_frame_longer_than_a_chunk_is_dropped_and_counted() -> None:
    with bench(redirect_to_xsk, mtu=3000) as wide, wide.socket(SMALL) as xsk:
        wide.send(frame(1, 2048 - 256), frame(2, 2048 - 255), frame(3, 3014), frame(4))
        assert receive(xsk, 2) == [frame(1, 2048 - 256), frame(4)]
        assert xsk.statistics().rx_dropped == 2


def test_a_chunk_of_a_page_takes_the_largest_frame_of_a_native_veth() -> None:
    with bench(redirect_to_xsk, mtu=3498) as wide, wide.socket() as xsk:
        wide.send(frame(1, 3512))
        assert receive(xsk, 1) == [frame(1, 3512)]


def test_metadata_of_the_program_lies_in_front_of_the_frame() -> None:
    with bench(redirect_with_metadata) as stamped, stamped.socket(metadata_bytes=8) as xsk:
        for number in range(20):
            before = monotonic_ns()
            stamped.send(frame(number, 600))
            (got,) = receive(xsk, 1)
            assert got[8:] == frame(number, 600)
            assert before < int.from_bytes(got[:8], "little") < monotonic_ns()


def test_the_queue_can_be_bound_again_at_once_after_close(redirecting: Bench) -> None:
    for number in range(20):
        xsk = redirecting.socket(SMALL)
        redirecting.send(frame(number))
        settle(xsk, 1)
        views = [xsk.peek()[0][14:]]  # a slice that outlives the socket must not keep its queue
        xsk.close()
        xsk.close()
        assert views[0][:4] == struct.pack("<I", number)


def test_a_queue_that_is_taken_is_refused_by_name(redirecting: Bench) -> None:
    with redirecting.socket(SMALL), pytest.raises(OSError, match="another socket holds this queue") as caught:
        redirecting.socket(SMALL)
    assert caught.value.errno == errno.EBUSY
    redirecting.socket(SMALL).close()


@pytest.mark.parametrize(
    ("index", "queue", "flags", "reason"),
    [
        (99_999, 0, BindFlag.COPY, "no such interface"),
        (None, 7, BindFlag.COPY, "no such queue"),
        (None, 0, BindFlag.COPY | BindFlag.ZERO_COPY, "mode"),
        (None, 0, BindFlag.ZERO_COPY, "no zero-copy"),
    ],
)
def test_a_bind_that_fails_says_why_and_leaves_nothing(
    redirecting: Bench, index: int | None, queue: int, flags: BindFlag, reason: str
) -> None:
    before = len(open_descriptors())
    with redirecting.far.namespace.entered(), pytest.raises(OSError, match=reason):
        Xsk(redirecting.far.index if index is None else index, queue, flags=flags, geometry=SMALL)
    assert len(open_descriptors()) == before
    redirecting.socket(SMALL).close()


@pytest.mark.parametrize("flags", [BindFlag.COPY, BindFlag.COPY | BindFlag.NEED_WAKEUP, BindFlag(0)])
def test_frames_come_in_every_mode_that_veth_has(redirecting: Bench, flags: BindFlag) -> None:
    with redirecting.socket(SMALL, flags) as xsk:
        for number in range(50):
            redirecting.send(frame(number))
            if xsk.needs_wakeup:
                xsk.wake()
            assert receive(xsk, 1) == [frame(number)]


def test_waking_a_socket_without_frames_does_not_block(redirecting: Bench) -> None:
    with redirecting.socket(SMALL, BindFlag.COPY | BindFlag.NEED_WAKEUP) as xsk:
        xsk.wake()
        assert xsk.peek() == []


def test_a_forked_child_holds_the_queue_until_it_closes_its_copy(redirecting: Bench) -> None:
    xsk = redirecting.socket(SMALL)
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            theirs.recv(1)
            xsk.close()
            theirs.send(b"c")
            theirs.recv(1)
        finally:
            os._exit(0)
    try:
        theirs.close()
        xsk.close()
        with pytest.raises(OSError, match="another socket"):
            redirecting.socket(SMALL)
        ours.send(b"g")
        assert ours.recv(1) == b"c"
        with redirecting.socket(SMALL) as again:
            redirecting.send(frame(3))
            assert receive(again, 1) == [frame(3)]
    finally:
        ours.close()
        os.waitpid(child, 0)


def test_a_link_that_goes_down_and_is_deleted_leaves_a_socket_that_closes(redirecting: Bench) -> None:
    xsk = redirecting.socket(SMALL)
    space = redirecting.far.namespace
    space.set_link("near", state="down")
    space.set_link("near", state="up")
    redirecting.near.wait_until_running()
    assert redirecting.sender.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ENETDOWN
    redirecting.send(frame(1))
    assert receive(xsk, 1) == [frame(1)]
    space.delete_link("near")
    assert xsk.peek() == []
    xsk.statistics()
    xsk.close()
    assert space.names() == {"lo"}


@pytest.mark.parametrize(("field", "value"), [("chunks", 100), ("chunks", 0), ("rx_entries", 3), ("chunk_bytes", 1024)])
def test_a_geometry_that_no_kernel_takes_is_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}"):
        Geometry(**{field: value})


@pytest.mark.parametrize("size", [-4, 3, 256])
def test_metadata_that_does_not_fit_the_headroom_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"metadata_bytes={size}:"):
        Xsk(1, metadata_bytes=size)


def test_another_machine_is_refused_before_anything_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(UnsupportedMachineError, match="aarch64"):
        Xsk(1)


def test_a_flood_between_two_looks_is_only_counted(redirecting: Bench) -> None:
    with redirecting.socket(SMALL) as xsk:
        packet = frame(0)
        for _ in range(20_000):
            redirecting.sender.send(packet)
        # The link's own queue of 256 drops some before the socket can.
        assert 256 < xsk.statistics().rx_dropped <= 20_000 - 16
        assert len(xsk.peek(100)) == 16
        xsk.release()
        redirecting.send(frame(5))
        assert receive(xsk, 1)[-1] in {packet, frame(5)}
