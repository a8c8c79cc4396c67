"""The demo's stage: starts the node, Sprint and the subscribers, lets the node mine, and counts what arrives.

Everything runs in processes of its own and ends with this one. What is counted as delivered is what the subscribers
found to be a block that the node says it mined.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress
from rich.table import Table

from sprint.composition import LOADING, NOT_YET
from sprint.demo.node import run_node
from sprint.demo.relay_process import START_TIMEOUT_S, RelayProcess
from sprint.demo.subscriber import Delivered, Ready, Received, run_shared_subscriber, run_subscriber
from sprint.demo.wire import lay, wire_for
from sprint.errors import HostError
from sprint.keys import FILE_NAME as KEY_FILE
from sprint.keys import MAX_CONNECTIONS, KeyStore
from sprint.record import state_names
from sprint.tiers import Tier

if TYPE_CHECKING:
    from multiprocessing.connection import Connection as Pipe

    from sprint.record import Record

INITIAL_BLOCKS = 12
"""More than the eleven of a median time."""
SETTLE_TIMEOUT_S = 15.0
SHOWN_BLOCKS = 12
FOLDER_PREFIX = "sprint-demo-"
BYPASS_TIMEOUT_S = 65.0
"""Compiling takes 3 s of a free CPU, and is given up, with the reason, after a minute."""
FANOUT_TIMEOUT_S = 10.0
COUNTERS_TIMEOUT_S = 2.0
COUNTERS_AGE_S = 0.3
"""A little more than the bypass' counters in the status may be old."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asked for."""

    once: bool
    as_json: bool
    blocks: int
    subscribers: int
    interval_s: float


@dataclass(slots=True)
class Score:
    """What has come in."""

    mined: list[bytes] = field(default_factory=list)
    delivered: int = 0
    after_seen_us: list[float] = field(default_factory=list)
    records: deque[Record] = field(default_factory=lambda: deque(maxlen=SHOWN_BLOCKS))
    tiers: dict[str, str] = field(default_factory=dict)
    """Tier → write deadline, as the stream answered."""

    def latency_us(self) -> dict[str, float | None]:
        """First sighting by Sprint → in the subscriber's process."""
        ordered = sorted(self.after_seen_us)
        if not ordered:
            return {"p50": None, "p99": None, "max": None}

        def quantile(share: float) -> float:
            return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)

        return {"p50": quantile(0.5), "p99": quantile(0.99), "max": round(ordered[-1], 1)}


class Stage:
    """Everything that plays in the demo."""

    def __init__(self, plan: Plan, stack: ExitStack) -> None:
        self._plan = plan
        self.score = Score()
        context = multiprocessing.get_context("spawn")
        self._node, theirs = context.Pipe()
        stack.callback(self._node.close)
        self._wire = wire_for(os.getpid()) if _wants_bypass() else None
        node_pid = 0
        self._start(context, run_node, (theirs, INITIAL_BLOCKS, self._wire), theirs)
        if self._wire is not None:
            node_pid = self._node.recv()
            lay(self._wire, node_pid)
            self._node.send(None)
        host, port = self._node.recv()
        _remove_dead_folders()
        prefix = f"{FOLDER_PREFIX}{os.getpid()}-"
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix))
        settings = self._settings(f"{host}:{port}", folder)
        key = _make_key(Path(folder), settings["TIER"])
        self.relay = RelayProcess(settings)
        stack.callback(self.relay.stop)
        self.api, self.stream = self.relay.wait_until_healthy()
        if self._wire is not None:
            self._await_bypass()
            self._await_fanout()
        self._subscribers: list[Pipe] = []
        for number in range(plan.subscribers):
            ours, theirs = context.Pipe()
            stack.callback(ours.close)
            by_udp = self._wire is not None and (number > 0 or plan.subscribers == 1)
            how = {"tell_all": number == 0, "beside": node_pid if by_udp else None}
            self._start(context, run_subscriber, (theirs, self.stream, key), theirs, **how)
            self._subscribers.append(ours)
        if self.relay.shm_socket is not None:
            ours, theirs = context.Pipe()
            stack.callback(ours.close)
            self._start(context, run_shared_subscriber, (theirs, self.relay.shm_socket, key), theirs)
            self._subscribers.append(ours)
        self._await_ready()

    def mine(self) -> None:
        """Let the node mine one block, and tell the subscribers its hash."""
        self._node.send(1)
        hashes = self._node.recv()
        self.score.mined += hashes
        for subscriber in self._subscribers:
            subscriber.send(hashes)

    def collect(self, until: float, *, enough: int | None = None) -> None:
        """Take in reports until that time (time.monotonic), or until so many blocks are delivered in all."""
        while enough is None or self.score.delivered < enough:
            left = until - time.monotonic()
            ready = wait(self._subscribers, max(0.0, left))
            if not ready:
                return
            for pipe in ready:
                self._take(pipe)

    def summary(self) -> dict[str, Any]:
        """The contract's summary."""
        deadline = time.monotonic() + COUNTERS_TIMEOUT_S
        told: Any = None
        while True:
            status = self.relay.ask("turbo-status")
            before, told = told, status["kernelBypass"]
            still = not told["egress"]["subscribers"] or (before is not None and told["egress"] == before["egress"])
            if (still and self._counted(told)) or time.monotonic() >= deadline:
                break
            time.sleep(COUNTERS_AGE_S)
        blocks = self.relay.ask("blocks?limit=64")["blocks"]
        return {
            "tier": status["tier"],
            "blocks": len(self.score.mined),
            "subscribers": len(self._subscribers),
            "delivered": self.score.delivered,
            "latency_us": self.score.latency_us(),
            "captured_first": sum(block["source"] == "capture" for block in blocks),
            "kernelBypass": status["kernelBypass"],
        }

    def _counted(self, bypass: dict[str, Any]) -> bool:
        """Whether what must have happened by now stands in the status: every block was captured and sent to each."""
        mined, egress = len(self.score.mined), bypass["egress"]
        captured: int = bypass["ingest"]["announcements"]
        told: int = egress["sent"] + egress["dropped"]
        return (not bypass["active"] or captured >= mined) and told >= egress["subscribers"] * mined

    @property
    def expected(self) -> int:
        """How many deliveries there must be by now."""
        return len(self.score.mined) * len(self._subscribers)

    def _settings(self, node: str, folder: str) -> dict[str, str]:
        settings = {
            "TIER": os.environ.get("TIER") or "turbo",
            "NETWORK": "regtest",
            "BITCOIN_NODE": node,
            "DATA_DIR": folder,
        }
        if self._wire is not None:
            settings |= {"TIER": "enterprise", "ENABLE_KERNEL_BYPASS": "true", "INTERFACE": self._wire.near}
        once = self._plan.once
        if once:
            settings |= {"API_BIND": "127.0.0.1:0", "ZMQ_BIND": "127.0.0.1:0"}
        if once or self._wire is not None:  # subscribers by UDP come over the wire
            host = "127.0.0.1" if self._wire is None else self._wire.near_address
            settings |= {"STREAM_BIND": f"{host}:{0 if once else 8434}", "UDP_BIND": f"{host}:{0 if once else 8436}"}
        return settings

    @staticmethod
    def _start(context: Any, target: Any, arguments: tuple[Any, ...], theirs: Pipe, **keywords: Any) -> None:
        # Ctrl-C is for the demo's first process; one that is still loading has had no time to say so. The tracker comes
        # first: to start it with its first child, multiprocessing would lift what is blocked here.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            context.Process(target=target, args=arguments, kwargs=keywords, daemon=True).start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()

    def _await_bypass(self) -> None:
        """Until the bypass is proven, or has said why it isn't; the demo goes on either way."""
        deadline = time.monotonic() + BYPASS_TIMEOUT_S
        while time.monotonic() < deadline:
            bypass = self.relay.ask("turbo-status")["kernelBypass"]
            if bypass["active"] or bypass["reason"] not in {NOT_YET, LOADING}:
                return
            time.sleep(0.05)

    def _await_fanout(self) -> None:
        """Until live frames can be sent, or it has taken too long; plain sockets serve then."""
        deadline = time.monotonic() + FANOUT_TIMEOUT_S
        while time.monotonic() < deadline and self.relay.ask("deliveries")["udp"]["rung"] != "live_frames":
            time.sleep(0.05)

    def _await_ready(self) -> None:
        waiting = list(self._subscribers)
        deadline = time.monotonic() + START_TIMEOUT_S
        while waiting:
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise HostError(f"{len(waiting)} subscribers were not accepted within {START_TIMEOUT_S:g} s")
            for pipe in ready:
                self._take(pipe)
            waiting = [pipe for pipe in waiting if pipe not in ready]

    def _take(self, pipe: Any) -> None:
        try:
            report = pipe.recv()
        except EOFError:
            raise HostError("a subscriber's process has ended") from None
        if isinstance(report, Delivered):
            self.score.delivered += 1
            self.score.after_seen_us.append(report.after_seen_ns / 1e3)
        elif isinstance(report, Received):
            self.score.records.append(report.record)
        elif isinstance(report, Ready):
            self.score.tiers[report.tier] = report.write_deadline


def _make_key(folder: Path, tier: str) -> str:
    """The key by which the demo's subscribers are served at the instance's own tier."""
    with KeyStore(folder / KEY_FILE) as store:
        try:
            asked = Tier.from_label(tier)
        except KeyError:
            asked = Tier.FREE  # Sprint itself will refuse to start, and say so
        return store.create("demo", asked, int(time.time()), connections=MAX_CONNECTIONS)


def _remove_dead_folders() -> None:
    """What demos of ours that were killed have left in the folder for temporary files."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*-*"):
        pid = folder.name.removeprefix(FOLDER_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists() and folder.lstat().st_uid == os.geteuid():
            shutil.rmtree(folder, ignore_errors=True)


def _wants_bypass() -> bool:
    """As root the demo shows enterprise with the kernel bypass, unless the environment says otherwise."""
    tier, switch = os.environ.get("TIER") or "enterprise", os.environ.get("ENABLE_KERNEL_BYPASS") or "true"
    return os.geteuid() == 0 and tier == "enterprise" and switch == "true"


def perform(plan: Plan) -> int:
    """Run the demo; returns the exit code: 0 when every subscriber got every block."""
    with ExitStack() as stack:
        stage = Stage(plan, stack)
        if plan.once:
            _mine_some(stage, plan)
        else:
            _mine_on(stage, plan)
        summary = stage.summary()
    print(json.dumps(summary) if plan.as_json else _in_words(summary))
    return 0 if summary["delivered"] == summary["blocks"] * summary["subscribers"] else 1


def _mine_some(stage: Stage, plan: Plan) -> None:
    pause_s = min(plan.interval_s, 0.2)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for _ in bar.track(range(plan.blocks), description="Mining and relaying"):
            stage.mine()
            stage.collect(time.monotonic() + pause_s)
        stage.collect(time.monotonic() + SETTLE_TIMEOUT_S, enough=stage.expected)


def _mine_on(stage: Stage, plan: Plan) -> None:
    """Until Ctrl-C, with a live view."""
    console = Console()
    try:
        with Live(_view(stage), console=console, refresh_per_second=4) as live:
            while True:
                stage.mine()
                until = time.monotonic() + plan.interval_s
                while time.monotonic() < until:
                    stage.collect(min(until, time.monotonic() + 0.25))
                    live.update(_view(stage))
    except KeyboardInterrupt:
        stage.collect(time.monotonic() + 1.0, enough=stage.expected)


def _view(stage: Stage) -> Group:
    score = stage.score
    bypass = stage.relay.ask("turbo-status")["kernelBypass"]
    head = Table.grid(padding=(0, 2))
    head.add_row("status page", f"http://{stage.api}/api/turbo-status", "stream", stage.stream)
    tiers = "; ".join(f"{tier}: write deadline {deadline}" for tier, deadline in score.tiers.items())
    head.add_row("subscribers", tiers, "delivered", f"{score.delivered} of {stage.expected}")
    latency = score.latency_us()
    figures = ", ".join(f"{name} {value:,.0f} µs" for name, value in latency.items() if value is not None)
    head.add_row("seen → subscriber", figures, "kernel bypass", "active" if bypass["active"] else bypass["reason"])
    table = Table("seq", "event", "height", "hash", "state", box=None, pad_edge=False)
    health = stage.relay.ask("health")
    processes = ", ".join(f"{row['name']} {row['pid']}" for row in health["processes"]) or "one"
    head.add_row("engine", health["engine"], "processes", processes)
    for record in score.records:
        states = " ".join(state_names(record.state))
        table.add_row(
            str(record.sequence), record.event.name.lower(), str(record.height), record.hash[::-1].hex(), states
        )
    accounts = Table(*ACCOUNTS, box=None, pad_edge=False)
    for row in stage.relay.ask("deliveries")["deliveries"]:
        for tier, account in row["tiers"].items():
            if account["subscribers"]:
                accounts.add_row(tier, *(str(account[name]) for name in ACCOUNTS[1:]))
    return Group(head, "", accounts, "", table)


ACCOUNTS = ("tier", "subscribers", "on_time", "late", "dropped", "overwritten", "relay_p50_us", "relay_p99_us")


def _in_words(summary: dict[str, Any]) -> str:
    latency = ", ".join(f"{name} {value} µs" for name, value in summary["latency_us"].items())
    bypass = summary["kernelBypass"]
    return (
        f"{summary['blocks']} blocks, {summary['subscribers']} subscribers of tier {summary['tier']}: "
        f"{summary['delivered']} delivered; first seen → subscriber {latency}; "
        f"kernel bypass {'active' if bypass['active'] else 'inactive: ' + bypass['reason']}"
    )
