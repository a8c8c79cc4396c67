"""A wire that loses, doubles and delays: frames between two veth pairs, forwarded by a process as a policy wants it.

For kernels without netem, and better to reproduce: chances come from a seed. Runs in a namespace of its own between the
two ends: `bad_wire()` sets all of it up. As a program it is that process; it ends with its standard input, and then
prints what it did as one line of JSON.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import random
import select
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.net.netns import ETH_P_ALL, PACKET_IGNORE_OUTGOING, SOL_PACKET, Namespace, Veth, veth_pair, without_offloads

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
FRAME_BYTES = 1 << 16
SO_RCVBUFFORCE = 33
BUFFER_BYTES = 1 << 25


@dataclass(frozen=True, slots=True)
class Policy:
    """What happens to a frame, in both directions; chances are from 0 to 1 and independent of each other."""

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    """Chance to be held back for `hold_ms`, while later frames overtake it."""
    hold_ms: float = 3.0
    lose_once: str = ""
    """Hexadecimal: the first frame that contains these bytes is lost; the same frame sent again passes."""
    seed: int = 1


@dataclass(slots=True)
class Counts:
    """What a forwarder did, in frames; `held` is how many were overtaken or might have been."""

    forwarded: int = 0
    lost: int = 0
    duplicated: int = 0
    held: int = 0
    lost_once: int = 0


class BadWire:
    """A running forwarder; counts are known once it is stopped."""

    def __init__(self, near: Veth, far: Veth, process: subprocess.Popen[str]) -> None:
        self.near, self.far = near, far
        self._process = process
        self._counts: Counts | None = None

    def stop(self) -> Counts:
        """End the forwarding, and tell what was done."""
        if self._counts is None:
            out, _ = self._process.communicate()
            self._counts = Counts(**json.loads(out))
        return self._counts


@contextlib.contextmanager
def bad_wire(
    near: Namespace,
    far: Namespace,
    policy: Policy,
    *,
    addresses: tuple[str, str],
    names: tuple[str, str] = ("near", "far"),
    mtu: int = 1500,
) -> Iterator[BadWire]:
    """Two namespaces that reach each other through a forwarder; their ends do no offloading."""
    with Namespace() as middle:
        outer_near, _ = veth_pair(near, middle, (names[0], "left"), addresses=(addresses[0], None), mtu=mtu)
        outer_far, _ = veth_pair(far, middle, (names[1], "right"), addresses=(addresses[1], None), mtu=mtu)
        for end in (outer_near, outer_far):
            without_offloads(end)
        command = [sys.executable, "-m", "tests.net.forwarder", json.dumps(asdict(policy))]
        process = middle.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        with process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n", "the forwarder did not start"
                yield BadWire(outer_near, outer_far, process)
            finally:
                process.kill()


def _listen(name: str) -> socket.socket:
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    raw.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    raw.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
    raw.bind((name, ETH_P_ALL))
    raw.setblocking(False)
    return raw


def forward(policy: Policy, left: socket.socket, right: socket.socket) -> Counts:
    """Until standard input ends."""
    chance, counts = random.Random(policy.seed), Counts()
    marker = bytes.fromhex(policy.lose_once)
    waiting: list[tuple[float, int, socket.socket, bytes]] = []
    poll = select.poll()
    for source in (left, right, sys.stdin):
        poll.register(source, select.POLLIN)
    other = {left.fileno(): (left, right), right.fileno(): (right, left)}
    while True:
        timeout = max(0.0, (waiting[0][0] - time.monotonic()) * 1000) if waiting else None
        for descriptor, _ in poll.poll(timeout):
            if descriptor == sys.stdin.fileno():
                return counts
            source, target = other[descriptor]
            with contextlib.suppress(BlockingIOError):
                frame = source.recv(FRAME_BYTES)
                if marker and marker in frame:
                    marker = b""
                    counts.lost_once += 1
                elif chance.random() < policy.loss:
                    counts.lost += 1
                elif chance.random() < policy.reorder:
                    counts.held += 1
                    entry = (time.monotonic() + policy.hold_ms / 1000, counts.held, target, frame)
                    heapq.heappush(waiting, entry)
                else:
                    again = chance.random() < policy.duplicate
                    counts.duplicated += again
                    for _ in range(1 + again):
                        _send(target, frame, counts)
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, target, frame = heapq.heappop(waiting)
            _send(target, frame, counts)


def _send(target: socket.socket, frame: bytes, counts: Counts) -> None:
    try:
        target.send(frame)
        counts.forwarded += 1
    except (BlockingIOError, OSError):  # its buffer is full, or the link is down: a wire loses then
        counts.lost += 1


if __name__ == "__main__":
    with _listen("left") as one, _listen("right") as two:
        print("ready", flush=True)
        print(json.dumps(asdict(forward(Policy(**json.loads(sys.argv[1])), one, two))), flush=True)
