"""The socket that hands over shared memory: whose processes it lets in, and what happens to its file."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import stat
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sprint.deliveries import shm
from sprint.errors import HostError
from sprint.tiers import Tier
from tests.descriptors import open_descriptors
from tests.unit.shm_host import (
    Client,
    Host,
    Local,
    ended,
    fork,
    reader,
    serving,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

NOBODY = 65534
GROUP = 54321

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


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
    with serving(path) as host, reader(path):
        until(lambda: host.accounts.accepted == 1)
        host.kill_worker()
        left = os.stat(path).st_ino
        assert host.accounts.tiers[Tier.TURBO].subscribers == 1
        held = os.open(path, os.O_PATH)  # so that the number isn't given to the next one
        host.serve()
        assert os.stat(path).st_ino != left
        assert host.accounts.tiers[Tier.TURBO].subscribers == 0
        with reader(path):
            until(lambda: host.accounts.accepted == 2)
        os.close(held)


def test_a_socket_that_somebody_listens_on_is_left_to_them(path: Path) -> None:
    with serving(path):
        with pytest.raises(HostError, match=f"SHM_SOCKET={path}: another server listens on it"):
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
    with pytest.raises(HostError, match=f"SHM_SOCKET={tmp_path / name}: "):
        start_and_close(tmp_path / name)


def test_a_start_that_fails_keeps_no_descriptor(tmp_path: Path) -> None:
    async def start(host: Host) -> None:
        for _ in range(5):
            with pytest.raises(HostError):
                host.delivery().start(asyncio.get_running_loop(), host.path)

    host = Host(tmp_path / "missing" / "shm.sock")
    before = open_descriptors()
    asyncio.run(start(host))
    assert open_descriptors() == before
    os.close(host.memory.descriptor)
    os.close(host.channel.fileno())
