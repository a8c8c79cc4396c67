"""MemorySprint put together: what the supervisor makes, and what each of its children is made of.

The supervisor makes everything that must outlive a child before it forks the first one: the shared memory, the
channels, the listening sockets, the header chain as it stands in the file. A child builds its own part from these; each
method `_be_…` is the whole of one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

from sprint.addresses import Address
from sprint.api.app import create_app
from sprint.api.server import ApiServer
from sprint.bitcoin.networks import NETWORKS
from sprint.broadcaster import Broadcaster
from sprint.channels import EventChannel, SocketChannel
from sprint.composition import bypass_wanted, facts_of, log_relayed, session_limit
from sprint.deliveries.shm import ShmDelivery
from sprint.deliveries.stream import StreamDelivery
from sprint.engines.memory import RelayLoop
from sprint.engines.rehearsal import Rehearsal
from sprint.engines.relay_log import PipeLog
from sprint.engines.supervisor import Child, Supervisor
from sprint.engines.turns import Turns
from sprint.errors import HostError
from sprint.events import Lapped
from sprint.ledger import Ledger
from sprint.optimize import Optimizations, Plan, cpu_plan
from sprint.record import decode
from sprint.relay import Relay
from sprint.ring import Ring, RingReader, RingWriter, size_for
from sprint.shared_memory import SharedMemory
from sprint.sources.bypass import BypassSource
from sprint.sources.p2p import P2PSource
from sprint.sources.upstream import Upstream
from sprint.status import PROCESSES, STEPS, StatusBlock
from sprint.status import SIZE as STATUS_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sprint.chain import HeaderChain
    from sprint.channels import Channel
    from sprint.config import Config
    from sprint.events import Block
    from sprint.header_file import HeaderFile
    from sprint.optimize import Step
    from sprint.sources import Source
    from sprint.status import Delivery

WORKER_PRIORITY = 5
REALTIME_PRIORITY = 10
"""SCHED_FIFO's lowest tenth: above every ordinary process, below the kernel's own threads that matter (50 and up)."""


MAX_SOCKET_PATH = 107
"""Bytes; sun_path of unix(7), less its end."""


class MemorySprint:
    """The supervisor's process: makes what is shared, then keeps the children alive."""

    def __init__(self, config: Config, chain: HeaderChain, header_file: HeaderFile, log: Any) -> None:
        """Raises HostError when memory can't be shared; nothing else is asked of the machine before run()."""
        self._config = config
        self._chain = chain
        self._header_file = header_file
        self._log = log
        session = secrets.randbits(63) | 1
        self._ring_memory = SharedMemory("sprint-ring", size_for(config.ring_slots))
        self._ring = Ring.create(self._ring_memory.memory, config.ring_slots, session)
        self._status_memory = SharedMemory("sprint-status", STATUS_SIZE)
        self._status = StatusBlock.create(session, facts_of(config, "memory"), self._status_memory.memory)
        self._seen = RingReader(self._ring)
        self._relay_cpus, self._other_cpus = _cpus(config)
        self._channels: dict[str, Channel] = {}
        self._control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) if bypass_wanted(config) else None
        """The relay's end and the bypass's."""

    def run(self) -> None:
        """Supervise until SIGINT or SIGTERM. Raises HostError when an address can't be bound."""
        config, log = self._config, self._log
        log.info("⚡ Starting memory-optimized sprint with tight deadlines")
        with contextlib.ExitStack() as stack:
            self._api = ApiServer(create_app(self._status), config.api_bind)
            stack.callback(self._api.stop)
            streams = _listeners(config.stream_bind, config.delivery_workers)
            for listener in streams:
                stack.callback(listener.close)
            check_socket_path(config.shm_socket)
            self._relay_log, self._log_channel = PipeLog(), EventChannel()
            stack.callback(lambda: self._relay_log.forward(log))
            self._children = self._family(streams)
            facts = self._status.facts
            host, port = streams[0].getsockname()[:2]
            facts["binds"] = {
                "api": str(self._api.address),
                "stream": str(Address(host, port)),
                "shm": str(config.shm_socket),
            }
            self._status.facts = facts
            log.info("Listening", **facts["binds"], network=config.network.name)
            stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
            self._leave_relay_alone()
            Supervisor(
                self._children,
                log,
                self._show_child,
                {
                    self._relay_log.fileno(): lambda: self._relay_log.forward(log),
                    self._log_channel.fileno(): self._log_records,
                },
            ).run()
        log.info("Stopped")

    def _family(self, streams: list[socket.socket]) -> tuple[Child, ...]:
        """All children, in the order in which they are started."""
        family = [Child("relay", self._be_relay)]
        if self._control is not None:
            family.append(Child("bypass", self._be_bypass))
        for number, listener in enumerate(streams):
            family.append(self._worker(f"stream-{number}", self._be_stream_worker, number, listener))
        family.append(self._worker("shm", self._be_shm_worker, len(streams)))
        family.append(Child("api", self._be_api))
        self._channels["log"] = self._log_channel
        return tuple(family)

    def _worker(self, name: str, main: Callable[..., None], *arguments: Any) -> Child:
        """A child that is woken by a channel of its own."""
        channel = self._channels[name] = EventChannel() if self._config.use_memory_channel else SocketChannel()
        return Child(name, lambda: main(channel, *arguments))

    # The supervisor's own part while it supervises.

    def _log_records(self) -> None:
        self._log_channel.drain()
        while (item := self._seen.read()) is not None:
            if isinstance(item, Lapped):
                self._log.warning("Records passed unlogged", first=item.first, count=item.lost)
            else:
                log_relayed(self._log, self._config.tier, decode(item))

    def _show_child(self, child: Child) -> None:
        index = self._children.index(child)
        if index < PROCESSES:
            row = self._status.layout.processes[index]
            row.name, row.pid, row.restarts = child.name.encode()[:15], child.pid, child.restarts
            row.started_ns = child.started_ns

    # The relay's process.

    def _be_relay(self) -> None:
        config, chain, log = self._config, self._chain, self._relay_log
        self._header_file.follow(chain)
        relay = Relay(chain)
        unsaid = self._resume(relay)
        self._status.relay.sequence = self._ring.tail  # which the one before may not have come to note
        source = P2PSource(
            config.upstreams, config.network, lambda: chain.tip_height, self._status, direct=config.use_direct_p2p
        )
        broadcaster = Broadcaster(
            RingWriter(self._ring), config.network.magic, list(self._channels.values()), time.monotonic_ns
        )
        broadcaster.wake()  # the one before may have died between a record and the call to come and read it
        turns = Turns(
            relay=relay,
            broadcaster=broadcaster,
            ring=self._ring,
            ledger=Ledger(self._status),
            header_file=self._header_file,
            sources=[*self._bypass_source(), source],
            log=log,
        )
        turns.publish(unsaid)
        if not config.optimize_system:
            RelayLoop(turns, spin=False).run()
            return
        plan = Plan(
            cpus=self._relay_cpus,
            realtime_priority=REALTIME_PRIORITY,
            lock_memory=True,
            freeze_gc=True,
            spin=True,
        )
        rehearsal = self._rehearsal()
        with Optimizations(plan) as optimizations:
            steps = optimizations.steps
            self._show_steps(steps)
            spin = any(step.name == "spin" and step.applied for step in steps)
            RelayLoop(turns, spin=spin, rehearsal=rehearsal if spin else None, on_idle=optimizations.idle).run()

    def _resume(self, relay: Relay) -> Sequence[Block]:
        """What the ring holds has been published by the relay before this one; without any, this is the first."""
        ring, noted = self._ring, self._status.relay
        records = (ring.copy(sequence) for sequence in range(ring.oldest, ring.tail + 1))
        return relay.resume(
            [decode(record) for record in records if record is not None],
            time.monotonic_ns(),
            time.time_ns(),
            caught_up=bool(noted.caught_up),
            height=noted.tip_height,
        )

    def _rehearsal(self) -> Rehearsal | None:
        try:
            return _rehearsal()
        except (HostError, OSError) as error:  # a cold path is still a path
            self._relay_log.warning("The path is not kept warm", reason=str(error))
            return None

    def _show_steps(self, steps: Sequence[Step]) -> None:
        for row, step in zip(self._status.layout.steps[:STEPS], steps, strict=False):
            name, detail = step.name.encode()[:15], step.detail.encode()[:159]
            known = row.name == name and not row.applied  # the relay before this one has said so
            row.name, row.applied, row.detail = name, step.applied, detail
            if not step.applied and not known:
                self._relay_log.warning("System optimisation refused", step=step.name, reason=step.detail)

    def _bypass_source(self) -> list[Source]:
        """The capture, if there is to be one: it is asked before the plain sockets."""
        if self._control is None:
            return []
        # Only where it is wanted: it brings AF_XDP and the BPF loader with it.
        from sprint.app_bypass import open_capture  # noqa: PLC0415

        network, status = self._config.network, self._status
        return [
            BypassSource(
                self._control[0],
                lambda facts, descriptors: open_capture(facts, descriptors, network, status),
                self._relay_log,
            )
        ]

    # The other processes.

    def _be_bypass(self) -> None:
        from sprint.app_bypass import BypassProcess  # noqa: PLC0415 - as above

        assert self._control is not None
        BypassProcess(self._config, self._status, self._control[1], self._log).run()

    def _be_stream_worker(self, channel: Channel, number: int, listener: socket.socket) -> None:
        config = self._config
        delivery = StreamDelivery(
            self._ring,
            self._accounts(number, f"stream-{number}"),
            network=config.network.name,
            tier_of_key=lambda _key: config.tier,
            write_deadline_ns=config.write_deadlines_ns(),
            max_sessions=session_limit(),
        )
        asyncio.run(self._deliver(channel, delivery, lambda loop: delivery.serve(loop, listener)))

    def _be_shm_worker(self, channel: Channel, number: int) -> None:
        config = self._config
        delivery = ShmDelivery(
            self._ring_memory,
            self._ring,
            self._accounts(number, "shm"),
            network=config.network.name,
            tier_of_key=lambda _key: config.tier,
            max_readers=max(1, session_limit() // 2),  # a reader takes two descriptors
        )
        asyncio.run(self._deliver(channel, delivery, lambda loop: delivery.start(loop, config.shm_socket)))

    def _accounts(self, number: int, name: str) -> Delivery:
        """A worker's accounts. The subscribers of the one before it went with it."""
        accounts = self._status.delivery(number, name)
        for tier in accounts.tiers:
            accounts.disconnected += tier.subscribers
            tier.subscribers = 0
        return accounts

    async def _deliver(
        self,
        channel: Channel,
        delivery: StreamDelivery | ShmDelivery,
        start: Callable[[asyncio.AbstractEventLoop], Any],
    ) -> None:
        """Run one delivery, woken by its channel, until SIGTERM."""
        optimizations = self._hurry(show=channel is self._channels["stream-0"])
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
        try:
            await stopped
        finally:
            loop.remove_reader(channel.fileno())
            delivery.close()
            optimizations.undo()

    def _hurry(self, *, show: bool) -> Optimizations:
        """A worker's share of OPTIMIZE_SYSTEM. It sleeps between records, so real-time scheduling harms nobody.

        Without that, whoever else is woken by the same block, the log above all, goes first: five times the latency.
        """
        self._leave_relay_alone()
        asked = self._config.optimize_system
        optimizations = Optimizations(
            Plan(
                cpus=None,
                realtime_priority=WORKER_PRIORITY if asked else None,
                lock_memory=asked,
                freeze_gc=False,  # nobody here would know when to collect
                spin=False,
            )
        )
        if asked:
            steps = optimizations.apply()
        if asked and show:  # one of them speaks for all: the row has one writer
            row = self._status.layout.steps[STEPS - 1]
            row.detail = "; ".join(f"{step.name}: {step.detail}" for step in steps).encode()[:159]
            row.applied = all(step.applied for step in steps)
            row.name = b"workers"
        return optimizations

    def _be_api(self) -> None:
        self._leave_relay_alone()
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))  # its threads inherit that
        self._api.start()
        signal.sigwait((signal.SIGTERM,))
        self._api.stop()

    def _leave_relay_alone(self) -> None:
        if self._config.optimize_system and self._other_cpus:
            os.sched_setaffinity(0, self._other_cpus)


def _cpus(config: Config) -> tuple[frozenset[int] | None, frozenset[int] | None]:
    if not config.optimize_system:
        return None, None
    relay, others = cpu_plan(os.sched_getaffinity(0))
    return relay, others


def check_socket_path(path: Path) -> None:
    """Raises HostError for a path at which no Unix socket can be bound."""
    size = len(os.fsencode(path))
    if size > MAX_SOCKET_PATH:
        raise HostError(f"SHM_SOCKET={path}: {size} bytes, at most {MAX_SOCKET_PATH} are possible")
    if not path.parent.is_dir():
        raise HostError(f"SHM_SOCKET={path}: {path.parent} is no folder")


def _listeners(bind: Address, workers: int) -> list[socket.socket]:
    """One listening socket a worker, all on the same address: the kernel shares the subscribers out (SO_REUSEPORT).

    They stay open here, so that those who connect while a worker is restarted wait for it instead of being refused.
    """
    first = StreamDelivery.listen(bind.host, bind.port, reuse_port=True)
    port = first.getsockname()[1]
    return [first, *(StreamDelivery.listen(bind.host, port, reuse_port=True) for _ in range(workers - 1))]


def _rehearsal() -> Rehearsal:
    """A rehearsal over a loopback connection of our own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        upstream = Upstream(Address("127.0.0.1", port), NETWORKS["regtest"], secrets.randbits(64), lambda: 0)
        upstream.candidates = [(socket.AF_INET, ("127.0.0.1", port))]
        upstream.connect(time.monotonic_ns(), high_bandwidth=True)
        theirs, _ = listener.accept()
    theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Rehearsal(upstream, theirs)
