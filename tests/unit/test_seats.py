"""Seats: limits that hold over processes."""

from __future__ import annotations

import mmap
import os

from hypothesis import given
from hypothesis import strategies as st

from sprint.seats import COLUMNS, KEYS, Seats, of_key, private_seats, size_for

SECRET = b"secret"
ACME = of_key(17)


def test_a_holder_gets_as_many_seats_as_his_limit_and_no_more() -> None:
    seats = private_seats()
    assert [seats.take(ACME, 2) for _ in range(3)] == [True, True, False]
    seats.give_back(ACME)
    assert seats.take(ACME, 2)
    assert seats.taken(ACME) == 2


def test_seats_taken_in_any_process_count_in_all() -> None:
    memory = memoryview(bytearray(size_for(3)))
    one, two, three = (Seats(memory, row, SECRET) for row in range(3))
    assert one.take(ACME, 2)
    assert two.take(ACME, 2)
    assert not three.take(ACME, 2)
    assert three.taken(ACME) == 2


def test_a_process_that_died_gives_its_seats_back_by_being_started_again() -> None:
    memory = memoryview(bytearray(size_for(2)))
    killed, other = (Seats(memory, row, SECRET) for row in range(2))
    assert killed.take(ACME, 1)
    assert not other.take(ACME, 1)

    Seats(memory, 0, SECRET)

    assert other.take(ACME, 1)


def test_two_processes_that_race_for_seats_never_have_more_than_the_limit() -> None:
    limit, rounds = 3, 3_000
    memory = memoryview(mmap.mmap(-1, size_for(2)))
    over = memoryview(mmap.mmap(-1, 16)).cast("Q")
    parent = Seats(memory, 0, SECRET)
    child = os.fork()
    if not child:
        status = 1
        try:
            over[1] = race(Seats(memory, 1, SECRET), limit, rounds)
            status = 0
        finally:
            os._exit(status)
    over[0] = race(parent, limit, rounds)
    assert os.waitpid(child, 0)[1] == 0
    assert over.tolist() == [0, 0]
    assert parent.taken(ACME) == 0


def race(seats: Seats, limit: int, rounds: int) -> int:
    """How often more seats than the limit were seen to be held, by the holder of one of them."""
    over = 0
    for _ in range(rounds):
        held = [seats.take(ACME, limit) for _ in range(2)]
        own = sum(held)
        over += own > limit
        for _ in range(own):
            seats.give_back(ACME)
    return over


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60), st.integers(1, 4))
def test_what_is_taken_and_given_back_adds_up(steps: list[tuple[bool, int]], limit: int) -> None:
    seats = private_seats(SECRET)
    held: dict[int, int] = {}
    for take, column in steps:
        if take:
            held[column] = held.get(column, 0) + seats.take(column, limit)
        elif held.get(column):
            seats.give_back(column)
            held[column] -= 1
        assert held.get(column, 0) <= limit
    assert {column: seats.taken(column) for column in held} == held


def test_a_networks_column_is_never_a_keys_and_depends_on_the_secret() -> None:
    one, other = private_seats(b"one"), private_seats(b"other")
    networks = [f"192.0.2.{n}" for n in range(256)]
    columns = [one.of_network(network) for network in networks]
    assert all(KEYS <= column < COLUMNS for column in columns)
    assert all(of_key(number) < KEYS for number in (0, 1, KEYS - 1, KEYS, 10**9))
    assert columns != [other.of_network(network) for network in networks]
