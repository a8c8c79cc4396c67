"""How long after a packet's arrival at the interface a block is known, and its record in the ring, by each way.

A peer in a network namespace of its own announces blocks over TCP and a veth pair whose near end is captured. The clock
starts in the XDP program, which has CLOCK_MONOTONIC too, when the packet passes that the announcement begins in. Stages
end when Python has the bytes (*seen*), when the source has told the sighting, its hash known (*hash*), and when the
relay has proven it and the record stands in the ring (*record*). All of that is the product's own code.

Three workloads: compact blocks of 3,000 transactions, as on main, 18 kB or 13 packets; blocks announced in one packet,
which is the best that can happen to a socket; and those in one packet behind a lost one, the peer being 20 ms away.

Ways take turns in rounds. In each, only what it needs is attached: for those that aren't a capture, classification and
the ring buffer, whose stamps are read after the turn, so that they don't pay for a mirror that they don't use. AF_XDP
carries them along. Every busy way runs the same warm-up each millisecond, the product's rehearsal. Blocking ways run
none, and sleep in epoll. All run at the same priority, nice -20, as far as we may. The reader has one CPU, and sender,
XDP and TCP the other, where there are two.

Everything made is in two namespaces without names, which end with the two processes.
"""

from __future__ import annotations

import gc
import os
import selectors
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sprint.bench.apart import Helper, be_apart, run_apart
from sprint.bench.detect_announcements import BEHIND_LOSS, NETWORK, ONE_PACKET, REALISTIC, WORKLOADS, announce
from sprint.bench.detect_dummy import rehearsal
from sprint.bench.detect_figures import Noted, figures_of, ratios
from sprint.bench.detect_path import ROUND_TRIP_NS
from sprint.bench.detect_sender import PAUSE_S, be_peer
from sprint.bench.detect_ways import PATIENCE_S, WAYS, PacketCapture, PlainSocket, Seen
from sprint.bench.detect_wire import FAR_ADDRESS, LOSSY_ADDRESS, NEAR, enter_namespace, lay
from sprint.broadcaster import Broadcaster
from sprint.chain import HeaderChain
from sprint.errors import HostError
from sprint.events import PeerReady, Sighting, Source
from sprint.regtest import RegtestChain
from sprint.relay import Relay
from sprint.ring import Ring, RingWriter, size_for
from sprint.sources.capture import CaptureSource
from sprint.status import StatusBlock
from sprint.tiers import NS_PER_MS, NS_PER_S
from xdp.attachment import AttachError, attach
from xdp.capture import Capture
from xdp.loader import Loaded, LoadError, load, missing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sprint.bench.apart import Progress
    from sprint.bench.detect_announcements import Workload
    from sprint.bench.detect_ways import Way
    from sprint.regtest import MinedBlock

ANNOUNCEMENTS = 2_000
ROUNDS = 10
LOSSY_ROUNDS = 4
LOSSY_WAYS = ("socket_blocking", "af_xdp_busy", "ringbuf_busy")
WARM_UP = 10
"""Announcements of each turn that aren't counted: caches and interpreter have been elsewhere."""
LOSSY_WARM_UP = 2
REHEARSE_NS = NS_PER_MS
BEFORE_S = 6 * 3_600
"""The chain begins that long ago: block times must grow, and not run ahead of the clock."""
_RING_SLOTS = 1_024
_DRAINS = 64


def measure_detect(progress: Progress, announcements: int = ANNOUNCEMENTS) -> dict[str, Any]:
    """Results and ratios, of at least that many announcements in each way.

    Raises HostError where nothing can be captured.
    """
    reason = missing()
    if reason is not None:
        raise HostError(f"detect captures a link of its own: {reason}")
    return run_apart("sprint.bench.detect", {"announcements": announcements}, progress)


def turns_of(announcements: int) -> list[tuple[Workload, Way, range, int]]:
    """All turns in their order: workload, way, which blocks, and how many of them are not counted."""
    turns: list[tuple[Workload, Way, range, int]] = []
    first = 0
    for workload in WORKLOADS:
        ways = [way for way in WAYS if not workload.lossy or way.name in LOSSY_WAYS]
        wanted = max(1, int(announcements * workload.share))
        rounds = min(LOSSY_ROUNDS if workload.lossy else ROUNDS, wanted)
        uncounted = LOSSY_WARM_UP if workload.lossy else WARM_UP
        count = uncounted + -(-wanted // rounds)
        for number in range(rounds):
            for place in range(len(ways)):
                turns.append((workload, ways[(place + number) % len(ways)], range(first, first + count), uncounted))
                first += count
    return turns


def measure(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """measure_detect()'s work, in this process, which must have one thread only."""
    load_before, stolen_before = os.getloadavg()[0], _stolen_ns()
    turns = turns_of(settings["announcements"])
    blocks = RegtestChain().extend(turns[-1][2].stop, int(time.time()) - BEFORE_S)
    reader_cpu, sender_cpu = _two_cpus()
    enter_namespace()
    sender = Helper(lambda control: be_peer(control, blocks), sender_cpu)
    try:
        mac = lay(sender.ask("enter"))
        sender.ask(mac)
        if reader_cpu is not None:
            os.sched_setaffinity(0, {reader_cpu})
        with (
            load(NETWORK.magic, [NETWORK.port], every_magic=False) as loaded,
            closing(_Reader(loaded, sender, blocks)) as reader,
        ):
            gc.collect()
            gc.freeze()
            gc.disable()  # in no way shall it fall on an announcement
            for done, (workload, way, turn, uncounted) in enumerate(turns):
                progress("turns", done, len(turns))
                reader.take_turn(workload, way, turn, uncounted)
            progress("turns", len(turns), len(turns))
    except (LoadError, AttachError) as error:
        raise HostError(f"detect: {error}") from None
    finally:
        sender.close()
    workloads = {workload.name: figures_of(reader.noted[workload.name], workload) for workload in WORKLOADS}
    for workload in WORKLOADS:
        size = len(announce(blocks[-1], workload.short_ids))
        workloads[workload.name] |= {"announcement_bytes": size, "transactions": workload.short_ids + 1}
    workloads[BEHIND_LOSS.name]["round_trip_ms"] = ROUND_TRIP_NS / NS_PER_MS
    workloads[BEHIND_LOSS.name]["packets_lost"] = reader.lost
    sent = sum(sum(way["sent"] for way in one["ways"].values()) for one in workloads.values())
    captured = sum(sum(way["captured"] for way in one["ways"].values()) for one in workloads.values())
    return {
        "results": {
            **workloads,
            "captured_share": round(captured / sent, 6),
            "attached": sorted(reader.attached),
            "pause_ms": [round(pause_s * 1e3, 3) for pause_s in PAUSE_S],
            "reader_cpu": reader_cpu,
            "sender_cpu": sender_cpu,
            "nice": os.nice(0),
            "load_average": {"before": load_before, "after": os.getloadavg()[0]},
            "stolen_ms": round((_stolen_ns() - stolen_before) / NS_PER_MS),
        },
        "ratios": {
            **ratios(workloads[REALISTIC.name], ""),
            **ratios(workloads[ONE_PACKET.name], "one_packet_"),
            "behind_loss_p50": workloads[BEHIND_LOSS.name]["vs_socket_p50"],
        },
    }


def _two_cpus() -> tuple[int | None, int | None]:
    """The reader's and the sender's; None where they must share."""
    usable = sorted(os.sched_getaffinity(0))
    return (usable[-1], usable[0]) if len(usable) > 1 else (None, None)


def _stolen_ns() -> int:
    """Time in which a hypervisor ran somebody else, of all CPUs together since the start (proc(5))."""
    first = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
    return int(first.split()[8]) * NS_PER_S // os.sysconf("SC_CLK_TCK")


class _Reader:
    """Hears the announcements, one way after the other, into one relay with one ring."""

    def __init__(self, loaded: Loaded, sender: Helper, blocks: Sequence[MinedBlock]) -> None:
        self._loaded, self._sender, self._blocks = loaded, sender, blocks
        self._direct, self._lossy = PlainSocket(FAR_ADDRESS), PlainSocket(LOSSY_ADDRESS)
        self._status = StatusBlock.create(1, {})
        self._rehearsal = rehearsal()
        self._relay = Relay(HeaderChain(NETWORK))
        self._relay.peer_ready(PeerReady(Source.P2P, "bench", 0), 0)
        self._relay.take_wants()
        ring = Ring.create(bytearray(size_for(_RING_SLOTS)), _RING_SLOTS, 1)
        self._broadcaster = Broadcaster(RingWriter(ring), NETWORK.magic, (), time.monotonic_ns)
        self.noted: dict[str, dict[str, Noted]] = {workload.name: {} for workload in WORKLOADS}
        self.attached: set[str] = set()
        self.lost = 0

    def take_turn(self, workload: Workload, way: Way, turn: range, uncounted: int) -> None:
        """One way: have those blocks announced, and hear them."""
        noted = self.noted[workload.name].setdefault(way.name, Noted())
        plain = self._lossy if workload.lossy else self._direct
        noted.begin([self._blocks[at].hash for at in turn], uncounted)
        with (
            attach(self._loaded, NEAR, backends={way.backend}) as attachment,
            closing(Capture(attachment.handover())) as capture,
        ):
            self.attached.add(attachment.mode)
            self._sender.tell(turn.start, turn.stop, workload.short_ids, workload.lossy)
            if way.kind == "socket":
                self._listen(plain, plain, noted, None, busy=way.busy)
            else:
                seen = Seen(PacketCapture() if way.kind == "packet" else capture)
                source = CaptureSource(seen, NETWORK, self._status)
                self._listen(source, seen, noted, plain, busy=way.busy)
                if way.kind == "packet":
                    seen.close()
            self.lost = self._sender.answer()
            if way.kind in {"socket", "packet"}:
                self._read_arrivals(CaptureSource(capture, NETWORK, self._status), noted)
        # What was lost on the way would leave those behind it without a parent.
        for at in turn:
            self._relay.chain.accept(self._blocks[at].header.encode(), time.time())

    def close(self) -> None:
        """Close all connections."""
        self._direct.close()
        self._lossy.close()
        self._rehearsal.close()

    def _listen(
        self, source: CaptureSource | PlainSocket, eye: Seen | PlainSocket, noted: Noted, plain: PlainSocket | None,
        *, busy: bool,
    ) -> None:  # fmt: skip
        """Hear a turn's announcements. `plain`, a way that is not measured, is read behind what is timed."""
        clock, relay, broadcaster, perform = time.monotonic_ns, self._relay, self._broadcaster, self._rehearsal.perform
        left, drained = len(noted.turn), 0
        due_ns, give_up_ns = 0, clock() + int(PATIENCE_S * NS_PER_S)
        with selectors.DefaultSelector() as selector:
            selector.register(source.fileno(), selectors.EVENT_READ)
            while left:
                if not busy:
                    selector.select(PATIENCE_S if source.deadline() is None else 0)
                heard = source.poll(0)  # 0: a segment without a stamp shows as one
                hash_ns = clock()
                if heard:
                    for one in heard:
                        assert isinstance(one, Sighting)
                        for block in relay.offer(one, hash_ns, time.time_ns()):
                            broadcaster.write(block)
                        left -= noted.note(one, eye.seen_ns, hash_ns, clock())
                    relay.take_journal()
                    relay.take_headers()
                    relay.take_wants()
                    if plain is not None:
                        drained += _drain(plain, _DRAINS)
                    now_ns = clock()
                    give_up_ns, due_ns = now_ns + int(PATIENCE_S * NS_PER_S), now_ns + REHEARSE_NS
                elif hash_ns > give_up_ns:
                    break
                elif busy and hash_ns >= due_ns:
                    perform()
                    due_ns = clock() + REHEARSE_NS
        # The next turn's first byte is a message's first byte.
        while plain is not None and drained < len(noted.turn) and clock() < give_up_ns:
            drained += _drain(plain, 1)

    def _read_arrivals(self, source: CaptureSource, noted: Noted) -> None:
        """What the capture has kept of a turn in which nobody read it."""
        give_up_ns = time.monotonic_ns() + NS_PER_S
        while noted.unstamped and time.monotonic_ns() < give_up_ns:
            for one in source.poll(0):
                assert isinstance(one, Sighting)
                noted.stamp(one.hash, one.seen_ns)


def _drain(plain: PlainSocket, reads: int) -> int:
    """Read until something is announced, at most that often; how much was announced."""
    for _ in range(reads):
        heard = plain.poll(0)
        if heard:
            return len(heard)
    return 0


if __name__ == "__main__":
    be_apart(measure)
