"""What both engines are put together from in the same way."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from sprint import __version__
from sprint.admission import CHECK_NS, ENDS_A_TURN, Admission
from sprint.durations import format_duration
from sprint.errors import HostError
from sprint.events import Event, State
from sprint.header_file import HeaderFile
from sprint.key_book import KeyBook
from sprint.keys import FILE_NAME as KEY_FILE
from sprint.seats import Seats
from sprint.tiers import NS_PER_S, NS_PER_US, Tier

if TYPE_CHECKING:
    import asyncio

    from sprint.chain import HeaderChain
    from sprint.config import Config
    from sprint.record import Record
    from sprint.ring import Ring
    from sprint.shared_memory import SharedMemory
    from sprint.status import StatusBlock

OTHER_DESCRIPTORS = 128
"""Kept free for everything but stream sessions: files, upstreams, the API's connections."""


NOT_YET = "not attached yet: plain sockets serve"
LOADING = "being loaded: plain sockets serve"

BYPASS_INACTIVE: dict[str, Any] = {
    "requested": False,
    "active": False,
    "mode": None,
    "interfaces": [],
    "reason": None,
    "ingest": dict.fromkeys(("packets", "announcements", "mirrored", "express", "dropped", "opaqueFlows"), 0),
    "egress": dict.fromkeys(("subscribers", "sent", "dropped"), 0),
}
"""`kernelBypass` of /api/turbo-status, where there is none."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What the supervisor of the memory-optimised engine makes before the first fork, and every child has."""

    config: Config
    ring_memory: SharedMemory
    ring: Ring
    status: StatusBlock
    seats_memory: SharedMemory
    seats_secret: bytes
    relay_cpus: frozenset[int] | None
    other_cpus: frozenset[int] | None
    """Both None, or the latter empty: nobody is pinned."""

    def admission(self, row: int) -> Admission:
        """The gate of the delivery worker with that row of accounts."""
        return admission(self.config, Seats(self.seats_memory.memory, row, self.seats_secret))

    def leave_relay_alone(self) -> None:
        """Keep this process off the CPU that is the relay's own."""
        if self.config.optimize_system and self.other_cpus:
            os.sched_setaffinity(0, self.other_cpus)


def admission(config: Config, seats: Seats) -> Admission:
    """Who is served at which tier: the keys in DATA_DIR, up to the instance's own tier."""
    return Admission(config.tier, KeyBook(config.data_dir / KEY_FILE), seats)


def keep_checking(loop: asyncio.AbstractEventLoop, gate: Admission, log: Any, told: str | None = None) -> None:
    """Hold the sessions of a loop against the keys, for as long as it runs; says when the keys can't be read.

    `told` is what was said of them last: a file that is being written for an instant isn't worth a line.
    """
    before, ended = gate.reason, 0
    try:
        ended = gate.check(int(time.time()))
        reason = gate.reason
        if reason is None or (reason == before and reason != told):
            if log is not None and reason != told:
                log.warning("Keys can't be read", reason=reason) if reason else log.info("Keys can be read again")
            told = reason
    finally:  # whatever became of one session, the others' keys are still looked after
        pause_s = 0 if ended >= ENDS_A_TURN else CHECK_NS / NS_PER_S
        loop.call_later(pause_s, keep_checking, loop, gate, log, told)


class BypassLines:
    """The lines to the bypass's process, made before the first fork: in each pair, the asking end comes first."""

    def __init__(self) -> None:
        self.capture, self.egress, self.udp = (
            socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)
        )

    def theirs(self) -> list[socket.socket]:
        """The bypass's ends."""
        return [pair[1] for pair in (self.capture, self.egress, self.udp)]


def announce(config: Config, log: Any) -> None:
    """The guide's start-up lines, and what is not as asked for."""
    for warning in config.warnings:
        log.warning(warning)
    if config.profile.memory_engine:
        words = f"⚡ {config.tier.label.capitalize()} mode enabled"
        log.info(
            words,
            writeDeadline=format_duration(config.write_deadline_ns),
            sharedMemory=config.use_shared_memory,
            blockBufferSize=config.ring_slots,
        )
    else:
        log.info(
            "Sprint starts",
            tier=config.tier.label,
            writeDeadline=format_duration(config.write_deadline_ns),
            blockBufferSize=config.ring_slots,
        )
    if config.enable_kernel_bypass and not (bypass_wanted(config) and config.use_shared_memory):
        log.warning("Kernel bypass requested but inactive", reason=bypass_reason(config))


def facts_of(config: Config, engine: str) -> dict[str, Any]:
    """What the status block says about the configuration; the API reads nothing else of it.

    A switch counts as on only where the engine that runs has what it switches.
    """
    memory = engine == "memory"
    return {
        "version": __version__,
        "engine": engine,
        "tier": config.tier.label,
        "network": config.network.name,
        "useSharedMemory": config.use_shared_memory and memory,
        "useDirectP2P": config.use_direct_p2p,
        "useMemoryChannel": config.use_memory_channel and memory,
        "optimizeSystem": config.optimize_system and memory,
        "writeDeadlineNs": config.write_deadline_ns,
        "blockBufferSize": config.ring_slots,
        "kernelBypass": {
            **BYPASS_INACTIVE,
            "requested": config.enable_kernel_bypass,
            "reason": bypass_reason(config),
        },
        "binds": {"api": str(config.api_bind), "stream": str(config.stream_bind)},
        "bitcoinNodes": [str(address) for address in config.upstreams],
    }


def bypass_reason(config: Config) -> str:
    """Why the kernel bypass is inactive."""
    if not config.enable_kernel_bypass:
        return "ENABLE_KERNEL_BYPASS is false"
    if config.tier is not Tier.ENTERPRISE:
        return f"TIER is {config.tier.label}: the kernel bypass takes effect on enterprise only"
    if not config.use_shared_memory:
        return "USE_SHARED_MEMORY is false: the kernel bypass needs the memory-optimised engine"
    return NOT_YET


def bypass_wanted(config: Config) -> bool:
    """Whether the memory-optimised engine is to try for the kernel bypass."""
    return config.enable_kernel_bypass and config.tier is Tier.ENTERPRISE


def open_header_file(config: Config, chain: HeaderChain, log: Any) -> HeaderFile:
    """The header file under DATA_DIR, locked and loaded into `chain`. Raises HostError or HeaderFileError."""
    folder = config.data_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"DATA_DIR={folder}: can't be made: {error.strerror}") from None
    path = folder / f"headers-{config.network.name}.dat"
    header_file = HeaderFile.open(path, config.network)
    # No refreshing thread: the supervisor forks after this.
    bar = Progress(
        console=Console(file=sys.stderr), transient=True, disable=not sys.stderr.isatty(), auto_refresh=False
    )
    with bar:
        task = bar.add_task("Verifying headers", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            bar.refresh()

        loaded = header_file.load_into(chain, advance)
    log.info("Headers loaded", count=loaded, height=chain.tip_height, file=str(path))
    if header_file.cut_bytes:
        log.warning("Damaged end of the header file cut off", bytes=header_file.cut_bytes)
    return header_file


def log_relayed(log: Any, tier: Tier, record: Record) -> None:
    """One line for a record; for a fresh block the guide's, from its first sighting to now, when it is relayed."""
    block_hash = record.hash[::-1].hex()
    if record.event is Event.PROVEN and not record.state & State.CATCHUP:
        elapsed_ns = max(0, time.monotonic_ns() - record.seen_ns)
        elapsed = format_duration(elapsed_ns // NS_PER_US * NS_PER_US)
        words = f"{tier.label.capitalize()} relay successful"
        log.info(words, elapsed=elapsed, blockHash=block_hash, height=record.height)
    else:
        words = f"Block {record.event.name.lower()}"
        log.info(words, blockHash=block_hash, height=record.height)


def session_limit() -> int:
    """Raise the limit of open files as far as we may, and leave room for everything that isn't a subscriber."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    descriptors = Path("/proc/self/fd")
    open_now = len(list(descriptors.iterdir())) if descriptors.is_dir() else 16
    return max(1, soft - open_now - OTHER_DESCRIPTORS)
