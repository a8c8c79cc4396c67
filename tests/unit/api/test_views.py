"""What the API says of health, sources and blocks."""

from __future__ import annotations

import hashlib
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from sprint.api import views
from sprint.chain import Reject
from sprint.events import Source, State
from sprint.histograms import Histogram
from sprint.ledger import REJECT_INDEX
from sprint.status import BLOCKS, MARKS, StatusBlock, writing
from sprint.tiers import NS_PER_S, Tier
from tests.unit.api.conftest import FIRST_SEEN_NS, SESSION, facts_of, fill, record_of

if TYPE_CHECKING:
    from flask.testing import FlaskClient

NOW_NS = 100 * NS_PER_S


@pytest.fixture
def healthy(status: StatusBlock) -> StatusBlock:
    """The status block with its heartbeat at NOW_NS."""
    status.relay.heartbeat_ns = NOW_NS
    return status


def test_health_tells_what_runs_where_and_for_how_long(healthy: StatusBlock) -> None:
    assert views.health(healthy, NOW_NS, healthy.layout.started_wall_ns + 90 * NS_PER_S) == {
        "status": "ok",
        "problems": [],
        "warnings": [],
        "version": "0.1.0",
        "engine": "standard",
        "tier": "turbo",
        "network": "regtest",
        "tip_height": 7,
        "caught_up": True,
        "sequence": 9,
        "session": f"{SESSION:016x}",
        "uptime_seconds": 90.0,
        "heartbeat_age_seconds": 0.0,
        "upstreams_connected": 1,
        "subscribers": {"free": 0, "pro": 0, "business": 0, "turbo": 0, "enterprise": 0},
        "processes": [],
        "optimizations": [],
        "rejected": dict.fromkeys((reason.value for reason in Reject), 0),
    }


def test_health_shows_processes_optimisations_and_rejections(healthy: StatusBlock) -> None:
    relay, api = healthy.layout.processes[:2]
    relay.name, relay.pid, relay.restarts = b"relay", 41, 2
    api.name, api.pid = b"api", 42
    step = healthy.layout.steps[0]
    step.name, step.applied, step.detail = b"realtime", 0, b"CAP_SYS_NICE is missing"
    healthy.relay.rejected[REJECT_INDEX[Reject.BAD_BITS]] = 3
    answer = views.health(healthy, NOW_NS, 0)
    assert answer["processes"] == [
        {"name": "relay", "pid": 41, "restarts": 2},
        {"name": "api", "pid": 42, "restarts": 0},
    ]
    assert answer["optimizations"] == [{"name": "realtime", "applied": False, "detail": "CAP_SYS_NICE is missing"}]
    assert answer["rejected"]["bad_bits"] == 3
    assert answer["status"] == "ok"


def test_a_process_that_is_being_restarted_is_a_problem(healthy: StatusBlock) -> None:
    healthy.layout.processes[0].name = b"stream-0"
    assert views.health(healthy, NOW_NS, 0)["problems"] == ["processes: being restarted: stream-0"]


def test_a_process_that_runs_is_unhealthy_until_it_serves_and_so_is_its_successor(healthy: StatusBlock) -> None:
    process, delivery = healthy.layout.processes[0], healthy.delivery(5, "shm")
    process.name, process.pid = b"shm", 4711
    healthy.layout.processes[1].name, healthy.layout.processes[1].pid = b"relay", 4712
    problem = ["processes: not serving yet: shm"]
    assert views.health(healthy, NOW_NS, 0)["problems"] == problem
    delivery.pid = 4711
    assert views.health(healthy, NOW_NS, 0)["problems"] == []
    process.pid = 4713
    assert views.health(healthy, NOW_NS, 0)["problems"] == problem


def test_deliveries_give_each_tier_its_accounts(healthy: StatusBlock) -> None:
    section = healthy.delivery(0, "stream")
    section.accepted = 5
    accounts = section.tiers[Tier.PRO]
    accounts.subscribers, accounts.on_time, accounts.dropped = 2, 7, 1
    Histogram(accounts.relay_latency).record(90_000)
    (delivery,) = views.deliveries(healthy)["deliveries"]
    assert (delivery["name"], delivery["accepted"], list(delivery["tiers"])) == (
        "stream",
        5,
        ["free", "pro", "business", "turbo", "enterprise"],
    )
    pro = delivery["tiers"]["pro"]
    assert (pro["subscribers"], pro["on_time"], pro["dropped"], pro["relay_p50_us"]) == (2, 7, 1, 90.0)
    assert delivery["tiers"]["free"]["relay_p50_us"] is None


def test_a_relay_is_healthy_until_its_last_turn_is_older_than_three_seconds(healthy: StatusBlock) -> None:
    assert views.health(healthy, NOW_NS + 3 * NS_PER_S, 0)["status"] == "ok"
    answer = views.health(healthy, NOW_NS + 3 * NS_PER_S + 1, 0)
    assert answer["status"] == "unhealthy"
    assert answer["problems"] == ["relay: last turn 3.0 s ago, expected within 3 s"]


def test_a_relay_that_has_not_begun_is_a_problem_of_its_own(healthy: StatusBlock) -> None:
    healthy.relay.heartbeat_ns = 0
    answer = views.health(healthy, NOW_NS, 0)
    assert answer["problems"] == ["relay: has not begun its first turn"]
    assert answer["heartbeat_age_seconds"] is None


def test_no_upstream_connected_is_a_problem_that_names_them(healthy: StatusBlock) -> None:
    healthy.layout.peers[0].connected = 0
    answer = views.health(healthy, NOW_NS, 0)
    assert answer["problems"] == ["upstreams: none connected of 127.0.0.1:18444, 127.0.0.2:18444"]


def test_every_problem_has_its_line() -> None:
    answer = views.health(StatusBlock.create(1, facts_of(Tier.FREE)), NOW_NS, 0)
    assert [line.split(":")[0] for line in answer["problems"]] == ["relay", "upstreams", "header chain"]


def test_a_clock_set_back_makes_no_negative_uptime(healthy: StatusBlock) -> None:
    assert views.health(healthy, NOW_NS, 0)["uptime_seconds"] == 0.0


def test_subscribers_are_summed_over_deliveries_by_tier(healthy: StatusBlock) -> None:
    stream, udp = healthy.delivery(0, "stream"), healthy.delivery(1, "udp")
    stream.tiers[Tier.TURBO].subscribers = 2
    udp.tiers[Tier.TURBO].subscribers = 40
    udp.tiers[Tier.ENTERPRISE].subscribers = 5
    healthy.layout.deliveries[2].tiers[Tier.TURBO].subscribers = 1_000  # not taken by a delivery: not counted
    subscribers = views.health(healthy, NOW_NS, 0)["subscribers"]
    assert subscribers == {"free": 0, "pro": 0, "business": 0, "turbo": 42, "enterprise": 5}


def test_a_source_tells_how_often_it_was_first_and_by_how_much(status: StatusBlock) -> None:
    row = status.layout.peers[0]
    with writing(row):
        row.source, row.high_bandwidth, row.height = Source.P2P, 1, 1_000
        row.agent, row.last_error = b"/Satoshi:30.0.0/", b"connection reset"
        row.sightings, row.first = 10, 4
        row.lead_ns, row.leads, row.behind_ns, row.behinds = 4_500, 3, 60_000, 6
        row.rtt_ns, row.connects, row.failures, row.skipped_messages = 250_500, 2, 1, 5
        row.bytes_received = 2**40
    assert views.sources(status)["sources"][0] == {
        "name": "127.0.0.1:18444",
        "source": "p2p",
        "connected": True,
        "agent": "/Satoshi:30.0.0/",
        "high_bandwidth": True,
        "height": 1_000,
        "sightings": 10,
        "first": 4,
        "mean_lead_us": 1.5,
        "mean_behind_us": 10.0,
        "rtt_us": 250.5,
        "connects": 2,
        "failures": 1,
        "skipped_messages": 5,
        "lost_messages": 0,
        "silent_seconds": None,
        "bytes_received": 2**40,
        "last_error": "connection reset",
    }


def test_what_is_not_known_of_a_source_is_null_and_not_zero(status: StatusBlock) -> None:
    source = views.sources(status)["sources"][1]
    for key in ("source", "agent", "mean_lead_us", "mean_behind_us", "rtt_us", "last_error"):
        assert source[key] is None, key
    assert source["connected"] is False


def test_a_hostile_agent_is_text_whatever_its_bytes(client: FlaskClient, status: StatusBlock) -> None:
    status.layout.peers[0].agent = b'\xff\xc3\n"</script>\x1b' + b"x" * 50
    agent = client.get("/api/sources").get_json()["sources"][0]["agent"]
    assert agent.startswith('\ufffd\ufffd\n"</script>\x1bx')


def test_a_block_is_its_record_and_its_timeline(status: StatusBlock) -> None:
    fill(status.next_block_row(), 3)
    first_ns = FIRST_SEEN_NS + 3
    assert views.blocks(status, 1)["blocks"] == [
        {
            **record_of(3).as_dict(),
            "state": ["proven", "best"],
            "sightings": 2,
            "first_seen_ns": first_ns,
            "proven_us": 30.0,
            "published_us": 40.0,
            "validated_us": None,
            "stale_us": None,
            "timeline": [
                {
                    "peer": "127.0.0.1:18444",
                    "source": "p2p",
                    "announcement": "cmpctblock",
                    "seen_ns": first_ns,
                    "after_first_us": 0.0,
                },
                {
                    "peer": "127.0.0.2:18444",
                    "source": "p2p",
                    "announcement": "inv",
                    "seen_ns": first_ns + 1_500,
                    "after_first_us": 1.5,
                },
            ],
        }
    ]


def test_a_blocks_state_is_what_is_known_now_and_not_what_its_record_said(status: StatusBlock) -> None:
    row = status.next_block_row()
    fill(row, 1)
    with writing(row):
        row.state = State.PROVEN | State.VALIDATED | State.STALE
        row.stale_ns = row.first_seen_ns + 2_000_000
    told = views.blocks(status, 1)["blocks"][0]
    assert told["state"] == ["proven", "validated", "stale"]
    assert told["stale_us"] == 2_000.0


def test_more_sightings_than_marks_are_counted_but_not_listed(status: StatusBlock) -> None:
    row = status.next_block_row()
    fill(row, 1)
    with writing(row):
        row.sightings = MARKS + 5
    told = views.blocks(status, 1)["blocks"][0]
    assert told["sightings"] == MARKS + 5
    assert len(told["timeline"]) == MARKS


def test_a_mark_without_a_known_peer_or_source_has_null_for_it(status: StatusBlock) -> None:
    row = status.next_block_row()
    fill(row, 1)
    with writing(row):
        row.marks[0].peer, row.marks[1].peer = 0xFFFF_FFFF, 5
        row.marks[0].source = row.marks[0].announcement = 99
    marks = views.blocks(status, 1)["blocks"][0]["timeline"]
    assert marks[0]["peer"] is marks[1]["peer"] is marks[0]["source"] is marks[0]["announcement"] is None


def test_a_block_without_a_record_is_left_out_and_another_takes_its_place(status: StatusBlock) -> None:
    for sequence in (1, 2):
        fill(status.next_block_row(), sequence)
    status.next_block_row()
    assert [block["seq"] for block in views.blocks(status, 2)["blocks"]] == [2, 1]


@pytest.mark.parametrize("damage", ["event", "dead writer"])
def test_a_row_that_can_not_be_trusted_is_left_out(status: StatusBlock, damage: str) -> None:
    for sequence in (1, 2):
        fill(status.next_block_row(), sequence)
    row = status.layout.blocks[1]
    if damage == "event":
        row.record[24] = 200
    else:
        row.version |= 1
    assert [block["seq"] for block in views.blocks(status, 2)["blocks"]] == [1]


def test_rows_overtaken_while_they_are_read_are_left_out(status: StatusBlock, monkeypatch: pytest.MonkeyPatch) -> None:
    for sequence in range(1, BLOCKS + 1):
        fill(status.next_block_row(), sequence)
    read = status.blocks

    def overtaken() -> object:
        rows = read()
        for sequence in range(BLOCKS + 1, BLOCKS + 4):
            fill(status.next_block_row(), sequence)
        return rows[:-3] + [status.layout.blocks[sequence] for sequence in (2, 1, 0)]

    monkeypatch.setattr(status, "blocks", overtaken)
    told = [block["seq"] for block in views.blocks(status, BLOCKS)["blocks"]]
    assert told == list(range(BLOCKS, 3, -1))


def test_every_answer_is_consistent_while_the_relay_writes(client: FlaskClient, status: StatusBlock) -> None:
    fill(status.next_block_row(), 1)
    due = threading.Semaphore(0)
    stop = threading.Event()
    written = [1]

    def write() -> None:
        while due.acquire() and not stop.is_set():
            written[0] += 1
            fill(status.next_block_row(), written[0])

    def ask() -> list[dict[str, Any]]:
        due.release(16)
        blocks: list[dict[str, Any]] = client.get("/api/blocks?limit=64").get_json()["blocks"]
        return blocks

    writer = threading.Thread(target=write)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads change places in the middle of rows
    writer.start()
    try:
        told = [ask() for _ in range(60)]
    finally:
        stop.set()
        due.release()
        writer.join()
        sys.setswitchinterval(interval_s)
    assert written[0] > BLOCKS, "the writer never lapped a reader"
    assert sum(map(len, told)) > 0
    for blocks in told:
        sequences = [block["seq"] for block in blocks]
        assert sequences == sorted(set(sequences), reverse=True)
        for block in blocks:
            header = bytes.fromhex(block["header"])
            assert hashlib.sha256(hashlib.sha256(header).digest()).digest()[::-1].hex() == block["hash"]
            assert int.from_bytes(header, "little") == block["seq"] == block["height"]
            assert block["first_seen_ns"] == FIRST_SEEN_NS + block["seq"]
            assert [mark["seen_ns"] - block["first_seen_ns"] for mark in block["timeline"]] == [0, 1_500]
            assert (block["proven_us"], block["published_us"]) == (30.0, 40.0)
