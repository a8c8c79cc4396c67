"""What the doctor says of nodes and of the connections around them; the nodes are scripts on real sockets."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprint import config
from sprint.addresses import Address
from sprint.bitcoin.networks import NETWORKS
from sprint.doctor import Finding, Need, State, flows, nodes, running
from sprint.doctor.flows import Flows, count, judge_flows
from sprint.doctor.running import RunningBypass, ask, understand

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAGIC = bytes.fromhex("fabfb5da")
FULL = 1 | 1 << 3
PATIENCE_S = 10


def message(command: str, payload: bytes = b"", magic: bytes = MAGIC) -> bytes:
    checksum = hashlib.sha256(hashlib.sha256(payload).digest()).digest()[:4]
    return magic + struct.pack("<12sI4s", command.encode(), len(payload), checksum) + payload


def version(services: int = FULL, agent: bytes = b"/Satoshi:30.0.0/", magic: bytes = MAGIC) -> bytes:
    payload = struct.pack("<iQq", 70016, services, 0) + bytes(52) + bytes(8)
    return message("version", payload + bytes((len(agent),)) + agent + struct.pack("<iB", 812, 1), magic)


def sendcmpct(number: int = 2) -> bytes:
    return message("sendcmpct", struct.pack("<BQ", 0, number))


@contextmanager
def node(*answers: bytes, pong: bool = True, hang_up: bool = False) -> Iterator[Address]:
    """Says `answers` to whoever connects, then answers pings until the other side hangs up."""

    def serve() -> None:
        with suppress(OSError):
            stream, _ = listener.accept()
            with stream:
                stream.settimeout(PATIENCE_S)
                stream.sendall(b"".join(answers))
                if hang_up:
                    # What we never read would make the kernel reset the connection, and lose our answer.
                    stream.recv(4096)
                    return
                while True:
                    head = stream.recv(24, socket.MSG_WAITALL)
                    if len(head) < 24:
                        return
                    body = stream.recv(int.from_bytes(head[16:20], "little"), socket.MSG_WAITALL)
                    if pong and head[4:16].rstrip(b"\0") == b"ping":
                        stream.sendall(message("pong", body))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield Address("127.0.0.1", listener.getsockname()[1])
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE_S)


def told(folder: Path, *addresses: Address, **settings: str) -> list[Finding]:
    named = ",".join(map(str, addresses))
    return nodes.nodes(config.load({"NETWORK": "regtest", "BITCOIN_NODE": named, **settings}, folder))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time-outs that a test can wait for."""
    monkeypatch.setattr(nodes, "CONNECT_TIMEOUT_S", 1.0)
    monkeypatch.setattr(nodes, "ANSWER_TIMEOUT_S", 0.3)


# ── nodes ──


def test_a_node_that_shakes_hands_is_told_with_what_it_says_of_itself(tmp_path: Path) -> None:
    with node(version(), message("verack"), sendcmpct()) as address:
        found, transport = told(tmp_path, address)
    assert (found.name, found.state, found.need) == (f"node {address}", State.OK, Need.FEED)
    for part in ("/Satoshi:30.0.0/", "70016", "height 812", "network, witness", "compact blocks", "on this host"):
        assert part in found.detail
    assert (transport.state, "v1 with all its peers" in transport.detail) == (State.OK, True)


@pytest.mark.parametrize(
    ("settings", "state"),
    [({"TIER": "free"}, State.OK), ({"TIER": "enterprise", "ENABLE_KERNEL_BYPASS": "true"}, State.DEGRADED)],
)
def test_a_local_node_with_v2_is_a_fault_only_to_who_wants_to_capture(
    tmp_path: Path, settings: dict[str, str], state: State
) -> None:
    with node(version(FULL | 1 << 11), message("verack"), sendcmpct()) as address:
        found, transport = told(tmp_path, address, **settings)
    assert "v2 transport" in found.detail
    assert (transport.state, "v2transport=0" in transport.remedy) == (state, state is State.DEGRADED)


def test_a_remote_nodes_other_connections_are_not_ours_to_see() -> None:
    answer = nodes.Answer(70016, FULL | 1 << 11, "/x/", 1, True, 1.0, local=False)
    finding = nodes.judge_transport(Address("192.0.2.1", 8333), answer, wanted=True)
    assert (finding.state, "hears only ours" in finding.detail) == (State.OK, True)


@pytest.mark.parametrize(
    ("answers", "part"),
    [
        ((version(), message("verack")), "no compact blocks"),
        ((version(), message("verack"), sendcmpct(1)), "no compact blocks"),
        ((version(services=0), message("verack"), sendcmpct()), "serves no blocks"),
    ],
)
def test_a_node_with_less_is_degraded(tmp_path: Path, answers: tuple[bytes, ...], part: str) -> None:
    with node(*answers) as address:
        found, _ = told(tmp_path, address)
    assert (found.state, part in found.detail, bool(found.remedy)) == (State.DEGRADED, True, True)


def test_what_a_node_calls_itself_can_not_break_the_report(tmp_path: Path) -> None:
    with node(version(agent=b"/\x1b[2J\n\xff/"), message("verack"), sendcmpct()) as address:
        found, _ = told(tmp_path, address)
    assert found.state is State.OK


@pytest.mark.parametrize(
    ("answers", "hang_up", "part"),
    [
        ((version(magic=b"\xf9\xbe\xb4\xd9"),), False, "magic"),
        ((b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",), False, "magic"),
        ((b"",), True, "hung up without a handshake"),
    ],
)
def test_who_is_no_node_of_this_network_is_told_with_what_it_did(
    tmp_path: Path, answers: tuple[bytes, ...], hang_up: bool, part: str
) -> None:
    with node(*answers, hang_up=hang_up) as address:
        (found,) = told(tmp_path, address)
    assert_no_node(found, part)


@pytest.mark.parametrize("answers", [(b"",), (version(),)])
def test_who_does_not_shake_hands_in_time_is_no_node_either(
    tmp_path: Path, short: None, answers: tuple[bytes, ...]
) -> None:
    with node(*answers) as address:
        (found,) = told(tmp_path, address)
    assert_no_node(found, "no handshake came")


def assert_no_node(found: Finding, part: str) -> None:
    assert (found.state, found.need) == (State.MISSING, Need.FEED)
    assert part in found.detail
    assert "NETWORK=regtest" in found.remedy


def test_a_node_that_answers_no_ping_is_judged_by_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "ANSWER_TIMEOUT_S", 1.5)  # it has to have said it by then
    with node(version(), message("verack"), sendcmpct(), pong=False) as address:
        found, _ = told(tmp_path, address)
    assert found.state is State.OK


def test_one_node_that_answers_is_enough_for_a_feed(tmp_path: Path) -> None:
    with node(version(), message("verack"), sendcmpct()) as up, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        down = Address("127.0.0.1", closed.getsockname()[1])
        found = {each.name: each for each in told(tmp_path, up, down)}
        alone = told(tmp_path, down)
    assert found[f"node {up}"].state is State.OK
    assert found[f"node {down}"].state is State.DEGRADED
    assert [(each.state, each.detail) for each in alone] == [(State.MISSING, "Connection refused")]


def test_a_node_whose_name_means_nothing_is_a_finding(tmp_path: Path) -> None:
    (found,) = told(tmp_path, Address("no.such.host.invalid", 8333))
    assert (found.state, "BITCOIN_NODE" in found.remedy) == (State.MISSING, True)
    with pytest.raises(nodes.Unusable):
        nodes.introduce(Address("a" * 64, 8333), NETWORKS["regtest"])


def test_nodes_that_never_answer_are_given_up(tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    def hang(*_: object, **__: object) -> socket.socket:
        answer.wait(30)
        raise OSError(113, "No route to host")

    monkeypatch.setattr(socket, "create_connection", hang)
    monkeypatch.setattr(nodes, "CONNECT_TIMEOUT_S", 0.01)
    try:
        findings = told(tmp_path, Address("192.0.2.1", 8333), Address("192.0.2.2", 8333))
    finally:
        answer.set()
    assert [each.detail for each in findings] == ["no answer within 0.31 s"] * 2


# ── flows ──

HEADING = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"
OURS, THEIRS, LOOPBACK = "0A00000A", "010200C0", "0100007F"  # 10.0.0.10, 192.0.2.1, 127.0.0.1
NODE, OTHER = "208D", "C350"  # 8333, 50000
OURS_6, THEIRS_6 = "B80D0120000000000000000001000000", "B80D0120000000000000000002000000"
MAPPED = "0000000000000000FFFF0000"


def line(local: str, remote: str, state: str = "01") -> str:
    return f"   0: {local} {remote} {state} 00000000:00000000 00:00000000 00000000     0        0 1 1 ffff 20"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], Flows()),
        ([line(f"{OURS}:{NODE}", f"{THEIRS}:{OTHER}")], Flows(inbound=1)),
        ([line(f"{OURS}:{OTHER}", f"{THEIRS}:{NODE}")], Flows(outbound=1)),
        ([line(f"{OURS}:{OTHER}", f"{THEIRS}:01BB")], Flows()),
        ([line(f"{OURS}:{NODE}", f"{THEIRS}:{OTHER}", "06")], Flows()),  # TIME_WAIT
        ([line(f"{LOOPBACK}:{NODE}", f"{LOOPBACK}:{OTHER}")], Flows(within=1)),
        ([line(f"{OURS}:{NODE}", f"{OURS}:{OTHER}")], Flows(within=1)),
        ([line(f"{OURS_6}:{NODE}", f"{THEIRS_6}:{OTHER}")], Flows(inbound=1)),
        ([line(f"{MAPPED}{OURS}:{NODE}", f"{MAPPED}{THEIRS}:{OTHER}")], Flows(inbound=1)),
        ([line(f"{MAPPED}{LOOPBACK}:{NODE}", f"{MAPPED}{LOOPBACK}:{OTHER}")], Flows(within=1)),
        ([line(f"{'0' * 24}01000000:{NODE}", f"{'0' * 24}01000000:{OTHER}")], Flows(within=1)),
        (["", "nonsense", "a b c 01", "0: x:y z:w 01 rest"], Flows()),
    ],
)
def test_connections_are_counted_by_way(lines: list[str], expected: Flows) -> None:
    assert count([HEADING, *lines], {8333}) == expected


@given(st.lists(st.text(max_size=80), max_size=8))
def test_any_lines_can_be_counted(lines: list[str]) -> None:
    count(lines, {8333})


def test_a_table_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "MAX_LINES", 3)
    counted = count([line(f"{OURS}:{NODE}", f"{THEIRS}:{OTHER}")] * 5, {8333})
    assert counted == Flows(inbound=3, cut=True)
    assert "more than 3 connections" in judge_flows(counted, {8333}, None, wanted=True).detail


def test_this_hosts_own_connections_are_found_in_its_tables(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with socket.create_connection(address), listener.accept()[0]:
            settings = {"NETWORK": "regtest", "BITCOIN_NODE": f"127.0.0.1:{address[1]}"}
            (found,) = flows.flows(Path("/"), config.load(settings, tmp_path), lambda: None)
    assert "2 within this host" in found.detail
    assert str(address[1]) in found.subject


@pytest.mark.parametrize(
    ("counted", "opaque", "wanted", "state"),
    [
        (Flows(inbound=3), None, True, State.OK),
        (Flows(within=3), None, True, State.DEGRADED),
        (Flows(within=3), None, False, State.OK),
        (Flows(inbound=3), 0, True, State.OK),
        (Flows(inbound=3), 2, True, State.DEGRADED),
    ],
)
def test_a_capture_wants_connections_that_it_can_read(
    counted: Flows, opaque: int | None, wanted: bool, state: State
) -> None:
    there = None if opaque is None else RunningBypass(True, "native", ("eth0",), 1_000, opaque, "")
    finding = judge_flows(counted, {8333}, there, wanted=wanted)
    assert (finding.state, bool(finding.remedy)) == (state, state is State.DEGRADED)
    assert ("v2transport=0" in finding.remedy) == bool(opaque)


def test_no_table_at_all_is_told(tmp_path: Path) -> None:
    (found,) = flows.flows(tmp_path, config.load({}, tmp_path), lambda: None)
    assert (found.state, found.remedy) == (State.UNKNOWN, "mount /proc")


# ── the running Sprint ──

ANSWER = {
    "kernelBypass": {
        "active": True,
        "mode": "native",
        "interfaces": ["eth0"],
        "reason": None,
        "ingest": {"packets": 7, "opaqueFlows": 2},
    }
}


def test_the_apis_answer_is_understood() -> None:
    plain = RunningBypass(True, "native", ("eth0",), 7, 2, "")
    assert understand(json.dumps(ANSWER).encode()) == plain
    each = [
        {"interface": "eth0", "mode": "native", "active": True, "reason": None},
        {"interface": "eth1", "mode": None, "active": False, "reason": "interface eth1: No such device"},
    ]
    bypass = {**ANSWER["kernelBypass"], "attached": each}
    expected = replace(plain, rungs={"eth0": "native"}, reasons={"eth1": "interface eth1: No such device"})
    assert understand(json.dumps({"kernelBypass": bypass}).encode()) == expected


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b"null", b'"kernelBypass"', b'{"kernelBypass": 3}', b"[" * 50_000, b'{"kernelBypass": {}}'],
)
def test_another_servers_answer_is_none_of_sprints(body: bytes) -> None:
    assert understand(body) is None


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_any_json_is_understood_or_not(value: object) -> None:
    understand(json.dumps({"kernelBypass": value}).encode())


def serve_http(answer: bytes) -> tuple[socket.socket, Callable[[], None]]:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        stream, _ = listener.accept()
        with stream:
            stream.recv(4096)
            stream.sendall(answer)

    return listener, serve


@pytest.mark.parametrize(
    ("head", "understood"),
    [(b"HTTP/1.0 200 OK\r\n\r\n", True), (b"HTTP/1.0 404 Gone\r\n\r\n", False), (b"\xff", False)],
)
def test_the_api_is_asked_over_http(head: bytes, understood: bool) -> None:
    listener, serve = serve_http(head + json.dumps(ANSWER).encode())
    with listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        said = ask(Address("127.0.0.1", listener.getsockname()[1]))
        thread.join(PATIENCE_S)
    assert (said is not None) == understood


def test_an_api_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert ask(Address("0.0.0.0", listener.getsockname()[1])) is None
    assert ask(Address("127.0.0.1", 1)) is None
