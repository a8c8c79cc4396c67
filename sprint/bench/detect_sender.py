"""The peer of `bench detect`: a process in a namespace of its own that announces blocks over TCP when it is told to."""

from __future__ import annotations

import os
import random
import socket
import time
from typing import TYPE_CHECKING

from sprint.bench.detect_announcements import NETWORK, announce, transactions_announced
from sprint.bench.detect_path import ROUND_TRIP_NS, LossyPath
from sprint.bench.detect_wire import FAR, FAR_ADDRESS, LOSSY_ADDRESS, bring_up, enter_namespace
from sprint.bitcoin.connection import Connection, ConnectionConfig, Phase, Role
from sprint.tiers import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection as Pipe

    from sprint.regtest import MinedBlock

PAUSE_S = (0.014, 0.026)
"""Between two announcements, at random, so that no rhythm of the reader fits them. On main minutes pass, and the longer
a reader sleeps, the longer it takes to wake up: this is as near to that as the benchmark's time allows."""
LOSSY_PAUSE_S = 3 * ROUND_TRIP_NS / NS_PER_S
"""Within which a lost packet has been sent again."""


def be_peer(control: Pipe, blocks: Sequence[MinedBlock]) -> None:
    """The process: namespace, wire and handshakes as they are asked for, then turns of announcements."""
    control.recv()
    enter_namespace()
    control.send(os.getpid())
    (mac,) = control.recv()
    bring_up(FAR, FAR_ADDRESS)
    path = LossyPath(LOSSY_ADDRESS, mac)
    with (
        socket.create_server((FAR_ADDRESS, NETWORK.port)) as listener,
        socket.create_server((LOSSY_ADDRESS, NETWORK.port)) as lossy_listener,
    ):
        control.send("listening")
        direct, lossy = _accept(listener), _accept(lossy_listener)
    while True:
        first, last, short_ids, by_lossy = control.recv()
        for block in blocks[first:last]:
            message = announce(block, short_ids)
            if by_lossy:
                time.sleep(LOSSY_PAUSE_S)
                before = transactions_announced()
                path.lose(before)
                lossy.sendall(before)
                lossy.sendall(message)
            else:
                time.sleep(random.uniform(*PAUSE_S))
                direct.sendall(message)
        if by_lossy:
            time.sleep(LOSSY_PAUSE_S)  # the last ones' fate is decided by then
        control.send(path.lost)


def _accept(listener: socket.socket) -> socket.socket:
    theirs, _ = listener.accept()
    theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = ConnectionConfig(network=NETWORK, role=Role.RESPONDER)
    connection = Connection(config, random.getrandbits(64), time.monotonic_ns(), int(time.time()))
    while connection.phase is not Phase.READY:
        connection.receive_data(theirs.recv(1 << 16), time.monotonic_ns())
        theirs.sendall(connection.data_to_send())
    return theirs
