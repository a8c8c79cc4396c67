"""Sprint under its operator's hands: what it answers, how it ends, how it refuses to start, and what it remembers."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sprint.tiers import Tier
from tests.real.product import COMMAND, Product, dying_with_us, environment, processes_of, run_sprint
from tests.real.subscribers import JsonStream
from tests.real.test_upstreams import mining

if TYPE_CHECKING:
    from tests.real.bcoin import BcoinNode

VECTORS = Path(__file__).parents[1] / "vectors" / "turbo-status"
NOBODY = "127.0.0.1:9"
"""An upstream that is never there: the discard port."""
HEADER_SIZE = 80
PREAMBLE_SIZE = 80


@pytest.mark.parametrize("tier", [tier.label for tier in Tier])
def test_turbo_status_is_the_guides_document_for_the_tier(tier: str, tmp_path: Path) -> None:
    with Product(tmp_path, NOBODY, tier=tier) as product:
        assert product.ask_raw("turbo-status") == (200, (VECTORS / f"{tier}.json").read_text(encoding="utf-8"))
        status, _ = product.ask_raw("health")
        assert status == 503
        assert NOBODY in " ".join(product.ask("health")["problems"])
        assert product.stop() == 0


def test_the_guides_lines_are_in_the_text_log(bcoin: BcoinNode, tmp_path: Path) -> None:
    stream = f"127.0.0.1:{free_port()}"
    settings = {"LOG_FORMAT": "text", "STREAM_BIND": stream}
    with Product(tmp_path, bcoin.p2p_address, **settings) as product:
        product.wait_for_log("⚡ Turbo mode enabled: writeDeadline=500µs sharedMemory=true blockBufferSize=2048")
        product.wait_for_log("Header chain caught up")
        with JsonStream(stream) as raw:
            (mined,) = bcoin.mine(1)
            raw.wait_for_hashes("proven", [mined])
        line = product.wait_for_log("Turbo relay successful")
        assert re.search(rf"Turbo relay successful: elapsed=[\d.]+(µs|ms|s) blockHash={mined}\b", line)
        assert product.stop() == 0


def test_sigterm_ends_it_in_good_order(bcoin: BcoinNode, tmp_path: Path) -> None:
    bcoin.mine(30)
    with Product(tmp_path, bcoin.p2p_address) as product:
        product.wait_until_healthy()
        with JsonStream(product.stream) as raw:
            mined = bcoin.mine(3)
            raw.wait_for_hashes("validated", mined)
            assert product.stop() == 0
            raw.wait_until_ended()
            assert raw.ended == "end of the stream"
        assert '"Stopped"' in product.log[-1]
        assert not any("Traceback" in line for line in product.log)
        data = product.header_file.read_bytes()
        assert data[PREAMBLE_SIZE:] == b"".join(bcoin.header(bcoin.block_hash(height)) for height in range(1, 34))


@pytest.mark.parametrize("tier", ["turbo", "business"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_its_end_leaves_no_process_behind(bcoin: BcoinNode, tmp_path: Path, tier: str, number: signal.Signals) -> None:
    with Product(tmp_path, bcoin.p2p_address, tier=tier) as product:
        product.wait_until_healthy()
        leader = product.pid
        assert leader in processes_of(leader)
        os.kill(leader, number)
        assert product.wait() == (0 if number is signal.SIGTERM else -number)
        deadline = time.monotonic() + 10
        while (left := processes_of(leader)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert left == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def refused_start(product: Product) -> str:
    """Its one line of refusal; it must have ended with exit code 1."""
    with product:
        assert product.wait() == 1
    log = list(product.log)
    said = [line for line in log if line.startswith("sprint: ")]
    assert said == log[-1:], log
    assert not any("Traceback" in line for line in log)
    return said[0]


@pytest.mark.parametrize("variable", ["API_BIND", "STREAM_BIND", "ZMQ_BIND"])
def test_a_taken_port_stops_the_start_with_one_line_that_names_it(variable: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = refused_start(Product(tmp_path, NOBODY, LOG_FORMAT="text", **{variable: address}))
    assert address in line
    assert "in use" in line


def test_a_data_folder_that_cannot_be_made_stops_the_start_with_one_line_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "data", Path("/proc/sprint")):
        line = refused_start(Product(tmp_path, NOBODY, LOG_FORMAT="text", DATA_DIR=str(folder)))
        assert str(folder) in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_data_folder_that_is_read_only_stops_the_start_with_one_line_that_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o555)
    assert str(folder) in refused_start(Product(tmp_path, NOBODY, LOG_FORMAT="text"))


def test_a_second_sprint_on_the_same_data_is_refused(tmp_path: Path) -> None:
    with Product(tmp_path, NOBODY) as product:
        line = refused_start(Product(tmp_path, NOBODY, LOG_FORMAT="text"))
        assert str(product.data_dir) in line
        assert product.running


def test_a_bad_value_stops_the_start_with_exit_code_2_and_one_line(tmp_path: Path) -> None:
    ended = run_sprint("run", TIER="gold", DATA_DIR=str(tmp_path))
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    for word in ("TIER", "gold", "enterprise"):
        assert word in ended.stderr


def test_after_a_restart_no_old_block_is_published_again_and_the_next_one_is(bcoin: BcoinNode, tmp_path: Path) -> None:
    bcoin.mine(20)
    product = Product(tmp_path, bcoin.p2p_address)
    with product:
        product.wait_until_healthy()
        with JsonStream(product.stream) as raw:
            raw.wait_for_hashes("validated", bcoin.mine(2))
        assert product.stop() == 0
    bcoin.mine(3)
    with product:
        assert '"height": 22' in product.wait_for_log("Headers loaded", occurrences=2)
        assert product.wait_until_healthy()["tip_height"] == 25
        with JsonStream(product.stream, b'{"format":"json","since":1}\n') as raw:
            assert raw.answer["next"] == 1
            (mined,) = bcoin.mine(1)
            raw.wait_for_hashes("validated", [mined])
            assert {one["hash"] for one in raw.events} == {mined}


def test_killed_while_it_writes_headers_it_starts_again_from_what_is_whole(bcoin: BcoinNode, tmp_path: Path) -> None:
    bcoin.mine(20)
    product = Product(tmp_path, bcoin.p2p_address)
    file = product.header_file
    with mining(bcoin):
        for torn in (0, 1, 79):
            with product:
                product.wait_until_healthy()
                with JsonStream(product.stream) as raw:
                    raw.wait_until(lambda told: len(told) >= 10, "blocks under load")
                    assert raw.events[0]["height"] > 20
                product.kill()
            if torn:  # as a power cut would leave it
                with file.open("r+b") as headers:
                    headers.truncate(file.stat().st_size - torn)
    with product:
        cut = [line for line in product.log if "Damaged end of the header file cut off" in line]
        assert len(cut) == 2, "a torn end that nobody noticed"
        product.wait_for_tip(bcoin.tip()[0])
        product.wait_until_healthy()
        with JsonStream(product.stream) as raw:
            mined = bcoin.mine(2)
            raw.wait_for_hashes("validated", mined)
            assert raw.hashes("proven") == mined
        assert product.stop() == 0
    data = file.read_bytes()
    heights = range(1, bcoin.tip()[0] + 1)
    assert data[PREAMBLE_SIZE:] == b"".join(bcoin.header(bcoin.block_hash(height)) for height in heights)


def test_the_demo_delivers_every_block_to_every_subscriber_and_leaves_nothing_behind(tmp_path: Path) -> None:
    mark = secrets.token_hex(16)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    settings = {"SPRINT_TEST_MARK": mark, "TMPDIR": str(temporary)}
    ended = subprocess.run(
        [*dying_with_us(), *COMMAND, "demo", "--once", "--json", "--blocks", "4", "--subscribers", "3"],
        cwd=tmp_path,
        env=environment(settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    summary = json.loads(ended.stdout)
    assert set(summary) == {
        "tier",
        "blocks",
        "subscribers",
        "delivered",
        "latency_us",
        "captured_first",
        "kernelBypass",
    }
    assert summary["blocks"] == 4
    assert summary["subscribers"] >= 3  # of the stream; the top tiers' shared memory has a reader besides
    assert summary["delivered"] == summary["blocks"] * summary["subscribers"]
    assert 0 < summary["latency_us"]["p50"] <= summary["latency_us"]["p99"] <= summary["latency_us"]["max"]
    deadline = time.monotonic() + 10  # multiprocessing's own tracker ends a moment after those it tracked
    while (left := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []
    assert list(temporary.iterdir()) == []


def processes_with(mark: str) -> list[str]:
    """The command lines of all processes whose environment holds the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or isn't ours to look at
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found
