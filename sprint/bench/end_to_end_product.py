"""The product's own processes in `bench end-to-end`: the relay and the bypass, and what the supervisor makes for them.

They are started as the supervisor starts them: what they share is made before, and each runs what it runs there, by the
same configuration. The UDP worker's part is in end_to_end_worker.
"""

from __future__ import annotations

import os
import secrets
import time
from typing import TYPE_CHECKING, Any

from sprint.app_bypass import BypassProcess
from sprint.app_relay import RelayProcess
from sprint.bench.detect_announcements import NETWORK
from sprint.bench.detect_wire import FAR_ADDRESS, NEAR
from sprint.chain import HeaderChain
from sprint.composition import BypassLines, Shared, facts_of, open_header_file
from sprint.config import load
from sprint.engines.relay_log import PipeLog
from sprint.errors import HostError
from sprint.optimize import cpu_plan
from sprint.ring import Ring, size_for
from sprint.seats import size_for as seats_size_for
from sprint.shared_memory import SharedMemory
from sprint.sources.rebuild import RebuildLine
from sprint.status import DELIVERIES, StatusBlock
from sprint.status import SIZE as STATUS_SIZE

if TYPE_CHECKING:
    from multiprocessing.connection import Connection as Pipe
    from pathlib import Path

READY_TIMEOUT_S = 30.0
_LOOK_S = 0.02


class Product:
    """What the supervisor makes, and the mains of its children."""

    def __init__(self, folder: Path) -> None:
        """`folder`: for its header file; this process is in the namespace where it is to run."""
        self.said: list[str] = []
        """Its log, warnings and errors."""
        self.log = PipeLog()
        config = load(
            {
                "TIER": "enterprise",
                "NETWORK": NETWORK.name,
                "BITCOIN_NODE": f"{FAR_ADDRESS}:{NETWORK.port}",
                "ENABLE_KERNEL_BYPASS": "true",
                "INTERFACE": NEAR,
                "DATA_DIR": str(folder),
            },
            folder,
        )
        self._chain = HeaderChain(config.network)
        self._header_file = open_header_file(config, self._chain, self.log)
        session = secrets.randbits(63) | 1
        ring_memory = SharedMemory("sprint-ring", size_for(config.ring_slots))
        ring = Ring.create(ring_memory.memory, config.ring_slots, session)
        status_memory = SharedMemory("sprint-status", STATUS_SIZE)
        self.status = StatusBlock.create(session, facts_of(config, "memory"), status_memory.memory)
        seats_memory = SharedMemory("sprint-seats", seats_size_for(DELIVERIES))
        relay_cpus, other_cpus = cpu_plan(os.sched_getaffinity(0))
        self.shared = Shared(
            config, ring_memory, ring, self.status, seats_memory, secrets.token_bytes(32), relay_cpus, other_cpus
        )
        self.bypass = BypassLines()
        self._line = RebuildLine()

    def be_relay(self, control: Pipe) -> None:
        """The relay's process; it says its pid."""
        control.send(os.getpid())
        RelayProcess(self.shared, self._chain, self._header_file, [], self.log, self._line, self.bypass).run()

    def be_bypass(self, _control: Pipe) -> None:
        """The bypass's."""
        BypassProcess(self.shared.config, self.status, self.bypass.theirs(), self.log).run()

    # ── what the supervisor's status tells ──

    def wait_until_ready(self) -> None:
        """The chain has caught up, the capture is active, the fan-out is at work. Raises HostError after a while."""
        give_up = time.monotonic() + READY_TIMEOUT_S
        while self._missing():
            if time.monotonic() > give_up:
                self.take_log()
                raise HostError(f"the product isn't ready: {', '.join(self._missing())}; {'; '.join(self.said[-3:])}")
            time.sleep(_LOOK_S)

    def _missing(self) -> list[str]:
        bypass = self.status.bypass or {}
        conditions = {
            "no upstream": bool(self.status.relay.caught_up),
            f"no capture ({bypass.get('reason')})": bool(bypass.get("active")),
            "no fan-out": bool(self.status.layout.egress.active),
        }
        return [words for words, holds in conditions.items() if not holds]

    def facts(self) -> dict[str, Any]:
        """What the status says of the bypass and of the optimisations."""
        self.take_log()
        steps = [row for row in self.status.layout.steps if row.name]
        egress = self.status.layout.egress
        return {
            "capture": (self.status.bypass or {}).get("mode"),
            "optimizations": {row.name.decode(): bool(row.applied) for row in steps},
            "egress": {"sent": egress.sent, "dropped": egress.dropped, "runs": egress.runs},
            "warnings": self.said[-8:],
        }

    def take_log(self) -> None:
        """Keep what the children have warned of."""
        self.log.forward(self)

    def info(self, event: str, **values: Any) -> None:
        """Not kept."""

    def warning(self, event: str, **values: Any) -> None:
        """A line of the log."""
        self.said.append(" ".join([event, *(f"{name}={value}" for name, value in values.items())]))

    error = warning
