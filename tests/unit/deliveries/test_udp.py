"""The UDP feed from outside: what proves an address, what doesn't, and what a gap costs."""

from __future__ import annotations

import json
import random
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from sprint.datagrams import (
    CHALLENGE_MAGIC,
    CHALLENGE_SIZE,
    COOKIE_SIZE,
    HEARTBEAT_MAGIC,
    KEEP_ALIVE_SIZE,
    Beat,
    Challenge,
    Echo,
    KeepAlive,
    from_server,
)
from sprint.deliveries.requests import MAX_EXTRA, MAX_RESEND, REQUEST_BURST
from sprint.record import MAGIC, decode
from sprint.tiers import NS_PER_S, Tier
from tests.unit.deliveries.udp_stage import PATIENCE_S, Session, Stage, until
from tests.unit.test_client import SESSION

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage(heartbeat_ns=NS_PER_S // 10) as running:
        yield running


def challenge(session: Session) -> Challenge:
    said = from_server(session.datagram(CHALLENGE_MAGIC))
    assert isinstance(said, Challenge)
    return said


def proven(stage: Stage, **options: str) -> Session:
    session = Session(stage, **options)
    session.send(Echo(session.token, challenge(session).cookie).encode())
    assert session.event("udp")["state"] == "active"
    return session


def test_who_echoes_the_cookie_gets_records_and_heartbeats_by_udp_and_no_records_by_tcp(stage: Stage) -> None:
    stage.publish(3)
    with Session(stage) as session:
        assert session.answer["udp"]["address"] == f":{stage.udp_address.port}"
        asked = challenge(session)
        assert asked.session == SESSION
        stage.publish()
        assert session.event("proven")["seq"] == 4
        session.send(Echo(session.token, asked.cookie).encode())
        assert session.event("udp") == {"event": "udp", "state": "active", "reason": None, "next": 5}
        stage.publish(2)
        assert [decode(session.datagram(MAGIC)).sequence for _ in range(2)] == [5, 6]
        beat = from_server(session.datagram(HEARTBEAT_MAGIC))
        assert isinstance(beat, Beat)
        assert (beat.session, beat.sequence) == (SESSION, 6)
        assert json.loads(session.lines.readline())["event"] == "heartbeat"
        assert stage.tier(0).subscribers == 0
        assert stage.tier(1).subscribers == 1
        until(lambda: stage.tier(1).on_time + stage.tier(1).late == 2, "both are accounted for")
    until(lambda: stage.tier(1).subscribers == 0, "the session's end ends the subscription")


def test_a_challenge_is_no_longer_than_the_packet_that_can_cause_it() -> None:
    assert len(Challenge(1, bytes(COOKIE_SIZE)).encode()) == CHALLENGE_SIZE <= KEEP_ALIVE_SIZE
    assert len(KeepAlive(bytes(16)).encode()) == KEEP_ALIVE_SIZE


@pytest.mark.parametrize(("key", "words"), [(None, "tier free has none"), ("business", "tier business has none")])
def test_only_the_top_tiers_have_udp(stage: Stage, key: str | None, words: str) -> None:
    with Session(stage, key=key) as session:
        assert words in session.answer["error"]
        session.datagrams.settimeout(0.2)
        with pytest.raises(TimeoutError):
            session.datagrams.recv(100)


def test_a_cookie_counts_once(stage: Stage) -> None:
    with Session(stage) as session:
        echo = Echo(session.token, challenge(session).cookie).encode()
        session.send(echo)
        assert session.event("udp")["state"] == "active"
        session.send(echo)
        until(lambda: stage.counters.refused == 1, "the replayed cookie is refused and counted")
        assert stage.tier(1).subscribers == 1


def test_a_cookie_counts_for_the_address_it_was_sent_to_only(stage: Stage) -> None:
    with Session(stage) as session, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as elsewhere:
        elsewhere.bind(("127.0.0.1", 0))
        session.send(Echo(session.token, challenge(session).cookie).encode(), by=elsewhere)
        until(lambda: stage.counters.refused == 1, "the cookie from another address is refused and counted")
        assert stage.tier(1).subscribers == 0


def test_a_cookie_counts_for_its_own_subscription_only(stage: Stage) -> None:
    with Session(stage) as mine, Session(stage) as theirs:
        mine.send(Echo(theirs.token, challenge(mine).cookie).encode())
        until(lambda: stage.counters.refused == 1, "another subscription's cookie is refused and counted")
        assert stage.tier(1).subscribers == 0


def test_whoever_is_named_by_somebody_else_gets_one_small_packet_and_nothing_more(stage: Stage) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as victim:
        victim.bind(("127.0.0.9", 0))
        victim.settimeout(PATIENCE_S)
        with Session(stage, udp=f"127.0.0.9:{victim.getsockname()[1]}") as attacker:
            packet = victim.recv(2048)
            assert len(packet) == CHALLENGE_SIZE
            for _ in range(20):  # a cookie that nobody has seen can only be guessed
                attacker.send(Echo(attacker.token, random.randbytes(COOKIE_SIZE)).encode())
            until(lambda: stage.counters.refused == 20, "guesses are refused and counted")
            stage.publish(5)
            victim.settimeout(0.3)
            with pytest.raises(TimeoutError):
                victim.recv(2048)
            assert [attacker.event("proven")["seq"] for _ in range(5)] == [1, 2, 3, 4, 5]


def test_challenges_to_a_host_that_has_no_connection_to_us_are_few(stage: Stage) -> None:
    """However many sessions name it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as victim:
        victim.bind(("127.0.0.9", 0))
        for _ in range(30):
            with Session(stage, udp=f"127.0.0.9:{victim.getsockname()[1]}"):
                pass
        until(lambda: stage.counters.suppressed >= 20, "the rest is suppressed and counted")
        assert stage.counters.challenges <= 10


def test_what_is_no_datagram_of_ours_is_counted_and_answered_by_nothing(stage: Stage) -> None:
    with Session(stage) as session:
        challenge(session)
        noise = [b"", b"x", random.randbytes(44), bytes(1400), b"SPRE", b"SPRK" + bytes(99), b"SPR1" + bytes(188)]
        for datagram in noise:
            session.send(datagram)
        until(lambda: stage.counters.garbage == len(noise), "garbage is counted")
        session.send(Echo(random.randbytes(16), random.randbytes(COOKIE_SIZE)).encode())
        session.send(KeepAlive(random.randbytes(16)).encode())
        until(lambda: stage.counters.unknown == 2, "tokens that nobody has are counted")
        session.datagrams.settimeout(0.2)
        with pytest.raises(TimeoutError):
            session.datagrams.recv(100)


def test_a_flood_of_garbage_delays_nobody_for_long(stage: Stage) -> None:
    with proven(stage) as session, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flooder:
        for number in range(20_000):
            flooder.sendto(random.randbytes(44), stage.udp_address)
            if number % 1_000 == 0:
                stage.publish()
        assert [decode(session.datagram(MAGIC)).sequence for _ in range(20)] == list(range(1, 21))
        assert stage.counters.garbage > 0


def test_a_subscriber_that_moves_proves_its_new_address_and_keeps_the_old_one_until_then(stage: Stage) -> None:
    with proven(stage) as session, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as new:
        new.bind(("127.0.0.1", 0))
        new.settimeout(PATIENCE_S)
        session.send(KeepAlive(session.token).encode(), by=new)
        while not isinstance(said := from_server(new.recv(2048)), Challenge):
            pass
        stage.publish()
        assert decode(session.datagram(MAGIC)).sequence == 1
        session.send(Echo(session.token, said.cookie).encode(), by=new)
        until(lambda: stage.status.layout.deliveries[1].accepted == 2, "the new address is proven")
        stage.publish()
        while not (data := new.recv(2048)).startswith(MAGIC):
            pass
        assert decode(data).sequence == 2
        assert stage.tier(1).subscribers == 1
        sessions = stage.stream._udp
        assert sessions is not None
        assert sessions._behind == {}  # else it would be looked at in each publication, to the end of its session


def test_a_session_that_ends_or_a_udp_side_that_begins_anew_puts_records_back_on_tcp(stage: Stage) -> None:
    with proven(stage) as session:
        stage.publish(2)
        stage.on_loop(stage.udp.close)
        stage.publish(1, udp=False)  # nobody sends this one by UDP, and TCP is parked
        stage.on_loop(stage.start_udp)
        told = session.event("udp")
        assert (told["state"], told["reason"], told["next"]) == ("inactive", "restarted", 4)
        stage.publish()
        assert session.event("proven")["seq"] == 4
        session.ask(3, 1)
        assert session.event("proven")["seq"] == 3
        session.send(Echo(session.token, challenge(session).cookie).encode())
        assert session.event("udp")["state"] == "active"


def test_what_the_stream_has_still_to_send_when_udp_begins_comes_over_tcp_and_nothing_after_it(stage: Stage) -> None:
    with Session(stage) as session:
        asked = challenge(session)
        stage.publish(2, stream=False)  # the UDP side is ahead of the stream's worker, as it may be
        session.send(Echo(session.token, asked.cookie).encode())
        until(lambda: stage.tier(1).subscribers == 1, "the address is proven")
        stage.publish(0)
        assert [session.event("proven")["seq"] for _ in range(2)] == [1, 2]
        assert session.event("udp")["next"] == 3
        stage.publish()
        assert decode(session.datagram(MAGIC)).sequence == 3
        assert json.loads(session.lines.readline())["event"] == "heartbeat"


def test_what_is_asked_for_again_comes_over_tcp_and_what_is_gone_is_told_as_lost() -> None:
    with Stage(slots=8) as stage, proven(stage) as session:
        stage.publish(20)
        session.ask(1, MAX_RESEND)
        assert session.event("lost") == {"event": "lost", "first": 1, "lost": 12}
        assert [session.event("proven")["seq"] for _ in range(8)] == list(range(13, 21))
        session.ask(20, 1)
        assert session.event("proven")["seq"] == 20
        session.ask(21, 5)
        session.ask(19, 1)
        assert session.event("proven")["seq"] == 19
        assert stage.tier(0).repaired == 10


def test_who_asks_too_often_or_talks_nonsense_is_cut_off(stage: Stage) -> None:
    stage.publish()
    for asked in (
        b'{"resend":{"first":1,"count":1}}\n' * (REQUEST_BURST + MAX_EXTRA // 20),
        b'{"resend":{"first":0,"count":1}}\n' * 40,
    ):
        with Session(stage) as session:
            session.tcp.settimeout(PATIENCE_S)
            with suppress(ConnectionError):  # a reset, where bytes were still unread, is as good an end
                session.tcp.sendall(asked)
                session.lines.read()  # to its end
    until(lambda: sum(stage.tier(0, tier).subscribers for tier in Tier) == 0, "both are gone")


def test_ipv6_is_served_like_ipv4() -> None:
    with Stage(host="::1") as stage, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.bind(("::1", 0))
        sock.settimeout(PATIENCE_S)
        with socket.create_connection(("::1", int(stage.address.rpartition(":")[2]))) as tcp:
            tcp.sendall(b'{"key":"turbo","format":"json","udp":":%d"}\n' % sock.getsockname()[1])
            answer = json.loads(tcp.makefile("rb").readline())
            said = from_server(sock.recv(2048))
            assert isinstance(said, Challenge)
            sock.sendto(Echo(bytes.fromhex(answer["udp"]["token"]), said.cookie).encode(), stage.udp_address)
            until(lambda: stage.tier(1).subscribers == 1, "the address is proven")
            stage.publish()
            while not (data := sock.recv(2048)).startswith(MAGIC):
                pass
            assert decode(data).sequence == 1
