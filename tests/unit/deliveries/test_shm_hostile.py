"""What a hostile reader in shared memory tries: to write, to block, to talk, to idle. None of it reaches the others."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import signal
import socket
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from sprint.deliveries.requests import MAX_EXTRA
from sprint.tiers import Tier
from tests.unit.shm_host import (
    PATIENCE_S,
    Client,
    ended,
    fork,
    killed,
    reader,
    serving,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

F_ADD_SEALS, F_SEAL_GROW = 1033, 0x4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shm.sock"


JUNK = b"\xff" * 64
WRITABLE = mmap.PROT_READ | mmap.PROT_WRITE


def attempts_to_write(memory: int, size: int) -> dict[str, Callable[[], object]]:
    """Every route that we know of to change memory behind a descriptor, its seals, or its size."""
    libc = ctypes.CDLL(None, use_errno=True)
    number, pointer, long = ctypes.c_int, ctypes.c_void_p, ctypes.c_long
    libc.mmap.restype = pointer
    libc.mmap.argtypes = (pointer, ctypes.c_size_t, number, number, number, long)
    libc.mprotect.argtypes = libc.madvise.argtypes = (pointer, ctypes.c_size_t, number)
    libc.fallocate.argtypes = (number, number, long, long)
    libc.splice.argtypes = (number, pointer, number, pointer, ctypes.c_size_t, ctypes.c_uint)
    mapped = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, memory, 0)
    assert mapped != pointer(-1).value

    def checked(result: int) -> int:
        if result == -1:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    def fallocate(mode: int, descriptor: int) -> int:
        return checked(libc.fallocate(descriptor, mode, 0, 4096))

    def by_proc_self(flags: int) -> int:
        return os.open(f"/proc/self/fd/{memory}", flags)

    def by_proc_pid(flags: int) -> int:
        return os.open(f"/proc/{os.getpid()}/fd/{memory}", flags)

    def then(anew: Callable[[], int], action: Callable[..., object], *arguments: object) -> object:
        return action(anew(), *arguments)

    def by_own_memory() -> int:
        with open("/proc/self/mem", "r+b", buffering=0) as own:
            own.seek(mapped)
            return own.write(JUNK)

    def by_splice() -> int:
        reading, writing = os.pipe()
        os.write(writing, JUNK)
        return checked(libc.splice(reading, None, by_proc_self(os.O_RDWR), ctypes.byref(long(0)), len(JUNK), 0))

    def this_file() -> int:
        return os.open(__file__, os.O_RDONLY)

    attempts: dict[str, Callable[[], object]] = {
        "write": lambda: os.write(memory, JUNK),
        "pwrite": lambda: os.pwrite(memory, JUNK, 0),
        "pwritev": lambda: os.pwritev(memory, [JUNK], 0),
        "mmap": lambda: mmap.mmap(memory, size, mmap.MAP_SHARED, WRITABLE),
        "mmap for writing only": lambda: mmap.mmap(memory, size, mmap.MAP_SHARED, mmap.PROT_WRITE),
        "mprotect": lambda: checked(libc.mprotect(mapped, size, WRITABLE)),
        "madvise remove": lambda: checked(libc.madvise(mapped, 4096, 9)),
        "ftruncate to nothing": lambda: os.ftruncate(memory, 0),
        "ftruncate to more": lambda: os.ftruncate(memory, 2 * size),
        "fallocate more": lambda: os.posix_fallocate(memory, 0, 2 * size),
        "punch a hole": lambda: fallocate(3, memory),
        "add a seal": lambda: fcntl.fcntl(memory, F_ADD_SEALS, F_SEAL_GROW),
        "sendfile": lambda: os.sendfile(by_proc_self(os.O_RDWR), this_file(), 0, 64),
        "copy_file_range": lambda: os.copy_file_range(_unsealed(), by_proc_self(os.O_RDWR), 64),
        "splice": by_splice,
        "/proc/self/mem": by_own_memory,
    }
    for reopened in (by_proc_self, by_proc_pid):
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_TRUNC):
            anew = partial(reopened, flags)
            actions: dict[str, tuple[Any, ...]] = {
                "write": (os.write, JUNK),
                "pwrite": (os.pwrite, JUNK, 0),
                "mmap": (mmap.mmap, size, mmap.MAP_SHARED, WRITABLE),
                "ftruncate": (os.ftruncate, size // 2),
                "punch a hole": (partial(fallocate, 3),),
            }
            for name, action in actions.items():
                attempts[f"{reopened.__name__} with flags {flags:o}, then {name}"] = partial(then, anew, *action)
    return attempts


IN_VAIN_ANYWAY = {
    "/proc/self/mem",  # refuses shared mappings that were made for reading
    *(f"{how} with flags {os.O_WRONLY:o}, then mmap" for how in ("by_proc_self", "by_proc_pid")),
    *(f"{how} with flags {os.O_RDWR | os.O_TRUNC:o}, then mmap" for how in ("by_proc_self", "by_proc_pid")),
}


def what_works(attempts: dict[str, Callable[[], object]]) -> set[str]:
    """The names of those that raise nothing."""
    works = set()
    for name, attempt in attempts.items():
        with suppress(OSError, ValueError):
            attempt()
            works.add(name)
    return works


def test_what_was_handed_over_cannot_be_written_by_any_route(path: Path) -> None:
    """Each route is tried in a process of its own, which has nothing but what came over the socket."""
    with serving(path, slots=64) as host:
        host.put(3)
        before = bytes(host.memory.memory)

        def life() -> None:
            os.close(host.memory.descriptor)  # what a stranger wouldn't have
            client = Client(path)
            client.answer()
            memory = client.descriptors[0]
            with suppress(OSError):  # it may succeed, but not truncate
                os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_TRUNC)
            assert what_works(attempts_to_write(memory, host.memory.size)) == set()

        assert ended(fork(life)) == 0
        assert bytes(host.memory.memory) == before
        assert os.fstat(host.memory.descriptor).st_size == host.memory.size
        assert host.put() == 4  # and its owner still can


def test_those_routes_do_lead_to_memory_that_is_not_sealed() -> None:
    """Else the test above would prove nothing."""

    def life() -> None:
        closed = set()
        for name in attempts_to_write(_unsealed(), 8192):
            if not what_works({name: attempts_to_write(_unsealed(), 8192)[name]}):
                closed.add(name)
        assert closed == IN_VAIN_ANYWAY, closed

    assert ended(fork(life)) == 0


def _unsealed() -> int:
    memory = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, 8192)
    return memory


def test_a_reader_cannot_hold_up_the_others_by_what_it_does_to_its_descriptors(path: Path) -> None:
    """With an eventfd it could: clear its O_NONBLOCK, fill its counter, and the server's next write blocks."""
    with serving(path) as host, reader(path) as bystander, reader(path, b'{"key":"enterprise"}\n') as hostile:
        for descriptor in (*hostile.descriptors, hostile.sock.fileno()):
            fcntl.fcntl(descriptor, fcntl.F_SETFL, 0)
        _, wake = hostile.descriptors
        attempts: dict[str, Callable[[], object]] = {
            "add to the counter": lambda: os.eventfd_write(wake, (1 << 64) - 2),
            "write": lambda: os.write(wake, b"\xfe" + b"\xff" * 7),
            "read": lambda: os.read(wake, 8),
            "open it anew": lambda: os.open(f"/proc/self/fd/{wake}", os.O_RDWR),
        }
        assert what_works(attempts) == set()
        with select.epoll.fromfd(os.dup(wake)) as mine:  # whatever was in it, it can only be taken out for itself
            mine.register(hostile.sock, select.EPOLLOUT)
        for _ in range(100):
            host.put()
            assert bystander.woken(PATIENCE_S)


def test_what_a_reader_says_after_its_hello_is_bounded(path: Path) -> None:
    with serving(path) as host, reader(path) as client, reader(path) as bystander:
        client.sock.sendall(b"\n" * MAX_EXTRA)
        host.put()
        assert client.woken(PATIENCE_S)
        client.sock.sendall(b"\n")
        assert client.closed()
        until(lambda: host.accounts.disconnected == 1)
        host.put()
        assert bystander.woken(PATIENCE_S)


def test_a_reader_that_half_closes_has_gone(path: Path) -> None:
    with serving(path) as host, reader(path) as client:
        client.sock.shutdown(socket.SHUT_WR)
        assert client.closed()
        until(lambda: host.accounts.tiers[Tier.TURBO].subscribers == 0)


def test_a_reader_that_is_killed_is_forgotten_and_harms_nobody(path: Path) -> None:
    with serving(path) as host, reader(path) as bystander:

        def life() -> None:
            Client(path).answer()
            signal.pause()

        child = fork(life)
        until(lambda: host.accounts.accepted == 2)
        killed(child)
        until(lambda: host.accounts.disconnected == 1)
        assert host.accounts.tiers[Tier.TURBO].subscribers == 1
        host.put()
        assert bystander.woken(PATIENCE_S)


def test_a_reader_that_takes_nothing_does_not_hold_up_the_others(path: Path) -> None:
    with serving(path) as host:
        silent = [Client(path) for _ in range(20)]  # they never receive their answer
        until(lambda: host.accounts.accepted == 20)
        with reader(path) as client:
            for _ in range(50):
                host.put()
                assert client.woken(PATIENCE_S)
        for each in silent:
            each.close()
