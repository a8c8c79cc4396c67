"""Source p2p over real sockets: who is asked to push, what is heard of whom, and what happens when peers misbehave."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sprint.addresses import Address
from sprint.bitcoin.framing import encode_frame
from sprint.bitcoin.messages import MSG_BLOCK, Inv
from sprint.bitcoin.networks import REGTEST
from sprint.events import Announcement, HeaderRun, PeerGone, PeerReady, Sighting, Source, Want
from sprint.ledger import Ledger
from sprint.regtest import mine
from sprint.relay import Decision, Outcome
from sprint.sources.p2p import MAX_HIGH_BANDWIDTH
from tests.unit.chains import MS, SECOND, WALL_S
from tests.unit.peers import Listener, closed_port, junk, rig_of

if TYPE_CHECKING:
    from sprint.regtest import MinedBlock


def _blocks(count: int) -> list[MinedBlock]:
    blocks: list[MinedBlock] = []
    previous = REGTEST.genesis_hash
    for height in range(1, count + 1):
        blocks.append(mine(previous, height, WALL_S + height, REGTEST.pow_limit_bits))
        previous = blocks[-1].hash
    return blocks


FIRST, SECOND_BLOCK, THIRD = _blocks(3)


def _resident_kb() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


# The handshake


def test_a_handshake_makes_a_peer_ready_with_its_height_and_name() -> None:
    with rig_of(height=17) as rig:
        (peer,) = rig.connect()
        assert rig.heard == [PeerReady(Source.P2P, str(rig.listeners[0].address), 17)]
        assert peer.connection.peer_version is not None
        assert peer.connection.peer_version.user_agent.startswith(b"/BitcoinSprint")
        row = rig.account()
        assert (row.agent, row.height, row.connected, row.connects, row.failures) == (b"/Scripted:1.0/", 17, 1, 1, 0)


def test_our_version_states_the_height_we_have_by_then() -> None:
    with rig_of() as rig:
        rig.tip_height = 812
        (peer,) = rig.connect()
        assert peer.connection.peer_version is not None
        assert peer.connection.peer_version.start_height == 812


def test_every_upstream_is_asked_for_headers_and_at_most_three_to_push() -> None:
    with rig_of(5) as rig:
        peers = rig.connect()
        rig.until(lambda: all(peer.connection.peer_wants_headers for peer in peers))
        rig.until(lambda: all(peer.connection.compact_version_agreed == 2 for peer in peers))
        assert sum(peer.pushes for peer in peers) == MAX_HIGH_BANDWIDTH
        assert sum(row.high_bandwidth for row in rig.accounts()) == MAX_HIGH_BANDWIDTH


def test_when_a_pushing_upstream_leaves_another_is_asked_to_push_and_no_more_than_three_ever() -> None:
    with rig_of(5) as rig:
        peers = rig.connect()
        rig.until(lambda: sum(peer.pushes for peer in peers) == 3)
        gone = next(listener for listener in rig.listeners if listener.peer.pushes)
        left = gone.peer
        left.close()
        rig.until(lambda: sum(peer.pushes for peer in peers if peer is not left) == 3)
        rig.forward(1)
        rig.until(lambda: gone.peer is not left and gone.peer.connection.compact_version_agreed == 2)
        assert sum(peer.pushes for peer in rig.peers) == 3
        assert not gone.peer.pushes


def test_an_attempt_that_fails_promotes_nobody_while_three_places_are_taken() -> None:
    with rig_of(4, addresses=[Address("127.0.0.1", closed_port())]) as rig:
        rig.connect()
        for _ in range(5):
            failures = rig.account(4).failures
            rig.forward(31)
            rig.until(lambda before=failures: rig.account(4).failures > before)  # type: ignore[misc]  # a default binds now
            assert sum(row.high_bandwidth for row in rig.accounts()) == 3
            for listener in rig.listeners:
                listener.pump()
            assert sum(peer.pushes for peer in rig.peers) == 3


def test_unreachable_upstreams_keep_no_place_as_pushers() -> None:
    dead = [Address("127.0.0.1", closed_port()) for _ in range(3)]
    with rig_of(0, addresses=dead) as rig:
        rig.until(lambda: all(row.failures for row in rig.accounts()))
        assert sum(row.high_bandwidth for row in rig.accounts()) == 0


def test_a_peer_that_completes_no_handshake_is_dropped_and_tried_again_without_a_word_to_the_relay() -> None:
    with rig_of(silent=True) as rig:
        rig.until(lambda: rig.listeners[0].peers)
        rig.until(rig.source.deadline)
        rig.step()
        rig.forward(4)
        rig.step()
        assert rig.account().failures == 0
        rig.forward(1.5)
        rig.until(lambda: rig.account().failures == 1)
        assert b"awaiting version after 5 s" in rig.account().last_error
        assert rig.heard == []
        rig.forward(0.3)
        rig.until(lambda: len(rig.listeners[0].peers) == 2)


def test_a_ping_is_answered() -> None:
    with rig_of() as rig:
        (peer,) = rig.connect()
        sent = peer.connection._pings
        peer.connection._ping(0)
        peer.pump()
        rig.until(lambda: peer.connection._ping_nonce is None)
        assert peer.connection._pings == sent + 1


def test_the_round_trip_is_measured_by_our_own_ping() -> None:
    with rig_of() as rig:
        rig.connect()
        rig.until(lambda: rig.account().rtt_ns)
        assert rig.account().rtt_ns < 5 * SECOND


def test_a_peer_that_answers_no_ping_is_gone() -> None:
    with rig_of() as rig:
        (peer,) = rig.connect()
        rig.until(lambda: rig.account().rtt_ns)
        peer.silent = True
        rig.forward(31)
        rig.step()
        rig.forward(21)
        rig.until(lambda: rig.of(PeerGone))
        assert b"awaiting pong" in rig.account().last_error


# What is heard


def test_a_compact_block_is_heard_as_a_sighting_that_nobody_has_validated() -> None:
    with rig_of() as rig:
        (peer,) = rig.connect()
        peer.compact(FIRST)
        (seen,) = rig.until(lambda: rig.of(Sighting))
        assert (seen.announcement, seen.hash) == (Announcement.CMPCTBLOCK, FIRST.hash)
        assert (seen.header, seen.transactions, seen.validated) == (FIRST.header.encode(), 1, False)
        assert seen.peer == str(rig.listeners[0].address)
        assert 0 <= rig.now_ns - seen.seen_ns < 5 * SECOND


def test_an_inv_is_heard_as_its_last_block_which_the_peer_has_validated() -> None:
    with rig_of() as rig:
        (peer,) = rig.connect()
        peer.inv(FIRST, SECOND_BLOCK)
        (seen,) = rig.until(lambda: rig.of(Sighting))
        assert (seen.announcement, seen.hash, seen.header) == (Announcement.INV, SECOND_BLOCK.hash, None)
        assert seen.validated


def test_the_first_answer_is_a_run_and_later_headers_are_announcements() -> None:
    with rig_of() as rig:
        (peer,) = rig.connect()
        rig.source.want(Want(Source.P2P, str(rig.listeners[0].address), (REGTEST.genesis_hash,)), rig.now_ns)
        rig.until(lambda: peer.questions)
        assert peer.questions[0].locator == (REGTEST.genesis_hash,)
        peer.headers(FIRST)
        (run,) = rig.until(lambda: rig.of(HeaderRun))
        assert (run.headers, run.complete) == (FIRST.header.encode(), True)
        assert rig.of(Sighting) == []
        peer.headers(SECOND_BLOCK, THIRD)
        seen = rig.until(lambda: rig.of(Sighting))
        assert [each.hash for each in seen] == [SECOND_BLOCK.hash, THIRD.hash]
        assert all(each.validated for each in seen)
        assert rig.of(HeaderRun) == [run]


def test_a_question_to_a_stranger_or_before_the_handshake_is_none_of_its_business() -> None:
    with rig_of() as rig:
        name = str(rig.listeners[0].address)
        rig.source.want(Want(Source.P2P, "elsewhere:1", ()), rig.now_ns)
        rig.source.want(Want(Source.P2P, name, (bytes(32),)), rig.now_ns)
        (peer,) = rig.connect()
        assert peer.questions == []


def test_what_two_upstreams_say_gives_each_its_account() -> None:
    with rig_of(2) as rig:
        first, second = rig.connect()
        ledger = Ledger(rig.status)
        first.compact(FIRST)
        rig.until(lambda: len(rig.of(Sighting)) == 1)
        second.compact(FIRST)
        rig.until(lambda: len(rig.of(Sighting)) == 2)
        outcomes = (Outcome.FIRST, Outcome.DUPLICATE)
        ledger.decided(Decision(seen, each) for seen, each in zip(rig.of(Sighting), outcomes, strict=True))
        leader, other = rig.accounts()
        assert (leader.first, leader.sightings, leader.leads) == (1, 1, 1)
        assert (other.first, other.sightings, other.behinds) == (0, 1, 1)
        assert leader.lead_ns == other.behind_ns > 0
        assert leader.bytes_received > 100


# Losing and finding again


def test_a_refused_connection_is_tried_again_within_250_ms_and_then_ever_later() -> None:
    with rig_of(0, addresses=[Address("127.0.0.1", closed_port())]) as rig:
        pauses = []
        for attempt in range(1, 10):
            rig.until(lambda n=attempt: rig.account().failures == n)  # type: ignore[misc]  # a default binds now
            due = rig.source.deadline()
            assert due is not None
            pauses.append(due - rig.now_ns)
            rig.forward(pauses[-1] / 1e9)
        assert 0 < pauses[0] <= 250 * MS
        assert all(pause <= limit * MS for pause, limit in zip(pauses, (250, 500, 1_000, 2_000), strict=False))
        assert 15 * SECOND - SECOND < pauses[-1] <= 30 * SECOND
        assert b"refused" in rig.account().last_error


def test_a_completed_handshake_starts_the_pauses_afresh() -> None:
    with rig_of() as rig:
        listener = rig.listeners[0]
        listener.silent = True
        for attempt in range(1, 5):
            rig.until(lambda n=attempt: len(listener.peers) == n)  # type: ignore[misc]  # a default binds now
            listener.peer.close()
            rig.until(lambda n=attempt: rig.account().failures == n)  # type: ignore[misc]  # a default binds now
            rig.forward(5)
        listener.silent = False
        rig.connect()
        listener.peer.close()
        rig.until(lambda: rig.of(PeerGone))
        due = rig.source.deadline()
        assert due is not None
        assert due - rig.now_ns <= 250 * MS


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"\x00" * 24, b"magic"),
        (REGTEST.magic + b"block".ljust(12, b"\0") + (4_000_001).to_bytes(4, "little") + bytes(4), b"4000001"),
        (REGTEST.magic + b"verack".ljust(12, b"\0") + (0xFFFFFFFF).to_bytes(4, "little") + bytes(4), b"4294967295"),
    ],
)
def test_a_peer_that_breaks_the_protocol_is_dropped_heard_of_and_connected_again(raw: bytes, reason: bytes) -> None:
    with rig_of() as rig:
        (peer,) = rig.connect()
        peer.connection.send(FIRST.compact(1))
        peer.raw(peer.connection.data_to_send() + raw)  # the sound message before it still counts
        rig.until(lambda: rig.of(PeerGone))
        assert [seen.hash for seen in rig.of(Sighting)] == [FIRST.hash]
        assert reason in rig.account().last_error
        assert isinstance(rig.heard[-1], PeerGone)
        rig.forward(0.3)
        rig.connect()
        assert len(rig.of(PeerReady)) == 2
        assert rig.account().connects == 2


def test_a_peer_that_breaks_the_protocol_before_it_was_ready_was_never_there() -> None:
    with rig_of(silent=True) as rig:
        rig.until(lambda: rig.listeners[0].peers)
        rig.listeners[0].peer.raw(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        rig.until(lambda: rig.account().failures == 1)
        rig.step()
        assert rig.heard == []


def test_a_lost_connection_is_found_again_and_again_on_the_same_descriptors() -> None:
    with rig_of(3) as rig:
        rig.connect()
        before = len(os.listdir("/proc/self/fd"))
        for turn in range(12):
            listener = rig.listeners[turn % 3]
            gone = len(rig.of(PeerGone))
            listener.peer.close()
            rig.until(lambda n=gone: len(rig.of(PeerGone)) == n + 1)  # type: ignore[misc]  # a default binds now
            rig.forward(0.3)
            rig.connect()
            listener.peer.inv(FIRST)
            seen = len(rig.of(Sighting))
            rig.until(lambda n=seen: len(rig.of(Sighting)) == n + 1)  # type: ignore[misc]  # a default binds now
            assert rig.of(Sighting)[-1].peer == str(listener.address)
        assert len(os.listdir("/proc/self/fd")) <= before + 3
        assert len(rig.source._watched) == len(rig.source._registered) == 3


def test_a_connection_lost_while_a_question_is_put_is_heard_of() -> None:
    with rig_of() as rig:
        (peer,) = rig.connect()
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        peer.close()
        want = Want(Source.P2P, str(rig.listeners[0].address), (REGTEST.genesis_hash,))
        rig.source.want(want, rig.now_ns)
        rig.source.want(want, rig.now_ns)
        due = rig.source.deadline()
        assert due is not None  # either it waits to be said, or the socket is readable
        rig.until(lambda: rig.of(PeerGone))
        assert len(rig.of(PeerGone)) == 1


def test_an_upstream_that_never_stops_talking_delays_nobody_elses_timers() -> None:
    with rig_of(1, addresses=[Address("127.0.0.1", closed_port())]) as rig:
        (peer,) = rig.connect()
        rig.until(lambda: rig.account(1).failures)
        failures = rig.account(1).failures
        rig.forward(31)
        for _ in range(3):
            peer.inv(FIRST)
            while not rig.step(0.01):
                continue
        for _ in range(100):
            peer.inv(FIRST)
            assert rig.step(0.2)
            if rig.account(1).failures > failures:
                return
        pytest.fail("the other upstream was never tried again")


def test_no_descriptor_left_is_a_reason_to_try_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(24, "Too many open files")

    with rig_of() as rig:
        with monkeypatch.context() as patch:
            patch.setattr("sprint.sources.upstream.socket.socket", refuse)
            assert rig.source.poll(rig.now_ns) == []
        assert b"Too many open files" in rig.account().last_error
        due = rig.source.deadline()
        assert due is not None
        assert 0 < due - rig.now_ns <= 250 * MS
        rig.forward(0.3)
        rig.connect()


# Under load


def test_junk_on_one_upstream_keeps_nobody_from_hearing_the_other_and_fills_no_memory() -> None:
    with rig_of(2) as rig:
        noisy, quiet = rig.connect()
        unknown, known = junk(3_999_000), junk(3_999_000, "block")
        noisy.raw(*[unknown, known] * 4)
        rig.until(lambda: rig.account().bytes_received > 8_000_000)
        before_kb = _resident_kb()
        heard_during = 0
        quiet_name = str(rig.listeners[1].address)
        frames = 72
        while frames or noisy.outgoing:
            if frames and len(noisy.outgoing) < 4:
                noisy.raw(unknown, known)
                frames -= 2
            quiet.compact(FIRST)
            for _ in range(40):
                rig.step()
                if any(isinstance(each, Sighting) and each.peer == quiet_name for each in rig.heard):
                    heard_during += bool(noisy.outgoing)
                    break
            else:
                pytest.fail("an announcement of the quiet upstream waited for the noisy one")
            rig.heard.clear()
        assert heard_during > 50
        rig.until(lambda: rig.account().bytes_received > 80 * 3_999_000)
        assert _resident_kb() - before_kb < 48_000
        assert rig.account().skipped_messages >= 40
        assert rig.account().connected


def test_an_upstream_with_more_to_say_than_we_can_read_leaves_the_others_their_turn() -> None:
    with rig_of(3) as rig:
        noisy, quiet, other = rig.connect()
        rig.until(lambda: all(row.rtt_ns for row in rig.accounts()))
        inv = Inv(tuple((MSG_BLOCK, bytes([n]) * 32) for n in range(5))).encode()
        noisy.raw(*[encode_frame(REGTEST.magic, "inv", inv) * 2_000] * 40)
        for _ in range(6):
            quiet.compact(FIRST)
            other.inv(FIRST)
            rig.heard.clear()
            for _ in range(6):
                for heard in rig.step():
                    assert isinstance(heard, Sighting)
            assert noisy.outgoing
            assert {seen.peer for seen in rig.of(Sighting)} == {str(listener.address) for listener in rig.listeners}


def test_a_peer_that_reads_nothing_is_dropped_before_much_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sprint.sources.upstream.MAX_UNSENT_BYTES", 100_000)
    with rig_of() as rig:
        rig.connect()
        rig.until(lambda: rig.account().rtt_ns)
        want = Want(Source.P2P, str(rig.listeners[0].address), tuple(bytes([n]) * 32 for n in range(100)))
        for _ in range(5_000):
            rig.source.want(want, rig.now_ns)
            if rig.source._upstreams[want.peer].socket is None:
                break
        else:
            pytest.fail("16 MB wait for a peer that reads nothing")
        assert rig.source.deadline() == 0
        assert [type(each) for each in rig.source.poll(rig.now_ns)] == [PeerGone]
        assert b"reads nothing" in rig.account().last_error


def test_an_answer_too_large_for_the_socket_goes_out_when_the_peer_reads_again() -> None:
    with rig_of() as rig:
        (peer,) = rig.connect()
        rig.until(lambda: rig.account().rtt_ns)
        name = str(rig.listeners[0].address)
        upstream = rig.source._upstreams[name]
        sent = 0
        want = Want(Source.P2P, name, tuple(bytes([n]) * 32 for n in range(100)))
        while not upstream.wants_to_write:
            rig.source.want(want, rig.now_ns)
            sent += 1
        rig.until(lambda: len(peer.questions) == sent)
        assert not upstream.wants_to_write


# Names


def test_a_name_is_resolved_without_stopping_the_loop_and_connected() -> None:
    with rig_of(0) as rig:
        listener = Listener()
        rig.listeners.append(listener)
        rig.source.close()
        rig.source = type(rig.source)([Address("localhost", listener.address.port)], REGTEST, lambda: 0, rig.status)
        rig.connect()
        assert [ready.peer for ready in rig.of(PeerReady)] == [f"localhost:{listener.address.port}"]


def test_a_name_that_leads_nowhere_is_tried_again_ever_later(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo
    asked = []

    def unknown(host: str, port: int, *rest: int, **options: int) -> object:
        if host != "nowhere.invalid" or options.get("flags"):
            return real(host, port, *rest, **options)
        asked.append(threading.current_thread())
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with rig_of(0, addresses=[Address("nowhere.invalid", 18_444)]) as rig:
        pauses = []
        for attempt in range(1, 9):
            rig.until(lambda n=attempt: rig.account().failures == n)  # type: ignore[misc]  # a default binds now
            due = rig.source.deadline()
            assert due is not None
            pauses.append(due - rig.now_ns)
            rig.forward(pauses[-1] / 1e9)
        assert pauses[0] <= 250 * MS
        assert pauses[-1] > 10 * SECOND
        assert b"nowhere.invalid can't be resolved" in rig.account().last_error
    assert threading.main_thread() not in asked


def test_a_name_is_resolved_anew_for_each_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = closed_port(), Listener()
    real = socket.getaddrinfo
    ports = [old, old]

    def moving(host: str, port: int, *rest: int, **options: int) -> object:
        if host != "moving.example" or options.get("flags"):
            return real(host, port, *rest, **options)
        at = ports.pop() if ports else new.address.port
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", at))]

    monkeypatch.setattr(socket, "getaddrinfo", moving)
    with rig_of(0, addresses=[Address("moving.example", 1)]) as rig:
        rig.listeners.append(new)
        for failures in (1, 2):
            rig.until(lambda n=failures: rig.account().failures == n)  # type: ignore[misc]  # a default binds now
            rig.forward(1)
        rig.connect()


def test_of_several_addresses_the_one_that_works_is_found_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    dead, alive = closed_port(), Listener()
    real = socket.getaddrinfo

    def both(host: str, port: int, *rest: int, **options: int) -> object:
        if host != "both.example" or options.get("flags"):
            return real(host, port, *rest, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", at)) for at in (dead, alive.address.port)]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with rig_of(0, addresses=[Address("both.example", 1)]) as rig:
        rig.listeners.append(alive)
        rig.until(lambda: rig.account().failures == 1)
        rig.forward(0.3)
        rig.connect()
        alive.peer.close()
        rig.until(lambda: rig.of(PeerGone))
        rig.forward(0.3)
        rig.connect()
        assert rig.account().failures == 2  # the dead one at first, and the loss


# The interface


def test_its_descriptor_is_readable_when_and_only_when_there_is_something_to_do() -> None:
    with rig_of() as rig:
        (peer,) = rig.connect()
        rig.until(lambda: rig.account().rtt_ns)
        while rig.step():
            continue
        assert rig.source._epoll.poll(0) == []
        peer.inv(FIRST)
        assert rig.source._epoll.poll(1)
        rig.until(lambda: rig.of(Sighting))
        assert rig.source._epoll.poll(0) == []


def test_its_deadline_is_never_due_twice_for_one_thing() -> None:
    """Driven by deadline alone, as an engine does, the source rests between its timers."""
    with rig_of(2, addresses=[Address("127.0.0.1", closed_port())]) as rig:
        rig.connect()
        polls = 0
        end = rig.now_ns + 25 * SECOND  # before the first ping
        while (due := rig.source.deadline()) is not None and due < end:
            if due > rig.now_ns:
                rig.skew_ns += due - rig.now_ns
            rig.step()
            polls += 1
        assert polls < 60


def test_closing_lets_go_of_everything() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with rig_of(2) as rig:
        rig.connect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_twice_configured_upstream_is_connected_once() -> None:
    with rig_of(1) as rig:
        address = rig.listeners[0].address
        rig.source.close()
        rig.source = type(rig.source)([address, address], REGTEST, lambda: 0, rig.status)
        rig.connect()
        assert len(rig.source._upstreams) == 1
