"""`sprint bench ring`, very small: that every record is accounted for, not how fast it is."""

from __future__ import annotations

import json
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from sprint.bench import plots
from sprint.bench.hops import BlockingRingHop, DatagramHop, Hop, IceoryxHop, PipeHop, QueueHop, RingHop
from sprint.bench.percentiles import PERCENTS
from sprint.bench.ring import _read_flat_out, _Reader, _write_flat_out, measure_ring
from sprint.record import SIZE
from sprint.ring import RingReader

ROUNDS, RECORDS = 2, 20
NAMES = ["sprint_busy", "sprint_blocking", "multiprocessing_queue", "pipe", "unix_datagram"]


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, Any], list[tuple[str, int, int]]]:
    steps: list[tuple[str, int, int]] = []
    return measure_ring(lambda *step: steps.append(step), ROUNDS, RECORDS, flat_out=5000), steps


def test_every_way_is_measured_in_the_same_run_and_loses_nothing(
    measured: tuple[dict[str, Any], list[tuple[str, int, int]]],
) -> None:
    result, steps = measured
    hops = result["results"]["hops"]
    assert list(hops) == NAMES + ["iceoryx2"] * IceoryxHop.installed()
    for name, hop in hops.items():
        assert (hop["records"], hop["lost"], hop["torn"]) == (ROUNDS * RECORDS, 0, 0), name
        times = [hop[key] for key in (*(f"p{percent}_us" for percent in PERCENTS), "max_us")]
        assert times == sorted(times)
        assert times[0] > 0.1, f"{name}: no record crosses in less than 100 ns"
        assert times[-1] < 60_000_000, name
        assert (f"records by {name}", ROUNDS, ROUNDS) in steps


def test_the_ratios_are_those_of_the_medians(measured: tuple[dict[str, Any], list[tuple[str, int, int]]]) -> None:
    result, _ = measured
    p50 = {name: hop["p50_us"] for name, hop in result["results"]["hops"].items()}
    ratios = result["ratios"]
    assert ratios["busy_vs_queue"] == pytest.approx(p50["sprint_busy"] / p50["multiprocessing_queue"], abs=1e-4)
    if IceoryxHop.installed():
        assert ratios["busy_vs_iceoryx2"] == pytest.approx(p50["sprint_busy"] / p50["iceoryx2"], abs=1e-4)
    else:
        assert ratios["busy_vs_iceoryx2"] is None


def test_flat_out_every_record_is_read_whole_or_told_as_lost(
    measured: tuple[dict[str, Any], list[tuple[str, int, int]]],
) -> None:
    results = measured[0]["results"]
    flat = results["flat_out"]
    assert results["torn"] == flat["torn"] == flat["out_of_account"] == 0
    assert flat["read"] + flat["lost_and_told"] == flat["written"] == ROUNDS * 5000
    assert min(flat[f"{what}_per_second"] for what in ("written", "read", "drained")) > 1000


def test_it_leaves_no_file_behind(measured: tuple[dict[str, Any], list[tuple[str, int, int]]]) -> None:
    assert not list(Path("/dev/shm").glob("sprint_bench_*"))


@pytest.mark.parametrize("kind", [RingHop, BlockingRingHop, QueueHop, PipeHop, DatagramHop, IceoryxHop])
def test_each_way_brings_the_bytes_that_were_handed_over_in_order(kind: type[Any]) -> None:
    if kind is IceoryxHop and not IceoryxHop.installed():
        pytest.skip("iceoryx2 is not installed")
    hop: Hop = kind()
    receive, hand_over = hop.reader(), hop.writer()
    for number in range(1, 6):
        record = bytearray([number] * SIZE)
        hand_over(record)
        record[:] = bytes(SIZE)  # the next record is written into the same buffer
        assert receive() == bytes([number] * SIZE)
    del receive, hand_over
    hop.close()


def test_a_record_that_is_a_mixture_of_two_is_counted_as_torn() -> None:
    ring, pipe = RingHop(), PipeHop()
    reader = _Reader([pipe], ring)
    ours, theirs = Pipe()
    hand_over = pipe.writer()
    first, second = ((n.to_bytes(8, "little") * 23) + bytes(8) for n in (1, 2))
    for record in (first, first[:96] + second[96:], second):
        hand_over(record)
    ours.send(("pipe", 2))
    ours.send(("unknown", 0))
    with pytest.raises(KeyError, match="unknown"):
        reader.serve(theirs)
    assert ours.recv() == "ready"
    heard = ours.recv()
    assert (heard["torn"], heard["lost"], len(heard["latencies"])) == (1, 0, 2)
    for opened in (ours, theirs, pipe, ring):
        opened.close()


def test_flat_out_a_torn_record_is_counted() -> None:
    hop = RingHop()
    reader, writer = hop.ring_reader(), hop.ring_writer()
    _write_flat_out(writer, 10)
    hop._shared.memory[192 + 3 * SIZE + 100] ^= 1
    read = _read_flat_out(RingReader(reader.ring, since=1), 10)
    assert (read["read"], read["told"], read["torn"], read["drained"]) == (10, 0, 1, 10)
    hop.close()


def test_the_plot_is_a_picture(measured: tuple[dict[str, Any], list[tuple[str, int, int]]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "ring.png"
    plots.plot_ring({"machine": {"cpu": "a CPU", "cpus": 2}, **json.loads(json.dumps(measured[0]))}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
