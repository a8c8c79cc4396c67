"""The memory-optimised engine whole: which tiers run it, what its switches do, and what a killed process costs whom.

Every process is killed in turn while subscribers watch. A subscriber's view decides: sequences without a gap, each
block proven once, nothing mined that isn't told.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sprint.shared_reader import SharedReader
from tests.real import product as harness
from tests.real.product import JsonStream, Product, ProductError
from tests.real.test_upstreams import mining

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sprint.record import Record
    from tests.real.bcoin import BcoinNode
    from tests.real.product import Event

NOBODY = "127.0.0.1:9"
"""An upstream that is never there: the discard port."""
START_LINE = "⚡ Starting memory-optimized sprint with tight deadlines"
BACK_WITHIN_S = 2.0
QUIET = {"OPTIMIZE_SYSTEM": "false"}
"""Nothing spins: two cores are shared by all tests."""


def processes(product: Product) -> dict[str, int]:
    """Name → pid of the children that are alive, as /api/health has them."""
    rows = product.ask("health")["processes"]
    return {row["name"]: row["pid"] for row in rows if row["pid"]}


def all_processes(product: Product) -> dict[str, int]:
    """The same, once all are alive."""
    answer = product.wait_for("health", lambda one: all(row["pid"] for row in one["processes"]), "all processes")
    return {row["name"]: row["pid"] for row in answer["processes"]}


def kill_and_await(product: Product, name: str) -> int:
    """SIGKILL to the child of that name; returns its successor's pid, which must be there within two seconds."""
    old = processes(product)[name]
    os.kill(old, signal.SIGKILL)
    deadline = time.monotonic() + BACK_WITHIN_S
    while time.monotonic() < deadline:
        with suppress(OSError):  # it may be the API that was killed
            new = processes(product).get(name, old)
            if new != old:
                return new
        time.sleep(0.01)
    raise ProductError(f"{name} was not back within {BACK_WITHIN_S} s\n{product.log_tail()}")


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.005)


def status_field(pid: int, name: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        field, _, value = line.partition(":")
        if field == name:
            return value.strip()
    raise KeyError(name)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def logged(product: Product, words: str) -> list[Event]:
    return [json.loads(line) for line in list(product.log) if words in line]


def assert_whole(log: JsonStream, mined: list[str], first_height: int) -> None:
    """This subscriber missed nothing, and was told nothing twice."""
    assert [one["seq"] for one in log.events] == list(range(log.events[0]["seq"], log.events[-1]["seq"] + 1))
    assert log.hashes("proven") == mined
    assert [one["height"] for one in log.of("proven")] == list(range(first_height, first_height + len(mined)))
    assert log.of("lost") == []
    assert len({one["session"] for one in log.events}) == 1


def streams_on(product: Product, stack: ExitStack, names: list[str]) -> dict[str, JsonStream]:
    """A subscriber on each of these workers; the kernel decides which worker has whom, so some are asked in vain."""
    found: dict[str, JsonStream] = {}

    def counts() -> dict[str, int]:
        rows = product.ask("deliveries")["deliveries"]
        return {row["name"]: row["accepted"] for row in rows}

    for _ in range(64):
        before = counts()
        stream = stack.enter_context(JsonStream(product.stream))
        product.wait_for("deliveries", lambda _, before=before: counts() != before, "an accepted subscriber")  # type: ignore[misc]  # bound now
        (name,) = [name for name, count in counts().items() if count != before.get(name)]
        found.setdefault(name, stream)
        if found.keys() >= set(names):
            return found
    raise AssertionError(f"no subscriber on {set(names) - found.keys()}")


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
        assert names == (["relay", "stream-0", "stream-1", "shm", "api"] if engine == "memory" else [])
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


@pytest.mark.parametrize("variable", ["API_BIND", "STREAM_BIND"])
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
        with JsonStream(product.stream) as raw, SharedReader(product.data_dir / "sprint.sock") as reader:
            raw.wait_for_hashes("validated", bcoin.mine(2))
            assert [reader.next(5) is None for _ in range(4)] == [False] * 4
            sockets = udp_waiting(worker)
            assert len(sockets) == (0 if channel else 2)  # the stream's and that of shm
            os.kill(worker, signal.SIGSTOP)
            try:
                mined = bcoin.mine(1)
                product.wait_for("health", lambda answer: answer["sequence"] >= 6, "the block")
                assert any(udp_waiting(worker)) is not channel
            finally:
                os.kill(worker, signal.SIGCONT)
            raw.wait_for_hashes("validated", mined)
            assert len(raw.events) == 6
        assert product.stop() == 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU: nothing is pinned, and nothing spins")
def test_optimize_system_pins_locks_and_says_what_was_refused_once_even_if_the_relay_is_restarted(
    bcoin: BcoinNode, tmp_path: Path
) -> None:
    with Product(tmp_path, bcoin.p2p_address, OPTIMIZE_SYSTEM="true", DELIVERY_WORKERS="1") as product:
        steps = product.wait_until_healthy()["optimizations"]
        assert [step["name"] for step in steps] == ["pinning", "spin", "timer slack", "gc", "memory", "realtime"]
        refused = [step["name"] for step in steps if not step["applied"]]
        for _ in range(2):
            pids = all_processes(product)
            product.wait_until_healthy()
            cpu = max(os.sched_getaffinity(0))
            if "pinning" not in refused:
                assert status_field(pids["relay"], "Cpus_allowed_list") == str(cpu)
                for name, pid in {**pids, "supervisor": product.pid}.items():
                    assert name == "relay" or cpu not in os.sched_getaffinity(pid), f"{name} shares the relay's CPU"
            if "memory" not in refused:
                until(
                    lambda pid=pids["relay"]: int(status_field(pid, "VmLck").split()[0]) > 1_000,  # type: ignore[misc]  # bound now
                    "locked memory",
                )
            with JsonStream(product.stream) as raw:
                raw.wait_for_hashes("validated", bcoin.mine(1))
            if "spin" not in refused:
                before = cpu_seconds(pids["relay"])
                until(lambda pid=pids["relay"], at=before: cpu_seconds(pid) > at + 0.1, "a spinning relay")  # type: ignore[misc]  # bound now
            kill_and_await(product, "relay")
        product.wait_until_healthy()
        assert sorted(line["step"] for line in logged(product, "System optimisation refused")) == sorted(refused)
        assert product.ask("health")["optimizations"] == steps or refused
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


# What a killed process costs


def test_each_child_that_is_killed_is_back_and_nobody_elses_subscribers_notice(
    bcoin: BcoinNode, tmp_path: Path
) -> None:
    bcoin.mine(5)
    with Product(tmp_path, bcoin.p2p_address, **QUIET, DELIVERY_WORKERS="2") as product, ExitStack() as stack:
        product.wait_until_healthy()
        session = product.ask("health")["session"]
        streams = streams_on(product, stack, ["stream-0", "stream-1"])
        reader = stack.enter_context(SharedReader(product.data_dir / "sprint.sock"))
        mined = bcoin.mine(2)
        for victim in ("relay", "stream-0", "shm", "api", "stream-1"):
            spared = [stream for name, stream in streams.items() if name != victim]
            kill_and_await(product, victim)
            mined += bcoin.mine(2)
            for stream in spared:
                if stream.ended is None:
                    stream.wait_for_hashes("validated", mined)
            if victim == "relay":
                for stream in spared:
                    assert_whole(stream, mined, 6)
            if victim in streams:
                streams[victim].wait_until_ended()
            if victim == "stream-0":
                assert streams["stream-1"].ended is None
                with JsonStream(product.stream, b'{"format":"json","since":1}\n') as late:
                    late.wait_for_hashes("validated", mined)
                    assert_whole(late, mined, 6)
            if victim != "stream-1":
                assert_whole(streams["stream-1"], mined, 6)

        health = product.wait_until_healthy()
        assert health["session"] == session
        assert {row["name"]: row["restarts"] for row in health["processes"]} == dict.fromkeys(
            ("relay", "stream-0", "stream-1", "shm", "api"), 1
        )
        shown = [record.hash[::-1].hex() for record in records(reader, 4 * 6) if record.event.name == "PROVEN"]
        assert shown == mined
        assert reader.lost == 0
        deaths = logged(product, "Child died")
        assert [line["child"] for line in deaths] == ["relay", "stream-0", "shm", "api", "stream-1"]
        assert {line["how"] for line in deaths} == {"signal 9"}

        for stream in streams.values():
            stream.__exit__()
        product.wait_for("health", lambda answer: sum(answer["subscribers"].values()) <= 1, "the dead left the books")
        assert product.stop() == 0


def records(reader: SharedReader, count: int) -> Iterator[Record]:
    from sprint.record import decode

    for _ in range(count):
        found = reader.next(10)
        assert isinstance(found, memoryview), found
        record = reader.copy()
        assert record is not None
        yield decode(record)


def test_blocks_mined_while_the_relay_was_down_come_with_catchup(bcoin: BcoinNode, tmp_path: Path) -> None:
    bcoin.mine(5)
    with Product(tmp_path, bcoin.p2p_address, **QUIET, DELIVERY_WORKERS="1") as product:
        product.wait_until_healthy()
        with JsonStream(product.stream) as raw:
            mined = bcoin.mine(2)
            raw.wait_for_hashes("validated", mined)
            relay = processes(product)["relay"]
            os.kill(relay, signal.SIGSTOP)  # it hears nothing, and is dead before it could
            missed = bcoin.mine(3)
            os.kill(relay, signal.SIGKILL)
            raw.wait_for_hashes("validated", [*mined, *missed])
            (fresh,) = bcoin.mine(1)
            raw.wait_for_hashes("validated", [fresh])
            assert_whole(raw, [*mined, *missed, fresh], 6)
            late = {one["hash"]: "catchup" in one["state"] for one in raw.of("proven")}
            assert late == {**dict.fromkeys(mined, False), **dict.fromkeys(missed, True), fresh: False}
        assert product.stop() == 0
    file = next(path for path in product.data_dir.iterdir() if path.name.startswith("headers"))
    heights = range(1, bcoin.tip()[0] + 1)
    assert file.read_bytes()[80:] == b"".join(bcoin.header(bcoin.block_hash(height)) for height in heights)


def test_a_relay_killed_again_and_again_under_load_loses_nothing_and_tells_nothing_twice(
    bcoin: BcoinNode, tmp_path: Path
) -> None:
    bcoin.mine(5)
    moments = random.Random(7)
    with Product(tmp_path, bcoin.p2p_address, **QUIET, DELIVERY_WORKERS="1") as product:
        product.wait_until_healthy()
        with JsonStream(product.stream) as raw:
            with mining(bcoin) as load:
                for _ in range(5):
                    before = len(raw.events)
                    raw.wait_until(lambda told, least=before + 10: len(told) >= least, "blocks between two kills")  # type: ignore[misc]  # bound now
                    time.sleep(moments.uniform(0, 0.1))  # any moment will do: the load doesn't pause
                    kill_and_await(product, "relay")
                before = len(raw.events)
                raw.wait_until(lambda told, least=before + 10: len(told) >= least, "blocks after the last kill")  # type: ignore[misc]  # bound now
            raw.wait_for_hashes("validated", load.mined)
            assert_whole(raw, load.mined, 6)
            assert {one["event"] for one in raw.events} == {"proven", "validated"}
        assert product.stop() == 0


def test_children_of_a_killed_supervisor_end_and_the_next_start_takes_its_place(
    bcoin: BcoinNode, tmp_path: Path
) -> None:
    ports = {name: f"127.0.0.1:{free_port()}" for name in ("API_BIND", "STREAM_BIND")}
    product = Product(tmp_path, bcoin.p2p_address, **QUIET, **ports)
    with product:
        product.wait_until_healthy()
        pids = all_processes(product)
        with JsonStream(product.stream) as raw:
            raw.wait_for_hashes("validated", bcoin.mine(1))
            os.kill(product.pid, signal.SIGKILL)
            until(lambda: not any(map(alive, pids.values())), "all children's end", BACK_WITHIN_S)
            raw.wait_until_ended()
        assert (product.data_dir / "sprint.sock").exists()
        assert product.wait() == -signal.SIGKILL
    with product:
        product.wait_until_healthy()
        with JsonStream(product.stream) as raw, SharedReader(product.data_dir / "sprint.sock") as reader:
            raw.wait_for_hashes("validated", bcoin.mine(1))
            assert reader.next(5) is not None
        assert product.stop() == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C"])
def test_it_ends_in_good_order_and_leaves_nothing_behind(how: str, bcoin: BcoinNode, tmp_path: Path) -> None:
    with Product(tmp_path, bcoin.p2p_address, **QUIET, DELIVERY_WORKERS="2") as product:
        product.wait_until_healthy()
        pids = all_processes(product)
        with JsonStream(product.stream) as raw, SharedReader(product.data_dir / "sprint.sock"):
            raw.wait_for_hashes("validated", bcoin.mine(1))
            if how == "SIGTERM":
                os.kill(product.pid, signal.SIGTERM)
            else:
                os.killpg(product.pid, signal.SIGINT)
            assert product.wait() == 0
            raw.wait_until_ended()
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values()), "a process, or its zombie, is left"
        assert [path.name for path in product.data_dir.iterdir()] == ["headers-regtest.dat"]
        assert '"Stopped"' in product.log[-1]
        assert not any("Traceback" in line or "Child died" in line for line in product.log)


# The wall clock


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
        with JsonStream(product.stream) as raw, SharedReader(product.data_dir / "sprint.sock") as reader:
            mined = []
            for hours in (0, 1, -1, 0):
                shift.write_text(f"{hours * 3600:+d}\n")
                mined += bcoin.mine(2)
                raw.wait_for_hashes("validated", mined)
                told_s = raw.of("proven")[-1]["time"] - time.time()
                assert abs(told_s - 3600 * hours) < 60, "faketime has no effect"
                for _ in range(2):
                    raw.wait_for_heartbeat()
                health: dict[str, Any] = product.ask("health")
                assert health["status"] == "ok", health["problems"]
            assert_whole(raw, mined, 6)
            assert not any("catchup" in one["state"] for one in raw.events)
            assert len(list(records(reader, len(raw.events)))) == len(raw.events)
        assert all_processes(product) == pids
        assert product.sources()[bcoin.p2p_address]["connects"] == 1
        assert product.stop() == 0
