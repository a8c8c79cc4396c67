"""The composition root: with app_memory, the only place that knows sources, deliveries and the API all at once.

serve() builds everything from a Config, hands collaborators to constructors, runs, and takes everything down again.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
import time
from typing import TYPE_CHECKING, Any

from sprint import logs
from sprint.api.app import create_app
from sprint.api.server import ApiServer
from sprint.app_memory import MemorySprint
from sprint.broadcaster import Broadcaster
from sprint.chain import HeaderChain
from sprint.composition import (
    admission,
    announce,
    facts_of,
    keep_checking,
    log_relayed,
    open_header_file,
    session_limit,
)
from sprint.deliveries.stream import StreamDelivery
from sprint.engines.standard import StandardSprint
from sprint.engines.turns import Turns
from sprint.errors import HostError
from sprint.ledger import Ledger
from sprint.relay import Relay
from sprint.ring import Ring, RingWriter, size_for
from sprint.seats import private_seats
from sprint.sources.p2p import P2PSource
from sprint.status import StatusBlock

if TYPE_CHECKING:
    from sprint.admission import Admission
    from sprint.config import Config
    from sprint.header_file import HeaderFile

SWITCH_INTERVAL_S = 0.0005
"""How long an API thread may keep the interpreter from the relay in the same process; Python's own 5 ms is half of what
turbo's relay may take."""


def serve(config: Config) -> None:
    """Run Sprint until SIGINT or SIGTERM. Raises HostError or HeaderFileError when it can't start."""
    log = logs.logger()
    announce(config, log)
    chain = HeaderChain(config.network)
    with open_header_file(config, chain, log) as header_file:
        if config.profile.memory_engine and config.use_shared_memory:
            try:
                engine = MemorySprint(config, chain, header_file, log)
            except HostError as error:
                log.warning("The standard engine takes over", reason=str(error))
            else:
                engine.run()
                return
        _serve_standard(config, chain, header_file, log)


def _serve_standard(config: Config, chain: HeaderChain, header_file: HeaderFile, log: Any) -> None:
    """StandardSprint: everything in this process."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    session = secrets.randbits(63) | 1
    status = StatusBlock.create(session, facts_of(config, "standard"))
    ring = Ring.create(bytearray(size_for(config.ring_slots)), config.ring_slots, session)
    gate = admission(config, private_seats())
    delivery = StreamDelivery(
        ring,
        status.delivery(0, "stream"),
        network=config.network.name,
        gate=gate,
        write_deadline_ns=config.write_deadlines_ns(),
        max_sessions=session_limit(),
        max_sessions_per_address=config.connections_per_address,
    )
    turns = Turns(
        relay=Relay(chain),
        broadcaster=Broadcaster(RingWriter(ring), config.network.magic, [delivery], time.monotonic_ns),
        ring=ring,
        ledger=Ledger(status),
        header_file=header_file,
        sources=[
            P2PSource(config.upstreams, config.network, lambda: chain.tip_height, status, direct=config.use_direct_p2p)
        ],
        log=log,
        on_relayed=lambda record: log_relayed(log, config.tier, record),
    )
    asyncio.run(_run_standard(config, StandardSprint(turns), delivery, gate, status, log))


async def _run_standard(
    config: Config, engine: StandardSprint, delivery: StreamDelivery, gate: Admission, status: StatusBlock, log: Any
) -> None:
    with contextlib.ExitStack() as stack:
        api = ApiServer(create_app(status), config.api_bind)
        stack.callback(api.stop)
        host, port = delivery.start(asyncio.get_running_loop(), config.stream_bind.host, config.stream_bind.port)
        stack.callback(delivery.close)
        keep_checking(asyncio.get_running_loop(), gate, log)
        facts = status.facts
        facts["binds"] = {"api": str(api.address), "stream": f"{host}:{port}"}
        status.facts = facts
        api.start()
        log.info("Listening", **facts["binds"], network=config.network.name)
        await engine.run()
        log.info("Stopped")
