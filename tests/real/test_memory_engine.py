"""The memory-optimised engine whole: which tiers run it, what its switches do, and an hour's jump of the wall clock."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.real import product as harness
from tests.real.children import (
    QUIET,
    all_processes,
    assert_whole,
    cpu_seconds,
    kill_and_await,
    logged,
    processes,
    records,
    status_field,
    until,
)
from tests.real.product import Product
from tests.real.subscribers import JsonStream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.real.bcoin import BcoinNode

NOBODY = "127.0.0.1:9"
"""An upstream that is never there: the discard port."""
CHANNELS = 4
"""The stream worker's, and those of udp, shm and zmq."""
SHARED = Path("/dev/shm")
START_LINE = "⚡ Starting memory-optimized sprint with tight deadlines"


# Which engine


@pytest.mark.parametrize(
    ("tier", "settings", "engine"),
    [
        ("free", {}, "standard"),
        ("pro", {}, "standard"),
        ("business", {"USE_SHARED_MEMORY": "true"}, "standard"),
        ("turbo", {}, "memory"),
        ("enterprise", {}, "memory"),
        ("turbo", {"USE_SHARED_MEMORY": "false"}, "standard"),
    ],
)
def test_the_tier_and_the_switch_decide_which_engine_runs(
    tier: str, settings: dict[str, str], engine: str, tmp_path: Path
) -> None:
    with Product(tmp_path, NOBODY, tier=tier, **QUIET, DELIVERY_WORKERS="2", **settings) as product:
        health = product.ask("health")
        assert health["engine"] == engine
        names = [row["name"] for row in health["processes"]]
        assert names == (["relay", "stream-0", "stream-1", "udp", "shm", "zmq", "api"] if engine == "memory" else [])
        assert len(logged(product, START_LINE)) == (engine == "memory")
        status = product.ask("turbo-status")
        assert status["useSharedMemory"] is (engine == "memory")
        assert ("Shared Memory" in status["features"]) is (engine == "memory")
        if engine == "memory":
            pids = all_processes(product)
            assert all(int(status_field(pid, "PPid")) == product.pid for pid in pids.values())
        assert product.stop() == 0


def test_without_memfd_the_standard_engine_takes_over_says_so_and_relays(
    bcoin: BcoinNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import errno, os\n"
        "def refuse(*_): raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))\n"
        "os.memfd_create = refuse\n"
        "from sprint.cli import main\n"
        "main()\n"
    )
    monkeypatch.setattr(harness, "COMMAND", (sys.executable, "-c", code))
    with Product(tmp_path, bcoin.p2p_address, **QUIET) as product:
        (line,) = logged(product, "The standard engine takes over")
        assert "memfd_create" in line["reason"]
        assert logged(product, START_LINE) == []
        assert product.wait_until_healthy()["engine"] == "standard"
        assert product.ask("turbo-status")["useSharedMemory"] is False
        with JsonStream(product.stream) as raw:
            mined = bcoin.mine(2)
            raw.wait_for_hashes("validated", mined)
        assert product.stop() == 0


@pytest.mark.parametrize("variable", ["API_BIND", "STREAM_BIND", "ZMQ_BIND"])
def test_a_taken_port_is_no_reason_for_the_other_engine(variable: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with Product(tmp_path, NOBODY, LOG_FORMAT="text", **QUIET, **{variable: address}) as product:
            assert product.wait() == 1
    assert not any("takes over" in line for line in product.log)
    assert address in product.log[-1]


def test_a_socket_path_that_is_too_long_stops_the_start_with_one_line_that_names_it(tmp_path: Path) -> None:
    path = str(tmp_path / ("x" * 100))
    with Product(tmp_path, NOBODY, LOG_FORMAT="text", **QUIET, SHM_SOCKET=path) as product:
        assert product.wait() == 1
    assert product.log[-1].startswith(f"sprint: SHM_SOCKET={path}")


# What the switches do


def udp_waiting(pid: int) -> list[int]:
    """Bytes that wait in each UDP socket of that process which is connected to itself on the loopback interface."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    waiting = []
    for line in Path("/proc/net/udp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[9] in inodes and fields[1] == fields[2] and fields[1].startswith("0100007F:"):
            waiting.append(int(fields[4].partition(":")[2], 16))
    return waiting


@pytest.mark.parametrize("channel", [True, False])
def test_the_memory_channel_switch_changes_what_wakes_the_workers(
    channel: bool, bcoin: BcoinNode, tmp_path: Path
) -> None:
    settings = {**QUIET, "USE_MEMORY_CHANNEL": str(channel).lower(), "DELIVERY_WORKERS": "1"}
    with Product(tmp_path, bcoin.p2p_address, **settings) as product:
        product.wait_until_healthy()
        assert ("Memory Channel" in product.ask("turbo-status")["features"]) is channel
        worker = processes(product)["stream-0"]
        with (
            JsonStream(product.stream) as raw,
            product.reader() as reader,
        ):
            first = bcoin.mine(2)
            for event in ("validated", "rebuilt"):
                raw.wait_for_hashes(event, first)
            assert [reader.next(5) is None for _ in range(6)] == [False] * 6
            sockets = udp_waiting(worker)
            assert len(sockets) == (0 if channel else CHANNELS)
            os.kill(worker, signal.SIGSTOP)
            try:
                mined = bcoin.mine(1)
                product.wait_for("health", lambda answer: answer["sequence"] >= 9, "the block")
                assert any(udp_waiting(worker)) is not channel
            finally:
                os.kill(worker, signal.SIGCONT)
            for event in ("validated", "rebuilt"):
                raw.wait_for_hashes(event, mined)
            assert len(raw.events) == 9
        assert product.stop() == 0


def test_a_relay_that_takes_over_wakes_the_workers_for_what_the_dead_one_may_have_left(tmp_path: Path) -> None:
    settings = {**QUIET, "USE_MEMORY_CHANNEL": "false", "DELIVERY_WORKERS": "1"}
    with Product(tmp_path, NOBODY, **settings) as product:
        worker = all_processes(product)["stream-0"]
        until(lambda: len(udp_waiting(worker)) == CHANNELS and not any(udp_waiting(worker)), "the first wake-up taken")
        os.kill(worker, signal.SIGSTOP)
        try:
            # Each channel is known in every process; that of shm is emptied by its own worker.
            kill_and_await(product, "relay")
            until(lambda: any(udp_waiting(worker)), "a wake-up")
        finally:
            os.kill(worker, signal.SIGCONT)
        assert product.stop() == 0


def assert_optimised(product: Product, pids: dict[str, int], refused: list[str]) -> None:
    """The relay has taken every step that wasn't refused, and the others leave its CPU alone."""
    relay, cpu = pids["relay"], max(os.sched_getaffinity(0))
    if "pinning" not in refused:
        until(lambda: status_field(relay, "Cpus_allowed_list") == str(cpu), "a pinned relay")
        for name, pid in {**pids, "supervisor": product.pid}.items():
            assert name == "relay" or cpu not in os.sched_getaffinity(pid), f"{name} shares the relay's CPU"
    if "memory" not in refused:
        until(lambda: int(status_field(relay, "VmLck").split()[0]) > 1_000, "locked memory")
    if "realtime" not in refused:
        until(lambda: os.sched_getscheduler(relay) & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO, "SCHED_FIFO")
    if "spin" not in refused:
        before = cpu_seconds(relay)
        until(lambda: cpu_seconds(relay) > before + 0.1, "a spinning relay")


def optimizations_of(product: Product) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The relay's steps, and the row of the workers."""
    until(lambda: any(row["name"] == "workers" for row in product.ask("health")["optimizations"]), "the workers' row")
    *steps, workers = product.ask("health")["optimizations"]
    return steps, workers


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU: nothing is pinned, and nothing spins")
def test_optimize_system_pins_locks_and_says_what_was_refused_once_even_if_the_relay_is_restarted(
    bcoin: BcoinNode, tmp_path: Path
) -> None:
    with Product(tmp_path, bcoin.p2p_address, OPTIMIZE_SYSTEM="true", DELIVERY_WORKERS="1") as product:
        product.wait_until_healthy()
        steps, workers = optimizations_of(product)
        assert [step["name"] for step in steps] == ["pinning", "spin", "timer slack", "gc", "memory", "realtime"]
        scheduled = os.sched_getscheduler(all_processes(product)["stream-0"]) & ~os.SCHED_RESET_ON_FORK
        assert (scheduled == os.SCHED_FIFO) == ("realtime: SCHED_FIFO" in workers["detail"])
        refused = [step["name"] for step in steps if not step["applied"]]
        for life in range(2):
            if life:
                kill_and_await(product, "relay")
            assert_optimised(product, all_processes(product), refused)
            with JsonStream(product.stream) as raw:
                raw.wait_for_hashes("validated", bcoin.mine(1))
        again, _ = optimizations_of(product)
        assert [(step["name"], step["applied"]) for step in again] == [
            (step["name"], step["applied"]) for step in steps
        ]
        assert sorted(line["step"] for line in logged(product, "System optimisation refused")) == sorted(refused)
        assert product.stop() == 0


def test_without_it_nothing_spins_and_nothing_is_pinned(bcoin: BcoinNode, tmp_path: Path) -> None:
    ours = os.sched_getaffinity(0)
    with Product(tmp_path, bcoin.p2p_address, **QUIET) as product:
        assert product.wait_until_healthy()["optimizations"] == []
        pids = {**all_processes(product), "supervisor": product.pid}
        for pid in pids.values():
            assert os.sched_getaffinity(pid) == ours
            assert status_field(pid, "VmLck") == "0 kB"
            assert os.sched_getscheduler(pid) == os.SCHED_OTHER
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        began = time.monotonic()
        time.sleep(2)  # the time in which nothing must be done
        idle_s = time.monotonic() - began
        shares = {name: (cpu_seconds(pid) - before[name]) / idle_s for name, pid in pids.items()}
        assert max(shares.values()) < 0.05, shares
        assert product.stop() == 0


# The wall clock


@pytest.fixture
def _faketime_leaves_nothing() -> Iterator[None]:
    """libfaketime leaves a segment and a semaphore of each program behind that it has faked the time for."""
    before = set(SHARED.glob("*faketime*"))
    yield
    for left in set(SHARED.glob("*faketime*")) - before:
        left.unlink()


@pytest.mark.usefixtures("_faketime_leaves_nothing")
@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed: apt-get install faketime")
def test_an_hours_jump_of_the_wall_clock_in_either_direction_changes_nothing(
    bcoin: BcoinNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shift = tmp_path / "shift"
    shift.write_text("+0\n")
    libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not libraries:
        pytest.skip("faketime has no libfaketimeMT.so.1 under /usr/lib")
    faked = {
        "LD_PRELOAD": str(libraries[0]),
        "FAKETIME_TIMESTAMP_FILE": str(shift),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    bcoin.mine(5)
    with Product(tmp_path, bcoin.p2p_address, **QUIET, DELIVERY_WORKERS="1", **faked) as product:
        product.wait_until_healthy()
        pids = all_processes(product)
        with (
            JsonStream(product.stream) as raw,
            product.reader() as reader,
        ):
            mined = []
            for hours in (0, 1, -1, 0):
                shift.write_text(f"{hours * 3600:+d}\n")
                mined += bcoin.mine(2)
                raw.wait_for_hashes("validated", mined)
                told_s = raw.of("proven")[-1]["time"] - time.time()
                assert abs(told_s - 3600 * hours) < 60, "faketime has no effect"
                raw.wait_for_heartbeat()
                health: dict[str, Any] = product.ask("health")
                assert health["status"] == "ok", health["problems"]
            assert_whole(raw, mined, 6)
            assert not any("catchup" in one["state"] for one in raw.events)
            assert len(list(records(reader, len(raw.events)))) == len(raw.events)
        assert all_processes(product) == pids
        assert product.sources()[bcoin.p2p_address]["connects"] == 1
        assert product.stop() == 0
