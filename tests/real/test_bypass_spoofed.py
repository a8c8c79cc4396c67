"""Packets that anybody could have sent, into a flow that the capture listens to: what comes of them is nothing.

The product has one honest upstream, which announces nothing by itself; blocks are announced on another connection that
Sprint only overhears. So whatever reaches the subscriber was captured, and what is real must be captured by both ways.
Forged packets have that connection's addresses and ports, and checksums that TCP refuses: the real flow goes on.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from sprint.bitcoin.networks import REGTEST
from sprint.regtest import coinbase_transaction
from tests.net.netns import Namespace, Veth, veth_pair
from tests.net.packets import Wire
from tests.real.captured import captured, wait_until_captured
from tests.real.product import ProductError
from tests.real.scripted_peer import (
    REGTEST_MAGIC,
    ScriptedPeer,
    cmpctblock_payload,
    double_sha256,
    headers_payload,
    make_branch,
    make_header,
    message,
)
from tests.real.subscribers import JsonStream
from xdp.loader import missing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.real.product import Product

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

NEAR, FAR = "10.82.0.1", "10.82.0.2"
PORT = REGTEST.port
HEIGHT = 20
PATIENCE_S = 10.0
FIN, SYN, RST, PSH_ACK = 0x01, 0x02, 0x04, 0x18
LARGEST = 4_000_000
SOURCE_PORT_AT = 14 + 20
COINBASE = coinbase_transaction(1)
MODULUS = 1 << 32
Packet = tuple[int, bytes, int]
"""How far from the flow's next byte, the payload, and TCP's flags."""


class Upstream(ScriptedPeer):
    """One that serves headers to everybody who connects, and says nothing by itself: some of Sprint's processes do."""

    def _serve(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve_one, args=(connection,), daemon=True).start()

    def _serve_one(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(PATIENCE_S)
            with contextlib.suppress(OSError, EOFError):
                self._converse(connection)


class Flow:
    """A peer's connection to a node on this host, which no Sprint is part of, and whoever forges packets of it."""

    def __init__(self, nic: Veth, wire: Veth, stack: contextlib.ExitStack) -> None:
        with socket.create_server((NEAR, PORT)) as listener:
            with wire.namespace.entered():
                self._peer = stack.enter_context(socket.create_connection((NEAR, PORT), PATIENCE_S))
            self._node = stack.enter_context(listener.accept()[0])
        self._node.settimeout(PATIENCE_S)
        self._forger = stack.enter_context(wire.namespace.raw_socket("wire"))
        self._link = Ether(src=wire.mac, dst=nic.mac)
        self._port = self._peer.getsockname()[1]

    def send(self, data: bytes) -> None:
        """The real peer says this, and the node has it."""
        self._peer.sendall(data)
        received = b""
        while len(received) < len(data):
            received += self._node.recv(len(data))
        assert received == data

    def next_sequence(self) -> int:
        """Of the next byte that the real peer will send."""
        # TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ (linux/tcp.h): the kernel tells, without a packet sent.
        repair, queue, queue_sequence, send_queue, off_silently = 19, 20, 21, 2, -1
        self._peer.setsockopt(socket.IPPROTO_TCP, repair, 1)
        try:
            self._peer.setsockopt(socket.IPPROTO_TCP, queue, send_queue)
            return self._peer.getsockopt(socket.IPPROTO_TCP, queue_sequence) % MODULUS
        finally:
            self._peer.setsockopt(socket.IPPROTO_TCP, repair, off_silently)

    def forge(self, packets: Iterable[Packet], ports: Iterable[int] = ()) -> None:
        """Put these on the wire; `ports`: one after the other, of connections that don't exist."""
        wire = Wire(self._link / IP(src=FAR, dst=NEAR) / TCP(sport=self._port, dport=PORT), self.next_sequence())
        others = iter(ports)
        for offset, payload, flags in packets:
            packet = bytearray(wire.at(wire.sequence + offset, payload, flags))
            struct.pack_into("!H", packet, SOURCE_PORT_AT, next(others, self._port))
            self._forger.send(packet)


class Attack:
    """The product, its subscriber, the honest chain, and the flow that is attacked."""

    def __init__(self, product: Product, stream: JsonStream, upstream: ScriptedPeer, flow: Flow) -> None:
        self.product, self.stream, self.flow = product, stream, flow
        self.upstream = upstream
        self.honest: list[str] = []

    @property
    def tip(self) -> bytes:
        return self.upstream.served[-1]

    def forged(self, label: str) -> list[bytes]:
        """Headers that don't stand the proof, each for another reason."""
        parent, then = double_sha256(self.tip), int.from_bytes(self.tip[68:72], "little") + 1
        return [
            make_header(parent, then, label=label, work=False),
            make_header(parent, then, label=label, bits=0x207FFFFE),  # regtest's work, but not regtest's nBits
            make_header(parent, then, label=label, bits=0x1F7FFFFF),
            make_header(double_sha256(label.encode()), then, label=label),  # nobody knows that parent
            make_header(parent, int(time.time()) + 3 * 3600, label=label),
            make_header(parent, 1_290_000_000, label=label),  # before the median time
            make_header(parent, then, label=label, version=-1),
        ]

    def announce(self, how: str) -> None:
        """One real block, on the flow."""
        header = make_branch(self.tip, 1, f"real {len(self.honest)}")[0]
        self.flow.send(say(header, how))
        self.honest.append(double_sha256(header)[::-1].hex())
        self.upstream.served.append(header)

    def goes_on(self) -> None:
        """Real blocks are heard again, all but the first of them at most; nothing else has been published."""
        self.announce("cmpctblock")
        with contextlib.suppress(ProductError):  # asked for at the upstream, then, when the next one is heard
            self.stream.wait_for_hashes("proven", self.honest, 1.0)
        for how in ("headers", "block", "cmpctblock"):
            self.announce(how)
            wait_until_captured(self.product, self.honest[-1])
        self.stream.wait_for_hashes("proven", self.honest)
        assert self.stream.hashes("proven") == self.honest
        assert self.stream.of("lost") == []


def say(header: bytes, how: str) -> bytes:
    """A message that announces it."""
    if how == "headers":
        return message(how, headers_payload([header]))
    return message(how, cmpctblock_payload(header) if how == "cmpctblock" else header + b"\x01" + COINBASE)


@pytest.fixture(scope="module")
def attack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attack]:
    with contextlib.ExitStack() as stack:
        near, far = stack.enter_context(Namespace()), stack.enter_context(Namespace())
        stack.enter_context(near.entered())
        nic, wire = veth_pair(near, far, ("nic", "wire"), addresses=(f"{NEAR}/24", f"{FAR}/24"))
        with far.entered():
            served = make_branch(REGTEST.genesis_header, HEIGHT, "before")
            upstream = stack.enter_context(Upstream(HEIGHT, served, host=FAR))
        upstream.open()
        product = stack.enter_context(captured(tmp_path_factory.mktemp("spoofed"), "nic", upstream.address))
        product.wait_for_tip(HEIGHT)
        stream = stack.enter_context(JsonStream(product.stream))
        yield Attack(product, stream, upstream, Flow(nic, wire, stack))


def test_what_is_forged_into_a_flow_is_never_published_and_what_is_real_in_it_is_heard(attack: Attack) -> None:
    attack.goes_on()
    chance = random.Random(12)

    def junk(count: int) -> Iterator[Packet]:
        for _ in range(count):
            start = chance.choice((REGTEST_MAGIC, message("cmpctblock", chance.randbytes(90))[:24], b""))
            yield chance.randrange(-100_000, 100_000), start + chance.randbytes(chance.randrange(200)), PSH_ACK

    for how in ("cmpctblock", "headers", "block"):
        attack.flow.forge((0, say(header, how), PSH_ACK) for header in attack.forged(how))
        attack.goes_on()
    for offset in (0, 24, -1, 1_448, 1 << 20, -(1 << 20), 1 << 31):
        said = [say(header, "cmpctblock") for header in attack.forged(f"at {offset}")]
        attack.flow.forge((offset, one, PSH_ACK) for one in said)
        attack.goes_on()
    for command in ("tx", "block", "cmpctblock", "headers", "inv"):
        lie = message(command)[:16] + LARGEST.to_bytes(4, "little") + bytes(4)
        attack.flow.forge([(0, lie, PSH_ACK), (0, lie + bytes(1_400), PSH_ACK), (700, lie, PSH_ACK)])
        attack.goes_on()
    for flags in (RST, FIN, SYN, SYN | FIN, RST | PSH_ACK, FIN | PSH_ACK):
        attack.flow.forge([(0, b"", flags), (0, bytes(50), flags), (5_000, b"", flags)])
        attack.goes_on()
    attack.flow.forge(junk(5_000))
    attack.goes_on()


def test_floods_of_forged_flows_push_nothing_real_aside(attack: Attack) -> None:
    attack.goes_on()
    for first in range(0, 10_000, 2_000):
        said = [say(header, "cmpctblock") for header in attack.forged(f"flood {first}")]
        packets = ((number, said[number % len(said)], PSH_ACK) for number in range(2_000))
        attack.flow.forge(packets, range(20_000 + first, 22_000 + first))
    attack.goes_on()


def test_the_proof_decides_not_who_sent_it(attack: Attack) -> None:
    """A forged packet with a header that stands the proof is a block: this shows that forged packets are heard."""
    attack.goes_on()
    (header,) = make_branch(attack.tip, 1, "forged, and proven")
    attack.upstream.served.append(header)
    attack.flow.forge([(0, say(header, "cmpctblock"), PSH_ACK)])
    attack.honest.append(double_sha256(header)[::-1].hex())
    attack.stream.wait_for_hashes("proven", attack.honest)
    attack.goes_on()
