"""The peer of `bench end-to-end`: a regtest node at the far end, which mines and announces a block when it is told to.

It answers getheaders and pings, and announces by compact blocks of 3,000 transactions, 18 kB, as on main.
"""

from __future__ import annotations

import random
import select
import socket
import time
from typing import TYPE_CHECKING

from sprint.bench.detect_announcements import NETWORK, TRANSACTIONS, announce
from sprint.bench.detect_wire import FAR_ADDRESS
from sprint.bench.fanout_wire import join_namespace
from sprint.bitcoin.connection import Connection, ConnectionConfig, Phase, Role
from sprint.bitcoin.messages import NODE_NETWORK, NODE_WITNESS, Headers
from sprint.bitcoin.peer_events import HeadersRequested
from sprint.regtest import RegtestChain

if TYPE_CHECKING:
    from multiprocessing.connection import Connection as Pipe

BEFORE_S = 6 * 3_600
"""The chain begins that long ago: block times must grow, and not run ahead of the clock."""
_READ = 1 << 16


def be_peer(control: Pipe, far_pid: int) -> None:
    """The process: one connection, then an announcement each time that it is asked for one."""
    join_namespace(far_pid)
    with socket.create_server((FAR_ADDRESS, NETWORK.port)) as listener:
        control.send("listening")
        control.recv()
        theirs, _ = listener.accept()
    theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer = _Peer(theirs)
    while not peer.ready:
        peer.hear()
    theirs.setblocking(False)
    control.send("ready")
    while True:
        ready, _, _ = select.select([control.fileno(), theirs.fileno()], [], [])
        if theirs.fileno() in ready and not peer.hear():
            return
        if control.fileno() in ready:
            control.recv()
            control.send(peer.announce())


class _Peer:
    def __init__(self, theirs: socket.socket) -> None:
        self._socket = theirs
        self._chain = RegtestChain()
        self._wall_s = int(time.time()) - BEFORE_S
        config = ConnectionConfig(network=NETWORK, role=Role.RESPONDER, services=NODE_NETWORK | NODE_WITNESS)
        self._connection = Connection(config, random.getrandbits(64), time.monotonic_ns(), int(time.time()))

    @property
    def ready(self) -> bool:
        """Hands are shaken."""
        return self._connection.phase is Phase.READY

    def hear(self) -> bool:
        """Take what has come, and answer it; False: the connection has ended."""
        try:
            data = self._socket.recv(_READ)
            for event in self._connection.receive_data(data, time.monotonic_ns()):
                if isinstance(event, HeadersRequested):
                    self._connection.send(Headers(self._chain.headers_after(event.locator, event.stop)))
            answer = self._connection.data_to_send()
            if answer:
                self._socket.sendall(answer)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return bool(data)

    def announce(self) -> int:
        """One more block; its height."""
        (block,) = self._chain.extend(1, self._wall_s)
        self._socket.sendall(announce(block, TRANSACTIONS))
        return self._chain.headers.tip_height
