"""How long a record takes from a writer process into a reader process: our ring beside other ways, in one run.

One writer and one reader process, each on a CPU of its own where there are two, open every hop at the start. Rounds
then go through the hops in turn, so that what else the machine does falls on all alike. A record is 23 times its
sequence, then the writer's CLOCK_MONOTONIC just before it hands the record over: a mixture of two is neither. The
reader's clock stops when it has its own copy, validated. Between two sends the writer sleeps, then spins: asleep it
leaves interpreter and CPU to the Queue's own thread, and spinning it warms up like a relay that polls its sources.

Flat out, the ring's writer doesn't pause at all and overtakes its reader, which must say exactly what it lost.
"""

from __future__ import annotations

import os
import struct
import time
from array import array
from typing import TYPE_CHECKING, Any, Final

from sprint.bench.apart import Helper, be_apart, run_apart
from sprint.bench.hops import (
    BlockingRingHop,
    Buffer,
    DatagramHop,
    Hop,
    IceoryxHop,
    PipeHop,
    QueueHop,
    RingHop,
)
from sprint.bench.percentiles import median, percentiles_us
from sprint.record import SIZE
from sprint.ring import RingReader
from sprint.tiers import NS_PER_US

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from sprint.bench.apart import Progress
    from sprint.ring import RingWriter

ROUNDS = 20
RECORDS = 1_000
"""In one round of one hop: over all rounds enough for twenty of them beyond the 99.9th percentile."""
WARM_UP = 50
"""Records of each round that aren't counted: the path has been cold while others had their turn."""
PAUSE_US = 500
FLAT_OUT = 100_000

_SEQUENCE = struct.Struct("<Q")
_STAMP_OFFSET = SIZE - _SEQUENCE.size
_REPEATS = _STAMP_OFFSET // _SEQUENCE.size
_FLAT_OUT_CONTENTS: Final = [n.to_bytes(8, "little") * (SIZE // 8) for n in range(4099)]
"""By sequence modulo their number, a prime above the ring's: records of different rounds of one slot always differ."""


def measure_ring(
    progress: Progress, rounds: int = ROUNDS, records: int = RECORDS, flat_out: int = FLAT_OUT
) -> dict[str, Any]:
    """Results and ratios. `rounds` of `records` counted records for each hop, and of `flat_out` records without pause.

    Raises HostError when there is no shared memory.
    """
    settings = {"rounds": rounds, "records": records, "flat_out": flat_out}
    return run_apart("sprint.bench.ring", settings, progress)


def measure(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """measure_ring()'s work, in this process, which must have one thread only."""
    rounds, records, flat_out = settings["rounds"], settings["records"], settings["flat_out"]
    load_before = os.getloadavg()[0]
    ring = RingHop()
    hops: list[Hop] = [RingHop(), BlockingRingHop(), QueueHop(), PipeHop(), DatagramHop()]
    iceoryx = IceoryxHop() if IceoryxHop.installed() else None
    if iceoryx is not None:
        hops.append(iceoryx)
    writer_cpu, reader_cpu = _two_cpus()
    reader = Helper(lambda control: _Reader(hops, ring).serve(control), reader_cpu)
    writer = Helper(lambda control: _Writer(hops, ring).serve(control), writer_cpu)
    try:
        latencies: dict[str, array[int]] = {hop.name: array("q") for hop in hops}
        lost = {hop.name: 0 for hop in hops}
        torn = {hop.name: 0 for hop in hops}
        flat: list[dict[str, int]] = []
        for number in range(rounds):
            for hop in hops:
                progress(f"records by {hop.name}", number, rounds)
                heard = _round(writer, reader, hop.name, WARM_UP + records)
                latencies[hop.name].extend(heard["latencies"][WARM_UP:])
                lost[hop.name] += heard["lost"]
                torn[hop.name] += heard["torn"]
                progress(f"records by {hop.name}", number + 1, rounds)
            flat.append(_round(writer, reader, "", flat_out))
    finally:
        writer.close()
        reader.close()
        for hop in (ring, *hops):
            hop.close()
    ways: dict[str, dict[str, float]] = {
        name: {**percentiles_us(times), "records": len(times), "lost": lost[name], "torn": torn[name]}
        for name, times in latencies.items()
    }
    ours = ways[RingHop.name]
    return {
        "results": {
            "torn": torn[RingHop.name] + torn[BlockingRingHop.name] + sum(each["torn"] for each in flat),
            "hops": ways,
            "flat_out": _flat_out_figures(flat, flat_out),
            "record_bytes": SIZE,
            "pause_us": PAUSE_US,
            "rounds": rounds,
            "writer_cpu": writer_cpu,
            "reader_cpu": reader_cpu,
            "load_average": {"before": load_before, "after": os.getloadavg()[0]},
        },
        "ratios": {
            "busy_vs_queue": round(ours["p50_us"] / ways[QueueHop.name]["p50_us"], 4),
            # null: the package isn't there to be measured
            "busy_vs_iceoryx2": round(ours["p50_us"] / ways[iceoryx.name]["p50_us"], 4) if iceoryx else None,
            "blocking_vs_pipe": round(ways[BlockingRingHop.name]["p50_us"] / ways[PipeHop.name]["p50_us"], 4),
        },
    }


def _round(writer: Helper, reader: Helper, name: str, count: int) -> dict[str, Any]:
    """One round of one hop, or with no name of the ring flat out: what the reader, and then the writer, says of it."""
    reader.ask(name, count)  # it stands ready
    sent = writer.ask(name, count)
    return {**sent, **reader.answer()}


def _flat_out_figures(flat: list[dict[str, int]], count: int) -> dict[str, int]:
    return {
        "written_per_second": median(count * 1_000_000_000 // each["writing_ns"] for each in flat),
        "read_per_second": median(each["read"] * 1_000_000_000 // each["reading_ns"] for each in flat),
        "drained_per_second": median(each["drained"] * 1_000_000_000 // each["draining_ns"] for each in flat),
        "written": count * len(flat),
        "read": sum(each["read"] for each in flat),
        "lost_and_told": sum(each["told"] for each in flat),
        "torn": sum(each["torn"] for each in flat),
        "out_of_account": sum(count - each["read"] - each["told"] for each in flat),
    }


def _two_cpus() -> tuple[int | None, int | None]:
    """The writer's and the reader's; None where they must share."""
    usable = sorted(os.sched_getaffinity(0))
    return (usable[-1], usable[0]) if len(usable) > 1 else (None, None)


class _Writer:
    """The writer's process."""

    def __init__(self, hops: list[Hop], ring: RingHop) -> None:
        """`ring` is for flat out."""
        self._ends = {hop.name: hop.writer() for hop in hops}
        self._sent = dict.fromkeys(self._ends, 0)
        self._ring = ring.ring_writer()

    def serve(self, control: Connection) -> None:
        while True:
            name, count = control.recv()
            if name:
                first = self._sent[name] + 1
                self._sent[name] += count
                _send_round(self._ends[name], first, count)
                control.send({})
            else:
                control.send({"writing_ns": _write_flat_out(self._ring, count)})


def _send_round(hand_over: Callable[[Buffer], object], first: int, count: int) -> None:
    clock, stamp, pause_ns = time.monotonic_ns, _SEQUENCE.pack_into, PAUSE_US * NS_PER_US
    record = bytearray(SIZE)
    for sequence in range(first, first + count):
        due = clock() + pause_ns
        record[:_STAMP_OFFSET] = _SEQUENCE.pack(sequence) * _REPEATS
        time.sleep(pause_ns / 2e9)
        while clock() < due:
            pass
        stamp(record, _STAMP_OFFSET, clock())
        hand_over(record)


def _write_flat_out(writer: RingWriter, count: int) -> int:
    """Nanoseconds."""
    contents, kinds = _FLAT_OUT_CONTENTS, len(_FLAT_OUT_CONTENTS)
    first = writer.next_sequence
    begun = time.monotonic_ns()
    for sequence in range(first, first + count):
        writer.claim()[:] = contents[sequence % kinds]
        writer.commit(best=False)
    return time.monotonic_ns() - begun


class _Reader:
    """The reader's process."""

    def __init__(self, hops: list[Hop], ring: RingHop) -> None:
        """`ring` is for flat out."""
        self._ends = {hop.name: hop.reader() for hop in hops}
        self._received = dict.fromkeys(self._ends, 0)
        self._ring = ring.ring_reader()

    def serve(self, control: Connection) -> None:
        while True:
            name, count = control.recv()
            if name:
                last = self._received[name] + count
                control.send("ready")
                heard = _receive_round(self._ends[name], self._received[name], last)
                self._received[name] = last
            else:
                control.send("ready")
                heard = _read_flat_out(self._ring, count)
            control.send(heard)


def _receive_round(receive: Callable[[], bytes], newest: int, last: int) -> dict[str, Any]:
    """Until the last one: neither a full ring nor a full queue of any hop gives up that one."""
    clock = time.monotonic_ns
    latencies: array[int] = array("q")
    lost = torn = 0
    while newest < last:
        record = receive()
        now = clock()
        (sequence,) = _SEQUENCE.unpack_from(record)
        if record[:_STAMP_OFFSET] != _SEQUENCE.pack(sequence) * _REPEATS:
            torn += 1
            continue
        latencies.append(now - _SEQUENCE.unpack_from(record, _STAMP_OFFSET)[0])
        lost += sequence - newest - 1
        newest = sequence
    return {"latencies": latencies, "lost": lost, "torn": torn}


def _read_flat_out(reader: RingReader, count: int) -> dict[str, int]:
    contents, kinds, read = _FLAT_OUT_CONTENTS, len(_FLAT_OUT_CONTENTS), reader.read
    last = reader.cursor + count - 1
    got = told = torn = begun = 0
    while reader.cursor <= last:
        record = read()
        if record is None:
            continue
        begun = begun or time.monotonic_ns()
        if isinstance(record, bytes):
            got += 1
            if record != contents[(reader.cursor - 1) % kinds]:
                torn += 1
        else:
            told += record.lost
    ended = time.monotonic_ns()
    standing = RingReader(reader.ring, since=reader.ring.oldest)
    draining = standing.behind
    while standing.read():
        pass
    return {
        "reading_ns": ended - begun,
        "read": got,
        "told": told,
        "torn": torn,
        "drained": draining,
        "draining_ns": time.monotonic_ns() - ended,
    }


if __name__ == "__main__":
    be_apart(measure)
