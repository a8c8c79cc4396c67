"""Capture end to end: real TCP over a veth pair of the test's own, the programs attached, both ways out read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import select
import signal
import socket
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.net import packets, tiny_bpf
from tests.net.conftest import REGTEST_MAGIC, REGTEST_PORT
from tests.net.netns import Namespace, Veth, veth_pair
from tests.net.slowness import SLOWNESS
from xdp import kernel, links
from xdp.attachment import AttachError, Attachment, Mode, attach, self_test_packet
from xdp.capture import Capture, close_handover
from xdp.interfaces import interface
from xdp.ringbuf import RingBuffer
from xdp.segments import Backend, Segment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from xdp.loader import Loaded

PATIENCE_S = 5.0 * SLOWNESS
BOTH = (Backend.RINGBUF, Backend.AF_XDP)


class Stretch(NamedTuple):
    """A segment, kept beyond the poll that gave it."""

    backend: Backend
    arrival_ns: int
    sequence: int
    payload: bytes


class Cable:
    """A "NIC" in the namespace that the test is in, and what it is plugged into, with a peer behind it."""

    def __init__(self, near: Namespace, far: Namespace, mtu: int) -> None:
        addresses = ("10.77.0.1/24", "10.77.0.2/24")
        self.nic, self.wire = veth_pair(near, far, ("nic", "wire"), addresses=addresses, mtu=mtu)

    @contextlib.contextmanager
    def connection(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """The peer's end, which sends, and ours."""
        with (
            self.wire.namespace.open_socket(socket.AF_INET, socket.SOCK_STREAM) as listener,
            self.nic.namespace.open_socket(socket.AF_INET, socket.SOCK_STREAM) as ours,
        ):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("10.77.0.2", REGTEST_PORT))
            listener.listen()
            for side in (listener, ours):
                side.settimeout(PATIENCE_S)
            ours.connect(("10.77.0.2", REGTEST_PORT))
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(PATIENCE_S)
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                yield peer, ours


@pytest.fixture
def near() -> Iterator[Namespace]:
    with Namespace() as space, space.entered():
        yield space


@pytest.fixture
def cable(loaded: Loaded, near: Namespace) -> Iterator[Cable]:
    drain(loaded)
    with Namespace() as far:
        yield Cable(near, far, 1500)


def drain(loaded: Loaded) -> None:
    """What an earlier test left for the next reader."""
    with RingBuffer.open(loaded.maps["express"]) as ring:
        while ring.poll():
            ring.release()


def receive(ours: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = ours.recv(size - len(received))
        assert part
        received += part
    return received


def collect(capture: Capture, enough: Callable[[list[Stretch]], bool]) -> list[Stretch]:
    """What comes until it is enough, waiting on the capture's descriptor."""
    waiting = select.poll()
    waiting.register(capture.fileno(), select.POLLIN)
    found: list[Stretch] = []
    give_up = time.monotonic() + PATIENCE_S
    while not enough(found):
        assert time.monotonic() < give_up, [entry[:3] for entry in found]
        waiting.poll(100)
        found += [Stretch(s.backend, s.arrival_ns, s.sequence, bytes(s.payload)) for s in capture.poll()]
    return found


def saw(text: bytes, *backends: Backend) -> Callable[[list[Stretch]], bool]:
    """Whether each of these has had a segment with that in it."""
    return lambda found: all(any(text in s.payload for s in found if s.backend is b) for b in backends)


def talk(cable: Cable, capture: Capture, text: bytes = b"", backends: tuple[Backend, ...] = BOTH) -> None:
    """One announcement, over a new connection, that everybody gets."""
    body = b"\x01" + os.urandom(80) + b"\0"
    announcement = packets.message("headers", body) + text
    with cable.connection() as (peer, ours):
        peer.sendall(announcement)
        assert receive(ours, len(announcement)) == announcement
        collect(capture, saw(body, *backends))


# ── what is seen ──


@pytest.mark.parametrize("mode", ["native", "generic", "tc"])
def test_both_backends_see_every_announcement_exactly_and_tcp_gets_its_stream(
    loaded: Loaded, cable: Cable, mode: Mode
) -> None:
    stream, due = b"", []
    for announcement in packets.ANNOUNCEMENTS:
        due.append((len(stream), announcement.needed))
        stream += announcement.bytes
        stream += b"".join(packets.OTHERS)
    with (
        attach(loaded, "nic", modes=(mode,)) as attachment,
        Capture(attachment.handover()) as capture,
        cable.connection() as (peer, ours),
    ):
        assert attachment.mode == mode
        assert attachment.reason is None
        for at in range(0, len(stream), 333):
            peer.sendall(stream[at : at + 333])
        assert receive(ours, len(stream)) == stream

        def covered(found: list[Stretch], backend: Backend) -> set[int]:
            mine = [s for s in found if s.backend is backend]
            places: set[int] = set()
            for s in mine:
                offset = (s.sequence - mine[0].sequence) % (1 << 32)
                assert s.payload == stream[offset : offset + len(s.payload)]
                places.update(range(offset, offset + len(s.payload)))
            return places

        wanted = {place for at, needed in due for place in range(at, at + needed)}
        found = collect(capture, lambda found: all(wanted <= covered(found, backend) for backend in BOTH))
        now = time.monotonic_ns()
        arrivals = {s.sequence: s.arrival_ns for s in found if s.backend is Backend.RINGBUF}
        assert all(now - 60 * 10**9 < arrival <= now for arrival in arrivals.values())
        for s in found:
            assert s.backend is Backend.RINGBUF or s.arrival_ns in {0, arrivals.get(s.sequence, 0)}
        assert sum(s.arrival_ns > 0 for s in found if s.backend is Backend.AF_XDP) > 0
        counters = attachment.counters()
        assert counters["announcements"] >= len(due)  # an inv whose first entry is in the next segment counts
        assert counters["express"] == len(arrivals)
        assert counters["mirrored"] >= len(arrivals)
        assert counters["dropped"] == counters["mirrorLost"] == counters["opaqueFlows"] == 0
        assert {name: capture.counters()[name] for name in counters} == counters


@pytest.mark.parametrize("mode", ["native", "generic", "tc"])
def test_a_large_block_passes_untouched_and_its_first_bytes_are_seen(loaded: Loaded, cable: Cable, mode: Mode) -> None:
    block = packets.block(2_000_000)
    with (
        attach(loaded, "nic", modes=(mode,)) as attachment,
        Capture(attachment.handover()) as capture,
        cable.connection() as (peer, ours),
    ):
        sender = threading.Thread(target=peer.sendall, args=(block,))
        sender.start()
        received = receive(ours, len(block))
        sender.join(PATIENCE_S)
        assert hashlib.sha256(received).digest() == hashlib.sha256(block).digest()
        peer.sendall(packets.headers())
        found = collect(capture, saw(packets.headers(), *BOTH))
        for backend in BOTH:
            first = next(s for s in found if s.backend is backend)
            assert first.payload[:152] == block[:152]


def test_without_tcx_a_filter_does_the_same_and_is_taken_away(
    loaded: Loaded, cable: Cable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "ATTACH_TCX_INGRESS", 0x7FFF)  # as a kernel before 6.6: EINVAL
    with attach(loaded, "nic") as attachment, Capture(attachment.handover()) as capture:
        assert attachment.mode == "native"
        assert [entry.filter is not None for entry in links.ours()] == [True, False]
        talk(cable, capture)
    assert links.ours() == []


def test_an_empty_poll_gives_nothing_and_the_descriptor_is_not_readable(loaded: Loaded, cable: Cable) -> None:
    with attach(loaded, "nic") as attachment, Capture(attachment.handover()) as capture:
        assert capture.poll() == []
        assert not select.select([capture], [], [], 0)[0]
        assert set(attachment.counters().values()) == {0}


def test_a_payload_cannot_be_read_after_the_next_poll(loaded: Loaded, cable: Cable) -> None:
    with (
        attach(loaded, "nic") as attachment,
        Capture(attachment.handover()) as capture,
        cable.connection() as (peer, _),
    ):
        peer.sendall(packets.headers())
        give_up = time.monotonic() + PATIENCE_S
        segments: list[Segment] = []
        while not segments:
            assert time.monotonic() < give_up
            segments = capture.poll()
        capture.poll()
        with pytest.raises(ValueError, match="released"):
            bytes(segments[0].payload)


@pytest.mark.parametrize("backend", BOTH)
def test_one_backend_alone_works_and_the_other_stays_silent(loaded: Loaded, cable: Cable, backend: Backend) -> None:
    with attach(loaded, "nic", backends={backend}) as attachment, Capture(attachment.handover()) as capture:
        assert attachment.backends == {backend}
        talk(cable, capture, backends=(backend,))
        counters = attachment.counters()
        assert (counters["express"] > 0, counters["mirrored"] > 0) == (
            backend is Backend.RINGBUF,
            backend is Backend.AF_XDP,
        )


# ── the ladder ──


def test_where_native_is_refused_generic_is_taken_and_says_why(loaded: Loaded, near: Namespace) -> None:
    with Namespace() as far:
        cable = Cable(near, far, 9000)  # more than veth takes with a native program
        with attach(loaded, "nic") as attachment, Capture(attachment.handover()) as capture:
            assert attachment.mode == "generic"
            assert (attachment.reason or "").startswith("native: ")
            assert [program.mode for program in interface("nic").xdp] == ["generic"]
            talk(cable, capture)


def test_somebody_elses_program_is_refused_by_name_and_left_where_it_is(loaded: Loaded, cable: Cable) -> None:
    with (
        tiny_bpf.load_program(tiny_bpf.XDP, tiny_bpf.mov(0, tiny_bpf.XDP_PASS), tiny_bpf.EXIT) as program,
        tiny_bpf.attach_xdp(program, cable.nic.index),
    ):
        before = interface("nic").xdp
        with pytest.raises(AttachError, match=rf"nic has XDP program tiny .*pid {os.getpid()}"):
            attach(loaded, "nic")
        assert interface("nic").xdp == before
        assert links.ours() == []


def test_somebody_elses_tcx_program_that_accepts_everything_does_not_hide_packets_from_ours(
    loaded: Loaded, cable: Cable
) -> None:
    with tiny_bpf.load_program(tiny_bpf.SCHED_CLS, tiny_bpf.mov(0, 0), tiny_bpf.EXIT) as program:
        try:
            other = kernel.link_create(program, cable.nic.index, kernel.ATTACH_TCX_INGRESS)
        except OSError:
            pytest.skip("no TCX before Linux 6.6")
        try:
            with attach(loaded, "nic", modes=("tc",)) as attachment, Capture(attachment.handover()) as capture:
                talk(cable, capture)
        finally:
            os.close(other)


@pytest.mark.parametrize(("name", "reason"), [("lo", "loopback"), ("none", "No such device")])
def test_an_interface_that_cannot_be_captured_is_refused(
    loaded: Loaded, near: Namespace, name: str, reason: str
) -> None:
    with pytest.raises(AttachError, match=reason):
        attach(loaded, name)


def test_where_no_rung_is_proven_nothing_stays(loaded: Loaded, cable: Cable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdp.attachment.SELF_TEST_S", 0.05)
    loaded.watch([])
    try:
        with pytest.raises(AttachError, match=r"native: .*did not come.*generic: .*tc: "):
            attach(loaded, "nic")
    finally:
        loaded.watch([REGTEST_PORT])
    assert interface("nic").xdp == ()
    assert links.ours() == []


@pytest.mark.parametrize("mode", ["native", "generic", "tc"])
def test_the_self_test_reaches_no_tcp_even_where_its_address_is_our_own(
    loaded: Loaded, near: Namespace, mode: Mode
) -> None:
    def received() -> int:
        names, values = (
            line.split() for line in Path("/proc/thread-self/net/snmp").read_text().splitlines() if "Tcp:" in line
        )
        return int(values[names.index("InSegs")])

    with Namespace() as far:
        veth_pair(near, far, ("nic", "wire"), addresses=("192.0.2.82/24", "192.0.2.83/24"))
        with socket.create_server(("192.0.2.82", REGTEST_PORT)):
            before = received()
            with attach(loaded, "nic", modes=(mode,)):
                assert received() == before


def test_a_reader_that_is_still_there_neither_disturbs_a_self_test_nor_hears_of_it(
    loaded: Loaded, cable: Cable
) -> None:
    with attach(loaded, "nic", backends={Backend.RINGBUF}) as first, Capture(first.handover()) as reader:
        first.close()
        stop = threading.Event()
        heard: list[Segment] = []

        def read() -> None:
            while not stop.is_set():
                heard.extend(reader.poll())

        thread = threading.Thread(target=read)
        thread.start()
        try:
            for _ in range(3):
                with attach(loaded, "nic") as attachment:
                    assert attachment.mode == "native"
        finally:
            stop.set()
            thread.join()
        assert heard == []
        with attach(loaded, "nic", backends={Backend.RINGBUF}):
            talk(cable, reader, backends=(Backend.RINGBUF,))


def test_the_self_tests_packet_is_a_headers_message_with_the_token() -> None:
    packet = self_test_packet(REGTEST_MAGIC, 1, b"token")
    assert packet.index(REGTEST_MAGIC + b"headers") == 54
    assert struct.unpack_from("!H", packet, 16)[0] == len(packet) - 14
    assert b"token" in packet


# ── processes that die ──


@contextlib.contextmanager
def forked(work: Callable[[], None]) -> Iterator[int]:
    """A child that does this, reports, and sleeps until it is killed; the body runs after its report."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            work()
            os.write(writer, b"!")
            signal.alarm(30)
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], PATIENCE_S)
        assert ready
        assert os.read(reader, 1) == b"!"
        yield child
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_killed_owner_leaves_no_program_and_its_mirror_is_cleaned(loaded: Loaded, cable: Cable, tcx: bool) -> None:
    kept: list[Attachment] = []
    with forked(lambda: kept.append(attach(loaded, "nic"))):
        assert [program.program for program in interface("nic").xdp] == ["classify"]
        assert links.leftovers() == []
    give_up = time.monotonic() + PATIENCE_S
    while interface("nic").xdp:  # the kernel takes it off a moment after the process
        assert time.monotonic() < give_up
    left = 1 if tcx else 2  # the filter that stands in for a link
    assert len(links.leftovers()) == left
    assert len(links.clean()) == left
    assert near_names() == {"lo", "nic"}
    with attach(loaded, "nic") as attachment:
        assert attachment.mode == "native"


def near_names() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def test_a_second_consumer_takes_over_from_one_that_was_killed(loaded: Loaded, cable: Cable) -> None:
    with attach(loaded, "nic") as attachment:
        handover = attachment.handover()
        kept: list[Capture] = []

        def consume() -> None:
            attachment.leave_in_child()
            kept.append(Capture(handover))
            talk(cable, kept[0])

        with forked(consume):
            pass
        with Capture(handover) as capture:
            talk(cable, capture)


def test_a_handover_is_valid_in_another_process_with_the_descriptors_it_is_sent(loaded: Loaded, cable: Cable) -> None:
    with attach(loaded, "nic") as attachment:
        one, other = socket.socketpair()
        with one, other:
            socket.send_fds(one, [pickle.dumps(attachment.handover())], attachment.handover().fds())
            data, fds, _, _ = socket.recv_fds(other, 4096, 8)
        handover = pickle.loads(data).with_fds(fds)
        assert handover != attachment.handover()
        with Capture(handover) as capture:
            talk(cable, capture)
        close_handover(handover)


def test_a_child_that_let_go_does_not_keep_the_programs_attached(loaded: Loaded, cable: Cable, tcx: bool) -> None:
    attachment = attach(loaded, "nic")
    with attachment, forked(attachment.leave_in_child):
        assert len(links.ours()) == (1 if tcx else 2)  # the child took nothing of its parent's away
        attachment.close()
        assert interface("nic").xdp == ()
        assert near_names() == {"lo", "nic"}


# ── links that go ──


def test_an_interface_that_is_deleted_while_captured_lets_everything_be_closed(
    loaded: Loaded, cable: Cable, near: Namespace
) -> None:
    attachment = attach(loaded, "nic")
    capture = Capture(attachment.handover())
    talk(cable, capture)
    near.delete_link("nic")
    assert "nic" not in near_names()
    collect(capture, lambda _: True)
    assert attachment.counters()["announcements"] == 1
    attachment.close()
    capture.poll()
    assert not [event for _, event in _events(capture) if event & (select.POLLERR | select.POLLHUP)]
    capture.close()
    capture.close()
    attachment.close()
    assert near_names() == {"lo"}


def _events(capture: Capture) -> list[tuple[int, int]]:
    waiting = select.poll()
    waiting.register(capture.fileno(), select.POLLIN)
    return waiting.poll(0)


def test_an_interface_that_went_down_and_came_back_is_still_captured(loaded: Loaded, cable: Cable) -> None:
    with attach(loaded, "nic") as attachment, Capture(attachment.handover()) as capture:
        cable.nic.namespace.set_link("nic", state="down")
        cable.nic.namespace.set_link("nic", state="up")
        for end in (cable.nic, cable.wire):
            Veth.wait_until_running(end)
        talk(cable, capture)
