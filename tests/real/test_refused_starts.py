"""Where the machine refuses what is asked for: one line that names the variable, before anything is served."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.real.children import QUIET, all_processes, kill_and_await
from tests.real.product import COMMAND, Product, dying_with_us, environment
from tests.real.test_operation import NOBODY, refused_start

if TYPE_CHECKING:
    from pathlib import Path

TEXT = {"LOG_FORMAT": "text", **QUIET}
EVERY_BIND = ("API_BIND", "STREAM_BIND", "UDP_BIND", "ZMQ_BIND")


@pytest.mark.parametrize(
    ("tier", "variable"),
    [
        ("turbo", "API_BIND"),
        ("turbo", "STREAM_BIND"),
        ("turbo", "UDP_BIND"),
        ("free", "STREAM_BIND"),
        ("free", "ZMQ_BIND"),
    ],
)
def test_an_address_that_is_not_ours_stops_the_start_with_a_line_that_begins_with_its_variable(
    tier: str, variable: str, tmp_path: Path
) -> None:
    address = "192.0.2.1:9"
    line = refused_start(Product(tmp_path, NOBODY, tier=tier, **TEXT, **{variable: address}))
    assert line == f"sprint: {variable}={address}: Cannot assign requested address"


def test_a_second_sprint_may_not_share_the_streams_address_with_the_first(tmp_path: Path) -> None:
    with Product(tmp_path / "first", NOBODY, **QUIET) as first:
        line = refused_start(Product(tmp_path / "second", NOBODY, **TEXT, STREAM_BIND=first.stream))
        assert line == f"sprint: STREAM_BIND={first.stream}: Address already in use"


def test_a_socket_path_where_something_else_stands_stops_the_start_and_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("precious")
    line = refused_start(Product(tmp_path, NOBODY, **TEXT, SHM_SOCKET=str(file)))
    assert line == f"sprint: SHM_SOCKET={file}: there is something else than a socket"
    assert file.read_text() == "precious"


def test_a_socket_path_that_another_server_has_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "there.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(path))
        server.listen()
        line = refused_start(Product(tmp_path, NOBODY, **TEXT, SHM_SOCKET=str(path)))
        assert line == f"sprint: SHM_SOCKET={path}: another server listens on it"
        assert path.exists()


def test_a_socket_path_in_which_none_can_be_made_stops_the_start(tmp_path: Path) -> None:
    line = refused_start(Product(tmp_path, NOBODY, **TEXT, SHM_SOCKET="/proc/sprint.sock"))
    assert line.startswith("sprint: SHM_SOCKET=/proc/sprint.sock: ")


def test_a_child_that_the_machine_refuses_something_later_says_so_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "sockets"
    folder.mkdir()
    with Product(tmp_path, NOBODY, **QUIET, SHM_SOCKET=str(folder / "ring.sock")) as product:
        shm = all_processes(product)["shm"]
        shutil.rmtree(folder)
        os.kill(shm, signal.SIGKILL)
        said = json.loads(product.wait_for_log("Child can't go on"))
        assert (said["child"], said["error"].partition(":")[0]) == ("shm", f"SHM_SOCKET={folder / 'ring.sock'}")
        folder.mkdir()
        product.wait_for("health", lambda one: all(row["pid"] for row in one["processes"]), "all processes")
        assert kill_and_await(product, "udp")
        assert not any("Traceback" in line for line in product.log)
        assert product.stop() == 0


@pytest.mark.parametrize(("tier", "closed"), [("turbo", ">&-"), ("turbo", "<&- >&- 2>&-"), ("free", "2>&-")])
def test_it_serves_whatever_standard_streams_it_is_started_with(closed: str, tier: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        api = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = {"TIER": tier, "NETWORK": "regtest", "BITCOIN_NODE": NOBODY, "DATA_DIR": str(tmp_path), **QUIET}
    settings |= dict.fromkeys(EVERY_BIND, "127.0.0.1:0") | {"API_BIND": api}
    command = ["/bin/bash", "-c", f'exec "$@" {closed}', "bash", *dying_with_us(), *COMMAND, "run"]
    with subprocess.Popen(command, env=environment(settings), cwd=tmp_path) as sprint:
        try:
            status = [*COMMAND, "status", api]
            for _ in range(40):  # half a second each, of which a refused connection takes next to nothing
                told = subprocess.run(status, capture_output=True, text=True, timeout=60, check=False)
                if told.stdout:
                    break
                assert sprint.poll() is None
            assert f"tier {tier}" in told.stdout
            sprint.terminate()
            assert sprint.wait(20) == 0
        finally:
            sprint.kill()
    assert (tmp_path / "headers-regtest.dat").stat().st_size == 80  # nothing was written into it that isn't a header
