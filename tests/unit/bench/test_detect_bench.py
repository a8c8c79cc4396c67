"""`sprint bench detect`, very small: that every announcement is heard and stamped by each way, not how fast it is."""

from __future__ import annotations

import json
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from sprint.bench import plots
from sprint.bench.detect import LOSSY_WAYS, ROUNDS, WARM_UP, measure_detect, turns_of
from sprint.bench.detect_announcements import (
    BEHIND_LOSS,
    NETWORK,
    ONE_PACKET,
    REALISTIC,
    WORKLOADS,
    announce,
    transactions_announced,
)
from sprint.bench.detect_figures import STAGES, Noted, faster, figures_of, ratios
from sprint.bench.detect_path import DEVICE
from sprint.bench.detect_ways import WAYS, connected_upstream
from sprint.bench.detect_wire import FAR, NEAR
from sprint.bench.percentiles import PERCENTS
from sprint.bitcoin.compact import CmpctBlock
from sprint.bitcoin.connection import Connection, ConnectionConfig, Phase, Role
from sprint.bitcoin.framing import FRAME_HEADER_SIZE, Framer
from sprint.events import Announcement, Sighting, Source
from sprint.regtest import RegtestChain
from xdp.loader import missing

if TYPE_CHECKING:
    from pathlib import Path

ANNOUNCEMENTS = 20
RATIOS = (
    "capture_vs_socket_p50",
    "capture_vs_socket_p99",
    "capture_vs_socket_busy_p50",
    "xsk_vs_socket_p50",
    "xsk_vs_socket_busy_p50",
)
Measured = tuple[dict[str, Any], list[tuple[str, int, int]]]


@pytest.fixture(scope="module")
def measured() -> Measured:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    steps: list[tuple[str, int, int]] = []
    result = measure_detect(lambda *step: steps.append(step), ANNOUNCEMENTS)
    assert not {NEAR, FAR, DEVICE} & {name for _, name in socket.if_nameindex()}
    return result, steps


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_every_way_hears_every_announcement_and_knows_its_arrival(measured: Measured, workload: Any) -> None:
    ways = measured[0]["results"][workload.name]["ways"]
    assert set(ways) == (set(LOSSY_WAYS) if workload.lossy else {way.name for way in WAYS})
    for name, way in ways.items():
        assert way["sent"] == way["heard"] == way["captured"] > way["count"] > 0, name
        for stage in STAGES:
            times = [way[stage][key] for key in (*(f"p{percent}_us" for percent in PERCENTS), "max_us")]
            assert times == sorted(times)
            assert 1 < times[0] <= times[-1] < 5_000_000, f"{name}: {stage}"
        assert way["seen"]["p50_us"] < way["hash"]["p50_us"] < way["record"]["p50_us"], name
    assert measured[0]["results"]["captured_share"] == 1


def test_behind_a_lost_packet_a_socket_waits_for_it_and_a_capture_does_not(measured: Measured) -> None:
    figures = measured[0]["results"][BEHIND_LOSS.name]
    round_trip_us = figures["round_trip_ms"] * 1e3
    for name, way in figures["ways"].items():
        assert (way["hash"]["p50_us"] >= round_trip_us) is name.startswith("socket"), name
    sent = sum(way["sent"] for way in figures["ways"].values())
    assert 0.7 * sent < figures["packets_lost"] <= sent, "all but what TCP has put into one packet with another"


def test_the_ratios_are_those_of_the_realistic_announcement_and_the_others_bear_their_name(measured: Measured) -> None:
    results, found = measured[0]["results"], measured[0]["ratios"]
    assert set(found) == {*RATIOS, *(f"one_packet_{name}" for name in RATIOS), "behind_loss_p50"}
    for workload, prefix in ((REALISTIC, ""), (ONE_PACKET, "one_packet_")):
        ways = results[workload.name]["ways"]
        best = ways[results[workload.name]["faster_capture"]]["hash"]["p50_us"]
        share = best / ways["socket_blocking"]["hash"]["p50_us"]
        assert found[f"{prefix}capture_vs_socket_p50"] == pytest.approx(share, abs=1e-4)
    assert results[REALISTIC.name]["announcement_bytes"] > 18_000
    assert results[ONE_PACKET.name]["announcement_bytes"] < 1_400


def test_progress_is_told_from_the_first_turn_to_the_last(measured: Measured) -> None:
    steps = measured[1]
    total = len(turns_of(ANNOUNCEMENTS))
    assert steps == [("turns", done, total) for done in range(total + 1)]


def test_the_plot_is_a_picture(measured: Measured, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "detect.png"
    plots.plot_detect({"machine": {"cpu": "a CPU", "cpus": 2}, **json.loads(json.dumps(measured[0]))}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


# ── without a kernel ──


@pytest.mark.parametrize("announcements", [1, 7, 20, 2_000])
def test_ways_take_turns_and_no_block_is_announced_twice(announcements: int) -> None:
    turns = turns_of(announcements)
    at = 0
    for _, _, turn, uncounted in turns:
        assert turn.start == at
        assert len(turn) > uncounted
        at = turn.stop
    for workload in WORKLOADS:
        counted = {way.name: 0 for _, way, _, _ in turns}
        for one, way, turn, uncounted in turns:
            counted[way.name] += (len(turn) - uncounted) * (one is workload)
        assert {count for count in counted.values() if count} == {max(counted.values())}
        assert max(counted.values()) >= int(announcements * workload.share)
    realistic = [way.name for workload, way, _, _ in turns if workload is REALISTIC]
    first = {tuple(realistic[at : at + len(WAYS)]) for at in range(0, len(realistic), len(WAYS))}
    assert len(first) == min(ROUNDS, announcements, len(WAYS)), "each round begins with another way"
    assert turns[0][3] == WARM_UP


@pytest.mark.parametrize("short_ids", [0, 1, 252, 253, 3_000])
def test_an_announcement_is_sound_and_as_long_as_its_transactions_make_it(short_ids: int) -> None:
    (block,) = RegtestChain().extend(1, 1_700_000_000)
    message = announce(block, short_ids)
    ((command, payload, _),) = Framer(NETWORK.magic).receive(message)
    compact = CmpctBlock.parse(payload)
    assert (command, compact.header, len(compact.short_ids)) == ("cmpctblock", block.header.encode(), short_ids)
    assert len(message) - FRAME_HEADER_SIZE == len(payload)
    assert announce(block, short_ids).startswith(message[:20]), "only the ids are random"


def test_what_goes_before_fits_one_packet_and_is_never_the_same_twice() -> None:
    one, other = transactions_announced(), transactions_announced()
    assert len(one) == len(other) < 1_400
    assert one != other


def sighting(number: int, peer: str, seen_ns: int) -> Sighting:
    return Sighting(Source.CAPTURE, peer, Announcement.CMPCTBLOCK, bytes([number]) * 32, None, seen_ns)


def test_what_is_noted_counts_once_and_from_its_arrival_whenever_that_becomes_known() -> None:
    noted = Noted()
    noted.begin([bytes([number]) * 32 for number in range(4)], 1)
    for number in range(3):
        assert noted.note(sighting(number, "host:1", 777), 1_010, 1_020, 1_030)
    assert not noted.note(sighting(1, "host:1", 777), 9_999, 9_999, 9_999), "the first time is what counts"
    assert not noted.note(sighting(9, "host:1", 777), 9_999, 9_999, 9_999), "another turn's"
    assert noted.unstamped == 4
    for number in (0, 1, 3, 1, 9):
        noted.stamp(bytes([number]) * 32, 1_000 + number)
    assert noted.unstamped == 1
    assert noted.latencies == {"seen": [9], "hash": [19], "record": [29]}, "0 was to warm up, 2 unstamped, 3 unheard"
    assert (noted.sent, noted.heard, noted.captured) == (4, 3, 3)
    noted.begin([bytes([5]) * 32], 0)
    assert noted.note(sighting(5, "capture ringbuf", 2_000), 2_001, 2_002, 2_003)
    assert noted.latencies["seen"] == [9, 1], "a capture's sighting brings its arrival along"


def test_ratios_divide_the_better_mode_by_the_sockets() -> None:
    medians = {"socket_blocking": 200, "socket_busy": 50, "af_xdp_blocking": 150, "af_xdp_busy": 40}
    medians |= {"packet_blocking": 5, "ringbuf_blocking": 100, "ringbuf_busy": 10}
    ways = {name: {"hash": {"p50_us": float(p50), "p99_us": 3.0 * p50}} for name, p50 in medians.items()}
    assert faster(ways, ("af_xdp", "ringbuf")) == "ringbuf_busy"
    assert ratios({"ways": ways}, "x_") == {
        "x_capture_vs_socket_p50": 0.05,
        "x_capture_vs_socket_p99": 0.05,
        "x_capture_vs_socket_busy_p50": 0.2,
        "x_xsk_vs_socket_p50": 0.2,
        "x_xsk_vs_socket_busy_p50": 0.8,
    }


def test_a_way_that_hears_nothing_is_an_error_and_no_figure() -> None:
    with pytest.raises(RuntimeError, match="realistic: nothing was heard by ringbuf_busy"):
        figures_of({"ringbuf_busy": Noted()}, REALISTIC)


def test_an_upstream_connects_and_shakes_hands_with_any_responder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        upstream = connected_upstream(*listener.getsockname())
        theirs, _ = listener.accept()

    def respond() -> None:
        peer = Connection(ConnectionConfig(network=NETWORK, role=Role.RESPONDER), 1, 0, 1)
        while peer.phase is not Phase.READY:
            peer.receive_data(theirs.recv(1 << 16), 0)
            theirs.sendall(peer.data_to_send())

    with theirs:
        theirs.settimeout(5)
        thread = threading.Thread(target=respond)
        thread.start()
        upstream.on_writable(0)
        assert upstream.socket is not None
        upstream.socket.settimeout(5)
        buffer = memoryview(bytearray(1 << 16))
        while not upstream.ready:
            upstream.on_readable(buffer)
            assert upstream.socket is not None, upstream.account.last_error
        thread.join()
        upstream.close()
