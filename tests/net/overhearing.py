"""The near end of announcer.py's connections: plain sockets, and a capture on the interface that they go through.

What the sockets receive and what each backend's sightings say is kept side by side; to compare them is the test's part.
Owns its connections, the peers' process, and a CaptureSource as the product has it. Every wait is bounded.
"""

from __future__ import annotations

import contextlib
import pickle
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sprint.bitcoin.networks import REGTEST
from sprint.events import Sighting
from sprint.sources.capture import PEERS, CaptureSource
from sprint.status import StatusBlock
from tests.net.announcer import PATIENCE_S, Said, Script, announced
from xdp.capture import Capture
from xdp.ringbuf import RingBuffer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.net.netns import Namespace
    from xdp.capture import Handover
    from xdp.loader import Loaded
    from xdp.segments import Backend

ROOT = Path(__file__).resolve().parents[2]
IDLE_S = 0.02
"""Between two looks where nothing came."""


class Overhearing:
    """Both ears. Connections are numbered as the script has them."""

    def __init__(self, script: Script, process: subprocess.Popen[bytes], connections: list[socket.socket]) -> None:
        self.script = script
        self.received = [bytearray() for _ in connections]
        self.sightings: list[Sighting] = []
        self.source: CaptureSource | None = None
        self.deaf = False
        """The capture isn't read, as by a relay that hangs."""
        self._process = process
        self._connections = connections
        self._poll = select.poll()
        self._by_descriptor = {connection.fileno(): number for number, connection in enumerate(connections)}
        for connection in connections:
            connection.setblocking(False)
            self._poll.register(connection, select.POLLIN)

    @contextlib.contextmanager
    def capturing(self, handover: Handover) -> Iterator[CaptureSource]:
        """From now on the capture is listened to as well."""
        source = CaptureSource(Capture(handover), REGTEST, StatusBlock.create(1, {}), sorted(handover.backends))
        self._poll.register(source.fileno(), select.POLLIN)
        self.source = source
        try:
            yield source
        finally:
            self.source = None
            self._poll.unregister(source.fileno())
            source.close()

    def play(self, burst: int, patience_s: float = PATIENCE_S) -> None:
        """Have one burst sent, until the plain sockets have it; the capture is read meanwhile."""
        due = {number: len(self.received[number]) + size for number, size in self.script.sizes(burst).items()}
        self.start_burst()
        give_up = time.monotonic() + patience_s
        while any(len(self.received[number]) < size for number, size in due.items()):
            assert time.monotonic() < give_up, f"burst {burst} did not arrive"
            self.listen()

    def start_burst(self) -> None:
        """Have the next burst sent."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"!")
        self._process.stdin.flush()

    def listen(self, wait_s: float = IDLE_S) -> None:
        """Take in what there is at both ends, waiting for it no longer than that."""
        for descriptor, _ in self._poll.poll(wait_s * 1000):
            number = self._by_descriptor.get(descriptor)
            if number is not None:
                with contextlib.suppress(BlockingIOError):
                    self.received[number] += self._connections[number].recv(1 << 20)
        self.overhear()

    def listen_until(self, condition: Callable[[], bool], what: str, patience_s: float = 5.0) -> None:
        """Listen until that is so."""
        give_up = time.monotonic() + patience_s
        while not condition():
            assert time.monotonic() < give_up, what
            self.listen()

    def overhear(self) -> None:
        """Read the capture until it has nothing."""
        source = self.source
        while source is not None and not self.deaf:
            heard = source.poll(time.monotonic_ns())
            self.sightings += [one for one in heard if isinstance(one, Sighting)]
            if not heard and source.deadline() != 0:  # what is due later, listen() comes round to
                return

    def overhear_all(self, backends: Iterable[Backend], patience_s: float = 5.0) -> None:
        """Until each of these has told as much as the sockets were, or no more has come for a while."""
        due, ways = sum(map(len, self.told())), list(backends)
        give_up = time.monotonic() + patience_s
        while any(len(self.heard(backend)) < due for backend in ways) and time.monotonic() < give_up:
            self.listen()
        self.overhear()

    def told(self) -> list[list[Said]]:
        """What the plain sockets were told, by connection."""
        return [announced(bytes(stream)) for stream in self.received]

    def heard(self, backend: Backend) -> list[Said]:
        """What a backend's sightings tell, in order."""
        return [Said(one.announcement.name.lower(), one.hash) for one in self.sightings if one.peer == PEERS[backend]]


def as_the_product_has_it(loaded: Loaded) -> None:
    """Programs that another test has used: empty rings, and the settings of app_bypass."""
    loaded.configure(express=1, wakeup=1, every_magic=0)
    with RingBuffer.open(loaded.maps["express"]) as ring:
        while ring.poll():
            ring.release()


@contextlib.contextmanager
def overhearing(script: Script, near: Namespace, far: Namespace, folder: Path) -> Iterator[Overhearing]:
    """The peers' process in `far`, and its connections, all of them open, with us in `near`."""
    file = folder / "script"
    file.write_bytes(pickle.dumps(script))
    family = socket.AF_INET6 if ":" in script.theirs[0] else socket.AF_INET
    with contextlib.ExitStack() as stack:
        with near.entered():
            listener = stack.enter_context(
                socket.create_server(script.theirs, family=family, backlog=script.connect + 1)
            )
        listener.settimeout(PATIENCE_S)
        process = far.start(
            [sys.executable, "-m", "tests.net.announcer", str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        stack.enter_context(process)
        stack.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n", "the peers did not start"
        connections: list[socket.socket] = []
        with near.entered():
            for _ in range(script.accept):
                ours = socket.create_connection(script.ours, PATIENCE_S)
                connections.append(stack.enter_context(ours))
        for _ in range(script.connect):
            accepted, _ = listener.accept()
            connections.append(stack.enter_context(accepted))
        assert process.stdout.readline() == b"connected\n", "the peers did not connect"
        yield Overhearing(script, process, connections)
