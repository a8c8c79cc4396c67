"""MemorySprint put together: what the supervisor makes, and which children it keeps alive.

The supervisor makes everything that must outlive a child before it forks the first one: the shared memory, the
channels, the listening sockets, the header chain as it stands in the file. A child builds its own part from these; the
relay's stands in app_relay, the bypass's in app_bypass, all others' in app_workers.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import TYPE_CHECKING, Any

from sprint.addresses import Address
from sprint.api.app import create_app
from sprint.api.server import ApiServer
from sprint.app_relay import RelayProcess
from sprint.app_workers import Workers
from sprint.channels import EventChannel, SocketChannel
from sprint.composition import BypassLines, Shared, bypass_wanted, facts_of, log_relayed
from sprint.deliveries import udp_link
from sprint.deliveries.shm import ShmDelivery
from sprint.deliveries.stream import StreamDelivery
from sprint.deliveries.udp import UdpDelivery, bound_address
from sprint.deliveries.udp_sessions import UdpService
from sprint.deliveries.zmq import ZmqDelivery
from sprint.engines.relay_log import PipeLog
from sprint.engines.supervisor import Child, Supervisor
from sprint.errors import HostError
from sprint.events import Lapped
from sprint.optimize import cpu_plan
from sprint.record import decode
from sprint.ring import Ring, RingReader, size_for
from sprint.seats import size_for as seats_size_for
from sprint.shared_memory import SharedMemory
from sprint.sources.rebuild import RebuildLine
from sprint.status import DELIVERIES, PROCESSES, StatusBlock
from sprint.status import SIZE as STATUS_SIZE

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from sprint.chain import HeaderChain
    from sprint.channels import Channel
    from sprint.config import Config
    from sprint.header_file import HeaderFile

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
        ring_memory = SharedMemory("sprint-ring", size_for(config.ring_slots))
        ring = Ring.create(ring_memory.memory, config.ring_slots, session)
        status_memory = SharedMemory("sprint-status", STATUS_SIZE)
        self._status = StatusBlock.create(session, facts_of(config, "memory"), status_memory.memory)
        seats_memory = SharedMemory("sprint-seats", seats_size_for(DELIVERIES))
        self._shared = Shared(
            config, ring_memory, ring, self._status, seats_memory, secrets.token_bytes(32), *_cpus(config)
        )
        self._workers = Workers(self._shared, log)
        self._seen = RingReader(ring)
        self._channels: dict[str, Channel] = {}
        self._line = RebuildLine()
        self._rows = 0
        self._bypass = BypassLines() if bypass_wanted(config) else None

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
            ShmDelivery.try_path(config.shm_socket)
            datagrams = UdpDelivery.bind(config.udp_bind)
            stack.callback(datagrams.close)
            publisher = ZmqDelivery.listen(config.zmq_bind)
            stack.callback(publisher.close)
            self._relay_log, self._log_channel = PipeLog(), EventChannel()
            stack.callback(lambda: self._relay_log.forward(log))
            self._children = self._family(streams, datagrams, publisher)
            facts = self._status.facts
            host, port = streams[0].getsockname()[:2]
            facts["binds"] = {
                "api": str(self._api.address),
                "stream": str(Address(host, port)),
                "udp": str(bound_address(datagrams)),
                "shm": str(config.shm_socket),
                "zmq": str(Address(*publisher.getsockname()[:2])),
            }
            self._status.facts = facts
            log.info("Listening", **facts["binds"], network=config.network.name)
            stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
            self._shared.leave_relay_alone()
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

    def _family(
        self, streams: list[socket.socket], datagrams: socket.socket, publisher: socket.socket
    ) -> tuple[Child, ...]:
        """All children, in the order in which they are started."""
        family = [Child("relay", self._be_relay)]
        if self._bypass is not None:
            family.append(Child("bypass", self._be_bypass))
        links = [udp_link.pair() for _ in streams]
        for number, (listener, (link, _)) in enumerate(zip(streams, links, strict=True)):
            service = UdpService(bound_address(datagrams), link)
            family.append(self._worker(f"stream-{number}", self._workers.be_stream, number, listener, service))
        control = self._bypass.udp[0] if self._bypass is not None else None
        family.append(self._worker("udp", self._workers.be_udp, datagrams, [link for _, link in links], control))
        family.append(self._worker("shm", self._workers.be_shm))
        family.append(self._worker("zmq", self._workers.be_zmq, publisher, self._line))
        family.append(Child("api", lambda: self._workers.be_api(self._api)))
        self._channels["log"] = self._log_channel
        return tuple(family)

    def _worker(self, name: str, main: Callable[..., None], *arguments: Any) -> Child:
        """A child with a channel that wakes it and a row of accounts: it is `main(channel, row, *arguments)`."""
        channel = self._channels[name] = EventChannel() if self._config.use_memory_channel else SocketChannel()
        row = self._rows
        self._rows += 1
        self._status.delivery(row, name)
        return Child(name, lambda: main(channel, row, *arguments))

    def _be_relay(self) -> None:
        RelayProcess(
            self._shared,
            self._chain,
            self._header_file,
            list(self._channels.values()),
            self._relay_log,
            self._line,
            self._bypass,
        ).run()

    def _be_bypass(self) -> None:
        # Only where it is wanted: it brings the BPF loader with it.
        from sprint.app_bypass import BypassProcess  # noqa: PLC0415

        assert self._bypass is not None
        BypassProcess(self._config, self._status, self._bypass.theirs(), self._log).run()

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


def _cpus(config: Config) -> tuple[frozenset[int] | None, frozenset[int] | None]:
    """The relay's, and everybody else's; None: as they were."""
    if not config.optimize_system:
        return None, None
    return cpu_plan(os.sched_getaffinity(0))


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
    # Another Sprint's sockets would let ours in beside them, and the kernel would share subscribers out among both.
    StreamDelivery.listen(bind.host, bind.port).close()
    first = StreamDelivery.listen(bind.host, bind.port, reuse_port=True)
    port = first.getsockname()[1]
    return [first, *(StreamDelivery.listen(bind.host, port, reuse_port=True) for _ in range(workers - 1))]
