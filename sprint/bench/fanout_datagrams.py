"""The three ways in which the product sends the same datagram to many, and the first of them on two CPUs.

One process holds them all: the fan-out, its table, an AF_XDP socket and a plain one. All ways send to the same ports of
the far end, in the same order: on the wire to addresses of their own, behind it as behind a gateway, which is how
subscribers are reached; where they are sockets, all to its own, for they are on one host.

Awake, the process waits as the product's relay does: spinning, with a rehearsal each millisecond. That is a live frame
which is dropped in the kernel, and one to nobody by the other ways.
"""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from sprint.bench.detect_wire import FAR_ADDRESS
from sprint.bench.fanout_figures import AF_XDP, LIVE, LIVE_TWO, SENDMMSG, Sent
from sprint.bench.fanout_sink import FIRST_PORT, SOURCE_PORT
from sprint.bench.fanout_wire import address_of
from sprint.errors import HostError
from sprint.record import SIZE
from xdp.datagrams import udp_headers
from xdp.fanout import open_fanout
from xdp.fanout_maps import Rank, Sender
from xdp.fanout_run import FanoutRun
from xdp.fanout_table import FanoutTable
from xdp.loader import LoadError
from xdp.sendmmsg import Multisend
from xdp.transmit import Transmitter

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from sprint.bench.fanout_wire import Wire

FIRST_RANK_SHARE = 10
"""One of so many subscribers is enterprise, the others are turbo."""
REHEARSAL_S = 0.001
"""From one rehearsal to the next, as in the product's relay."""
_NOBODYS_PORT = 9
"""discard (RFC 863): no subscriber's."""
_NOTHING = bytes(SIZE)
"""A record that tells of no event: the far end drops it."""
_SEND_BUFFER = 8 << 20
_SO_SNDBUFFORCE = 32


def be_datagram_sender(control: Connection, wire: Wire, most: int, second_cpu: int | None) -> None:
    """The process: opens everything, then adds subscribers and publishes as it is told."""
    try:
        with ExitStack() as stack:
            senders = _Senders(stack, wire, most, second_cpu)
            control.send(tuple(senders.ways))
            while True:
                what, *arguments = control.recv()
                control.send(senders.publish(*arguments) if what == "publish" else senders.place(*arguments))
    except (LoadError, OSError) as error:
        control.send(HostError(f"fanout: {error}"))


class _Senders:
    def __init__(self, stack: ExitStack, wire: Wire, most: int, second_cpu: int | None) -> None:
        self._hop = wire.next_hop
        self._far_address = socket.inet_aton(FAR_ADDRESS)
        fanout = stack.enter_context(open_fanout())
        handover = fanout.handover()
        self._table = stack.enter_context(FanoutTable(handover, SOURCE_PORT))
        self._transmitter = stack.enter_context(Transmitter(wire.near_index, most + 1))
        self._transmitter.put(most, udp_headers(self._hop, self._far_address, _NOBODYS_PORT, SOURCE_PORT))
        self._socket = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER)
        self._socket.bind(("", SOURCE_PORT))
        self._multisend = Multisend(socket.AF_INET, [])
        to_nobody = Multisend(socket.AF_INET, [(self._far_address, _NOBODYS_PORT)])
        self._slots: list[int] = []
        one = stack.enter_context(FanoutRun(handover, Sender.RELAY))
        self.ways: dict[str, Callable[[bytes], int]] = {
            LIVE: lambda payload: one.send(payload).transmitted,
            AF_XDP: lambda payload: self._transmitter.send(payload, range(len(self._slots))).sent,
            SENDMMSG: lambda payload: self._multisend.send(self._socket, payload).sent,
        }
        self._rehearsals: dict[str, Callable[[], object]] = {
            LIVE: one.rehearse,
            AF_XDP: lambda: self._transmitter.send(_NOTHING, range(most, most + 1)),
            SENDMMSG: lambda: to_nobody.send(self._socket, _NOTHING),
        }
        if second_cpu is not None:
            two = stack.enter_context(FanoutRun(handover, Sender.OTHER, cpus=(second_cpu,)))
            self.ways[LIVE_TWO] = lambda payload: two.send(payload).transmitted
            self._rehearsals[LIVE_TWO] = two.rehearse

    def place(self, subscribers: int, addresses: bool) -> int:
        """From now on there are so many, with an address each, or all at the far end's; ns that one's joining took."""
        ports = range(FIRST_PORT, FIRST_PORT + subscribers)
        own = [address_of(number) if addresses else self._far_address for number in range(subscribers)]
        with self._table.batch():
            for slot in self._slots:
                self._table.remove(slot)
        begun = time.monotonic_ns()
        with self._table.batch():
            self._slots = [
                self._table.add(self._hop, address, port, Rank.FIRST if port % FIRST_RANK_SHARE == 0 else Rank.SECOND)
                for address, port in zip(own, ports, strict=True)
            ]
        took = time.monotonic_ns() - begun
        for number, (address, port) in enumerate(zip(own, ports, strict=True)):
            self._transmitter.put(number, udp_headers(self._hop, address, port, SOURCE_PORT))
        self._multisend = Multisend(socket.AF_INET, list(zip(own, ports, strict=True)))
        return took // max(subscribers, 1)

    def publish(self, way: str, payload: bytes, awake_s: float = 0.0) -> Sent:
        """By one of them, to all, after having been awake for so long."""
        send = self.ways[way]
        if awake_s:
            self._be_awake(self._rehearsals[way], awake_s)
        cpu = time.process_time_ns()
        begun = time.monotonic_ns()
        taken = send(payload)
        ended = time.monotonic_ns()
        return Sent(begun, ended, time.process_time_ns() - cpu, taken, payload)

    def _be_awake(self, rehearse: Callable[[], object], awake_s: float) -> None:
        until = time.monotonic() + awake_s
        while (now := time.monotonic()) < until:
            rehearse()
            while time.monotonic() < now + REHEARSAL_S:
                pass
