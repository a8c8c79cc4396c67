"""The gate: tiers by key alone, one answer to every bad key, and an end to those who are no longer let in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sprint.admission import (
    ENDS_A_TURN,
    FORGET_NS,
    FREE_FAILURES,
    LAST_DELAY_NS,
    MAX_NETWORKS,
    Admission,
    Denial,
    Ticket,
)
from sprint.keys import FILE_NAME, KeyStore
from sprint.seats import private_seats
from sprint.tiers import Tier
from tests.unit.key_books import open_book

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

S, NS = 1_800_000_000, 10**9
HERE = "192.0.2.1"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    with KeyStore(tmp_path / FILE_NAME) as opened:
        yield opened


def gate(tmp_path: Path, highest: Tier = Tier.ENTERPRISE) -> Admission:
    return Admission(highest, open_book(tmp_path / FILE_NAME), private_seats())


def ticket(admitted: Ticket | Denial) -> Ticket:
    assert isinstance(admitted, Ticket)
    return admitted


def denial(admitted: Ticket | Denial) -> Denial:
    assert isinstance(admitted, Denial)
    return admitted


def test_without_a_key_one_is_served_at_the_free_tier(tmp_path: Path) -> None:
    assert ticket(gate(tmp_path).admit(None, HERE, NS, S)).tier is Tier.FREE


@pytest.mark.parametrize("tier", Tier)
def test_a_key_gives_its_tier_up_to_the_instances(store: KeyStore, tmp_path: Path, tier: Tier) -> None:
    key = store.create("acme", tier, S, connections=1)
    assert ticket(gate(tmp_path).admit(key, HERE, NS, S)).tier is tier
    assert ticket(gate(tmp_path, Tier.BUSINESS).admit(key, HERE, NS, S)).tier is min(tier, Tier.BUSINESS)


def test_a_keys_connections_are_counted_and_come_back(store: KeyStore, tmp_path: Path) -> None:
    key = store.create("acme", Tier.TURBO, S, connections=2)
    admission = gate(tmp_path)
    first = ticket(admission.admit(key, HERE, NS, S))
    ticket(admission.admit(key, "198.51.100.7", NS, S))

    assert denial(admission.admit(key, HERE, NS, S)) == Denial(0, full=True)

    admission.leave(first)
    admission.leave(first)  # twice gives nothing twice
    ticket(admission.admit(key, HERE, NS, S))
    assert denial(admission.admit(key, HERE, NS, S)).full


def test_bad_keys_get_one_answer_that_comes_later_each_time(store: KeyStore, tmp_path: Path) -> None:
    good = store.create("acme", Tier.TURBO, S, connections=50)
    store.create("revoked", Tier.TURBO, S, connections=1)
    store.revoke("revoked", S)
    admission = gate(tmp_path)

    delays = [denial(admission.admit(f"bad {n}", HERE, NS, S)).delay_ns for n in range(40)]

    assert delays[:FREE_FAILURES] == [0] * FREE_FAILURES
    assert delays[FREE_FAILURES] > 0
    assert delays == sorted(delays)
    assert delays[-1] == LAST_DELAY_NS
    assert denial(admission.admit("bad", "192.0.2.2", NS, S)).delay_ns == 0  # the neighbour doesn't pay
    ticket(admission.admit(good, HERE, NS, S))  # nor does who knows his key
    assert denial(admission.admit("bad", HERE, NS + FORGET_NS + 1, S)).delay_ns == 0
    assert admission.denied == 42


def test_the_failures_that_are_remembered_are_bounded(tmp_path: Path) -> None:
    admission = gate(tmp_path)
    for n in range(MAX_NETWORKS + 100):
        admission.admit("bad", f"network {n}", NS, S)
    assert len(admission._failures) == MAX_NETWORKS + 1
    admission.admit("bad", HERE, NS + FORGET_NS + 1, S)
    assert len(admission._failures) == 1


def test_whoever_has_many_addresses_gets_no_failure_forgotten_and_no_more_fast_answers(tmp_path: Path) -> None:
    admission = gate(tmp_path)
    for _ in range(FREE_FAILURES + 20):
        admission.admit("bad", HERE, NS, S)
    delays = [denial(admission.admit("bad", f"network {n}", NS + 1, S)).delay_ns for n in range(2 * MAX_NETWORKS)]
    assert delays[-1] == LAST_DELAY_NS
    assert denial(admission.admit("bad", HERE, NS + 2, S)).delay_ns == LAST_DELAY_NS


def test_a_session_that_can_not_be_ended_keeps_no_other(store: KeyStore, tmp_path: Path) -> None:
    key = store.create("acme", Tier.TURBO, S, connections=2)
    admission = gate(tmp_path)
    ended: list[str] = []

    def fail() -> None:
        raise OSError("a bug")

    ticket(admission.admit(key, HERE, NS, S)).end = fail
    ticket(admission.admit(key, HERE, NS, S)).end = lambda: ended.append("other")
    store.revoke("acme", S)
    with pytest.raises(OSError, match="a bug"):
        admission.check(S)
    assert admission.check(S) == 1
    assert ended == ["other"]
    assert admission.seats.taken(1) == 0


def test_a_key_with_thousands_of_sessions_ends_in_turns_and_whoever_left_meanwhile_is_not_ended(
    store: KeyStore, tmp_path: Path
) -> None:
    key = store.create("acme", Tier.TURBO, S, connections=2 * ENDS_A_TURN + 10)
    admission = gate(tmp_path)
    ended: list[int] = []
    tickets = [ticket(admission.admit(key, HERE, NS, S)) for _ in range(2 * ENDS_A_TURN + 10)]
    for number, one in enumerate(tickets):
        one.end = lambda number=number: ended.append(number)
    store.revoke("acme", S)

    assert admission.check(S) == ENDS_A_TURN
    admission.leave(tickets[-1])
    assert denial(admission.admit(key, HERE, NS, S)) == Denial(0)
    assert admission.check(S) == ENDS_A_TURN
    assert admission.check(S) == 9
    assert admission.check(S) == 0
    assert sorted(ended) == list(range(len(tickets) - 1))
    assert admission.seats.taken(1) == 0


def test_each_key_ends_when_it_expires_whichever_came_first(store: KeyStore, tmp_path: Path) -> None:
    store.create("other", Tier.TURBO, S, connections=1)
    soon, later = (store.create(f"{n}", Tier.TURBO, S, expires_s=S + n, connections=1) for n in (10, 20))
    admission = gate(tmp_path)
    ended: list[str] = []
    ticket(admission.admit(later, HERE, NS, S)).end = lambda: ended.append("later")
    assert admission.check(S) == 0
    ticket(admission.admit(soon, HERE, NS, S)).end = lambda: ended.append("soon")
    assert admission.check(S + 9) == 0
    assert admission.check(S + 10) == 1
    assert ended == ["soon"]
    assert admission.check(S + 19) == 0
    assert admission.check(S + 25) == 1
    assert ended == ["soon", "later"]


def test_a_revoked_or_expired_key_ends_its_sessions_and_nobody_elses(store: KeyStore, tmp_path: Path) -> None:
    ended: list[str] = []
    keys = {
        "revoked": store.create("revoked", Tier.TURBO, S, connections=2),
        "expiring": store.create("expiring", Tier.TURBO, S, expires_s=S + 10, connections=2),
        "good": store.create("good", Tier.TURBO, S, connections=2),
    }
    admission = gate(tmp_path)
    for name, key in (*keys.items(), ("revoked", keys["revoked"])):
        ticket(admission.admit(key, HERE, NS, S)).end = lambda name=name: ended.append(name)
    free = ticket(admission.admit(None, HERE, NS, S))
    free.end = lambda: ended.append("free")
    assert admission.check(S) == 0

    store.revoke("revoked", S)
    assert admission.check(S) == 2
    assert ended == ["revoked", "revoked"]
    assert admission.check(S + 10) == 1
    assert ended == ["revoked", "revoked", "expiring"]
    assert admission.check(S + 11) == 0
