"""MemorySprint's relay process: sources → relay → ring, and a signal to whoever reads the ring.

Its loop is its own. Blocking, it waits in one selector for the sources' descriptors and the next deadline, and burns
nothing. Spinning (OPTIMIZE_SYSTEM), it polls the sources without pause and, every few hundred turns in which nothing
came, runs a rehearsal: the path from a packet to the ring costs many times more when its code and data have left the
processor's caches.
"""

from __future__ import annotations

import selectors
import signal
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from sprint.tiers import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from sprint.engines.turns import Turns

REHEARSE_SPINS = 1_000
"""Idle turns between two rehearsals: about a millisecond, in which the caches begin to cool. A rehearsal takes 70 µs:
seven announcements of a hundred meet one, and wait 35 µs, which is less than a cold path costs each of them."""


class Rehearses(Protocol):
    """Something that keeps the path warm."""

    def perform(self) -> None:
        """Run the path once, to no effect outside."""


class RelayLoop:
    """Drives Turns until SIGTERM."""

    def __init__(
        self, turns: Turns, *, spin: bool, rehearsal: Rehearses | None = None, on_idle: Callable[[], None] | None = None
    ) -> None:
        """`on_idle` is called about once a second, when nothing else is to be done."""
        self._turns = turns
        self._spin = spin
        self._rehearsal = rehearsal
        self._on_idle = on_idle
        self._stopping = False

    def run(self) -> None:
        """Serve until SIGTERM; then close the sources and save what isn't saved.

        After an exception in a turn nothing is saved: a header may have been accepted and not published, and the relay
        that takes over must meet it as news.
        """
        waking, woken = socket.socketpair()
        waking.setblocking(False)
        woken.setblocking(False)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        try:
            if self._spin:
                self._run_spinning()
            else:
                self._run_blocking(waking)
        except BaseException:
            self._turns.close(save=False)
            raise
        else:
            self._turns.close()
        finally:
            signal.set_wakeup_fd(-1)
            waking.close()
            woken.close()

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._stopping = True

    def _run_blocking(self, waking: socket.socket) -> None:
        turns = self._turns
        with selectors.DefaultSelector() as selector:
            selector.register(waking, selectors.EVENT_READ)
            for source in turns.sources:
                selector.register(source.fileno(), selectors.EVENT_READ)
            due_ns = 0
            while not self._stopping:
                wait_s = max(0, due_ns - time.monotonic_ns()) / NS_PER_S
                ready = selector.select(wait_s)
                now_ns = time.monotonic_ns()
                speaking = {key.fd for key, _ in ready}
                for source in turns.sources:  # in their order: the capture is heard before the plain sockets
                    if source.fileno() in speaking:
                        turns.hear(source, now_ns)
                if waking.fileno() in speaking:
                    with suppress(BlockingIOError):
                        waking.recv(64)
                if now_ns >= due_ns:
                    self._on_time(now_ns)
                turns.settle(now_ns)
                due_ns = turns.deadline()

    def _run_spinning(self) -> None:
        turns, sources, rehearsal = self._turns, self._turns.sources, self._rehearsal
        clock = time.monotonic_ns
        due_ns = idle = 0
        while not self._stopping:
            now_ns = clock()
            heard = False
            for source in sources:
                if turns.hear(source, now_ns):
                    heard = True
            if heard or now_ns >= due_ns:
                if now_ns >= due_ns:
                    self._on_time(now_ns)
                turns.settle(now_ns)
                due_ns = turns.deadline()
                idle = 0
                continue
            idle += 1
            if idle % REHEARSE_SPINS == 0 and rehearsal is not None:
                rehearsal.perform()

    def _on_time(self, now_ns: int) -> None:
        turns = self._turns
        for source in turns.sources:
            turns.hear(source, now_ns)
        turns.on_timer(now_ns)
        if self._on_idle is not None:
            self._on_idle()
