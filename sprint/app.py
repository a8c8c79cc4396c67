"""The composition root: the only place that knows sources, deliveries and the API all at once.

serve() builds everything from a Config, hands collaborators to constructors, runs, and takes everything down again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from sprint import __version__, logs
from sprint.api.app import create_app
from sprint.api.server import ApiServer
from sprint.broadcaster import Broadcaster
from sprint.chain import HeaderChain
from sprint.deliveries.stream import StreamDelivery
from sprint.durations import format_duration
from sprint.engines.standard import StandardSprint
from sprint.errors import HostError
from sprint.header_file import HeaderFile
from sprint.ledger import Ledger
from sprint.relay import Relay
from sprint.ring import Ring, RingWriter, size_for
from sprint.sources.p2p import P2PSource
from sprint.status import StatusBlock
from sprint.tiers import Tier

if TYPE_CHECKING:
    from sprint.config import Config

OTHER_DESCRIPTORS = 128
"""Kept free for everything but stream sessions: files, upstreams, the API's connections."""

SWITCH_INTERVAL_S = 0.0005
"""How long an API thread may keep the interpreter from the relay in the same process; Python's own 5 ms is half of what
turbo's relay may take."""


def serve(config: Config) -> None:
    """Run Sprint until SIGINT or SIGTERM. Raises HostError or HeaderFileError when it can't start."""
    log = logs.logger()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    for warning in config.warnings:
        log.warning(warning)
    _announce(config, log)
    session = secrets.randbits(63) | 1
    status = StatusBlock.create(session, facts_of(config))
    ring = Ring.create(bytearray(size_for(config.ring_slots)), config.ring_slots, session)
    chain = HeaderChain(config.network)
    header_file = _open_header_file(config, chain, log)
    delivery = StreamDelivery(
        ring,
        status.delivery(0, "stream"),
        network=config.network.name,
        tier_of_key=lambda _key: config.tier,
        write_deadline_ns=config.write_deadlines_ns(),
        max_sessions=_session_limit(),
        max_sessions_per_address=None,
    )
    source = P2PSource(config.upstreams, config.network, lambda: chain.tip_height, status)
    engine = StandardSprint(
        relay=Relay(chain),
        broadcaster=Broadcaster(RingWriter(ring), config.network.magic, [delivery], time.monotonic_ns),
        ring=ring,
        ledger=Ledger(status),
        header_file=header_file,
        sources=[source],
        log=log,
        relay_label=f"{config.tier.label.capitalize()} relay successful",
    )
    asyncio.run(_run(config, engine, delivery, status, log))


async def _run(config: Config, engine: StandardSprint, delivery: StreamDelivery, status: StatusBlock, log: Any) -> None:
    with contextlib.ExitStack() as stack:
        api = ApiServer(create_app(status), config.api_bind)
        stack.callback(api.stop)
        host, port = delivery.start(asyncio.get_running_loop(), config.stream_bind.host, config.stream_bind.port)
        stack.callback(delivery.close)
        facts = status.facts
        facts["binds"] = {"api": str(api.address), "stream": f"{host}:{port}"}
        status.facts = facts
        api.start()
        log.info("Listening", **facts["binds"], network=config.network.name)
        await engine.run()
        log.info("Stopped")


def facts_of(config: Config) -> dict[str, Any]:
    """What the status block says about the configuration; the API reads nothing else of it."""
    return {
        "version": __version__,
        "engine": "standard",
        "tier": config.tier.label,
        "network": config.network.name,
        "useSharedMemory": config.use_shared_memory,
        "useDirectP2P": config.use_direct_p2p,
        "useMemoryChannel": config.use_memory_channel,
        "optimizeSystem": config.optimize_system,
        "writeDeadlineNs": config.write_deadline_ns,
        "blockBufferSize": config.ring_slots,
        "kernelBypass": {
            "requested": config.enable_kernel_bypass,
            "active": False,
            "mode": None,
            "interfaces": [],
            "reason": _bypass_reason(config),
            "ingest": dict.fromkeys(("packets", "announcements", "mirrored", "express", "dropped", "opaqueFlows"), 0),
            "egress": dict.fromkeys(("subscribers", "sent", "dropped"), 0),
        },
        "binds": {"api": str(config.api_bind), "stream": str(config.stream_bind)},
        "bitcoinNodes": [str(address) for address in config.upstreams],
    }


def _bypass_reason(config: Config) -> str:
    if not config.enable_kernel_bypass:
        return "ENABLE_KERNEL_BYPASS is false"
    if config.tier is not Tier.ENTERPRISE:
        return f"TIER is {config.tier.label}: the kernel bypass takes effect on enterprise only"
    return f"version {__version__} has no kernel bypass: plain sockets serve"


def _announce(config: Config, log: Any) -> None:
    """The guide's start-up lines."""
    if config.profile.memory_engine:
        words = f"⚡ {config.tier.label.capitalize()} mode enabled"
        log.info(
            words,
            writeDeadline=format_duration(config.write_deadline_ns),
            sharedMemory=config.use_shared_memory,
            blockBufferSize=config.ring_slots,
        )
        if config.use_shared_memory:
            log.warning("The standard engine serves: the memory-optimised one is not built yet", version=__version__)
    else:
        log.info(
            "Sprint starts",
            tier=config.tier.label,
            writeDeadline=format_duration(config.write_deadline_ns),
            blockBufferSize=config.ring_slots,
        )
    if config.enable_kernel_bypass:
        log.warning("Kernel bypass requested but inactive", reason=_bypass_reason(config))


def _open_header_file(config: Config, chain: HeaderChain, log: Any) -> HeaderFile:
    folder = config.data_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"DATA_DIR={folder}: can't be made: {error.strerror}") from None
    path = folder / f"headers-{config.network.name}.dat"
    header_file = HeaderFile.open(path, config.network)
    bar = Progress(console=Console(file=sys.stderr), transient=True, disable=not sys.stderr.isatty())
    with bar:
        task = bar.add_task("Verifying headers", total=None)
        loaded = header_file.load_into(chain, lambda done, total: bar.update(task, completed=done, total=total))
    log.info("Headers loaded", count=loaded, height=chain.tip_height, file=str(path))
    if header_file.cut_bytes:
        log.warning("Damaged end of the header file cut off", bytes=header_file.cut_bytes)
    return header_file


def _session_limit() -> int:
    """Raise the limit of open files as far as we may, and leave room for everything that isn't a subscriber."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    open_now = len(list(Path("/proc/self/fd").iterdir())) if os.path.exists("/proc/self/fd") else 16
    return max(1, soft - open_now - OTHER_DESCRIPTORS)
