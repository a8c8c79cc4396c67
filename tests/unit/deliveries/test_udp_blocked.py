"""A way on which datagrams stop arriving: the client says so, and has its records over TCP again."""

from __future__ import annotations

import ctypes
import socket
import struct
import threading
from contextlib import closing
from inspect import getgeneratorlocals
from typing import TYPE_CHECKING

from sprint.addresses import parse_address
from sprint.client_datagrams import DatagramProtocol
from sprint.client_retry import Pauses
from sprint.client_udp import datagram_events
from sprint.datagrams import Echo, KeepAlive
from sprint.errors import SprintError
from sprint.frames import UdpChange, UdpReason, UdpState
from sprint.record import MAGIC, Record
from tests.unit.deliveries.test_udp import challenge, proven
from tests.unit.deliveries.udp_stage import PATIENCE_S, Stage, until

if TYPE_CHECKING:
    from sprint.client_protocol import Subscribed
    from sprint.frames import Item

_SO_ATTACH_FILTER = 26  # asm/socket.h
_RETURN = struct.pack("=HBBI", 0x06, 0, 0, 0)  # linux/filter.h: BPF_RET, of nothing


def block(sock: socket.socket) -> None:
    """From now on the kernel drops whatever arrives for that socket."""
    program = ctypes.create_string_buffer(_RETURN, len(_RETURN))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("=H6xQ", 1, ctypes.addressof(program)))


class Subscriber:
    """sprint.client's own loop, in a thread; it is told of by what it says."""

    def __init__(self, stage: Stage) -> None:
        self.protocol = DatagramProtocol(key="turbo", check_proof=False)
        self.said: list[Item | Subscribed] = []
        events = datagram_events(parse_address(stage.address), self.protocol, Pauses(reconnect=False))
        self._events = events
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with closing(self._events):
            try:
                self.said.extend(self._events)  # item by item
            except (OSError, SprintError):  # its connection has ended, and so has the test
                return

    def records(self) -> list[int]:
        return [item.sequence for item in list(self.said) if isinstance(item, Record)]

    def changes(self) -> list[tuple[UdpState, UdpReason]]:
        return [(item.state, item.reason) for item in list(self.said) if isinstance(item, UdpChange)]


def udp_socket_of(subscriber: Subscriber) -> socket.socket:
    sock: socket.socket = getgeneratorlocals(subscriber._events)["port"].sock
    return sock


def test_who_hears_nothing_by_udp_any_more_has_the_next_record_over_tcp_at_once() -> None:
    with Stage() as stage:
        subscriber = Subscriber(stage)
        until(lambda: subscriber.changes() == [(UdpState.ACTIVE, UdpReason.NONE)], "UDP is active")
        stage.publish()
        until(lambda: subscriber.protocol.by_datagram == 1, "the first record comes by UDP")

        block(udp_socket_of(subscriber))
        until(
            lambda: subscriber.changes()[1:] == [(UdpState.INACTIVE, UdpReason.UNHEARD)], "records are put back on TCP"
        )
        until(lambda: stage.tier(1).subscribers == 0, "nothing is sent there by UDP")
        requests = subscriber.protocol.requests
        stage.publish(3)
        until(lambda: subscriber.records() == [1, 2, 3, 4], "they come over TCP")
        assert subscriber.protocol.requests == requests  # none had to be asked for
        assert stage.tier(0).subscribers == 1


def test_a_session_that_gives_up_is_served_by_udp_again_once_it_has_proven_an_address_anew() -> None:
    with Stage() as stage, proven(stage) as session:
        session.tcp.sendall(b'{"udp":false}\n')
        told = session.event("udp")
        assert (told["state"], told["reason"], told["next"]) == ("inactive", "unheard", 1)
        session.tcp.sendall(b'{"udp":false}\n')  # harmless
        stage.publish()
        assert session.event("proven")["seq"] == 1
        session.send(KeepAlive(session.token).encode())
        session.send(Echo(session.token, challenge(session).cookie).encode())
        assert session.event("udp")["state"] == "active"
        stage.publish()
        session.datagrams.settimeout(PATIENCE_S)
        assert session.datagram(MAGIC)
        assert stage.tier(1).subscribers == 1
