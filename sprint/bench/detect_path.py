"""A path with a delay and with losses at will, for `bench detect`: TCP's packets leave by a tunnel and go on late.

The peer has a second address in its namespace, whose packets a rule of routing sends into the tunnel. A thread takes
them out there, waits, and puts them on the wire as they are; what is told to be lost, isn't. The way back is direct, so
the delay is the round trip's. Only one direction of one address is affected, and the receiver's side not at all.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from pathlib import Path

from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types

from sprint.bench.detect_wire import FAR, NEAR_ADDRESS
from sprint.tiers import NS_PER_MS, NS_PER_S

ROUND_TRIP_NS = 20 * NS_PER_MS
"""Between two nodes on one continent."""
DEVICE = "path"
_TABLE = 100
_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_ETH_P_IP = 0x0800
_PACKET_BYTES = 1 << 16
_IP_AND_TCP = 40


class LossyPath:
    """The forwarding thread, and what it is to lose."""

    def __init__(self, address: str, mac: bytes) -> None:
        """`address`: the one to make, in this process's namespace; `mac`: of the wire's other end. Raises OSError."""
        self._device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(self._device, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
        for where in ("all", FAR):  # what comes in by the wire is answered by another device
            Path(f"/proc/sys/net/ipv4/conf/{where}/rp_filter").write_text("0", encoding="ascii")
        with IPRoute() as route:
            index = route.link_lookup(ifname=DEVICE)[0]
            route.addr("add", index=index, address=address, prefixlen=32)
            route.link("set", index=index, state="up")
            route.route("add", dst=f"{NEAR_ADDRESS}/32", oif=index, table=_TABLE)
            route.rule("add", src=address, src_len=32, table=_TABLE, priority=_TABLE)
        self._wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        self._to = (FAR, _ETH_P_IP, 0, 0, mac)
        self._loses: bytes | None = None
        self.lost = 0
        threading.Thread(target=self._forward, daemon=True).start()

    def lose(self, beginning: bytes) -> None:
        """Lose the next packet whose payload begins so; the same again will pass."""
        self._loses = beginning

    def _forward(self) -> None:
        waiting: deque[tuple[int, bytes]] = deque()
        while True:
            pause_s = None if not waiting else max(0, waiting[0][0] - time.monotonic_ns()) / NS_PER_S
            ready, _, _ = select.select([self._device], [], [], pause_s)
            now_ns = time.monotonic_ns()
            while waiting and waiting[0][0] <= now_ns:
                self._wire.sendto(waiting.popleft()[1], self._to)
            if ready:
                packet = os.read(self._device, _PACKET_BYTES)
                if self._is_lost(packet):
                    self.lost += 1
                else:
                    waiting.append((now_ns + ROUND_TRIP_NS, packet))

    def _is_lost(self, packet: bytes) -> bool:
        loses = self._loses
        if loses is None or len(packet) < _IP_AND_TCP:
            return False
        start = (packet[0] & 15) * 4  # RFC 791
        start += (packet[start + 12] >> 4) * 4  # RFC 9293
        if not packet.startswith(loses, start):
            return False
        self._loses = None
        return True
