"""A peer without a connection: announcements as packets of its own making, which only the capture takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from tests.net import packets
from tests.net.conftest import REGTEST_PORT

if TYPE_CHECKING:
    from tests.net.netns import Veth


@final
class Peer:
    """Sends announcements, each a packet of its own, to nobody: only the capture takes them."""

    def __init__(self, nic: Veth, wire: Veth, addresses: tuple[str, str]) -> None:
        """`addresses`: the captured interface's, and its own."""
        ours, theirs = addresses
        headers = Ether(src=wire.mac, dst=nic.mac) / IP(src=theirs, dst=ours) / TCP(sport=REGTEST_PORT, dport=40000)
        self._raw = wire.namespace.raw_socket(wire.name)
        self._wire = packets.Wire(headers)

    def announce(self, count: int = 1) -> None:
        for _ in range(count):
            self._raw.send(self._wire.send(packets.headers()))

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()
