"""The supervisor: forks the children of the memory-optimised engine, restarts those that die, ends with them.

It is single-threaded, as forking demands, and does nothing in the way of a block. Children are forked from its own
memory: what was loaded before (the header chain) and what was made before (shared memory, listening sockets, channels)
is theirs without asking, and outlives any of them. A child dies with its supervisor, by PR_SET_PDEATHSIG, however that
ends.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from sprint.errors import SprintError
from sprint.tiers import NS_PER_MS, NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

FIRST_RESTART_NS = 50 * NS_PER_MS
LAST_RESTART_NS = 1 * NS_PER_S
"""However often a child was killed, it is back within two seconds."""
STEADY_NS = 10 * NS_PER_S
"""A child that ran for this long was no failed start: it is restarted at once."""
STOP_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1


@dataclass(slots=True)
class Child:
    """One process to keep alive."""

    name: str
    main: Callable[[], None]
    """Runs in the child, until SIGTERM."""
    pid: int = 0
    restarts: int = 0
    pidfd: int = -1
    started_ns: int = 0
    restart_ns: int | None = 0
    pause_ns: int = FIRST_RESTART_NS


@dataclass(slots=True)
class Supervisor:
    """Keeps its children alive until stop() or a signal."""

    children: tuple[Child, ...]
    log: Any
    on_change: Callable[[Child], None]
    """A child was started, or has died (its pid is 0)."""
    watches: dict[int, Callable[[], None]] = field(default_factory=dict)
    """Descriptors to read while supervising, and what to do when they are readable."""
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _stopping: bool = False

    def run(self) -> None:
        """Start every child and supervise until SIGINT or SIGTERM; then end the children, newest first."""
        waking, woken = socket.socketpair()
        for end in (waking, woken):
            end.setblocking(False)
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        old_wakeup = signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        self._selector.register(waking, selectors.EVENT_READ, lambda: _drain(waking))
        for descriptor, action in self.watches.items():
            self._selector.register(descriptor, selectors.EVENT_READ, action)
        try:
            while not self._stopping:
                now_ns = time.monotonic_ns()
                for child in self.children:
                    if child.restart_ns is not None and now_ns >= child.restart_ns and not self._stopping:
                        self._start(child, now_ns)
                for key, _ in self._selector.select(self._wait_s()):
                    key.data()
        finally:
            self._end_children()
            signal.set_wakeup_fd(old_wakeup)
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._selector.close()
            waking.close()
            woken.close()

    def stop(self) -> None:
        """End run() in good order."""
        self._stopping = True

    def _start(self, child: Child, now_ns: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # whoever reads them may have gone
                stream.flush()
        parent = os.getpid()
        # A signal that met the child with our handlers still in place would be taken, and forgotten.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            pid = os.fork()
            if not pid:
                self._be(child, parent, mask)
            child.pid, child.started_ns, child.restart_ns = pid, now_ns, None
            child.pidfd = os.pidfd_open(pid)
        except OSError as error:
            self._give_up(child, now_ns, error)
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._on_death(child))
        self.on_change(child)

    def _give_up(self, child: Child, now_ns: int, error: OSError) -> None:
        """The machine has no process, or no descriptor, left for this child: later perhaps."""
        if child.pid:
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
            child.pid = 0
        self._postpone(child, now_ns)
        self.on_change(child)
        self.log.error("Child can't be started", child=child.name, error=error.strerror)

    def _be(self, child: Child, parent: int, mask: Iterable[int]) -> NoReturn:
        """The child's whole life. It never returns into the supervisor's code, whatever happens."""
        code = 1
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:  # else it died before we could ask to die with it
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor, which ends us in order
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                self._selector.close()
                child.main()
                code = 0
        except SprintError as error:
            # Refused on purpose, by the machine for one: where in our code that was tells the operator nothing.
            self.log.error("Child can't go on", child=child.name, error=str(error))  # noqa: TRY400
        except BaseException:  # reported here, for nobody above may handle it
            traceback.print_exc()
        finally:
            with suppress(OSError, ValueError):
                sys.stderr.flush()
            os._exit(code)

    def _on_death(self, child: Child) -> None:
        now_ns = time.monotonic_ns()
        _, status = os.waitpid(child.pid, 0)
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        child.pidfd = -1
        pid, child.pid = child.pid, 0
        if self._stopping:  # a service manager tells all of us at once
            self.on_change(child)
            return
        if now_ns - child.started_ns >= STEADY_NS:
            child.pause_ns, child.restart_ns = FIRST_RESTART_NS, now_ns
        else:
            self._postpone(child, now_ns)
        child.restarts += 1
        self.on_change(child)
        how = (
            f"signal {os.WTERMSIG(status)}"
            if os.WIFSIGNALED(status)
            else f"exit code {os.waitstatus_to_exitcode(status)}"
        )
        self.log.error("Child died", child=child.name, pid=pid, how=how, restarts=child.restarts)

    def _postpone(self, child: Child, now_ns: int) -> None:
        child.restart_ns = now_ns + child.pause_ns
        child.pause_ns = min(2 * child.pause_ns, LAST_RESTART_NS)

    def _wait_s(self) -> float | None:
        if self._stopping:
            return 0.0
        due = [child.restart_ns for child in self.children if child.restart_ns is not None]
        return max(0.0, (min(due) - time.monotonic_ns()) / NS_PER_S) if due else None

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._stopping = True

    def _end_children(self) -> None:
        living = [child for child in reversed(self.children) if child.pid]
        for child in living:
            os.kill(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for child in living:
            with selectors.DefaultSelector() as ended:
                ended.register(child.pidfd, selectors.EVENT_READ)
                if not ended.select(max(0.0, deadline - time.monotonic())):
                    os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
            os.close(child.pidfd)
            child.pid = 0


def _drain(end: socket.socket) -> None:
    with suppress(BlockingIOError):
        end.recv(4096)
