"""Shared memory for local subscribers of the top tiers: a Unix socket hands over the ring itself, and a wake-up call.

A reader gets two descriptors (docs/shared-memory.md): the ring's sealed memfd, opened anew for reading only, and an
epoll instance that watches an eventfd of this reader's own. The eventfd itself stays here. Whoever holds one can clear
its O_NONBLOCK and fill its counter, and our next write would block with every other reader waiting behind it; nothing
that is done to the epoll instance reaches the eventfd behind it.

publish() is one eventfd_write a reader. How far a reader is, only the reader knows. Bounds: a reader costs two
descriptors, and `max_readers` counts connections, those still to say hello included.

Knows neither relay nor engine. Not thread-safe: start(), publish() and close() belong on the loop's thread.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from sprint.deliveries.accounts import TierLedger
from sprint.deliveries.gate import admit
from sprint.deliveries.hello import Hello, Refusal
from sprint.deliveries.reception import BACKLOG, Reception
from sprint.deliveries.requests import MAX_EXTRA
from sprint.deliveries.session import latency_origin_ns
from sprint.deliveries.stream import HELLO_TIMEOUT_NS
from sprint.errors import HostError
from sprint.frames import Format, json_line
from sprint.histograms import Histogram
from sprint.record import SIZE as RECORD_SIZE
from sprint.ring import LAYOUT
from sprint.shared_memory import SEALS
from sprint.tiers import PROFILES, Tier

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from sprint.admission import Ticket
    from sprint.deliveries.gate import Gate
    from sprint.ring import Ring
    from sprint.shared_memory import SharedMemory
    from sprint.status import Delivery

MODE: Final = 0o660
MAX_GROUPS: Final = 256
"""Supplementary groups that are looked through; a process with more is judged by its own group alone."""

_TIERS: Final = tuple(sorted((tier for tier, profile in PROFILES.items() if profile.memory_engine), reverse=True))
_SO_PEERGROUPS: Final = 59  # Linux 4.13; Python has no name for it
_CREDENTIALS: Final = struct.Struct("iII")  # struct ucred of unix(7): pid, uid, gid


class _Listener(socket.socket):
    """Reception counts connections by the address they come from; a local peer comes from its user."""

    def accept(self) -> tuple[socket.socket, Any]:
        sock, _ = super().accept()
        return sock, (f"uid {_user_of(sock)}",)


class _Reader:
    """One reader's connection, and the eventfd that wakes it."""

    __slots__ = ("eventfd", "extra", "network", "sock", "ticket", "tier")

    def __init__(self, sock: socket.socket, network: str, ticket: Ticket, extra: int) -> None:
        self.sock = sock
        self.network = network
        self.ticket = ticket
        self.tier = ticket.tier
        self.extra = extra
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


class ShmDelivery:
    """Hands one ring to local readers, and wakes them."""

    def __init__(
        self,
        ring_memory: SharedMemory,
        ring: Ring,
        accounts: Delivery,
        *,
        network: str,
        gate: Gate,
        max_readers: int,
        max_readers_per_user: int | None = None,
        write_deadline_ns: Mapping[Tier, int] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        hello_timeout_ns: int = HELLO_TIMEOUT_NS,
    ) -> None:
        """`ring` lies in `ring_memory` and is what is handed over; the other names are StreamDelivery's.

        A delivery is on time when one signal takes no longer than the tier's write deadline (the tier's own unless
        `write_deadline_ns` says otherwise). Raises HostError when the memory is not sealed.
        """
        seals = ring_memory.seals()
        if seals & SEALS != SEALS:
            raise HostError(f"shared memory with seals {seals:#x} can't be handed over: {SEALS:#x} expected")
        self._memory = ring_memory
        self._ring = ring
        self._accounts = accounts
        self._network = network
        self._gate = gate
        self._max_readers = max_readers
        self._max_per_user = max_readers_per_user
        self._clock = clock
        self._hello_timeout_ns = hello_timeout_ns
        deadlines = write_deadline_ns or {tier: PROFILES[tier].write_deadline_ns for tier in _TIERS}
        self._ledgers = {tier: TierLedger(accounts.tiers[tier], PROFILES[tier], deadlines[tier]) for tier in _TIERS}
        self._rosters: dict[Tier, list[_Reader]] = {tier: [] for tier in _TIERS}
        self._turn = 0
        self._sequence = 0
        self._processing = Histogram(accounts.processing)
        self._read_only = -1
        self._path: Path
        self._bound: tuple[int, int]
        self._loop: asyncio.AbstractEventLoop
        self._reception: Reception | None = None

    @staticmethod
    def try_path(path: Path) -> None:
        """Raises HostError, as start() would, when no socket can be made at that path; leaves none there."""
        _listen(path).close()
        with suppress(OSError):
            os.unlink(path)

    def start(self, loop: asyncio.AbstractEventLoop, path: Path) -> None:
        """Listen on a Unix socket of mode 0660 at `path`, whose directory must exist.

        A socket that a killed process left there is replaced. Raises HostError, naming the path, when somebody listens
        on it, when it is something else than a socket, or when it can't be made.
        """
        try:
            # A description of its own: what a reader does to its flags, position or owner reaches none of our own.
            self._read_only = os.open(f"/proc/self/fd/{self._memory.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"SHM_SOCKET={path}: the ring can't be opened again: {error.strerror}") from None
        try:
            listener = _listen(path)
        except HostError:
            os.close(self._read_only)
            raise
        found = os.stat(path)
        self._path, self._bound = path, (found.st_dev, found.st_ino)
        self._loop = loop
        self._sequence = self._ring.tail
        for ledger in self._ledgers.values():
            ledger.accounts.subscribers = 0  # those of a predecessor that was killed are gone
        self._reception = Reception(
            loop,
            listener,
            self._accounts,
            self._admit,
            clock=self._clock,
            hello_timeout_ns=self._hello_timeout_ns,
            max_sessions=self._max_readers,
            max_sessions_per_address=self._max_per_user,
        )

    def publish(self) -> None:
        """The ring has grown: wake every reader, enterprise first, then turbo."""
        began = self._clock()
        first, tail = self._sequence + 1, self._ring.tail
        if first > tail:
            return
        self._sequence = tail
        self._turn += 1
        rounds = [(self._ledgers[tier], self._wake(roster)) for tier, roster in self._rosters.items() if roster]
        self._count(rounds, first, tail)
        self._processing.record(self._clock() - began)

    def close(self) -> None:
        """Stop listening, forget every reader, and remove the socket file unless another server has taken its place."""
        if self._reception is None:
            return
        with suppress(OSError):
            found = os.stat(self._path)
            if (found.st_dev, found.st_ino) == self._bound:
                os.unlink(self._path)
        for roster in self._rosters.values():
            for reader in list(roster):
                self._end(reader)
        self._reception.close()
        self._reception = None
        os.close(self._read_only)

    def _wake(self, roster: list[_Reader]) -> list[int]:
        """When the round began and when each signal was given; who is first rotates."""
        clock, write = self._clock, os.eventfd_write
        start = self._turn % len(roster)
        times = [clock()]
        for reader in roster[start:] + roster[:start]:
            write(reader.eventfd, 1)
            times.append(clock())
        return times

    def _count(self, rounds: list[tuple[TierLedger, list[int]]], first: int, last: int) -> None:
        """One signal delivers all records that came since the one before; those already overwritten it doesn't."""
        held = max(first, last - self._ring.slots + 1)
        records = [self._ring.copy(sequence) for sequence in range(held, last + 1)]
        for ledger, times in rounds:
            ledger.lost((held - first) * (len(times) - 1))
            for record in records:
                ledger.sent(times, [], latency_origin_ns(record) if record is not None else 0)

    def _admit(self, sock: socket.socket, network: str, hello: Hello, extra: int) -> Refusal | None:
        stranger = self._stranger(sock)
        if stranger is not None:
            return stranger
        if hello.since is not None or hello.format is not Format.BINARY:
            return Refusal("the hello takes a key only: where to begin in the ring is the reader's own choice")
        ticket = admit(self._gate, hello.key, network, self._clock(), time.time_ns())
        if isinstance(ticket, Refusal):
            return ticket
        reader = self._take_in(sock, network, ticket, extra)
        if isinstance(reader, Refusal):
            self._gate.leave(ticket)
            return reader
        ticket.end = lambda: self._end(reader)
        self._rosters[ticket.tier].append(reader)
        self._accounts.accepted += 1
        self._ledgers[ticket.tier].accounts.subscribers += 1
        self._loop.add_reader(sock, self._readable, reader)
        return None

    def _take_in(self, sock: socket.socket, network: str, ticket: Ticket, extra: int) -> _Reader | Refusal:
        """A reader who has been handed the ring."""
        tier = ticket.tier
        if tier not in self._rosters:
            return Refusal(f"tier {tier.label} has no shared memory: {' and '.join(t.label for t in _TIERS)} have")
        try:
            reader = _Reader(sock, network, ticket, extra)
        except OSError as error:
            return Refusal(f"no reader can be taken now: {error.strerror}", retry=True)
        try:
            self._hand_over(reader)
        except OSError as error:  # out of descriptors, or the peer holds too many of ours that it hasn't received
            os.close(reader.eventfd)
            return Refusal(f"no reader can be taken now: {error.strerror}", retry=True)
        return reader

    def _hand_over(self, reader: _Reader) -> None:
        answer = {
            "tier": reader.tier.label,
            "session": f"{self._ring.session:016x}",
            "network": self._network,
            "layout": LAYOUT,
            "slots": self._ring.slots,
            "recordSize": RECORD_SIZE,
        }
        with select.epoll() as wake:
            wake.register(reader.eventfd, select.EPOLLIN | select.EPOLLET)
            socket.send_fds(reader.sock, [json_line(answer)], [self._read_only, wake.fileno()])

    def _stranger(self, sock: socket.socket) -> Refusal | None:
        """Root, our own user, and members of the group that the socket file has now are at home; others are told."""
        user, group = _user_of(sock), self._group()
        if user in (0, os.geteuid()) or group in _groups_of(sock):
            return None
        return Refusal(f"uid {user} is neither the server's user nor in the group of the socket, gid {group}")

    def _group(self) -> int | None:
        try:
            return os.stat(self._path).st_gid
        except OSError:
            return None  # removed under us: then by user only

    def _readable(self, reader: _Reader) -> None:
        try:
            data = reader.sock.recv(MAX_EXTRA + 1)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        reader.extra += len(data)
        if not data or reader.extra > MAX_EXTRA:
            self._end(reader)

    def _end(self, reader: _Reader) -> None:
        self._rosters[reader.tier].remove(reader)
        self._ledgers[reader.tier].accounts.subscribers -= 1
        self._accounts.disconnected += 1
        self._loop.remove_reader(reader.sock)
        reader.sock.close()
        os.close(reader.eventfd)
        self._gate.leave(reader.ticket)
        if self._reception is not None:
            self._reception.release(reader.network)


def _listen(path: Path) -> socket.socket:
    listener = _Listener(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.setblocking(False)
        # bind() gives the file the mode that the unbound socket has, less the umask: never wider, not for an instant.
        os.fchmod(listener.fileno(), MODE)
        listener.bind(os.fspath(path))
        os.chmod(path, MODE)  # whatever a narrower umask has taken away
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise HostError(f"SHM_SOCKET={path}: {error.strerror or error}") from None
    except HostError:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Remove a socket on which nobody listens. Two servers that start at once are kept apart by DATA_DIR's lock."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise HostError(f"SHM_SOCKET={path}: there is something else than a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # its backlog is full: somebody listens
    raise HostError(f"SHM_SOCKET={path}: another server listens on it")


def _user_of(sock: socket.socket) -> int:
    """The user that the peer was when it connected."""
    return int(_CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1])


def _groups_of(sock: socket.socket) -> frozenset[int]:
    """The peer's group and its supplementary ones, as when it connected."""
    own = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[2]
    try:
        more = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * MAX_GROUPS)
    except OSError:
        more = b""
    return frozenset((own, *(number for (number,) in struct.iter_unpack("I", more))))
