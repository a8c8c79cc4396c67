"""The composition root: with its app_* kin, the only place that knows sources, deliveries and the API all at once.

serve() builds everything from a Config, hands collaborators to constructors, runs, and takes everything down again.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sprint import logs
from sprint.addresses import Address
from sprint.api.app import create_app
from sprint.api.server import ApiServer
from sprint.app_memory import MemorySprint
from sprint.app_zmq import ZmqDesk
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
from sprint.deliveries import udp_link
from sprint.deliveries.stream import StreamDelivery
from sprint.deliveries.udp import UdpDelivery, bound_address
from sprint.deliveries.udp_sessions import UDP_TIERS, UdpService
from sprint.deliveries.zmq import ZmqDelivery
from sprint.engines.standard import StandardSprint
from sprint.engines.turns import Turns
from sprint.errors import HostError
from sprint.ledger import Ledger
from sprint.relay import Relay
from sprint.ring import Ring, RingWriter, size_for
from sprint.seats import private_seats
from sprint.sources.p2p import P2PSource
from sprint.sources.zmq import ZmqSource
from sprint.status import StatusBlock

if TYPE_CHECKING:
    import socket

    from sprint.admission import Admission
    from sprint.broadcaster import Publishes
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
    udp = _UdpFeed.open(config, ring, status) if config.tier in UDP_TIERS else None
    delivery = StreamDelivery(
        ring,
        status.delivery(0, "stream"),
        network=config.network.name,
        gate=gate,
        write_deadline_ns=config.write_deadlines_ns(),
        max_sessions=session_limit(),
        max_sessions_per_address=config.connections_per_address,
        udp=udp.service if udp is not None else None,
    )
    desk = ZmqDesk(config, ring, status, status.delivery(1, "zmq"), log)
    publishers = [ZmqSource(config.zmq_nodes, lambda: chain.tip_hash, status)] if config.zmq_nodes else []
    deliveries: list[Publishes] = [*([udp.delivery] if udp is not None else []), delivery, desk]
    turns = Turns(
        relay=Relay(chain),
        broadcaster=Broadcaster(RingWriter(ring), config.network.magic, deliveries, time.monotonic_ns),
        ring=ring,
        ledger=Ledger(status),
        header_file=header_file,
        sources=[
            P2PSource(config.upstreams, config.network, lambda: chain.tip_height, status, direct=config.use_direct_p2p),
            *publishers,
        ],
        log=log,
        on_relayed=lambda record: log_relayed(log, config.tier, record),
    )
    asyncio.run(_run_standard(config, StandardSprint(turns), delivery, udp, desk, gate, status, log))


@dataclass(frozen=True, slots=True)
class _UdpFeed:
    """The UDP side in the same process: the stream reaches it by a link as it would another process."""

    delivery: UdpDelivery
    sock: socket.socket
    service: UdpService

    @classmethod
    def open(cls, config: Config, ring: Ring, status: StatusBlock) -> _UdpFeed:
        """Raises HostError when the address can't be bound."""
        sock = UdpDelivery.bind(config.udp_bind)
        ours, theirs = udp_link.pair()
        delivery = UdpDelivery(
            ring,
            status.delivery(2, "udp"),
            status.layout.udp,
            [theirs],
            write_deadline_ns=config.write_deadlines_ns(),
        )
        return cls(delivery, sock, UdpService(bound_address(sock), ours))


async def _run_standard(
    config: Config,
    engine: StandardSprint,
    delivery: StreamDelivery,
    udp: _UdpFeed | None,
    desk: ZmqDesk,
    gate: Admission,
    status: StatusBlock,
    log: Any,
) -> None:
    with contextlib.ExitStack() as stack:
        api = ApiServer(create_app(status), config.api_bind)
        stack.callback(api.stop)
        host, port = delivery.start(asyncio.get_running_loop(), config.stream_bind.host, config.stream_bind.port)
        stack.callback(delivery.close)
        if udp is not None:
            stack.enter_context(udp.sock)
            udp.delivery.start(asyncio.get_running_loop(), udp.sock)
            stack.callback(udp.delivery.close)
        publisher = stack.enter_context(ZmqDelivery.listen(config.zmq_bind))
        desk.start(asyncio.get_running_loop(), publisher)
        stack.callback(desk.close)
        keep_checking(asyncio.get_running_loop(), gate, log)
        facts = status.facts
        facts["binds"] = {
            "api": str(api.address),
            "stream": f"{host}:{port}",
            "zmq": str(Address(*publisher.getsockname()[:2])),
        }
        if udp is not None:
            facts["binds"]["udp"] = str(udp.service.address)
        status.facts = facts
        api.start()
        log.info("Listening", **facts["binds"], network=config.network.name)
        await engine.run()
        log.info("Stopped")
