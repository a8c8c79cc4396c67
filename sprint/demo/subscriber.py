"""One subscriber of the demo: a process of its own, which checks every hash against what the node says it mined."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sprint.client import Subscribed, events
from sprint.demo.wire import join_namespace
from sprint.events import Event
from sprint.frames import UdpChange, UdpState
from sprint.record import Record
from sprint.shared_reader import SharedReader

if TYPE_CHECKING:
    from multiprocessing.connection import Connection as Pipe


@dataclass(frozen=True, slots=True)
class Ready:
    """The stream has accepted the subscriber."""

    tier: str
    write_deadline: str


@dataclass(frozen=True, slots=True)
class Delivered:
    """A proven block came that the node has mined."""

    hash: bytes
    after_seen_ns: int
    """First sighting by Sprint → this process has the record."""


@dataclass(frozen=True, slots=True)
class Received:
    """Any record came: what the view shows of it."""

    record: Record


class _Checker:
    """Matches what came with what was mined, whichever is known first."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._mined: set[bytes] = set()
        self._came: dict[bytes, int] = {}

    def mined(self, hashes: list[bytes]) -> None:
        with self._lock:
            self._mined.update(hashes)
            for block_hash in hashes:
                self._match(block_hash)

    def came(self, block_hash: bytes, after_seen_ns: int) -> None:
        with self._lock:
            self._came[block_hash] = after_seen_ns
            self._match(block_hash)

    def _match(self, block_hash: bytes) -> None:
        if block_hash in self._mined and block_hash in self._came:
            self._mined.discard(block_hash)
            self._pipe.send(Delivered(block_hash, self._came.pop(block_hash)))


def run_subscriber(pipe: Pipe, address: str, key: str, *, tell_all: bool, beside: int | None = None) -> None:
    """Subscribe to the stream and report by `pipe`, which brings the hashes mined; ends when its other end is closed.

    `tell_all`: report every record too, for the view. `beside` a process: by UDP, in that one's network namespace.
    """
    checker = _checker(pipe)
    if beside is not None:
        join_namespace(beside)
    subscribed: Subscribed | None = None
    for item in events(address, key=key, udp=beside is not None):
        now_ns = time.monotonic_ns()
        if isinstance(item, Subscribed):
            subscribed = item
            if beside is None:
                pipe.send(Ready(item.tier, item.write_deadline))
        elif isinstance(item, UdpChange) and item.state is UdpState.ACTIVE and subscribed is not None:
            pipe.send(Ready(f"{subscribed.tier}, UDP", subscribed.write_deadline))
        elif isinstance(item, Record):
            if item.event is Event.PROVEN:
                checker.came(item.hash, now_ns - item.seen_ns)
            if tell_all:
                pipe.send(Received(item))


def run_shared_subscriber(pipe: Pipe, path: str, key: str) -> None:
    """As run_subscriber, but reads the ring itself, in shared memory."""
    checker = _checker(pipe)
    with SharedReader(path, key=key) as reader:
        pipe.send(Ready(f"{reader.tier}, shared memory", "none: it reads the ring itself"))
        for record in reader:
            now_ns = time.monotonic_ns()
            if record.event is Event.PROVEN:
                checker.came(record.hash, now_ns - record.seen_ns)


def _checker(pipe: Pipe) -> _Checker:
    """A checker, fed by a thread of its own with what the node says it mined."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the demo's first process
    checker = _Checker(pipe)

    def listen() -> None:
        try:
            while True:
                checker.mined(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)  # the demo has ended; the main thread waits for a block

    threading.Thread(target=listen, daemon=True).start()
    return checker
