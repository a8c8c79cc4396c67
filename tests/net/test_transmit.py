"""The rungs below live frames: AF_XDP frames that stand ready, and sendmmsg."""

from __future__ import annotations

import os
import random
import socket
from typing import TYPE_CHECKING

import pytest

from tests.net.netns import Namespace, Veth, veth_pair
from tests.net.slowness import SLOWNESS
from tests.net.subscribers import SOURCE_PORT, US, Cable, Collector, addresses, expected, read, scapy_agrees
from xdp.datagrams import NextHop, udp_headers
from xdp.sendmmsg import Multisend
from xdp.transmit import Transmitter

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces and links")


@pytest.fixture
def wire() -> Iterator[Cable]:
    """Without GRO or XDP at the far end: these rungs need neither."""
    with Namespace() as near, Namespace() as far, near.entered():
        yield Cable(*veth_pair(near, far))


def test_frames_that_stand_ready_are_right_whatever_payload_comes(wire: Cable) -> None:
    people = [*addresses(2500), *addresses(500, ipv6=True)]
    with Transmitter(wire.near.index, 4096) as transmitter, Collector(wire.far) as collector:
        for slot, (address, port) in enumerate(people):
            transmitter.put(slot, udp_headers(wire.hop(ipv6=len(address) == 16), address, port, SOURCE_PORT))
        for length in (192, 192, 40, 41, 192, 256):
            payload = os.urandom(length)
            assert transmitter.send(payload, range(len(people))) == (len(people), 0)
            frames = collector.frames(len(people))
            assert [read(frame) for frame in frames] == [expected(wire, payload, *who) for who in people]
            for frame in random.sample(frames, 5):
                scapy_agrees(frame)


def test_only_the_slots_that_are_named_are_sent_and_the_newest_headers(wire: Cable) -> None:
    people = list(addresses(3))
    with Transmitter(wire.near.index, 8) as transmitter, Collector(wire.far) as collector:
        for slot, who in enumerate(people):
            transmitter.put(slot, udp_headers(wire.hop(), *who, SOURCE_PORT))
        transmitter.send(b"first", [0, 1, 2])
        collector.frames(3)
        transmitter.put(0, udp_headers(wire.hop(), *people[1], SOURCE_PORT))
        assert transmitter.send(b"again", [2, 0]).sent == 2
        due = [expected(wire, b"again", *people[2]), expected(wire, b"again", *people[1])]
        assert [read(frame) for frame in collector.frames(2)] == due
        with pytest.raises(ValueError, match="slot 8: expected 0 to 7"):
            transmitter.put(8, udp_headers(wire.hop(), *people[1], SOURCE_PORT))
        with pytest.raises(ValueError, match="1 to 256"):
            transmitter.send(b"", [0])


def test_an_interface_that_is_down_ends_it_with_an_error_that_is_returned(wire: Cable) -> None:
    ((address, port),) = addresses(1)
    with Transmitter(wire.near.index, 8) as transmitter:
        transmitter.put(0, udp_headers(wire.hop(), address, port, SOURCE_PORT))
        wire.near.namespace.set_link(wire.near.name, state="down")
        taken = transmitter.send(b"nobody", [0])
        assert taken.error != 0
    wire.near.namespace.set_link(wire.near.name, state="up")
    with Transmitter(wire.near.index, 8) as another:  # its place is free again
        another.put(0, udp_headers(wire.hop(), address, port, SOURCE_PORT))
        assert another.send(b"somebody", [0]) == (1, 0)


def test_an_interface_that_is_not_there_is_refused_by_name_of_the_step(wire: Cable) -> None:
    with pytest.raises(OSError, match="bind to interface 4711, queue 0"):
        Transmitter(4711, 8)


# ── sendmmsg ──


@pytest.fixture
def ends() -> Iterator[tuple[Veth, Veth]]:
    with Namespace() as near, Namespace() as far, near.entered():
        yield veth_pair(near, far, addresses=("10.61.0.1/24", "10.61.0.2/24"))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_datagram_goes_to_each_of_thousands_by_sendmmsg(ends: tuple[Veth, Veth], family: int) -> None:
    there = socket.inet_aton("10.61.0.2")
    with (
        ends[1].namespace.open_socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(family, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind(("10.61.0.2", 0))
        receiver.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        receiver.settimeout(5 * SLOWNESS)
        sender.setsockopt(socket.SOL_SOCKET, 32, 64 << 20)  # SO_SNDBUFFORCE
        port = receiver.getsockname()[1]
        ready = Multisend(family, [(there, port)] * 2500)
        assert len(ready) == 2500
        for payload in (b"a record", b"another, longer one"):
            assert ready.send(sender, payload) == (2500, 0, 0)
            assert {receiver.recv(100) for _ in range(2500)} == {payload}


def test_a_destination_that_is_refused_keeps_nobody_else_from_getting_it(ends: tuple[Veth, Veth]) -> None:
    with (
        ends[1].namespace.open_socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind(("10.61.0.2", 0))
        receiver.settimeout(5 * SLOWNESS)
        port = receiver.getsockname()[1]
        nowhere, everybody = socket.inet_aton("192.0.2.1"), socket.inet_aton("10.61.0.255")
        there = socket.inet_aton("10.61.0.2")
        ready = Multisend(socket.AF_INET, [(there, port), (nowhere, 9), (everybody, 9), (there, port)])
        assert ready.send(sender, b"record") == (2, 2, 0)
        assert [receiver.recv(100) for _ in range(2)] == [b"record", b"record"]


def test_nobody_to_send_to_is_nothing_sent(ends: tuple[Veth, Veth]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        assert Multisend(socket.AF_INET, []).send(sender, b"record") == (0, 0, 0)


def test_headers_of_two_families_are_refused() -> None:
    hop = NextHop(1, bytes(6), bytes(6), US)
    with pytest.raises(ValueError, match="one family is expected"):
        udp_headers(hop, bytes(16), 9, 9)
