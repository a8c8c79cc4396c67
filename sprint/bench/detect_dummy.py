"""What keeps all busy ways of `bench detect` warm alike: the product's own rehearsal."""

from __future__ import annotations

import socket

from sprint.bench.detect_ways import PATIENCE_S, connected_upstream
from sprint.engines.rehearsal import Rehearsal
from sprint.sources.capture import Overheard


def rehearsal() -> Rehearsal:
    """By a TCP connection over the loopback, and by a capture in memory. Raises HostError or OSError."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE_S)
        upstream = connected_upstream(*listener.getsockname())
        theirs, _ = listener.accept()
    theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Rehearsal(upstream, theirs, Overheard())
