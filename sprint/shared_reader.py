"""A subscriber on Sprint's own host reads the ring where the relay writes it: `with SharedReader(path) as reader: …`.

read() looks and never waits, next() waits, and both show a record where it lies: nothing is copied until copy() is
called. The writer waits for nobody, so a view that was looked at means something only if validate() says so afterwards.
Iterating does all that, and yields decoded copies.

Every sequence from the first one on is either shown once or told once as lost. A reader that was overtaken goes on, as
the top tiers do, with the newest best tip and the newest record.

The memory outlives the process that hands it over. While that one is away the reader reads on, looking every few
milliseconds, and asks for a new wake-up call meanwhile. Not thread-safe. x86-64 only, as is the ring between processes.
"""

from __future__ import annotations

import array
import os
import platform
import select
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, final

from sprint.errors import HostError, RemoteProtocolError, SprintError
from sprint.events import Lapped
from sprint.frames import json_line
from sprint.record import SIZE, Record, decode
from sprint.ring import HEADER_SIZE, Ring, size_for
from sprint.shared_memory import map_read_only
from sprint.subscription import (
    ANSWER_TIMEOUT_NS,
    MAX_ANSWER,
    ConnectionLostError,
    ServerFullError,
    SubscriptionRefusedError,
    read_answer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import TracebackType

RETRY_NS: Final = 100_000_000
"""Between two attempts to connect: a restarted worker serves again within a fraction of a second."""
FULL_RETRY_NS: Final = 1_000_000_000
LOOK_S: Final = 0.005
"""How often the ring is looked at while nobody wakes us: a delay that is small beside the worker's restart."""

_SPINS: Final = 1024
"""Looks at the ring between two at the clock and the connection: a fraction of a millisecond."""
_DESCRIPTORS: Final = 2
_PAGE: Final = 4096
_NOTHING: Final = memoryview(b"")


class _Call:
    """One connection: from the hello to the two descriptors, and then open for as long as the server serves."""

    def __init__(self, path: str, key: str | None) -> None:
        """Connect and say hello, without waiting. Raises OSError when nobody listens."""
        self.descriptors: list[int] = []
        self._deadline_ns = time.monotonic_ns() + ANSWER_TIMEOUT_NS
        self._received = b""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.setblocking(False)
            self.sock.connect(path)
            with suppress(BrokenPipeError):  # a full server has hung up already: why, it has said before
                self.sock.send(json_line({} if key is None else {"key": key}))
        except OSError:
            self.sock.close()
            raise

    def answer(self) -> dict[str, Any] | None:
        """The server's answer, once it has come whole; None until then.

        Raises what read_answer() raises, RemoteProtocolError and ConnectionLostError.
        """
        try:
            data, control, flags, _ = self.sock.recvmsg(
                MAX_ANSWER, socket.CMSG_LEN(4 * _DESCRIPTORS), socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            if time.monotonic_ns() > self._deadline_ns:
                raise RemoteProtocolError("no answer to the hello in time") from None
            return None
        except OSError as error:
            raise ConnectionLostError(f"no answer to the hello: {error.strerror}") from None
        for level, kind, content in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self.descriptors += array.array("i", content[: len(content) // 4 * 4])
        if not data:
            raise ConnectionLostError("the server closed the connection without an answer")
        self._received += data
        line, newline, _ = self._received.partition(b"\n")
        if len(line) > MAX_ANSWER or len(self.descriptors) > _DESCRIPTORS or flags & socket.MSG_CTRUNC:
            raise RemoteProtocolError("answer to the hello is too long, or holds too many descriptors")
        if not newline:
            return None
        answer = read_answer(line)
        if len(self.descriptors) != _DESCRIPTORS:
            raise RemoteProtocolError(f"answer to the hello with {len(self.descriptors)} descriptors: expected 2")
        return answer

    def wait(self) -> None:
        """Until the server has said something, or for LOOK_S."""
        waiting = select.poll()
        waiting.register(self.sock, select.POLLIN)
        waiting.poll(LOOK_S * 1000)

    def close(self) -> None:
        """Hang up, and give back whatever was not taken."""
        self.sock.close()
        while self.descriptors:
            os.close(self.descriptors.pop())


class _Shared:
    """The memory that was handed over: a ring, and which memory it is."""

    def __init__(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        self.identity = (found.st_dev, found.st_ino)
        memory = map_read_only(descriptor)
        self.ring = Ring.attach(memory)
        self.records = memory[HEADER_SIZE : size_for(self.ring.slots)]
        sum(memory[::_PAGE])  # every page is faulted in now, rather than at the first record that comes to lie in it


@final
class SharedReader:
    """A cursor of one's own over a running Sprint's ring; a context manager, and an iterator of Records."""

    def __init__(
        self,
        path: str | Path,
        *,
        key: str | None = None,
        since: int | None = None,
        spin: bool = False,
        reconnect: bool = True,
        on_lost: Callable[[Lapped], None] | None = None,
    ) -> None:
        """Read from the next record on, or from sequence `since`; next() and iteration spin instead of sleeping.

        When nobody serves `path` the reader tries again in next(); with `reconnect=False` that raises
        ConnectionLostError, and so does a connection that is lost later, once the ring is read to its end. A refusal
        raises SubscriptionRefusedError in any case. `on_lost` is told by iteration which records it doesn't yield.
        Raises HostError on a machine whose memory model the ring doesn't carry.
        """
        if platform.machine().lower() not in ("x86_64", "amd64"):
            raise HostError(f"shared memory on {platform.machine()}: the ring between processes needs x86-64")
        self.lost = 0
        """Records that this reader was not shown, all in all."""
        self.tier: str | None = None
        self.network: str | None = None
        self._path = os.fspath(path)
        self._key = key
        self._since = since
        self._spin = spin
        self._reconnect = reconnect
        self._on_lost = on_lost
        self._shared: _Shared | None = None
        self._following: _Shared | None = None  # another memory, to go on with once the present one is read to its end
        self._cursor = 1
        self._jump = (0, 0)  # at the first of these sequences, those up to the second are skipped
        self._shown = 0
        self._view = _NOTHING
        self._call: _Call | None = None
        self._retry_ns = 0
        self._wake: select.epoll | None = None
        self._closed = False
        self._failure: SprintError | None = None
        self._tend()
        while self._call is not None and self._wake is None:
            self._call.wait()
            self._tend()
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> SharedReader:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def session(self) -> int | None:
        """The number that tells these sequences from those of another ring; None before the first connection."""
        return self._shared.ring.session if self._shared else None

    @property
    def sequence(self) -> int:
        """The sequence of the record that was shown last; 0: none yet."""
        return self._shown

    @property
    def connected(self) -> bool:
        """Whether somebody stands by to wake us."""
        return self._wake is not None

    def read(self) -> memoryview | Lapped | None:
        """The next record where it lies, 192 bytes that can't be written; Lapped; or None: there is none yet.

        The bytes change under the eye of a reader that takes too long: call validate() after looking at them.
        """
        shared = self._shared
        if shared is None:
            return None
        sequence, ring = self._cursor, shared.ring
        if sequence == self._jump[0]:
            return self._skip_to(self._jump[1])
        if sequence > ring.tail:
            if self._following is None:
                return None
            self._move_on(self._following)
            return self.read()
        if sequence < ring.oldest:
            return self._lapped(ring)
        at = (sequence - 1) % ring.slots * SIZE
        self._view = shared.records[at : at + SIZE]
        self._shown = sequence
        self._cursor = sequence + 1
        return self._view

    def validate(self) -> bool:
        """Whether the record shown last is still whole, and with it all that was seen of it.

        If it isn't, it counts as lost, and the next read() says so.
        """
        if self._shared is None or not self._view:
            return False
        if self._shown < self._shared.ring.oldest:
            self._cursor, self._jump = self._shown, (0, 0)
            self._view = _NOTHING
            return False
        return True

    def copy(self) -> bytes | None:
        """The record shown last, for keeps; None if it was overtaken meanwhile, as in validate()."""
        record = bytes(self._view)
        return record if self.validate() else None

    def next(self, timeout: float | None = None) -> memoryview | Lapped | None:
        """As read(), but waits for up to `timeout` seconds, or for ever; None when nothing came.

        Raises SubscriptionRefusedError, HostError for a memory that is no ring of ours, and with `reconnect=False`
        whatever else ended the connection, in each case after the last record.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self._tend()  # before looking: what is published from here on wakes us
            found = self.read()
            if found is not None:
                return found
            if self._failure is not None:
                raise self._failure
            left = None if deadline is None else deadline - time.monotonic()
            if self._closed or (left is not None and left <= 0):
                return None
            if self._spin and self._shared is not None:
                self._look_often(self._shared.ring)
            elif self._wake is not None:
                self._listen(self._wake, left)
            else:
                time.sleep(LOOK_S if left is None else min(left, LOOK_S))

    def __iter__(self) -> Iterator[Record]:
        """Records as they come, each once. Ends after close()."""
        while not self._closed:
            found = self.next()
            if isinstance(found, Lapped):
                if self._on_lost is not None:
                    self._on_lost(found)
            elif found is not None:
                record = self.copy()
                if record is not None:
                    yield decode(record)

    def close(self) -> None:
        """Hang up. Views that are still held stay readable, and are nobody's news any more."""
        self._closed = True
        self._hang_up()
        self._shared = self._following = None
        self._view = _NOTHING

    # Where to read next

    def _lapped(self, ring: Ring) -> Lapped:
        """The writer has overtaken us: what counts is the newest best tip, and then the newest record."""
        newest, best = ring.tail, ring.latest_best
        keep = best if ring.oldest <= best < newest else newest
        self._jump = (keep + 1, newest) if keep + 1 < newest else (0, 0)
        return self._skip_to(keep)

    def _skip_to(self, sequence: int) -> Lapped:
        lapped = Lapped(self._cursor, sequence - self._cursor)
        self._view = _NOTHING
        if self._cursor == self._jump[0]:
            self._jump = (0, 0)
        self._cursor = sequence
        self.lost += lapped.lost
        return lapped

    def _move_on(self, shared: _Shared) -> None:
        """Read that memory from now on: the same numbering goes on, and another is read from its beginning."""
        before, self._shared, self._following = self._shared, shared, None
        self._view = _NOTHING
        ring = shared.ring
        if before is None:
            since = ring.tail + 1 if self._since is None else self._since
        else:
            since = self._cursor if before.ring.session == ring.session else 1
        self._cursor = min(max(1, since), ring.tail + 1)
        # What was gone before we came is told, but is no reason to pass over what is still there.
        self._jump = (self._cursor, ring.oldest) if self._cursor < ring.oldest else (0, 0)

    # The connection

    def _tend(self) -> None:
        """See to the connection without waiting: make it, take its answer, note why there will be none."""
        if self._wake is not None or self._closed or self._failure is not None:
            return
        try:
            if self._call is None:
                if time.monotonic_ns() < self._retry_ns:
                    return
                self._call = _Call(self._path, self._key)
            answer = self._call.answer()
            if answer is not None:
                self._take(self._call, answer)
        except OSError as error:
            self._lose(ConnectionLostError(f"{self._path}: {error.strerror}"))
        except SprintError as error:
            self._lose(error)

    def _take(self, call: _Call, answer: dict[str, Any]) -> None:
        memory, wake = call.descriptors
        shared = _Shared(memory)
        self.tier, self.network = str(answer.get("tier")), str(answer.get("network"))
        self._wake = select.epoll.fromfd(wake)
        call.descriptors = [memory]  # the epoll object closes its own
        # The same instance tells when the server is gone. By the event's kind: its number is one of the server's.
        self._wake.register(call.sock, select.EPOLLRDHUP)
        os.close(call.descriptors.pop())
        if self._shared is None:
            self._move_on(shared)
        elif shared.identity != self._shared.identity:
            self._following = shared

    def _lose(self, error: SprintError) -> None:
        self._hang_up()
        if not self._reconnect or isinstance(error, SubscriptionRefusedError | HostError):
            self._failure = error.with_traceback(None)  # which would keep what was handed over mapped
        self._retry_ns = time.monotonic_ns() + (FULL_RETRY_NS if isinstance(error, ServerFullError) else RETRY_NS)

    def _hang_up(self) -> None:
        if self._wake is not None:
            self._wake.close()
            self._wake = None
        if self._call is not None:
            self._call.close()
            self._call = None

    def _listen(self, wake: select.epoll, timeout: float | None) -> None:
        """Sleep until somebody wakes us, or the server is gone."""
        if any(events & ~select.EPOLLIN for _, events in wake.poll(timeout)):
            self._lose(ConnectionLostError(f"{self._path}: the server is gone"))

    def _look_often(self, ring: Ring) -> None:
        for _ in range(_SPINS):
            if ring.tail >= self._cursor:
                return
        if self._wake is not None:
            self._listen(self._wake, 0)
