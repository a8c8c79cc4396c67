"""From the first packet of a block's announcement, as it comes in, to the frames of ten thousand subscribers.

The product's relay and bypass run as they do in service (end_to_end_product), on one end of a veth pair: they hear a
node's announcement by the capture, prove the block, write the record, and send it by the fan-out. The other end has the
node, and an XDP program that stamps each subscriber's frame. Both stamps, of arrival and of each delivery, are XDP's,
by one clock; that of arrival travels in the record, so each delivery is judged by its own frame.

A block every 20 ms; the header file is in memory, for at that pace a disk that is busy would be waited for in the next
block's time. The relay has one CPU for itself, as OPTIMIZE_SYSTEM gives it, and all else the others. Where the kernel
doesn't let it be a real-time process, whatever else runs on the machine may still take that CPU from it; blocks during
which that has not happened are told by themselves, too, as `undisturbed`.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sprint.bench.apart import Helper, be_apart, run_apart
from sprint.bench.detect_wire import enter_namespace
from sprint.bench.end_to_end_figures import Deliveries
from sprint.bench.end_to_end_peer import be_peer
from sprint.bench.end_to_end_product import Product
from sprint.bench.end_to_end_worker import be_worker
from sprint.bench.fanout_sink import MOST, Arrivals, Sink
from sprint.bench.fanout_wire import be_far_end, lay
from sprint.bench.surroundings import Surroundings, kept_waiting_ns
from sprint.errors import HostError
from sprint.tiers import NS_PER_MS, NS_PER_S
from xdp.loader import LoadError, missing

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from sprint.bench.apart import Progress

SUBSCRIBERS = 10_000
ENTERPRISE_SHARE = 10
"""One of so many subscribers is enterprise, the others are turbo."""
BLOCKS = 3_000
WARM_UP = 50
"""Blocks that aren't counted."""
PERIOD_NS = 20 * NS_PER_MS
PATIENCE_S = 0.5
"""After which a frame that hasn't come is lost."""
DISTURBED_NS = NS_PER_MS // 20
"""For so long the relay may be ready and not running around a block: a timer or the kernel's own threads take less."""


def measure_end_to_end(progress: Progress, blocks: int = BLOCKS, subscribers: int = SUBSCRIBERS) -> dict[str, Any]:
    """Results, of that many blocks. Raises HostError where the kernel can't be bypassed."""
    reason = missing()
    if reason is not None:
        raise HostError(f"end-to-end runs on a link of its own: {reason}")
    if subscribers > MOST:
        raise HostError(f"--subscribers {subscribers}: {MOST} is the most")
    return run_apart("sprint.bench.end_to_end", {"blocks": blocks, "subscribers": subscribers}, progress)


def measure(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """measure_end_to_end()'s work, in this process, which must have one thread only."""
    surroundings = Surroundings()
    subscribers, blocks = settings["subscribers"], settings["blocks"]
    enterprise = max(1, subscribers // ENTERPRISE_SHARE)
    all_blocks, undisturbed = Deliveries(enterprise, subscribers), Deliveries(enterprise, subscribers)
    progress("starting the product", 0, 1)
    enter_namespace()
    try:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sprint-bench-", dir=_memory())))
            sink = stack.enter_context(Sink())

            def helper(main: Callable[[Connection], None], cpu: int | None) -> Helper:
                started = Helper(main, cpu)
                stack.callback(started.close)
                return started

            product = Product(folder)
            shared = product.shared
            relay_cpu = next(iter(shared.relay_cpus)) if shared.relay_cpus else None
            other_cpu = min(shared.other_cpus) if shared.other_cpus else None
            far = helper(be_far_end, other_cpu)
            lay(far)
            far.ask("sink", sink.program_fd)
            far_pid = far.ask("pid")
            peer = helper(lambda control: be_peer(control, far_pid), other_cpu)
            peer.answer()
            peer.tell("accept")
            helper(product.be_bypass, other_cpu)
            worker = helper(lambda control: be_worker(control, product, enterprise, subscribers), other_cpu)
            relay_pid = helper(product.be_relay, None).answer()
            peer.answer()
            worker.answer()
            product.wait_until_ready()
            if other_cpu is not None:
                os.sched_setaffinity(0, {other_cpu})
            progress("starting the product", 1, 1)
            begun_ns, waited_ns = time.monotonic_ns(), kept_waiting_ns(relay_pid)

            def note(arrivals: Arrivals, waited_ns: int) -> None:
                all_blocks.note(arrivals.at_ns, arrivals.seen_ns, arrivals.sources, arrivals.surplus)
                if waited_ns < DISTURBED_NS:
                    undisturbed.note(arrivals.at_ns, arrivals.seen_ns, arrivals.sources, arrivals.surplus)

            _announce(peer, sink, relay_pid, subscribers, blocks, note, progress)
            waited = (kept_waiting_ns(relay_pid) - waited_ns) / (time.monotonic_ns() - begun_ns)
            facts = product.facts()
    except (LoadError, OSError) as error:
        raise HostError(f"end-to-end: {error}") from None
    around = surroundings.figures()
    return {
        "results": {
            **all_blocks.figures(),
            "undisturbed": undisturbed.figures() if undisturbed.blocks else None,
            "subscribers": {"enterprise": enterprise, "turbo": subscribers - enterprise},
            "period_ms": PERIOD_NS / NS_PER_MS,
            "product": facts,
            "relay_cpu": relay_cpu,
            "relay_kept_waiting_share": round(waited, 5),
            "other_cpu": other_cpu,
            **around,
        },
        "ratios": {},
    }


def _memory() -> str | None:
    """A folder that no disk is behind, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - what is made there has a random name


def _announce(
    peer: Helper,
    sink: Sink,
    relay_pid: int,
    subscribers: int,
    blocks: int,
    note: Callable[[Arrivals, int], None],
    progress: Progress,
) -> None:
    """Block after block, each when the one before has arrived, or is given up."""
    due_ns = time.monotonic_ns()
    for number in range(-WARM_UP, blocks):
        if number % 50 == 0:
            progress("blocks", max(0, number), blocks)
        sink.clear(subscribers)
        time.sleep(max(0, due_ns - time.monotonic_ns()) / NS_PER_S)
        due_ns = time.monotonic_ns() + PERIOD_NS
        waited_ns = kept_waiting_ns(relay_pid)
        peer.ask("announce")
        sink.wait(subscribers, PATIENCE_S)
        arrivals = sink.read(subscribers)
        if number >= 0:
            note(arrivals, kept_waiting_ns(relay_pid) - waited_ns)
    progress("blocks", blocks, blocks)


if __name__ == "__main__":
    be_apart(measure)
