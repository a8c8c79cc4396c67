"""The second rung of the egress, for one interface: its AF_XDP socket, and whose frame stands in which slot.

Grows by doubling, with a new socket each time; where that is refused, it goes on with as many as it has. A socket that
is refused, or fails, is tried again after a pause; those on this rung are then for the caller to serve (see egress).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from xdp.datagrams import NextHop, udp_headers
from xdp.fanout_maps import Rank, Step
from xdp.transmit import Transmitter

if TYPE_CHECKING:
    from collections.abc import Hashable

RETRY_NS = 5_000_000_000
"""Between two attempts at a socket; and at whatever else may have mended itself."""
SMALLEST = 1024
"""Slots to begin with."""


@final
class Member:
    """A subscriber, and where he is served."""

    __slots__ = ("address", "hop", "key", "port", "rank", "slot", "step")

    def __init__(self, key: Hashable, address: bytes, port: int, rank: Rank) -> None:
        self.key, self.address, self.port, self.rank = key, address, port, rank
        self.step = Step.SENDMMSG
        self.hop: NextHop | None = None
        self.slot = 0


@final
class Frames:
    """The second rung of one interface."""

    def __init__(self, ifindex: int, source_port: int) -> None:
        self.ifindex, self.source_port = ifindex, source_port
        self.transmitter: Transmitter | None = None
        self.retry_ns = self._grow_ns = 0
        self.members: dict[int, Member] = {}
        self.free: list[int] = []
        self.order: list[int] | None = None
        self._capacity = 0

    def open(self, now_ns: int) -> bool:
        """Whether there is a socket to send by."""
        if self.transmitter is None and now_ns >= self.retry_ns:
            self._make(max(SMALLEST, self._capacity), now_ns)
        return self.transmitter is not None

    def _make(self, capacity: int, now_ns: int) -> None:
        self.close()
        try:
            self.transmitter = Transmitter(self.ifindex, capacity)
        except (OSError, RuntimeError):
            self.retry_ns = now_ns + RETRY_NS
            return
        self._capacity = capacity
        self.free = [slot for slot in range(capacity - 1, -1, -1) if slot not in self.members]
        for member in self.members.values():
            self._put(member)

    def add(self, member: Member, now_ns: int) -> bool:
        """Whether his frame stands ready now."""
        if not self.free and self.transmitter is not None and now_ns >= self._grow_ns:
            before = self.transmitter.capacity
            self._make(2 * before, now_ns)
            if self.transmitter is None:
                self._grow_ns = now_ns + RETRY_NS
                self._make(before, now_ns)
        if self.transmitter is None or not self.free:
            return False
        member.slot = self.free.pop()
        self.members[member.slot] = member
        self._put(member)
        self.order = None
        return True

    def _put(self, member: Member) -> None:
        if self.transmitter is not None and member.hop is not None:
            self.transmitter.put(member.slot, udp_headers(member.hop, member.address, member.port, self.source_port))

    def remove(self, member: Member) -> None:
        """Free his slot."""
        del self.members[member.slot]
        self.free.append(member.slot)
        self.order = None

    def transmit(self, payload: bytes | memoryview, now_ns: int) -> tuple[int, int]:
        """To everybody here, the first rank first: how many the kernel took, and how many it didn't."""
        if self.transmitter is None or not self.members:
            return 0, 0
        if self.order is None:
            self.order = sorted(self.members, key=lambda slot: self.members[slot].rank)
        taken = self.transmitter.send(payload, self.order)
        if taken.error:
            self.close()
            self.retry_ns = now_ns + RETRY_NS
        return taken.sent, len(self.order) - taken.sent

    def close(self) -> None:
        """Let go of the socket; the slots stay whose they are."""
        if self.transmitter is not None:
            self.transmitter.close()
            self.transmitter = None
