"""What `bench detect` announces, how a socket's reader hears it, and the dummy that keeps all busy modes warm alike."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

from sprint.bitcoin.connection import Connection, ConnectionConfig, Phase, Role
from sprint.bitcoin.framing import encode_frame
from sprint.bitcoin.networks import NETWORKS
from sprint.bitcoin.peer_events import BlockAnnounced
from sprint.regtest import MinedBlock, mine
from sprint.sources.capture import CaptureSource
from xdp.segments import Backend, Flow, Segment, TcpFlags

if TYPE_CHECKING:
    from sprint.status import StatusBlock

PATIENCE_S = 2.0
"""After which what hasn't come is lost."""
BUFFER_SIZE = 1 << 18
NETWORK = NETWORKS["regtest"]
_DUMMIES = 128
_READS = 32
_MINED_AT = 1_700_000_000


def mine_blocks(count: int) -> list[MinedBlock]:
    """Each on another coinbase and with a hash that meets its target; they needn't make a chain."""
    return [mine(bytes(32), height, _MINED_AT, NETWORK.pow_limit_bits) for height in range(1, count + 1)]


def announce(block: MinedBlock) -> bytes:
    return encode_frame(NETWORK.magic, "cmpctblock", block.compact(0).encode())


def ready_connection() -> Connection:
    """An initiator whose handshake with a peer in memory is complete."""
    now_ns, wall_s = time.monotonic_ns(), int(time.time())
    ours = Connection(ConnectionConfig(network=NETWORK, role=Role.INITIATOR), 1, now_ns, wall_s)
    peer = Connection(ConnectionConfig(network=NETWORK, role=Role.RESPONDER), 2, now_ns, wall_s)
    while {ours.phase, peer.phase} != {Phase.READY}:
        peer.receive_data(ours.data_to_send(), now_ns)
        ours.receive_data(peer.data_to_send(), now_ns)
    return ours


class _Replayed:
    """A capture with one segment at a time, of our own making."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    def fileno(self) -> int:
        return -1

    def poll(self) -> list[Segment]:
        segments, self.segments = self.segments, []
        return segments

    def counters(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        self.segments = []


class WarmUp:
    """A dummy through the functions of every mode: the same for all."""

    def __init__(self, status: StatusBlock) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._ours = socket.create_connection(listener.getsockname(), PATIENCE_S)
            self._theirs, _ = listener.accept()
        self._theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._ours.setblocking(False)
        self._connection = ready_connection()
        self._frames = [announce(block) for block in mine_blocks(_DUMMIES)]
        self._buffer = memoryview(bytearray(BUFFER_SIZE))
        self._replayed = _Replayed()
        self._source = CaptureSource(self._replayed, NETWORK, status)
        self._flow = Flow(bytes(15) + b"\1", bytes(15) + b"\1", 1, NETWORK.port)
        self._sequence = 0

    def perform(self) -> None:
        frame = self._frames[self._sequence % _DUMMIES]
        self._sequence += 1
        self._theirs.send(frame)
        for _ in range(_READS):
            if hear_socket(self._ours, self._connection, self._buffer, socket.MSG_DONTWAIT):
                break
        for backend in Backend:
            sequence = self._sequence * len(frame) & 0xFFFF_FFFF
            view = memoryview(frame)
            self._replayed.segments = [Segment(backend, 1, self._flow, sequence, TcpFlags(0), len(view), view)]
            self._source.poll(0)
            self._source.poll(0)

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


def hear_socket(ours: socket.socket, connection: Connection, buffer: memoryview, flags: int) -> list[bytes]:
    """Hashes of what one recv() brought."""
    try:
        size = ours.recv_into(buffer, 0, flags)
    except BlockingIOError:
        return []
    if not size:
        raise RuntimeError("the sender has closed the connection")
    events = connection.receive_data(buffer[:size], 0)
    return [event.hash for event in events if isinstance(event, BlockAnnounced)]
