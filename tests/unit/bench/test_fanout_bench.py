"""`sprint bench fanout`, small: every way reaches every subscriber, and the figures are of what arrived."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from multiprocessing import Pipe
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest

from sprint.bench import fanout, plots
from sprint.bench.detect_wire import FAR, NEAR
from sprint.bench.fanout_figures import (
    AF_XDP,
    LIVE,
    LIVE_TWO,
    PEERS,
    SENDMMSG,
    STREAM,
    Rounds,
    Sent,
    best_peer,
    loss,
    ratios,
)
from sprint.bench.fanout_peers import found, kinds
from sprint.bench.fanout_receivers import Greeting, Receivers
from sprint.errors import HostError
from sprint.tiers import NS_PER_MS
from xdp.loader import missing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection
    from pathlib import Path

SUBSCRIBERS, ROUNDS = 120, 3
Measured = tuple[dict[str, Any], list[tuple[str, int, int]]]


def installed(peer: str) -> bool:
    if peer == "libzmq":
        return True
    try:
        found(f"{peer}-server")
    except HostError:
        return False
    return True


@pytest.fixture(scope="module")
def measured() -> Measured:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    steps: list[tuple[str, int, int]] = []
    result = fanout.measure_fanout(lambda *step: steps.append(step), SUBSCRIBERS, ROUNDS)
    assert not {NEAR, FAR} & {name for _, name in socket.if_nameindex()}
    return result, steps


def test_every_way_reaches_every_subscriber_on_the_wire_and_on_sockets(measured: Measured) -> None:
    results = measured[0]["results"]
    assert [size["subscribers"] for size in results["sizes"]] == [1, 100, SUBSCRIBERS]
    two = {LIVE_TWO} if results["second_cpu"] is not None else set()
    for size in results["sizes"]:
        assert set(size["wire"]) == {LIVE, AF_XDP, SENDMMSG} | two
        assert set(size["sockets"]) == {LIVE, AF_XDP, SENDMMSG, STREAM} | set(filter(installed, PEERS))
        asleep = size["subscribers"] == SUBSCRIBERS
        assert set(size["wire_asleep"] or ()) == (set(size["wire"]) if asleep else set())
        for place in ("wire", "wire_asleep", "sockets") if asleep else ("wire", "sockets"):
            for name, way in size[place].items():
                assert (way["rounds"], way["missing"], way["incomplete"]) == (ROUNDS, 0, 0), name
                assert 0 < way["first_ms"] <= way["median_ms"] <= way["p99_9_ms"] <= way["last_ms"] < 60_000, name
                assert way["last_min_ms"] <= way["last_ms"] <= way["last_p90_ms"], name
                assert way["surplus"] == 0, name
                assert way["cpu_ms"] > 0, name
        assert all(way["receivers_cpu_ms"] > 0 for way in size["sockets"].values())
    assert results["loss_before_repair"] == 0


def test_the_figures_that_others_rely_on_are_those_of_the_largest_number(measured: Measured) -> None:
    results, named = measured[0]["results"], measured[0]["ratios"]
    largest = results["sizes"][-1]
    assert results["reference_subscribers"] == SUBSCRIBERS
    assert results["live_wire_last_ms_p50"] == largest["wire"][LIVE]["last_ms"]
    assert results["live_sockets_last_ms_p50"] == largest["sockets"][LIVE]["last_ms"]
    assert results["live_wire_asleep_last_ms_p50"] == largest["wire_asleep"][LIVE]["last_ms"]
    assert results["live_wire_asleep_vs_sendmmsg_wire_asleep"] > 0
    assert named == ratios(largest["wire"], largest["sockets"])
    assert set(named) == {
        "live_wire_vs_sendmmsg_wire",
        "live_sockets_vs_best_tcp_peer",
        "stream_vs_best_tcp_peer",
    }
    assert all(value > 0 for value in named.values())


def test_the_plot_is_a_picture(measured: Measured, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "fanout.png"
    plots.plot_fanout({"machine": {"cpu": "a CPU", "cpus": 2}, **json.loads(json.dumps(measured[0]))}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_more_subscribers_than_there_are_ports_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "missing", lambda: None)
    with pytest.raises(HostError, match="50000 is the most"):
        fanout.measure_fanout(lambda *_: None, 50_001)


def test_without_the_kernel_s_help_it_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "missing", lambda: "loading BPF programs needs root")
    with pytest.raises(HostError, match="fanout sends over a link of its own: loading BPF programs needs root"):
        fanout.measure_fanout(lambda *_: None, 1)


# ── what is noted ──


def sent(begun_ns: int, taken: int | None = None) -> Sent:
    return Sent(begun_ns, begun_ns + 500, None, taken, b"")


def test_a_round_s_times_begin_with_the_publication_and_an_incomplete_one_has_none() -> None:
    rounds = Rounds(1_000)
    rounds.note(sent(1_000_000), [1_000_000 + number * 1_000 for number in range(1_000, 0, -1)], 7)
    rounds.note(sent(0, taken=998), [0, 0, *range(1, 999)], 7, surplus=3)
    assert rounds.figures() == {
        "first_ms": 0.001,
        "median_ms": 0.5,
        "p99_9_ms": 0.999,
        "last_ms": 1.0,
        "call_ms": 0.0005,
        "cpu_ms": 0.0,
        "last_p90_ms": 1.0,
        "last_min_ms": 1.0,
        "rounds": 2,
        "missing": 2,
        "refused": 2,
        "surplus": 3,
        "incomplete": 1,
    }
    assert loss([(1_000, rounds.figures())]) == 2 / 2_000


def test_with_nothing_complete_there_are_counts_and_no_times() -> None:
    rounds = Rounds(2)
    rounds.note(sent(0), [5], 1)
    assert rounds.figures() == {"rounds": 1, "missing": 1, "refused": 0, "surplus": 0, "incomplete": 1}
    assert loss([]) == 0


def test_ratios_are_of_the_quickest_peer_and_unknown_where_there_is_none() -> None:
    def way(last_ms: float) -> dict[str, float]:
        return {"last_ms": last_ms}

    wire = {LIVE: way(2), SENDMMSG: way(40)}
    sockets = {LIVE: way(20), STREAM: way(90), "libzmq": way(130), "redis": way(100)}
    sockets["nats"] = {"rounds": 3}  # nothing complete
    assert best_peer(sockets) == "redis"
    assert ratios(wire, sockets) == {
        "live_wire_vs_sendmmsg_wire": 0.05,
        "live_sockets_vs_best_tcp_peer": 0.2,
        "stream_vs_best_tcp_peer": 0.9,
    }
    assert ratios(wire, {LIVE: way(20)})["live_sockets_vs_best_tcp_peer"] is None
    assert ratios({}, {}) == dict.fromkeys(ratios(wire, sockets))


# ── receivers ──


@pytest.fixture
def receivers() -> Iterator[Connection]:
    """A loop in a thread, at the other end of its pipe."""
    ours, theirs = Pipe()

    loop = Receivers(theirs)

    def serve() -> None:
        with suppress(EOFError, HostError):
            loop.serve()

    thread = Thread(target=serve)
    thread.start()
    with ours:
        yield ours
    thread.join(5)
    assert not thread.is_alive()
    for sock in loop._sockets:
        sock.close()
    loop._epoll.close()
    theirs.close()


def ask(receivers: Connection, *question: Any) -> Any:
    receivers.send(question)
    return answer(receivers)


def answer(receivers: Connection) -> Any:
    assert receivers.poll(5), "no answer"
    return receivers.recv()


def test_receivers_tell_when_each_has_its_publication_in_however_many_parts(receivers: Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receivers.send(("tcp", *listener.getsockname(), 2, Greeting(((b"hello", b"!\n"), (b"more", 2)))))
        theirs = []
        for _ in range(2):
            one, _ = listener.accept()
            one.settimeout(5)
            assert one.recv(100) == b"hello"
            one.sendall(b"you!\n")
            assert one.recv(100) == b"more"
            one.sendall(b"ok")
            theirs.append(one)
        assert answer(receivers) == 2
        theirs[0].sendall(b"PING")  # by itself, outside of a round: read, and forgotten
        assert ask(receivers, "expect", 7, 10) == 7
        theirs[0].sendall(b"0123456789")
        theirs[1].sendall(b"01234")
        assert not receivers.poll(0.05)
        theirs[1].sendall(b"56789")
        round_ = answer(receivers)
        assert (round_.number, len(round_.stamps)) == (7, 16)
        assert ask(receivers, "expect", 8, 10) == 8
        theirs[0].sendall(b"abcdefghij")
        receivers.send(("give_up", 7))  # of another round
        assert not receivers.poll(0.05)
        round_ = ask(receivers, "give_up", 8)
        assert (round_.number, len(round_.stamps)) == (8, 8)
        for one in theirs:
            one.close()


def test_a_server_that_refuses_a_subscriber_is_named(receivers: Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    refused = ask(receivers, "tcp", *address, 1, Greeting(()))
    assert isinstance(refused, HostError)
    assert str(refused).startswith(f"subscriber 1 of 127.0.0.1:{address[1]}: ")


def test_what_stands_around_a_payload_is_each_peer_s_own_protocol() -> None:
    around = {kind.name: (kind.before, kind.behind) for kind in kinds(192)}
    assert around == {
        "libzmq": (b"\x00\xc0", b""),
        "redis": (b"*3\r\n$7\r\nmessage\r\n$1\r\nb\r\n$192\r\n", b"\r\n"),
        "nats": (b"MSG b 1 192\r\n", b"\r\n"),
    }


def test_milliseconds_are_what_they_say() -> None:
    rounds = Rounds(1)
    rounds.note(sent(0), [3 * NS_PER_MS], 2 * NS_PER_MS, receivers_cpu_ns=NS_PER_MS)
    figures = rounds.figures()
    assert (figures["last_ms"], figures["cpu_ms"], figures["receivers_cpu_ms"]) == (3, 2, 1)
