"""The hand-over of shared memory over a real Unix socket: to whom, in what state, and what no reader can do with it."""

from __future__ import annotations

import array
import asyncio
import ctypes
import fcntl
import json
import mmap
import os
import select
import shutil
import signal
import socket
import stat
import tempfile
import time
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sprint.deliveries import shm
from sprint.deliveries.hello import MAX_HELLO
from sprint.deliveries.stream import MAX_EXTRA
from sprint.errors import HostError
from sprint.events import State
from sprint.record import STATE_OFFSET
from sprint.ring import Ring
from sprint.shared_memory import SEALS, map_read_only
from sprint.tiers import PROFILES, Tier
from tests.unit.shm_host import PATIENCE_S, SESSION, Host, ended, fork, killed, record_of, serving, until

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

MS = 1_000_000
NOBODY = 65534
GROUP = 54321
KEY_ONLY = "the hello takes a key only: where to begin in the ring is the reader's own choice"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


class Client:
    """A reader by hand: says its hello and takes what it is given."""

    def __init__(self, path: Path, hello: bytes = b'{"key":"turbo"}\n') -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(os.fspath(path))
        with suppress(BrokenPipeError):  # of a hello that is refused before its end
            self.sock.sendall(hello)
        self.descriptors: list[int] = []

    def answer(self) -> dict[str, Any]:
        data, control, flags, _ = self.sock.recvmsg(4096, socket.CMSG_SPACE(64), socket.MSG_CMSG_CLOEXEC)
        assert not flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC)
        for level, kind, content in control:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            self.descriptors += array.array("i", content)
        assert data.endswith(b"\n")
        answer: dict[str, Any] = json.loads(data)
        return answer

    def woken(self, timeout_s: float = 0) -> bool:
        """Whether it was woken since it was last asked."""
        _, wake = self.descriptors
        with select.epoll.fromfd(os.dup(wake)) as waiting:
            return bool(waiting.poll(timeout_s))

    def closed(self) -> bool:
        """Whether the server hangs up, saying nothing more."""
        with suppress(ConnectionResetError):
            return self.sock.recv(1) == b""
        return True

    def close(self) -> None:
        self.sock.close()
        while self.descriptors:
            os.close(self.descriptors.pop())


@contextmanager
def reader(path: Path, hello: bytes = b'{"key":"turbo"}\n') -> Iterator[Client]:
    with closing(Client(path, hello)) as client:
        assert "error" not in client.answer()
        yield client


def refusal(path: Path, hello: bytes) -> dict[str, Any]:
    with closing(Client(path, hello)) as client:
        answer = client.answer()
        assert client.descriptors == []
        assert client.closed()
        return answer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shm.sock"


@pytest.fixture
def public_path() -> Iterator[Path]:
    """In a directory that any user may enter, as /run is."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield directory / "shm.sock"
    shutil.rmtree(directory)


# What is handed over


@pytest.mark.parametrize("tier", ["turbo", "enterprise"])
def test_a_subscriber_of_a_top_tier_gets_the_ring_and_is_told_what_it_is(path: Path, tier: str) -> None:
    with serving(path, slots=16) as host, closing(Client(path, json.dumps({"key": tier}).encode() + b"\n")) as client:
        assert client.answer() == {
            "tier": tier,
            "session": f"{SESSION:016x}",
            "network": "regtest",
            "layout": 1,
            "slots": 16,
            "recordSize": 192,
        }
        memory, wake = client.descriptors
        assert os.fstat(memory)[:3] == os.fstat(host.memory.descriptor)[:3]
        assert fcntl.fcntl(memory, 1034) == SEALS
        assert fcntl.fcntl(memory, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert os.readlink(f"/proc/self/fd/{wake}") == "anon_inode:[eventpoll]"
        ring = Ring.attach(map_read_only(memory))
        host.put(20)
        assert (ring.session, ring.slots, ring.tail) == (SESSION, 16, 20)
        assert ring.copy(20) == host.ring.copy(20)


def test_each_reader_is_woken_once_a_publication_and_not_before(path: Path) -> None:
    with serving(path) as host, reader(path) as one, reader(path, b'{"key":"enterprise"}\n') as other:
        for each in (one, other):
            assert not each.woken()
        for _ in range(3):
            host.put()
            for each in (one, other):
                assert each.woken(PATIENCE_S)
                assert not each.woken()


def test_signals_that_a_reader_did_not_wait_for_become_one(path: Path) -> None:
    with serving(path) as host, reader(path) as client:
        for _ in range(5):
            published = host.accounts.processing.count
            host.put()
            until(lambda: host.accounts.processing.count > published)  # noqa: B023 - called before the next round
        assert client.woken()
        assert not client.woken()


def test_another_loop_can_watch_what_a_reader_was_given(path: Path) -> None:
    with serving(path) as host, reader(path) as client, select.epoll() as outer:
        outer.register(client.descriptors[1], select.EPOLLIN)
        assert outer.poll(0) == []
        host.put()
        assert outer.poll(PATIENCE_S) == [(client.descriptors[1], select.EPOLLIN)]
        assert client.woken()
        assert outer.poll(0) == []


def test_two_hundred_readers_are_all_woken_and_accounted_for(path: Path) -> None:
    with serving(path) as host:
        clients = [Client(path, b'{"key":"enterprise"}\n' if each % 4 else b"{}\n") for each in range(267)]
        tier = host.accounts.tiers[Tier.ENTERPRISE]
        try:
            answers = [client.answer() for client in clients]
            readers = [client for client in clients if client.descriptors]
            assert (len(readers), sum("error" in answer for answer in answers)) == (200, 67)
            until(lambda: tier.subscribers == host.accounts.accepted == 200)
            assert host.accounts.refused == 67
            host.put()
            for client in readers:
                assert client.woken(PATIENCE_S)
            until(lambda: host.accounts.processing.count == 1)
            assert tier.on_time + tier.late == 200
            assert tier.relay_latency.count == tier.write_time.count == 200
            assert (tier.dropped, tier.overwritten) == (0, 0)
            assert tier.relay_latency.max_ns > 0
        finally:
            for client in clients:
                client.close()
        until(lambda: host.accounts.disconnected == 200)
        assert tier.subscribers == 0


# To whom


@pytest.mark.parametrize(
    ("hello", "error"),
    [
        (b'{"key":"nobody"}\n', "not accepted"),
        (b"{}\n", "tier free has no shared memory: enterprise and turbo have"),
        (b'{"key":"pro"}\n', "tier pro has no shared memory: enterprise and turbo have"),
        (b'{"key":"business"}\n', "tier business has no shared memory: enterprise and turbo have"),
        (b'{"key":"turbo","since":1}\n', KEY_ONLY),
        (b'{"key":"turbo","format":"json"}\n', KEY_ONLY),
        (b"GET / HTTP/1.1\r\n\r\n", "hello is not JSON: expected one line with an object"),
        (b"x" * MAX_HELLO, f"hello longer than {MAX_HELLO} bytes"),
        (b"x" * (1 << 20), f"hello longer than {MAX_HELLO} bytes"),
    ],
)  # fmt: skip
def test_who_is_refused_is_told_why_and_gets_no_descriptor(path: Path, hello: bytes, error: str) -> None:
    with serving(path) as host:
        with closing(Client(path, hello)) as client:
            assert client.answer() == {"error": error}
            assert client.descriptors == []
            assert client.closed()
        until(lambda: host.accounts.refused == 1)
        assert host.accounts.accepted == 0
        with reader(path):  # and nobody else is the worse for it
            assert host.accounts.accepted == 1


def test_who_says_no_hello_in_time_is_sent_away(path: Path) -> None:
    with serving(path, hello_timeout_ns=50 * MS):
        assert refusal(path, b'{"key":') == {"error": "no hello in time"}


def test_no_more_readers_than_agreed_are_taken_and_a_place_that_gets_free_is_given_again(path: Path) -> None:
    with serving(path, max_readers=2) as host:
        with reader(path), reader(path):
            assert refusal(path, b'{"key":"turbo"}\n') == {"error": "too many subscribers", "retry": True}
        until(lambda: host.accounts.disconnected == 2)
        with reader(path):
            pass


def test_one_user_can_be_kept_from_taking_all_places(path: Path) -> None:
    with serving(path, max_readers=10, max_readers_per_user=1), reader(path):
        assert refusal(path, b'{"key":"turbo"}\n')["retry"] is True


def as_nobody(path: Path, groups: list[int], own_group: int = NOBODY) -> str:
    """What another user is answered, or the name of the error that it meets."""
    said, says = os.pipe()

    def life() -> None:
        os.setgroups(groups)
        os.setresgid(own_group, own_group, own_group)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        try:
            with closing(Client(path)) as client:
                os.write(says, json.dumps(client.answer()).encode())
        except OSError as error:
            os.write(says, type(error).__name__.encode())

    child = fork(life)
    os.close(says)
    with os.fdopen(said) as pipe:
        words = pipe.read()
    assert ended(child) == 0
    return words


@as_root
def test_another_user_is_kept_out_by_the_file_s_mode(public_path: Path) -> None:
    with serving(public_path) as host:
        assert as_nobody(public_path, []) == "PermissionError"
        assert host.accounts.accepted == host.accounts.refused == 0


@as_root
def test_another_user_is_refused_by_its_credentials_even_when_the_mode_lets_it_in(public_path: Path) -> None:
    with serving(public_path):
        public_path.chmod(0o666)
        answer = json.loads(as_nobody(public_path, [GROUP]))
        assert answer == {
            "error": f"uid {NOBODY} is neither the server's user nor in the group of the socket, gid {os.getegid()}"
        }


@as_root
@pytest.mark.parametrize(("groups", "own_group"), [([GROUP], NOBODY), ([7, GROUP, 9], NOBODY), ([], GROUP)])
def test_members_of_the_group_that_the_socket_has_now_are_let_in(
    public_path: Path, groups: list[int], own_group: int
) -> None:
    with serving(public_path):
        assert as_nobody(public_path, groups, own_group) == "PermissionError"
        os.chown(public_path, -1, GROUP)
        assert json.loads(as_nobody(public_path, groups, own_group))["tier"] == "turbo"


@as_root
def test_a_user_with_more_groups_than_are_looked_through_is_judged_by_its_own(public_path: Path) -> None:
    with serving(public_path):
        os.chown(public_path, -1, GROUP)
        many = list(range(1000, 1000 + shm.MAX_GROUPS))
        assert "neither" in as_nobody(public_path, [*many, GROUP])
        assert json.loads(as_nobody(public_path, many, GROUP))["tier"] == "turbo"


# What a reader can't do


def _cannot(attempts: dict[str, Callable[[], object]]) -> None:
    """Run each; what succeeds is told on stderr, and fails the process."""
    broken = []
    for name, attempt in attempts.items():
        try:
            outcome = attempt()
        except (OSError, ValueError):
            continue
        broken.append(f"{name}: {outcome!r}")
    assert not broken, broken


def test_what_was_handed_over_cannot_be_written_by_any_route(path: Path) -> None:
    """Each route is tried in a process of its own, which has nothing but what came over the socket."""
    with serving(path, slots=64) as host:
        host.put(3)
        before = bytes(host.memory.memory)
        size = host.memory.size
        junk = b"\xff" * 64

        def life() -> None:
            os.close(host.memory.descriptor)  # what a stranger wouldn't have
            client = Client(path)
            client.answer()
            memory = client.descriptors[0]
            libc = ctypes.CDLL(None, use_errno=True)
            for name in ("mmap", "mremap"):
                getattr(libc, name).restype = ctypes.c_void_p
            libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
            libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
            libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
            libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
            mapped = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, memory, 0)
            assert mapped != ctypes.c_void_p(-1).value
            writable = mmap.PROT_READ | mmap.PROT_WRITE

            def checked(result: int) -> int:
                if result == -1:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
                return result

            def punch(descriptor: int) -> int:
                return checked(libc.fallocate(descriptor, 3, 0, 4096))

            def then(anew: Callable[[], int], action: Callable[..., object], *arguments: object) -> object:
                return action(anew(), *arguments)

            def again(flags: int) -> int:
                return os.open(f"/proc/self/fd/{memory}", flags)

            def in_process(flags: int) -> int:
                return os.open(f"/proc/{os.getpid()}/fd/{memory}", flags)

            def by_process_memory() -> int:
                with open("/proc/self/mem", "r+b", buffering=0) as own:
                    own.seek(mapped)
                    return own.write(junk)

            def by_splice() -> int:
                reading, writing = os.pipe()
                os.write(writing, junk)
                at = ctypes.c_long(0)
                return checked(libc.splice(reading, None, again(os.O_RDWR), ctypes.byref(at), len(junk), 0))

            attempts: dict[str, Callable[[], object]] = {
                "write": lambda: os.write(memory, junk),
                "pwrite": lambda: os.pwrite(memory, junk, 0),
                "pwritev": lambda: os.pwritev(memory, [junk], 0),
                "mmap": lambda: mmap.mmap(memory, size, flags=mmap.MAP_SHARED, prot=writable),
                "mmap write only": lambda: mmap.mmap(memory, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_WRITE),
                "mprotect": lambda: checked(libc.mprotect(mapped, size, writable)),
                "mprotect with exec": lambda: checked(libc.mprotect(mapped, size, writable | mmap.PROT_EXEC)),
                "madvise remove": lambda: checked(libc.madvise(mapped, size // 4096 * 4096, 9)),
                "ftruncate to nothing": lambda: os.ftruncate(memory, 0),
                "ftruncate to more": lambda: os.ftruncate(memory, 2 * size),
                "fallocate": lambda: os.posix_fallocate(memory, 0, 2 * size),
                "punch a hole": lambda: punch(memory),
                "zero a range": lambda: checked(libc.fallocate(memory, 0x10, 0, 4096)),
                "take off seals": lambda: fcntl.fcntl(memory, 1033, 0),
                "add a seal": lambda: fcntl.fcntl(memory, 1033, 0x8),
                "sendfile": lambda: os.sendfile(again(os.O_RDWR), os.open(__file__, os.O_RDONLY), 0, 64),
                "copy_file_range": lambda: os.copy_file_range(os.open(__file__, os.O_RDONLY), again(os.O_RDWR), 64),
                "splice": by_splice,
                "process_vm or /proc/self/mem": by_process_memory,
            }
            for reopened in (again, in_process):
                for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_TRUNC):
                    anew = partial(reopened, flags)
                    label = f"{reopened.__name__}, opened with {flags:o}, then"
                    attempts |= {
                        f"{label} write": partial(then, anew, os.write, junk),
                        f"{label} pwrite": partial(then, anew, os.pwrite, junk, 0),
                        f"{label} mmap": partial(then, anew, mmap.mmap, size, mmap.MAP_SHARED, writable),
                        f"{label} ftruncate": partial(then, anew, os.ftruncate, 0),
                        f"{label} punch a hole": partial(then, anew, punch),
                    }
            with suppress(OSError):  # it may succeed, but must not truncate
                again(os.O_RDONLY | os.O_TRUNC)
            _cannot(attempts)

        assert ended(fork(life)) == 0
        assert bytes(host.memory.memory) == before
        assert os.fstat(host.memory.descriptor).st_size == size
        assert host.put() == 4  # and its owner still can


def test_a_reader_cannot_hold_up_the_others_by_what_it_does_to_its_descriptors(path: Path) -> None:
    """With an eventfd it could: clear its O_NONBLOCK, fill its counter, and the server's next write blocks."""
    with serving(path) as host, reader(path) as bystander, reader(path, b'{"key":"enterprise"}\n') as hostile:
        for descriptor in (*hostile.descriptors, hostile.sock.fileno()):
            fcntl.fcntl(descriptor, fcntl.F_SETFL, 0)
        _, wake = hostile.descriptors
        _cannot(
            {
                "add to the counter": lambda: os.eventfd_write(wake, (1 << 64) - 2),
                "write": lambda: os.write(wake, b"\xfe" + b"\xff" * 7),
                "read": lambda: os.read(wake, 8),
                "open it anew": lambda: os.open(f"/proc/self/fd/{wake}", os.O_RDWR),
            }
        )
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


# In this process: order, accounts, what the kernel refuses


class Local:
    """A delivery on the test's own loop."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.host = Host(path)
        self.path = path
        self.delivery = self.host.delivery(**options)

    def start(self) -> None:
        self.delivery.start(asyncio.get_running_loop(), self.path)

    async def client(self, tier: str) -> Client:
        client = Client(self.path, json.dumps({"key": tier}).encode() + b"\n")
        waiting = select.poll()
        waiting.register(client.sock, select.POLLIN)
        while not waiting.poll(0):
            await asyncio.sleep(0.001)
        return client

    def close(self) -> None:
        self.delivery.close()
        os.close(self.host.memory.descriptor)
        os.close(self.host.channel.fileno())


def on_a_loop(path: Path, test: Callable[[Local], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def run() -> None:
        local = Local(path, **options)
        local.start()
        try:
            await asyncio.wait_for(test(local), PATIENCE_S)
        finally:
            local.close()

    asyncio.run(run())


def test_enterprise_is_woken_first_and_within_a_tier_the_first_one_rotates(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(local: Local) -> None:
        clients = [await local.client(tier) for tier in ("turbo", "enterprise", "turbo", "enterprise", "turbo")]
        names = {
            each.eventfd: f"{tier.label}{place}"
            for tier, roster in local.delivery._rosters.items()
            for place, each in enumerate(roster)
        }
        woken: list[str] = []
        monkeypatch.setattr(os, "eventfd_write", lambda descriptor, _value: woken.append(names[descriptor]))
        starts = set()
        for _ in range(6):
            local.host.writer.claim()[:] = record_of(local.host.writer.next_sequence)
            local.host.writer.commit(best=True)
            woken.clear()
            local.delivery.publish()
            assert sorted(woken) == ["enterprise0", "enterprise1", "turbo0", "turbo1", "turbo2"]
            assert all(name.startswith("enterprise") for name in woken[:2])
            starts |= {woken[0], woken[2]}
        assert starts == set(names.values())
        for client in clients:
            client.close()

    on_a_loop(path, test)


def test_a_signal_delivers_every_record_since_the_last_and_the_overwritten_ones_are_told_apart(path: Path) -> None:
    async def test(local: Local) -> None:
        clients = [await local.client("turbo") for _ in range(3)]
        accounts = local.host.accounts.tiers[Tier.TURBO]
        local.host.put(5)
        local.delivery.publish()
        assert (accounts.on_time + accounts.late, accounts.overwritten) == (15, 0)
        local.delivery.publish()  # nothing new
        assert accounts.on_time + accounts.late == 15
        assert local.host.accounts.processing.count == 1
        local.host.put(64 + 7)  # the ring holds 64
        local.delivery.publish()
        assert (accounts.on_time + accounts.late, accounts.overwritten) == (15 + 3 * 64, 3 * 7)
        for client in clients:
            client.close()

    on_a_loop(path, test)


def test_relay_latency_is_counted_from_the_first_sighting_but_not_for_a_catch_up(path: Path) -> None:
    now = 1_000_000 * MS

    def clock() -> int:
        nonlocal now
        now += MS  # each look at the clock takes a millisecond
        return now

    async def test(local: Local) -> None:
        client = await local.client("turbo")
        accounts = local.host.accounts.tiers[Tier.TURBO]
        local.host.write(record_of(1, seen_ns=now - 20 * MS))
        local.delivery.publish()
        assert (accounts.on_time, accounts.late, accounts.over_target) == (0, 1, 1)
        assert accounts.relay_latency.count == 1
        assert 20 * MS < accounts.relay_latency.max_ns < 25 * MS
        assert accounts.write_time.max_ns == MS
        old = bytearray(record_of(2))
        old[STATE_OFFSET : STATE_OFFSET + 2] = (State.PROVEN | State.CATCHUP).to_bytes(2, "little")
        local.host.write(bytes(old))
        local.delivery.publish()
        assert accounts.late == 2
        assert accounts.relay_latency.count == 1
        client.close()

    on_a_loop(path, test, clock=clock, hello_timeout_ns=1 << 62)


def test_a_signal_within_the_write_deadline_that_was_asked_for_is_on_time(path: Path) -> None:
    async def test(local: Local) -> None:
        client = await local.client("turbo")
        local.host.put()
        local.delivery.publish()
        accounts = local.host.accounts.tiers[Tier.TURBO]
        assert (accounts.on_time, accounts.late) == (1, 0)
        client.close()

    on_a_loop(path, test, write_deadline_ns=dict.fromkeys(Tier, 10**12))


def test_what_was_published_before_the_start_is_no_delivery(path: Path) -> None:
    async def run() -> None:
        local = Local(path)
        local.host.put(3)
        local.start()
        client = await local.client("turbo")
        local.delivery.publish()
        assert local.host.accounts.tiers[Tier.TURBO].on_time == 0
        client.close()
        local.close()

    asyncio.run(run())


@pytest.mark.parametrize("refused", ["eventfd", "epoll", "send_fds"])
def test_a_process_that_is_out_of_descriptors_refuses_for_now_and_keeps_none(
    path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    def full(*_: object) -> int:
        raise OSError(24, "Too many open files")

    async def test(local: Local) -> None:
        first = await local.client("turbo")
        first.answer()
        before = set(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            patch.setattr({"eventfd": os, "epoll": select, "send_fds": socket}[refused], refused, full)
            client = await local.client("turbo")
        assert client.answer() == {"error": "no reader can be taken now: Too many open files", "retry": True}
        client.close()
        while local.delivery._reception is not None and local.delivery._reception._arrivals:
            await asyncio.sleep(0.001)
        assert set(os.listdir("/proc/self/fd")) == before
        assert local.host.accounts.accepted == 1
        again = await local.client("turbo")
        assert again.answer()["tier"] == "turbo"
        again.close()
        first.close()

    on_a_loop(path, test)


# The socket file


def start_and_close(path: Path) -> int:
    """Start a delivery; the mode that its socket has."""

    async def run() -> int:
        local = Local(path)
        try:
            local.start()
            found = os.stat(path)
            assert stat.S_ISSOCK(found.st_mode)
            return stat.S_IMODE(found.st_mode)
        finally:
            local.close()

    return asyncio.run(run())


@pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o777])
def test_the_socket_has_mode_0660_whatever_the_umask_and_never_a_wider_one(
    path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow, seen = os.chmod, []

    def chmod(where: Path, mode: int) -> None:
        seen.append(stat.S_IMODE(os.stat(where).st_mode))  # as bind() has left it
        narrow(where, mode)

    monkeypatch.setattr(os, "chmod", chmod)
    before = os.umask(umask)
    try:
        assert start_and_close(path) == 0o660
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert seen == [0o660 & ~umask]


def test_a_socket_that_a_killed_worker_left_is_replaced(path: Path) -> None:
    with serving(path) as host:
        host.kill_worker()
        left = os.stat(path).st_ino
        held = os.open(path, os.O_PATH)  # so that the number isn't given to the next one
        host.serve()
        assert os.stat(path).st_ino != left
        with reader(path):
            pass
        os.close(held)


def test_a_socket_that_somebody_listens_on_is_left_to_them(path: Path) -> None:
    with serving(path):
        with pytest.raises(HostError, match=f"shared memory socket {path}: another server listens on it"):
            start_and_close(path)
        with reader(path):
            pass


def test_a_socket_whose_listener_is_too_busy_to_accept_is_left_to_it(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as busy:
        busy.bind(os.fspath(path))
        busy.listen(0)
        waiting = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            with suppress(BlockingIOError):
                each.connect(os.fspath(path))
        with pytest.raises(HostError, match="another server listens on it"):
            start_and_close(path)
        for each in waiting:
            each.close()


def test_a_file_that_is_no_socket_is_not_removed(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(HostError, match=f"{path}: there is something else than a socket"):
        start_and_close(path)
    assert path.read_text() == "precious"
    target = path.with_name("target")
    path.rename(target)
    path.symlink_to(target)
    with pytest.raises(HostError, match="something else than a socket"):
        start_and_close(path)
    assert target.read_text() == "precious"


@pytest.mark.parametrize("name", ["missing/shm.sock", "x" * 120])
def test_a_path_that_cannot_be_bound_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(HostError, match=f"shared memory socket {tmp_path / name}: "):
        start_and_close(tmp_path / name)


def test_a_start_that_fails_keeps_no_descriptor(tmp_path: Path) -> None:
    with suppress(HostError):
        start_and_close(tmp_path / "missing" / "shm.sock")
    before = len(os.listdir("/proc/self/fd"))
    host = Host(tmp_path / "missing" / "shm.sock")
    opened = len(os.listdir("/proc/self/fd"))

    async def start() -> None:
        for _ in range(5):
            with pytest.raises(HostError):
                host.delivery().start(asyncio.get_running_loop(), host.path)

    asyncio.run(start())
    assert len(os.listdir("/proc/self/fd")) == opened > before
    os.close(host.memory.descriptor)
    os.close(host.channel.fileno())


def test_memory_that_is_not_sealed_is_never_handed_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(path)
    monkeypatch.setattr(host.memory, "seals", lambda: SEALS & ~0x10)
    with pytest.raises(HostError, match="seals 0x7 can't be handed over: 0x17 expected"):
        host.delivery()
    os.close(host.memory.descriptor)
    os.close(host.channel.fileno())


def test_closing_ends_every_connection_and_removes_the_socket(path: Path) -> None:
    async def test(local: Local) -> None:
        client = await local.client("turbo")
        client.answer()
        early = Client(path, b"")
        await asyncio.sleep(0)
        local.delivery.close()
        local.delivery.close()
        assert client.closed()
        assert early.closed()
        assert not path.exists()
        assert local.host.accounts.disconnected == 1
        client.close()
        early.close()

    on_a_loop(path, test)


def test_closing_leaves_a_socket_that_another_server_has_put_there(path: Path) -> None:
    async def test(local: Local) -> None:
        path.unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            other.bind(os.fspath(path))
            other.listen()
            local.delivery.close()
            assert path.exists()

    on_a_loop(path, test)


def test_signals_are_given_while_no_reader_is_there(path: Path) -> None:
    with serving(path) as host:
        host.put(10)
        until(lambda: host.accounts.processing.count >= 1)
        with reader(path) as client:
            assert not client.woken()
            began = time.monotonic()
            host.put()
            assert client.woken(PATIENCE_S)
            assert time.monotonic() - began < PATIENCE_S


def test_the_tiers_that_have_shared_memory_are_those_of_the_memory_engine() -> None:
    assert shm._TIERS == (Tier.ENTERPRISE, Tier.TURBO)
    assert all(PROFILES[tier].memory_engine for tier in shm._TIERS)
