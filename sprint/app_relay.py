"""The relay's process of the memory-optimised engine: sources → relay → ring, and nothing else.

It may die at any moment: what it leaves in the ring, the status block and the header file is what the next one starts
from.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from sprint.addresses import Address
from sprint.bitcoin.networks import NETWORKS
from sprint.broadcaster import Broadcaster
from sprint.engines.memory import RelayLoop
from sprint.engines.rehearsal import Rehearsal
from sprint.engines.turns import Turns
from sprint.errors import HostError
from sprint.ledger import Ledger
from sprint.optimize import Optimizations, Plan
from sprint.record import decode
from sprint.relay import Relay
from sprint.ring import RingWriter
from sprint.sources.bypass import BypassSource
from sprint.sources.p2p import P2PSource
from sprint.sources.rebuild import RebuildSource
from sprint.sources.upstream import Upstream
from sprint.sources.zmq import ZmqSource
from sprint.status import DELIVERIES, STEPS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sprint.broadcaster import Publishes
    from sprint.chain import HeaderChain
    from sprint.composition import BypassLines, Shared
    from sprint.deliveries.udp_fanout import RelayFanout
    from sprint.engines.relay_log import PipeLog
    from sprint.events import Block
    from sprint.header_file import HeaderFile
    from sprint.optimize import Step
    from sprint.sources import Source
    from sprint.sources.rebuild import RebuildLine

FANOUT_ROW = DELIVERIES - 1
"""Of the status block's: the workers' rows begin at the other end."""
INTAKE_PRIORITY = 5
"""As the workers have."""
REALTIME_PRIORITY = 10
"""SCHED_FIFO's lowest tenth: above every ordinary process, below the kernel's own threads that matter (50 and up)."""


class RelayProcess:
    """One process's work, from start to SIGTERM."""

    def __init__(
        self,
        shared: Shared,
        chain: HeaderChain,
        header_file: HeaderFile,
        channels: Sequence[Publishes],
        log: PipeLog,
        line: RebuildLine,
        bypass: BypassLines | None,
    ) -> None:
        """`channels` are signalled in this order; `line` brings whole blocks; `bypass` the lines
        to what holds the bypass."""
        self._shared = shared
        self._config = shared.config
        self._ring = shared.ring
        self._status = shared.status
        self._chain = chain
        self._header_file = header_file
        self._channels = channels
        self._log = log
        self._line = line
        self._bypass = bypass

    def run(self) -> None:
        """Relay until SIGTERM."""
        config, chain, log = self._config, self._chain, self._log
        self._header_file.follow(chain)
        relay = Relay(chain)
        unsaid = self._resume(relay)
        self._status.relay.sequence = self._ring.tail  # which the one before may not have come to note
        source = P2PSource(
            config.upstreams, config.network, lambda: chain.tip_height, self._status, direct=config.use_direct_p2p
        )
        fanout = self._fanout()
        deliveries = [*self._channels, *fanout]  # whom the signals wake works while the fan-out's call goes on
        broadcaster = Broadcaster(RingWriter(self._ring), config.network.magic, deliveries, time.monotonic_ns)
        broadcaster.wake()  # the one before may have died between a record and the call to come and read it
        turns = Turns(
            relay=relay,
            broadcaster=broadcaster,
            ring=self._ring,
            ledger=Ledger(self._status),
            header_file=self._header_file,
            sources=[*self._bypass_source(), source, *self._zmq_source(), self._rebuild_source(), *fanout],
            log=log,
        )
        turns.publish(unsaid)
        if not config.optimize_system:
            RelayLoop(turns, spin=False).run()
            return
        plan = Plan(
            cpus=self._shared.relay_cpus,
            realtime_priority=REALTIME_PRIORITY,
            lock_memory=True,
            freeze_gc=True,
            spin=True,
        )
        rehearsal = self._rehearsal(fanout[0].rehearse if fanout else None)
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

    def _rehearsal(self, deliver: Callable[[], None] | None) -> Rehearsal | None:
        try:
            return open_rehearsal(captures=self._bypass is not None, deliver=deliver)
        except (HostError, OSError) as error:  # a cold path is still a path
            self._log.warning("The path is not kept warm", reason=str(error))
            return None

    def _show_steps(self, steps: Sequence[Step]) -> None:
        for row, step in zip(self._status.layout.steps[:STEPS], steps, strict=False):
            name, detail = step.name.encode()[:15], step.detail.encode()[:159]
            known = row.name == name and not row.applied  # the relay before this one has said so
            row.name, row.applied, row.detail = name, step.applied, detail
            if not step.applied and not known:
                self._log.warning("System optimisation refused", step=step.name, reason=step.detail)

    def _rebuild_source(self) -> Source:
        return RebuildSource(self._line, every=16 if self._config.optimize_system else 1)

    def _zmq_source(self) -> list[Source]:
        """The nodes' publishers, if there are any."""
        if not self._config.zmq_nodes:
            return []
        cpus = os.sched_getaffinity(0)
        # libzmq's thread has the CPUs and the priority that we have now: not the relay's own, and before everybody
        # who would keep a block waiting there.
        self._shared.leave_relay_alone()
        if self._config.optimize_system:
            with suppress(PermissionError):
                os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(INTAKE_PRIORITY))
        try:
            return [ZmqSource(self._config.zmq_nodes, lambda: self._chain.tip_hash, self._status)]
        finally:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            os.sched_setaffinity(0, cpus)

    def _bypass_source(self) -> list[Source]:
        """The capture, if there is to be one: it is asked before the plain sockets."""
        if self._bypass is None:
            return []
        # Only where it is wanted: it brings AF_XDP and the BPF loader with it.
        from sprint.app_bypass import open_capture  # noqa: PLC0415

        network, status = self._config.network, self._status
        return [
            BypassSource(
                self._bypass.capture[0],
                lambda facts, descriptors: open_capture(facts, descriptors, network, status),
                self._log,
            )
        ]

    def _fanout(self) -> list[RelayFanout]:
        """What serves UDP subscribers, if there is to be a bypass."""
        if self._bypass is None:
            return []
        from sprint.deliveries.udp_fanout import RelayFanout  # noqa: PLC0415 - as above

        return [
            RelayFanout(
                self._ring,
                self._status.delivery(FANOUT_ROW, "fanout"),
                self._status,
                self._bypass.egress[0],
                self._config.write_deadlines_ns(),
                self._log,
            )
        ]


def open_rehearsal(*, captures: bool = False, deliver: Callable[[], None] | None = None) -> Rehearsal:
    """A rehearsal over a loopback connection of our own; `captures`: and of a capture; `deliver`: as Rehearsal's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        upstream = Upstream(Address("127.0.0.1", port), NETWORKS["regtest"], secrets.randbits(64), lambda: 0)
        upstream.candidates = [(socket.AF_INET, ("127.0.0.1", port))]
        upstream.connect(time.monotonic_ns(), high_bandwidth=True)
        theirs, _ = listener.accept()
    theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not captures:
        return Rehearsal(upstream, theirs, deliver=deliver)
    from sprint.sources.capture import Overheard  # noqa: PLC0415 - only where it is wanted: it brings the BPF loader

    return Rehearsal(upstream, theirs, Overheard(), deliver)
