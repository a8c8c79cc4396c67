"""The same datagram to many, in batches whose arrays for sendmmsg(2) stand ready.

A batch is made anew when somebody has joined or left it: 0.3 ms, when the loop has time for it, or else with the next
datagram.
"""

from __future__ import annotations

import socket
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from xdp.sendmmsg import Multisend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sprint.addresses import Address

BATCH: Final = 256
"""Datagrams a system call: more would save nothing, and their times would be known less well."""


class Rung(IntEnum):
    """How a subscriber is served, best first; the numbers are those of xdp.fanout_maps.Step."""

    LIVE_FRAMES = 0
    """By the relay, one system call for all."""
    AF_XDP = 1
    """By frames that stand ready."""
    SENDMMSG = 2
    """By a plain socket."""


class Target:
    """One proven address."""

    __slots__ = ("address", "packed", "place")

    def __init__(self, address: Address) -> None:
        self.address = address
        self.packed = pack(address.host)
        self.place = 0


def pack(host: str) -> bytes:
    """A numeric address as 4 or 16 bytes. Raises OSError for anything else."""
    return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)


class Run(NamedTuple):
    """One batch's way to the kernel; times are the clock's."""

    sent: int
    failed: int
    """Refused by the kernel for their addresses, or left over when the socket's buffer was full."""
    started_ns: int
    ended_ns: int


class Batches:
    """Targets in the order of their joining, as far as leaving lets it be: the last one takes the free place."""

    def __init__(self, sock: socket.socket, clock: Callable[[], int]) -> None:
        """`sock` is non-blocking; its family is that of all addresses, or IPv6 for both."""
        self._sock = sock
        self._clock = clock
        self._targets: list[Target] = []
        self._ready: list[Multisend | None] = []

    def __len__(self) -> int:
        return len(self._targets)

    def add(self, target: Target) -> None:
        """From the next datagram on."""
        target.place = len(self._targets)
        self._targets.append(target)
        self._change(target.place)

    def remove(self, target: Target) -> None:
        """Not any more."""
        last = self._targets.pop()
        self._change(last.place)
        if last is not target:
            self._targets[target.place] = last
            last.place = target.place
            self._change(target.place)

    def make_ready(self) -> bool:
        """Make one batch anew that has changed; False: all are ready."""
        for number, batch in enumerate(self._ready):
            if batch is None:
                self._ready[number] = self._made(number)
                return True
        return False

    def send(self, data: bytes) -> list[Run]:
        """To all, batch after batch; raises for nobody's address."""
        return list(self.parts(data))

    def parts(self, data: bytes) -> Iterator[Run]:
        """As send(), one batch at each step; between two of them there may be joins and leaves."""
        number = 0
        while number < len(self._ready):
            multisend = self._ready[number]
            if multisend is None:
                multisend = self._ready[number] = self._made(number)
            started_ns = self._clock()
            done = multisend.send(self._sock, data)
            yield Run(done.sent, len(multisend) - done.sent, started_ns, self._clock())
            number += 1

    def _made(self, number: int) -> Multisend:
        batch = self._targets[number * BATCH : (number + 1) * BATCH]
        return Multisend(self._sock.family, [(target.packed, target.address.port) for target in batch])

    def _change(self, place: int) -> None:
        number = place // BATCH
        while len(self._ready) <= number:
            self._ready.append(None)
        self._ready[number] = None
        del self._ready[-(-len(self._targets) // BATCH) :]
