"""The processes of the memory-optimised engine that serve subscribers: each method of Workers is the whole of one.

A delivery worker is an asyncio loop around one delivery, woken by its channel when the ring has grown. It may die at
any moment: its row in the status block, the ring and its listening socket are the supervisor's, and its successor's.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any, Protocol

from sprint.app_zmq import ZmqDesk
from sprint.composition import keep_checking, session_limit
from sprint.deliveries.shm import ShmDelivery
from sprint.deliveries.stream import StreamDelivery
from sprint.deliveries.udp import UdpDelivery, bound_address
from sprint.optimize import Optimizations, Plan
from sprint.status import STEPS

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from sprint.api.server import ApiServer
    from sprint.channels import Channel
    from sprint.composition import Shared
    from sprint.deliveries.udp_ladder import Fanout
    from sprint.deliveries.udp_sessions import UdpService
    from sprint.sources.rebuild import RebuildLine
    from sprint.status import Delivery

WORKER_PRIORITY = 5


class Delivers(Protocol):
    """A delivery, as its process sees it."""

    def publish(self) -> None:
        """The ring has grown: send what is new."""

    def close(self) -> None:
        """End every subscription."""


class Workers:
    """What each of them needs of what the supervisor made before the first fork."""

    def __init__(self, shared: Shared, log: Any) -> None:
        self._shared = shared
        self._log = log
        self._config = shared.config

    def be_stream(self, channel: Channel, row: int, number: int, listener: socket.socket, udp: UdpService) -> None:
        """Serve TCP subscribers of `listener`; the accounts are `row` of the status block's."""
        config, gate = self._config, self._shared.admission(row)
        accounts = self._accounts(row)
        delivery = StreamDelivery(
            self._shared.ring,
            accounts,
            network=config.network.name,
            gate=gate,
            write_deadline_ns=config.write_deadlines_ns(),
            max_sessions=session_limit(),
            max_sessions_per_address=config.connections_per_address,
            seats=gate.seats,
            udp=udp,
        )

        def start(loop: asyncio.AbstractEventLoop) -> None:
            delivery.serve(loop, listener)
            keep_checking(loop, gate, self._log if row == 0 else None)  # one speaks for all

        asyncio.run(self._deliver(channel, delivery, accounts, start, show=number == 0))

    def be_shm(self, channel: Channel, row: int) -> None:
        """Hand the ring to local readers, and wake them."""
        config, gate = self._config, self._shared.admission(row)
        accounts = self._accounts(row)
        delivery = ShmDelivery(
            self._shared.ring_memory,
            self._shared.ring,
            accounts,
            network=config.network.name,
            gate=gate,
            max_readers=max(1, session_limit() // 2),  # a reader takes two descriptors
        )

        def start(loop: asyncio.AbstractEventLoop) -> None:
            delivery.start(loop, config.shm_socket)
            keep_checking(loop, gate, self._log if row == 0 else None)  # one speaks for all

        asyncio.run(self._deliver(channel, delivery, accounts, start))

    def be_zmq(self, channel: Channel, row: int, listener: socket.socket, line: RebuildLine) -> None:
        """Publish by ZMQ, and fetch the whole blocks for it and for the relay."""
        accounts = self._accounts(row)
        desk = ZmqDesk(
            self._config,
            self._shared.ring,
            self._shared.status,
            accounts,
            self._log,
            report=line.report,
        )

        def start(loop: asyncio.AbstractEventLoop) -> None:
            loop.set_exception_handler(_end)
            desk.start(loop, listener)

        # A block of 4 MB is work for some ten milliseconds, which no stream subscriber must wait for.
        asyncio.run(self._deliver(channel, desk, accounts, start, priority=WORKER_PRIORITY - 1))

    def be_udp(
        self,
        channel: Channel,
        row: int,
        sock: socket.socket,
        links: Sequence[socket.socket],
        control: socket.socket | None,
    ) -> None:
        """Serve UDP subscribers by that socket.

        `links` are this side's ends to the stream workers, `control` the one to the bypass.
        """
        fanout: Fanout | None = None
        if control is not None:
            from sprint.deliveries.udp_fanout import WorkerFanout  # noqa: PLC0415 - only where it is wanted

            try:
                bound = bound_address(sock)
                fanout = WorkerFanout(control, bound.port, self._log, source_host=bound.host)
            except OSError as error:
                self._log.warning("Datagrams go out by plain sockets", reason=str(error))
        accounts = self._accounts(row)
        delivery = UdpDelivery(
            self._shared.ring,
            accounts,
            self._shared.status.layout.udp,
            links,
            write_deadline_ns=self._config.write_deadlines_ns(),
            fanout=fanout,
        )
        counters = self._shared.status.layout.udp
        counters.fanout_turbo = counters.fanout_enterprise = 0
        asyncio.run(self._deliver(channel, delivery, accounts, lambda loop: delivery.start(loop, sock)))

    def be_api(self, api: ApiServer) -> None:
        """Answer HTTP from the status block."""
        self._shared.leave_relay_alone()
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))  # its threads inherit that
        api.start()
        signal.sigwait((signal.SIGTERM,))
        api.stop()

    def _accounts(self, row: int) -> Delivery:
        """A worker's accounts. The subscribers of the one before it went with it."""
        accounts: Delivery = self._shared.status.layout.deliveries[row]
        for tier in accounts.tiers:
            accounts.disconnected += tier.subscribers
            tier.subscribers = 0
        return accounts

    async def _deliver(
        self,
        channel: Channel,
        delivery: Delivers,
        accounts: Delivery,
        start: Callable[[asyncio.AbstractEventLoop], Any],
        *,
        show: bool = False,
        priority: int = WORKER_PRIORITY,
    ) -> None:
        """Run one delivery, woken by its channel, until SIGTERM. `show`: its optimisations stand in the status."""
        optimizations = self._hurry(show=show, priority=priority)
        loop = asyncio.get_running_loop()
        stopped: asyncio.Future[None] = loop.create_future()

        def stop(error: Exception | None = None) -> None:
            if stopped.done():
                return
            if error is None:
                stopped.set_result(None)
            else:
                stopped.set_exception(error)

        def wake() -> None:
            try:
                channel.drain()
                delivery.publish()
            except Exception as error:  # asyncio would log it and go on, perhaps deaf
                stop(error)

        loop.add_signal_handler(signal.SIGTERM, stop)
        start(loop)
        loop.add_reader(channel.fileno(), wake)
        accounts.pid = os.getpid()
        try:
            await stopped
        finally:
            loop.remove_reader(channel.fileno())
            delivery.close()
            optimizations.undo()

    def _hurry(self, *, show: bool, priority: int) -> Optimizations:
        """A worker's share of OPTIMIZE_SYSTEM. It sleeps between records, so real-time scheduling harms nobody.

        Without that, whoever else is woken by the same block, the log above all, goes first: five times the latency.
        """
        self._shared.leave_relay_alone()
        asked = self._config.optimize_system
        optimizations = Optimizations(
            Plan(
                cpus=None,
                realtime_priority=priority if asked else None,
                lock_memory=asked,
                freeze_gc=False,  # nobody here would know when to collect
                spin=False,
            )
        )
        if asked:
            steps = optimizations.apply()
        if asked and show:  # one of them speaks for all: the row has one writer
            row = self._shared.status.layout.steps[STEPS - 1]
            row.detail = "; ".join(f"{step.name}: {step.detail}" for step in steps).encode()[:159]
            row.applied = all(step.applied for step in steps)
            row.name = b"workers"
        return optimizations


def _end(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An exception in a callback: asyncio would log it and go on, perhaps deaf; a successor isn't."""
    loop.default_exception_handler(context)
    raise SystemExit(1)
