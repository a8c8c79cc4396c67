"""Leases and limits by themselves: time is an argument, and so is every address."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprint.addresses import Address
from sprint.datagrams import COOKIE_SIZE, TOKEN_SIZE, Challenge, Echo, KeepAlive, from_server
from sprint.deliveries.reception import network_of
from sprint.deliveries.requests import MAX_EXTRA, MAX_REQUEST, MAX_RESEND, REQUEST_BURST, Requests, Resend, read_request
from sprint.deliveries.udp_leases import (
    CHALLENGE_GAP_NS,
    LEASE_NS,
    PROOF_TIMEOUT_NS,
    Activated,
    Deactivated,
    Leases,
    NotProven,
    SendChallenge,
)
from sprint.deliveries.udp_limits import (
    COOKIE_LIFE_NS,
    MAX_STRANGERS,
    OWN_BURST,
    OWN_PER_S,
    STRANGER_BURST,
    TOTAL_BURST,
    ChallengeLimits,
    Cookies,
)
from sprint.frames import UdpReason
from sprint.tiers import NS_PER_S, Tier

SESSION = 7
HOME, ELSEWHERE = Address("192.0.2.1", 5000), Address("198.51.100.1", 6000)


def network(host: str) -> str:
    return network_of(socket.AF_INET6 if ":" in host else socket.AF_INET, host)


def token(number: int) -> bytes:
    return number.to_bytes(TOKEN_SIZE, "big")


class Desk:
    """Leases, and whoever answers their challenges."""

    def __init__(self, **limits: int) -> None:
        self.now = 0
        self.leases = Leases(SESSION, bytes(32), network, 0, **limits)

    def want(self, number: int, address: Address = HOME, peer: str = HOME.host) -> list[object]:
        return list(self.leases.want(token(number), Tier.TURBO, 0, address, peer, self.now))

    def here(self, number: int, address: Address) -> list[object]:
        return list(self.leases.keep_alive(KeepAlive(token(number)), address, self.now))

    def echo(self, number: int, cookie: bytes, address: Address) -> list[object]:
        return list(self.leases.echo(Echo(token(number), cookie), address, self.now))

    def prove(self, number: int, address: Address = HOME) -> list[object]:
        """Want it there, and echo what comes."""
        return self.echo(number, cookie_in(self.want(number, address)), address)


def cookie_in(actions: list[object]) -> bytes:
    (sent,) = actions
    assert isinstance(sent, SendChallenge)
    said = from_server(sent.data)
    assert isinstance(said, Challenge)
    assert said.session == SESSION
    return said.cookie


def test_one_who_says_that_he_hears_nothing_is_as_good_as_unproven_and_may_prove_his_address_again() -> None:
    desk = Desk()
    assert desk.leases.give_up(token(1)) == []
    desk.prove(1)
    (action,) = desk.leases.give_up(token(1))
    assert isinstance(action, Deactivated)
    assert action.reason is UdpReason.UNHEARD
    assert desk.leases.active == {}
    assert desk.leases.give_up(token(1)) == []
    assert [type(one) for one in desk.echo(1, cookie_in(desk.here(1, HOME)), HOME)] == [Activated]


def test_a_lease_lapses_without_keep_alives_and_is_taken_up_again_by_one() -> None:
    desk = Desk()
    (begun,) = desk.prove(1)
    assert isinstance(begun, Activated)
    desk.now = LEASE_NS - 1
    assert desk.leases.on_timer(desk.now) == []
    assert desk.here(1, HOME) == []
    desk.now += LEASE_NS - 1
    assert desk.leases.on_timer(desk.now) == []
    desk.now += 1
    (ended,) = desk.leases.on_timer(desk.now)
    assert isinstance(ended, Deactivated)
    assert ended.reason is UdpReason.LAPSED
    cookie = cookie_in(desk.here(1, HOME))
    assert isinstance(desk.echo(1, cookie, HOME)[0], Activated)


def test_who_proves_nothing_is_told_once_and_may_still_do_so() -> None:
    desk = Desk()
    cookie = cookie_in(desk.want(1))
    desk.now = PROOF_TIMEOUT_NS
    (told,) = desk.leases.on_timer(desk.now)
    assert isinstance(told, NotProven)
    assert told.reason is UdpReason.UNPROVEN
    assert desk.leases.on_timer(desk.now + NS_PER_S) == []
    assert isinstance(desk.echo(1, cookie, HOME)[0], Activated)


def test_a_cookie_expires() -> None:
    desk = Desk()
    cookie = cookie_in(desk.want(1))
    desk.now = COOKIE_LIFE_NS + 1
    assert desk.echo(1, cookie, HOME) == []
    assert desk.leases.refused == 1


def test_a_cookie_of_before_a_move_doesn_t_move_it_back() -> None:
    desk = Desk()
    first = cookie_in(desk.want(1))
    desk.now += CHALLENGE_GAP_NS
    old = cookie_in(desk.here(1, HOME))
    assert isinstance(desk.echo(1, first, HOME)[0], Activated)
    desk.now += CHALLENGE_GAP_NS
    moved = desk.echo(1, cookie_in(desk.here(1, ELSEWHERE)), ELSEWHERE)
    assert [type(action) for action in moved] == [Deactivated, Activated]
    assert desk.echo(1, old, HOME) == []
    assert desk.leases.refused == 1
    assert list(desk.leases.active) == [ELSEWHERE]


def test_a_second_subscription_that_proves_the_same_address_takes_the_place_of_the_first() -> None:
    desk = Desk()
    desk.prove(1)
    replaced, begun = desk.prove(2)
    assert isinstance(replaced, Deactivated)
    assert replaced.reason is UdpReason.REPLACED
    assert isinstance(begun, Activated)
    assert len(desk.leases.active) == 1


@pytest.mark.parametrize("limits", [{"max_active": 2}, {"max_active_per_network": 2}])
def test_there_are_no_more_than_there_may_be_and_a_place_that_is_left_is_free(limits: dict[str, int]) -> None:
    desk = Desk(**limits)
    homes = [Address(HOME.host, 5000 + number) for number in range(4)]
    assert all(isinstance(desk.prove(number, homes[number])[0], Activated) for number in range(2))
    (refused,) = desk.prove(2, homes[2])
    assert isinstance(refused, NotProven)
    assert refused.reason is UdpReason.FULL
    assert desk.leases.full == 1
    desk.leases.end(token(0))
    desk.now += CHALLENGE_GAP_NS
    assert isinstance(desk.echo(2, cookie_in(desk.here(2, homes[2])), homes[2])[0], Activated)


def test_a_worker_that_begins_anew_takes_its_subscriptions_with_it_and_no_others() -> None:
    desk = Desk()
    desk.prove(1)
    desk.leases.want(token(2), Tier.ENTERPRISE, 1, ELSEWHERE, ELSEWHERE.host, 0)
    assert [type(action) for action in desk.leases.end_all_of(0)] == [Deactivated]
    assert len(desk.leases) == 1
    assert desk.leases.end(token(1)) == []


def test_one_subscription_gets_a_challenge_no_more_often_than_it_needs() -> None:
    desk = Desk()
    assert len(desk.want(1)) == 1
    assert desk.here(1, HOME) == []
    desk.now = CHALLENGE_GAP_NS
    assert len(desk.here(1, HOME)) == 1


def test_one_subscriber_who_claims_to_be_everywhere_keeps_nobody_else_from_proving_his_address() -> None:
    desk = Desk()
    desk.want(1)
    challenged = 0
    for number in range(2 * TOTAL_BURST):
        desk.now += NS_PER_S // 20_000
        challenged += len(desk.here(1, Address(HOME.host, 1024 + number)))
    assert challenged <= OWN_BURST + OWN_PER_S * desk.now // NS_PER_S
    assert len(desk.want(2, ELSEWHERE, ELSEWHERE.host)) == 1


def test_strangers_get_few_challenges_whoever_asks_and_all_together_are_bounded() -> None:
    limits = ChallengeLimits(0)
    assert sum(limits.allow("192.0.2.9", own=False, now_ns=0) for _ in range(100)) == STRANGER_BURST
    assert sum(limits.allow("192.0.2.9", own=False, now_ns=NS_PER_S) for _ in range(100)) == 1
    for number in range(3 * MAX_STRANGERS):
        limits.allow(f"stranger {number}", own=False, now_ns=NS_PER_S)
    assert not limits.allow("one more", own=False, now_ns=NS_PER_S)
    assert limits.allow("one more", own=False, now_ns=60 * NS_PER_S)  # those who are quiet are forgotten
    limits = ChallengeLimits(0)
    assert sum(limits.allow("192.0.2.9", own=True, now_ns=0) for _ in range(2 * TOTAL_BURST)) == TOTAL_BURST


@settings(deadline=None)
@given(st.binary(max_size=60), st.integers(0, 3))
def test_no_cookie_can_be_made_without_the_key(forged: bytes, bit: int) -> None:
    cookies = Cookies(bytes(range(32)))
    real = cookies.bake(HOME, token(1), 0, 0)
    assert len(real) == COOKIE_SIZE
    assert cookies.check(real, HOME, token(1), 0, 0)
    assert not cookies.check(bytes([real[0] ^ (1 << bit)]) + real[1:], HOME, token(1), 0, 0)
    assert not Cookies(bytes(32)).check(real, HOME, token(1), 0, 0)
    padded = (forged + bytes(COOKIE_SIZE))[:COOKIE_SIZE]
    assert padded == real or not cookies.check(padded, HOME, token(1), 0, 0)
    for address, owner, serial in ((ELSEWHERE, token(1), 0), (HOME, token(2), 0), (HOME, token(1), 1)):
        assert not cookies.check(real, address, owner, serial, 0)


# What a session asks for again


@pytest.mark.parametrize(
    "line",
    [
        b"", b"{}", b"[]", b"null", b"resend", b'{"resend":{}}', b'{"resend":{"first":1}}', b"\xff" * 20,
        b'{"resend":{"first":0,"count":1}}', b'{"resend":{"first":1,"count":0}}', b'{"resend":{"first":1,"count":129}}',
        b'{"resend":{"first":true,"count":1}}', b'{"resend":{"first":1,"count":1,"more":1}}', b"[" * MAX_REQUEST,
        b'{"resend":{"first":1,"count":1},"more":1}', b'{"resend":{"first":18446744073709551616,"count":1}}',
        b'{"udp":true}', b'{"udp":0}', b'{"udp":null}', b'{"udp":false,"more":1}',
    ],
)  # fmt: skip
def test_what_asks_for_nothing_that_there_is_counts_as_surplus(line: bytes) -> None:
    assert read_request(line) is None
    requests = Requests(0)
    assert requests.receive(line + b"\n", 0) == []
    assert requests.surplus == len(line) + 1


def test_requests_are_read_however_they_are_cut_and_no_more_than_there_may_be() -> None:
    line = b'{"resend":{"first":5,"count":%d}}\n' % MAX_RESEND
    requests = Requests(0)
    got = [one for at in range(2 * len(line)) for one in requests.receive((line * 2)[at : at + 1], 0)]
    assert got == [Resend(5, MAX_RESEND)] * 2
    for _ in range(REQUEST_BURST):
        got += requests.receive(line, 0)
    assert len(got) == REQUEST_BURST
    assert requests.surplus == 2 * len(line)
    assert requests.receive(line, NS_PER_S) == [Resend(5, MAX_RESEND)]


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=20))
def test_whatever_is_said_little_is_kept(pieces: list[bytes]) -> None:
    requests = Requests(0)
    for piece in pieces:
        requests.receive(piece, 0)
        assert len(requests._rest) <= MAX_REQUEST
    assert requests.surplus <= sum(map(len, pieces)) + MAX_EXTRA
