"""The product with the kernel bypass: a node behind a wire of the demo's own, and blocks heard on that wire first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types

from sprint.demo.stage import Plan, Stage
from xdp.interfaces import interface
from xdp.links import leftovers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("bpf_loadable")

TIMEOUT_S = 90
WAIT_S = 60
"""Programs may have to be compiled meanwhile: 3 s of a free CPU."""
BLOCKS = 6


def run_demo(**environ: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "sprint",
        "demo",
        "--once",
        "--json",
        "--blocks",
        str(BLOCKS),
        "--subscribers",
        "2",
    ]
    settings = {**os.environ, "TIER": "enterprise", "OPTIMIZE_SYSTEM": "false", **environ}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def links() -> set[str]:
    with IPRoute() as route:
        return {str(link.get("ifname")) for link in route.get_links()}


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """The demo, enterprise with the bypass, without anybody mining yet."""
    monkeypatch.setenv("OPTIMIZE_SYSTEM", "false")
    monkeypatch.delenv("TIER", raising=False)
    with ExitStack() as stack:
        yield Stage(Plan(once=True, as_json=True, blocks=1, subscribers=1, interval_s=0.1), stack)


def bypass_of(stage: Stage) -> dict[str, Any]:
    said: dict[str, Any] = stage.relay.ask("turbo-status")["kernelBypass"]
    return said


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def mine(stage: Stage) -> list[dict[str, Any]]:
    """One block, delivered to everybody; what /api/blocks says of all."""
    stage.mine()
    stage.collect(time.monotonic() + WAIT_S, enough=stage.expected)
    assert stage.score.delivered == stage.expected
    blocks: list[dict[str, Any]] = stage.relay.ask("blocks")["blocks"]
    return blocks


def process_of(stage: Stage, name: str) -> int:
    rows = stage.relay.ask("health")["processes"]
    return int(next(row["pid"] for row in rows if row["name"] == name) or 0)


def test_every_block_is_heard_on_the_wire_before_the_socket_has_it_and_nothing_stays_behind() -> None:
    before = links()
    summary = run_demo(ENABLE_KERNEL_BYPASS="true")
    bypass = summary["kernelBypass"]
    assert (bypass["active"], bypass["mode"], bypass["reason"]) == (True, "native", None)
    assert bypass["ingest"]["mirrored"] >= BLOCKS
    assert bypass["ingest"]["express"] >= BLOCKS
    assert summary["delivered"] == summary["blocks"] * summary["subscribers"]
    assert summary["captured_first"] == BLOCKS
    assert links() == before
    assert not leftovers()


def test_switched_off_it_is_inactive_with_the_reason_and_delivers_the_same() -> None:
    summary = run_demo(ENABLE_KERNEL_BYPASS="false")
    assert (summary["kernelBypass"]["active"], summary["kernelBypass"]["reason"]) == (
        False,
        "ENABLE_KERNEL_BYPASS is false",
    )
    assert summary["delivered"] == summary["blocks"] * summary["subscribers"]
    assert summary["captured_first"] == 0


def test_one_way_out_of_the_kernel_is_enough() -> None:
    summary = run_demo(ENABLE_KERNEL_BYPASS="true", CAPTURE="af_xdp")
    ingest = summary["kernelBypass"]["ingest"]
    assert summary["kernelBypass"]["active"]
    assert ingest["mirrored"] >= BLOCKS
    assert ingest["express"] == 0
    assert summary["delivered"] == summary["blocks"] * summary["subscribers"]


def test_a_block_s_timeline_has_both_ways_out_with_the_same_arrival_and_the_socket_behind(stage: Stage) -> None:
    mine(stage)
    told: dict[str, dict[str, Any]] = {}

    def all_three_told() -> bool:
        (block,) = stage.relay.ask("blocks")["blocks"]
        told.update({mark["peer"]: mark for mark in block["timeline"] if mark["announcement"] == "cmpctblock"})
        return len(told) == 3

    # The mirror's copy may reach the books last: the relay looks at the ring buffer first, and acts on it at once.
    wait_for(all_three_told, f"no mark of each way: {told}")
    express, mirrored = told.pop("capture ringbuf"), told.pop("capture af_xdp")
    (socket_s,) = told.values()
    assert (express["source"], mirrored["source"], socket_s["source"]) == ("capture", "capture", "p2p")
    assert express["seen_ns"] == mirrored["seen_ns"] < socket_s["seen_ns"]


def test_a_killed_relay_s_successor_gets_the_capture_back(stage: Stage) -> None:
    assert mine(stage)[0]["source"] == "capture"
    relay = process_of(stage, "relay")
    os.kill(relay, signal.SIGKILL)
    wait_for(lambda: process_of(stage, "relay") not in {0, relay}, "the relay did not come back")
    wait_for(lambda: stage.relay.ask("health")["status"] == "ok", "not healthy again")

    def captured() -> bool:
        return bool(mine(stage)[0]["source"] == "capture")

    wait_for(captured, "no block was captured any more")
    assert bypass_of(stage)["active"]


def test_a_killed_bypass_leaves_no_program_and_comes_back_while_the_sockets_serve(stage: Stage) -> None:
    name = bypass_of(stage)["interfaces"][0]
    assert [attached.mode for attached in interface(name).xdp] == ["native"]
    bypass = process_of(stage, "bypass")
    os.kill(bypass, signal.SIGKILL)
    wait_for(lambda: not interface(name).xdp or process_of(stage, "bypass") not in {0, bypass}, "the program stayed")
    mine(stage)
    wait_for(lambda: process_of(stage, "bypass") not in {0, bypass}, "the bypass did not come back")
    wait_for(lambda: bool(interface(name).xdp), "nothing was attached again")
    wait_for(lambda: bool(mine(stage)[0]["source"] == "capture"), "no block was captured any more")


def test_a_demo_that_was_killed_leaves_no_link_and_no_process_and_the_next_removes_its_folder(tmp_path: Path) -> None:
    before = links()
    command = [sys.executable, "-m", "sprint", "demo", "--once", "--blocks", "10000", "--subscribers", "1"]
    settings = {**os.environ, "TIER": "enterprise", "OPTIMIZE_SYSTEM": "false", "TMPDIR": str(tmp_path)}
    demo = subprocess.Popen(command, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: any(name.startswith("spd") for name in links() - before), "the demo's wire was not laid")
        wait_for(lambda: any(tmp_path.glob("sprint-demo-*/headers-regtest.dat")), "no header file")
    finally:
        demo.kill()
        demo.wait()
    wait_for(lambda: not {name for name in links() - before if name.startswith("spd")}, "the wire stayed")
    wait_for(lambda: not leftovers(), "the mirror stayed")
    assert any(tmp_path.iterdir())
    run_demo(ENABLE_KERNEL_BYPASS="false", TMPDIR=str(tmp_path))
    assert not any(tmp_path.iterdir())
