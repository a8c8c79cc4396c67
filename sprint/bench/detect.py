"""How long after a packet's arrival at the interface Python knows the announced block's hash, by each way out.

A sender in a network namespace of its own writes cmpctblock messages, each with another header and in a single packet,
into a TCP connection over a veth pair whose near end is captured. The clock starts in the XDP program, which has
CLOCK_MONOTONIC too, and ends when the reader has the hash: from a plain recv() and the protocol's Connection, which
needs the whole message, or from CaptureSource, which needs 104 bytes and the header's own proof. A socket's hash finds
its arrival in the ring buffer that the same program filled, which is read after the turn. AF_XDP carries it along.

Modes take turns in rounds. In each, only what it needs is attached: for the sockets, classification and the ring
buffer, so that they don't pay for a mirror that they don't use. Every busy mode runs the same warm-up each millisecond:
a dummy through recv(), Connection and CaptureSource alike. Blocking modes run none, and sleep in the kernel. The reader
has one CPU, and sender, XDP and TCP the other, where there are two.

Not measured: AF_PACKET, and packets behind a lost one (behind_loss_p50); nor the way from hash to record.

Everything made is in two namespaces without names, which end with the two processes.
"""

from __future__ import annotations

import gc
import os
import random
import selectors
import socket
import struct
import time
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sprint.bench.apart import Helper, be_apart, run_apart
from sprint.bench.detect_dummy import (
    BUFFER_SIZE,
    NETWORK,
    PATIENCE_S,
    WarmUp,
    announce,
    hear_socket,
    mine_blocks,
    ready_connection,
)
from sprint.bench.detect_wire import FAR, FAR_ADDRESS, NEAR, bring_up, enter_namespace, lay
from sprint.bench.percentiles import percentiles_us
from sprint.errors import HostError
from sprint.events import Sighting
from sprint.sources.capture import CaptureSource
from sprint.status import StatusBlock
from sprint.tiers import NS_PER_MS, NS_PER_S
from xdp.attachment import AttachError, attach
from xdp.capture import Capture
from xdp.loader import Loaded, LoadError, load, missing
from xdp.segments import Backend

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection as Pipe

    from sprint.bench.apart import Progress

ANNOUNCEMENTS = 2_000
ROUNDS = 10
WARM_UP = 20
"""Announcements of each turn that aren't counted: caches and interpreter have been elsewhere."""
PAUSE_S = (0.002, 0.004)
"""Between two announcements, at random, so that no rhythm of the reader's fits them."""
REHEARSE_NS = NS_PER_MS


@dataclass(frozen=True, slots=True)
class Mode:
    """One way from the wire to the hash."""

    name: str
    backend: Backend | None
    """None: the socket."""
    busy: bool


MODES = (
    Mode("socket_blocking", None, busy=False),
    Mode("socket_busy", None, busy=True),
    Mode("af_xdp_blocking", Backend.AF_XDP, busy=False),
    Mode("af_xdp_busy", Backend.AF_XDP, busy=True),
    Mode("ringbuf_blocking", Backend.RINGBUF, busy=False),
    Mode("ringbuf_busy", Backend.RINGBUF, busy=True),
)
Times = dict[bytes, int]
"""CLOCK_MONOTONIC ns by block hash."""


def measure_detect(progress: Progress, announcements: int = ANNOUNCEMENTS) -> dict[str, Any]:
    """Results and ratios, of at least that many announcements in each mode.

    Raises HostError where nothing can be captured.
    """
    reason = missing()
    if reason is not None:
        raise HostError(f"detect captures a link of its own: {reason}")
    return run_apart("sprint.bench.detect", {"announcements": announcements}, progress)


def measure(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """measure_detect()'s work, in this process, which must have one thread only."""
    load_before = os.getloadavg()[0]
    rounds = min(ROUNDS, settings["announcements"])
    counted = -(-settings["announcements"] // rounds)
    count = WARM_UP + counted
    blocks = mine_blocks(rounds * len(MODES) * count)
    frames = [announce(block) for block in blocks]
    reader_cpu, sender_cpu = _two_cpus()
    enter_namespace()
    sender = Helper(lambda control: _send(control, frames), sender_cpu)
    try:
        lay(sender.ask("enter"))
        sender.ask("listen")
        if reader_cpu is not None:
            os.sched_setaffinity(0, {reader_cpu})
        with (
            load(NETWORK.magic, [NETWORK.port], every_magic=False) as loaded,
            socket.create_connection((FAR_ADDRESS, NETWORK.port), PATIENCE_S) as ours,
            closing(_Reader(loaded, ours, sender)) as reader,
        ):
            gc.collect()
            gc.freeze()
            gc.disable()  # in no mode shall it fall on an announcement
            first = 0
            for number in range(rounds):
                for place in range(len(MODES)):
                    mode = MODES[(place + number) % len(MODES)]
                    progress(f"announcements by {mode.name}", number, rounds)
                    turn = range(first, first + count)
                    reader.take_turn(mode, [blocks[at].hash for at in turn], turn, sum(len(frames[at]) for at in turn))
                    first += count
                    progress(f"announcements by {mode.name}", number + 1, rounds)
    except (LoadError, AttachError) as error:
        raise HostError(f"detect: {error}") from None
    finally:
        sender.close()
    figures = reader.figures()
    return {
        "results": {
            "modes": figures,
            "captured_share": round(
                sum(mode["captured"] for mode in figures.values()) / sum(mode["sent"] for mode in figures.values()), 6
            ),
            "faster_capture": _faster(figures, ("af_xdp", "ringbuf")),
            "attached": sorted(reader.attached),
            "frame_bytes": max(map(len, frames)),
            "pause_ms": [round(pause_s * 1e3, 3) for pause_s in PAUSE_S],
            "rounds": rounds,
            "reader_cpu": reader_cpu,
            "sender_cpu": sender_cpu,
            "load_average": {"before": load_before, "after": os.getloadavg()[0]},
        },
        "ratios": _ratios(figures),
    }


def _faster(figures: dict[str, dict[str, Any]], prefixes: tuple[str, ...]) -> str:
    return min((name for name in figures if name.startswith(prefixes)), key=lambda name: figures[name]["p50_us"])


def _ratios(figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    """A way's better mode by its median, beside the socket's two; its p99 is of that same mode."""
    capture, xsk = figures[_faster(figures, ("af_xdp", "ringbuf"))], figures[_faster(figures, ("af_xdp",))]
    blocking, busy = figures["socket_blocking"], figures["socket_busy"]
    return {
        "capture_vs_socket_p50": round(capture["p50_us"] / blocking["p50_us"], 4),
        "capture_vs_socket_p99": round(capture["p99_us"] / blocking["p99_us"], 4),
        "capture_vs_socket_busy_p50": round(capture["p50_us"] / busy["p50_us"], 4),
        "xsk_vs_socket_p50": round(xsk["p50_us"] / blocking["p50_us"], 4),
        "xsk_vs_socket_busy_p50": round(xsk["p50_us"] / busy["p50_us"], 4),
    }


def _two_cpus() -> tuple[int | None, int | None]:
    """The reader's and the sender's; None where they must share."""
    usable = sorted(os.sched_getaffinity(0))
    return (usable[-1], usable[0]) if len(usable) > 1 else (None, None)


def _send(control: Pipe, frames: Sequence[bytes]) -> None:
    """The sender's process: its namespace, its end of the wire, and announcements when told."""
    control.recv()
    enter_namespace()
    control.send(os.getpid())
    control.recv()
    bring_up(FAR, FAR_ADDRESS)
    with socket.create_server((FAR_ADDRESS, NETWORK.port)) as listener:
        control.send("listening")
        theirs, _ = listener.accept()
    theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while True:
        first, last = control.recv()
        for at in range(first, last):
            time.sleep(random.uniform(*PAUSE_S))
            theirs.sendall(frames[at])
        control.send(time.monotonic_ns())


class _Reader:
    """Hears the announcements, one mode after the other, on one connection."""

    def __init__(self, loaded: Loaded, ours: socket.socket, sender: Helper) -> None:
        ours.settimeout(None)
        # Not Python's own time-out, which would wait by poll() before each recv().
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(PATIENCE_S), 0))
        self._loaded, self._ours, self._sender = loaded, ours, sender
        self._connection = ready_connection()
        self._buffer = memoryview(bytearray(BUFFER_SIZE))
        self._status = StatusBlock.create(1, {})
        self._warm_up = WarmUp(self._status)
        self._latencies: dict[str, list[int]] = {mode.name: [] for mode in MODES}
        self._counts = {mode.name: {"sent": 0, "heard": 0, "captured": 0} for mode in MODES}
        self.attached: set[str] = set()

    def take_turn(self, mode: Mode, hashes: list[bytes], turn: range, size: int) -> None:
        """One mode: have those announcements sent, `size` bytes in all, and hear them."""
        backend = mode.backend or Backend.RINGBUF
        arrivals: Times = {}
        with (
            attach(self._loaded, NEAR, backends={backend}) as attachment,
            closing(CaptureSource(Capture(attachment.handover()), NETWORK, self._status, (backend,))) as source,
        ):
            self.attached.add(attachment.mode)
            self._sender.tell(turn.start, turn.stop)
            if mode.backend is None:
                heard = self._by_socket(len(hashes), busy=mode.busy)
                self._sender.answer()
                _hear_rest(source, arrivals, len(hashes))
            else:
                heard = self._by_capture(source, arrivals, len(hashes), size, busy=mode.busy)
                self._sender.answer()
        counts = self._counts[mode.name]
        counts["sent"] += len(hashes)
        counts["heard"] += sum(block_hash in heard for block_hash in hashes)
        counts["captured"] += sum(arrivals.get(block_hash, 0) > 0 for block_hash in hashes)
        self._latencies[mode.name] += [
            heard[block_hash] - arrivals[block_hash]
            for block_hash in hashes[WARM_UP:]
            if block_hash in heard and arrivals.get(block_hash, 0) > 0
        ]

    def figures(self) -> dict[str, dict[str, Any]]:
        """By mode: percentiles of what was counted, and counts of all."""
        silent = [name for name, latencies in self._latencies.items() if not latencies]
        if silent:
            raise RuntimeError(f"nothing was heard by {', '.join(silent)}: {self._counts}")
        return {
            name: {**percentiles_us(latencies), "announcements": len(latencies), **self._counts[name]}
            for name, latencies in self._latencies.items()
        }

    def close(self) -> None:
        self._warm_up.close()

    def _by_socket(self, count: int, *, busy: bool) -> Times:
        clock, ours, connection, buffer = time.monotonic_ns, self._ours, self._connection, self._buffer
        flags = socket.MSG_DONTWAIT if busy else 0
        heard: Times = {}
        due_ns, give_up_ns = 0, clock() + int(PATIENCE_S * NS_PER_S)
        while len(heard) < count:
            hashes = hear_socket(ours, connection, buffer, flags)
            now_ns = clock()
            if hashes:
                for block_hash in hashes:
                    heard[block_hash] = now_ns
                give_up_ns, due_ns = now_ns + int(PATIENCE_S * NS_PER_S), now_ns + REHEARSE_NS
            elif now_ns > give_up_ns:
                break
            elif busy and now_ns >= due_ns:
                self._warm_up.perform()
                due_ns = clock() + REHEARSE_NS
        return heard

    def _by_capture(self, source: CaptureSource, arrivals: Times, count: int, size: int, *, busy: bool) -> Times:
        """Also reads the socket, after what is timed, so that TCP goes on as it does in the product."""
        clock, ours, buffer = time.monotonic_ns, self._ours, self._buffer
        times: Times = {}
        due_ns, give_up_ns = 0, clock() + int(PATIENCE_S * NS_PER_S)
        with selectors.DefaultSelector() as selector:
            selector.register(source.fileno(), selectors.EVENT_READ)
            while len(times) < count:
                if not busy:
                    selector.select(PATIENCE_S if source.deadline() is None else 0)
                heard = source.poll(0)  # 0: a segment without a stamp shows as one
                now_ns = clock()
                if heard:
                    for one in heard:
                        assert isinstance(one, Sighting)
                        times[one.hash], arrivals[one.hash] = now_ns, one.seen_ns
                    size -= self._skim(ours, buffer)
                    give_up_ns, due_ns = now_ns + int(PATIENCE_S * NS_PER_S), now_ns + REHEARSE_NS
                elif now_ns > give_up_ns:
                    break
                elif busy and now_ns >= due_ns:
                    self._warm_up.perform()
                    due_ns = clock() + REHEARSE_NS
        while size > 0:  # the next turn's first byte is a message's first byte
            size -= ours.recv_into(buffer, size) or size
        return times

    def _skim(self, ours: socket.socket, buffer: memoryview) -> int:
        try:
            return ours.recv_into(buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0


def _hear_rest(source: CaptureSource, arrivals: Times, count: int) -> None:
    """What the capture has kept of a turn in which nobody read it."""
    give_up_ns = time.monotonic_ns() + NS_PER_S
    while len(arrivals) < count and time.monotonic_ns() < give_up_ns:
        for one in source.poll(0):
            assert isinstance(one, Sighting)
            arrivals.setdefault(one.hash, one.seen_ns)


if __name__ == "__main__":
    be_apart(measure)
