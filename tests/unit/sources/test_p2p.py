"""Source p2p over real sockets: who is asked to push, what is heard of whom, and what its loop may rely on."""

from __future__ import annotations

from sprint.addresses import Address
from sprint.bitcoin.networks import REGTEST
from sprint.events import Announcement, HeaderRun, PeerGone, PeerReady, Sighting, Source, Want
from sprint.ledger import Ledger
from sprint.relay import Decision, Outcome
from sprint.sources.p2p import MAX_HIGH_BANDWIDTH
from tests.descriptors import open_descriptors
from tests.unit.chains import SECOND
from tests.unit.peers import FIRST, SECOND_BLOCK, THIRD, closed_port, rig_of

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
    before = len(open_descriptors())
    with rig_of(2) as rig:
        rig.connect()
    assert len(open_descriptors()) == before


def test_a_twice_configured_upstream_is_connected_once() -> None:
    with rig_of(1) as rig:
        address = rig.listeners[0].address
        rig.source.close()
        rig.source = type(rig.source)([address, address], REGTEST, lambda: 0, rig.status)
        rig.connect()
        assert len(rig.source._upstreams) == 1
