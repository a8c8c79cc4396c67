"""The client's half of the UDP feed, with no socket: what it believes, what it asks for, when it gives up."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprint.addresses import Address
from sprint.bitcoin.networks import REGTEST
from sprint.client_datagrams import (
    AHEAD,
    FIRST_KEEP_ALIVE_NS,
    GRACE_NS,
    KEEP_ALIVE_NS,
    MAX_REPAIRED,
    MAX_REQUESTS,
    MAX_UNHEARD,
    RETREAT_NS,
    DatagramProtocol,
)
from sprint.datagrams import COOKIE_SIZE, TOKEN_SIZE, Beat, Challenge, Echo, KeepAlive
from sprint.errors import RemoteProtocolError
from sprint.events import Lapped
from sprint.frames import Format, Heartbeat, UdpChange, UdpReason, UdpState, udp_frame
from sprint.record import Record
from tests.unit.test_client import SECOND, SESSION, frame, record, welcome

if TYPE_CHECKING:
    from sprint.frames import Item

TOKEN, COOKIE = bytes(range(TOKEN_SIZE)), bytes(range(COOKIE_SIZE))
PORT = 4321


def offer(following: int, address: str = ":8436", token: str = TOKEN.hex()) -> bytes:
    answer = json.loads(welcome(following))
    return json.dumps({**answer, "udp": {"address": address, "token": token}}).encode() + b"\n"


def change(state: UdpState, following: int, reason: UdpReason = UdpReason.NONE) -> bytes:
    return udp_frame(UdpChange(state, reason, following), Format.BINARY)


def active(following: int = 5, now_ns: int = 0, **options: Any) -> DatagramProtocol:
    """Its records come by UDP, from that one on."""
    protocol = DatagramProtocol(**options)
    protocol.connected(now_ns, PORT)
    protocol.receive(offer(following) + change(UdpState.ACTIVE, following), now_ns)
    assert protocol.active
    return protocol


def asked(protocol: DatagramProtocol) -> list[tuple[int, int]]:
    """What it asks for again; whether it gives UDP up is asked elsewhere."""
    said = [json.loads(line) for line in protocol.data_to_send().splitlines()]
    return [(line["resend"]["first"], line["resend"]["count"]) for line in said if "resend" in line]


def test_the_hello_names_the_port_and_the_answer_tells_where_the_server_is() -> None:
    protocol = DatagramProtocol(key="k")
    assert json.loads(protocol.connected(0, PORT)) == {"key": "k", "udp": f":{PORT}"}
    protocol.receive(offer(5, "192.0.2.1:99"), 0)
    assert protocol.server == Address("192.0.2.1", 99)
    protocol.connected(1, PORT)
    protocol.receive(offer(5), 1)
    assert protocol.server == Address("", 8436)


def test_the_server_may_be_named_in_any_spelling_of_its_number() -> None:
    protocol = DatagramProtocol()
    protocol.connected(0, PORT)
    protocol.receive(offer(5, "[2001:DB8:0::1]:99"), 0)
    assert protocol.server == Address("2001:db8::1", 99)


def test_a_challenge_of_this_session_is_echoed_even_one_that_overtook_the_answer() -> None:
    for early in (True, False):
        protocol = DatagramProtocol()
        protocol.connected(0, PORT)
        if early:
            protocol.receive_datagram(Challenge(SESSION, COOKIE).encode(), 0)
        assert protocol.datagrams_to_send() == []
        protocol.receive(offer(5), 0)
        if not early:
            protocol.receive_datagram(Challenge(SESSION, COOKIE).encode(), 0)
        assert protocol.datagrams_to_send() == [Echo(TOKEN, COOKIE).encode()]
        protocol.receive_datagram(Challenge(SESSION + 1, COOKIE).encode(), 0)
        assert protocol.datagrams_to_send() == []


def test_without_an_answer_it_says_that_it_is_there_and_once_active_every_ten_seconds() -> None:
    protocol = DatagramProtocol()
    protocol.connected(0, PORT)
    protocol.receive(offer(5), 0)
    assert protocol.deadline() == FIRST_KEEP_ALIVE_NS
    protocol.on_timer(FIRST_KEEP_ALIVE_NS)
    assert protocol.datagrams_to_send() == [KeepAlive(TOKEN).encode()]
    protocol.receive(change(UdpState.ACTIVE, 5), SECOND)
    for second in range(2, 11):
        protocol.receive(frame(Heartbeat(SESSION, 4, 0)), second * SECOND)
        protocol.on_timer(second * SECOND)
    assert protocol.datagrams_to_send() == []
    protocol.receive(frame(Heartbeat(SESSION, 4, 0)), 11 * SECOND)
    protocol.on_timer(SECOND + KEEP_ALIVE_NS)
    assert protocol.datagrams_to_send() == [KeepAlive(TOKEN).encode()]


def test_a_server_without_udp_serves_over_tcp() -> None:
    protocol = DatagramProtocol()
    protocol.connected(0, PORT)
    assert protocol.receive(welcome(5) + frame(record(5)), 0)[1:] == [record(5)]
    assert not protocol.active
    assert protocol.datagrams_to_send() == []


def test_records_come_once_whichever_way_is_first() -> None:
    protocol = active(5)
    assert protocol.receive_datagram(record(5).encode(), 0) == [record(5)]
    assert protocol.receive(frame(record(5)) + frame(record(6)), 0) == [record(6)]
    assert protocol.receive_datagram(record(6).encode(), 0) == []
    assert protocol.by_datagram == 1
    assert protocol.last == 6


def test_a_gap_is_asked_for_after_a_short_grace_and_filled_in_any_order() -> None:
    protocol = active(5)
    assert protocol.receive_datagram(record(7).encode(), 0) == [record(7)]
    assert protocol.deadline() == GRACE_NS
    assert protocol.receive_datagram(record(6).encode(), 0) == [record(6)]
    protocol.on_timer(GRACE_NS)
    assert asked(protocol) == [(5, 1)]
    assert protocol.receive(frame(record(5)), GRACE_NS) == [record(5)]
    assert protocol.last == 7
    protocol.on_timer(SECOND)
    assert asked(protocol) == []


@pytest.mark.parametrize("by_udp", [True, False])
def test_a_heartbeat_tells_of_the_loss_of_the_last_record(by_udp: bool) -> None:
    protocol = active(5)
    if by_udp:
        assert protocol.receive_datagram(Beat(SESSION, 6, 0).encode(), 0) == []
    else:
        protocol.receive(frame(Heartbeat(SESSION, 6, 0)), 0)
    protocol.on_timer(GRACE_NS)
    assert asked(protocol) == [(5, 2)]
    assert protocol.receive(frame(Lapped(5, 1)) + frame(record(6)), GRACE_NS) == [Lapped(5, 1), record(6)]
    assert protocol.deadline() == GRACE_NS + 3 * SECOND


def test_what_falls_between_tcp_and_udp_is_asked_for() -> None:
    protocol = active(5)
    protocol.receive(change(UdpState.INACTIVE, 9, UdpReason.RESTARTED), 0)
    assert not protocol.active
    protocol.on_timer(GRACE_NS)
    assert asked(protocol) == [(5, 4)]


def test_nothing_is_asked_for_while_a_replay_is_under_way() -> None:
    protocol = DatagramProtocol(since=1)
    protocol.connected(0, PORT)
    protocol.receive(offer(50) + frame(record(1)), 0)
    assert protocol.receive_datagram(record(50).encode(), 0) == [record(50)]
    protocol.on_timer(FIRST_KEEP_ALIVE_NS)
    assert asked(protocol) == []


def test_who_gets_no_answer_for_a_record_gives_up_the_connection_and_asks_for_it_in_the_next() -> None:
    protocol = active(5)
    protocol.receive_datagram(record(6).encode(), 0)
    for _ in range(MAX_REQUESTS):
        now = protocol.deadline()
        protocol.receive(frame(Heartbeat(SESSION, 6, 0)), now)
        protocol.on_timer(now)
    now = protocol.deadline()
    protocol.receive(frame(Heartbeat(SESSION, 6, 0)), now)
    with pytest.raises(RemoteProtocolError, match="record 5 was asked for"):
        protocol.on_timer(now)
    assert len(asked(protocol)) == MAX_REQUESTS
    assert json.loads(protocol.connected(now, PORT))["since"] == 5


def test_silence_over_tcp_is_trouble_even_if_udp_goes_on() -> None:
    protocol = active(5)
    protocol.receive_datagram(Beat(SESSION, 4, 0).encode(), 2 * SECOND)
    with pytest.raises(RemoteProtocolError, match="TCP"):
        protocol.on_timer(3 * SECOND)


FORGED = {
    "another session": record(5, session=SESSION + 1),
    "no work": record(5, hash=bytes(32)),
    "another network": record(5, network=REGTEST.magic, hash=REGTEST.genesis_hash, header=REGTEST.genesis_header),
    "far ahead": record(5 + AHEAD),
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_a_datagram_that_can_t_be_believed_is_passed_over_and_counted(forged: Record) -> None:
    protocol = active(5)
    assert protocol.receive_datagram(forged.encode(), 0) == []
    assert protocol.ignored == 1
    protocol.on_timer(SECOND)
    assert asked(protocol) == []
    assert protocol.receive_datagram(record(5).encode(), SECOND) == [record(5)]


def test_a_heartbeat_far_ahead_or_of_another_session_means_nothing() -> None:
    protocol = active(5)
    for beat in (Beat(SESSION, 5 + AHEAD, 0), Beat(SESSION + 1, 5, 0)):
        assert protocol.receive_datagram(beat.encode(), 0) == []
    assert protocol.ignored == 2
    protocol.on_timer(SECOND)
    assert asked(protocol) == []


def test_tcp_takes_back_what_a_forged_heartbeat_made_believe() -> None:
    protocol = active(5)
    protocol.receive_datagram(Beat(SESSION, 500, 0).encode(), 0)
    protocol.on_timer(GRACE_NS)
    assert asked(protocol) == [(5, 128)]
    protocol.receive(frame(Heartbeat(SESSION, 4, 0)), SECOND)
    protocol.on_timer(2 * SECOND)
    assert asked(protocol) == []


def test_a_reconnect_in_the_same_session_repeats_nothing_that_came_by_udp() -> None:
    protocol = active(5)
    protocol.receive_datagram(record(5).encode(), 0)
    protocol.receive_datagram(record(7).encode(), 0)
    assert json.loads(protocol.connected(1, PORT)) == {"since": 6, "udp": f":{PORT}"}
    assert protocol.receive_datagram(record(8).encode(), 1) == [record(8)]  # while the connection isn't there yet
    items = protocol.receive(offer(8) + frame(record(6)) + frame(record(7)) + frame(record(8)), 1)
    assert items[1:] == [record(6)]
    assert protocol.last == 8


def test_another_session_begins_anew() -> None:
    protocol = active(5)
    protocol.receive_datagram(record(5).encode(), 0)
    protocol.connected(1, PORT)
    with pytest.raises(RemoteProtocolError, match="new session"):
        protocol.receive(welcome(9, session=2), 1)
    assert json.loads(protocol.connected(2, PORT))["since"] == 1
    items = protocol.receive(welcome(2, session=2) + frame(record(1, session=2)), 2)
    assert items[1:] == [record(1, session=2)]


GIVE_UP = b'{"udp":false}\n'


def test_when_several_heartbeats_come_and_no_datagram_records_are_wanted_over_tcp_and_udp_again_a_minute_later() -> (
    None
):
    protocol = active(5)
    for second in range(1, MAX_UNHEARD):
        protocol.receive(frame(Heartbeat(SESSION, 4, 0)), second * SECOND)
    assert protocol.data_to_send() == b""
    now = MAX_UNHEARD * SECOND
    protocol.receive(frame(Heartbeat(SESSION, 4, 0)), now)
    assert protocol.data_to_send() == GIVE_UP
    protocol.receive(change(UdpState.INACTIVE, 5, UdpReason.UNHEARD), now)
    assert not protocol.active
    for _ in range(2 * MAX_UNHEARD):
        now += SECOND
        protocol.receive(frame(Heartbeat(SESSION, 4, 0)), now)
    assert protocol.data_to_send() == b""
    protocol.datagrams_to_send()
    protocol.receive(frame(Heartbeat(SESSION, 4, 0)), MAX_UNHEARD * SECOND + RETREAT_NS - 1)
    protocol.on_timer(MAX_UNHEARD * SECOND + RETREAT_NS - 1)
    assert protocol.datagrams_to_send() == []
    protocol.on_timer(MAX_UNHEARD * SECOND + RETREAT_NS)
    assert protocol.datagrams_to_send() == [KeepAlive(TOKEN).encode()]


def test_whoever_hears_datagrams_or_slept_over_several_heartbeats_gives_nothing_up() -> None:
    protocol = active(5)
    for second in range(1, 3 * MAX_UNHEARD):
        if second % (MAX_UNHEARD - 1) == 0:
            protocol.receive_datagram(Beat(SESSION, 4, 0).encode(), second * SECOND)
        protocol.receive(frame(Heartbeat(SESSION, 4, 0)), second * SECOND)
    protocol.receive_datagram(Beat(SESSION, 4, 0).encode(), 3 * MAX_UNHEARD * SECOND)
    protocol.receive(frame(Heartbeat(SESSION, 4, 0)) * 2 * MAX_UNHEARD, 3 * MAX_UNHEARD * SECOND)
    assert protocol.data_to_send() == b""


def test_when_tcp_fills_one_gap_after_the_other_and_only_heartbeats_come_by_datagram_udp_is_given_up() -> None:
    protocol = active(5)

    def gap(sequence: int) -> bytes:
        now = sequence * SECOND // 5
        protocol.receive_datagram(Beat(SESSION, sequence, 0).encode(), now)
        protocol.on_timer(now + GRACE_NS)
        said = protocol.data_to_send()
        protocol.receive(frame(record(sequence)), now + GRACE_NS)
        return said

    for sequence in range(5, 4 + MAX_REPAIRED):
        assert GIVE_UP not in gap(sequence)
    protocol.receive_datagram(record(4 + MAX_REPAIRED).encode(), 2 * SECOND)  # one that comes: all is well
    for sequence in range(5 + MAX_REPAIRED, 4 + 2 * MAX_REPAIRED):
        assert GIVE_UP not in gap(sequence)
    assert GIVE_UP in gap(4 + 2 * MAX_REPAIRED)


@pytest.mark.parametrize("bad", [":", "nowhere", ":99999", "", "host.example:99"])
def test_an_offer_that_is_none_ends_the_connection(bad: str) -> None:
    for answer in (offer(5, address=bad), offer(5, token=bad), offer(5, token="00")):
        protocol = DatagramProtocol()
        protocol.connected(0, PORT)
        with pytest.raises(RemoteProtocolError):
            protocol.receive(answer, 0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["udp", "tcp", "both", "none"]), st.booleans()), max_size=30))
def test_whatever_is_lost_every_record_comes_exactly_once_in_the_end(fates: list[tuple[str, bool]]) -> None:
    """Each record comes by UDP, TCP, both or not at all, and a heartbeat after some; the server answers requests."""
    protocol = active(1)
    got: list[Item] = []
    now = 0
    for sequence, (way, beat) in enumerate(fates, 1):
        if way in {"udp", "both"}:
            got += protocol.receive_datagram(record(sequence).encode(), now)
        if way in {"tcp", "both"}:
            got += protocol.receive(frame(record(sequence)), now)  # type: ignore[arg-type]  # no Subscribed comes here
        if beat:
            protocol.receive_datagram(Beat(SESSION, sequence, 0).encode(), now)
    newest = len(fates)
    for _ in range(10):
        now += SECOND // 2
        got += [
            item
            for item in protocol.receive(frame(Heartbeat(SESSION, newest, 0)), now)
            if isinstance(item, Record | Lapped)
        ]
        protocol.on_timer(now + GRACE_NS)
        for first, count in asked(protocol):
            again = b"".join(frame(record(one)) for one in range(first, min(first + count, newest + 1)))
            got += protocol.receive(again, now + GRACE_NS)  # type: ignore[arg-type]
    assert sorted(item.sequence for item in got if isinstance(item, Record)) == list(range(1, newest + 1))
    assert protocol.last == newest


@settings(deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=250), st.just(record(5).encode())), max_size=10))
def test_no_datagrams_make_it_fail(datagrams: list[bytes]) -> None:
    protocol = active(5)
    for datagram in datagrams:
        protocol.receive_datagram(datagram, 0)
    protocol.on_timer(SECOND)
