"""An upstream that says more than can be read, or reads nothing: others have their turn, and memory stays bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from sprint.addresses import Address
from sprint.bitcoin.framing import encode_frame
from sprint.bitcoin.messages import MSG_BLOCK, Inv
from sprint.bitcoin.networks import REGTEST
from sprint.events import PeerGone, Sighting, Source, Want
from tests.unit.peers import FIRST, closed_port, junk, rig_of


def _resident_kb() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


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
