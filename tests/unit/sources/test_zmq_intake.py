"""The intake of what the operator's nodes publish: whose word is passed on, and what of it is missing."""

from __future__ import annotations

import select
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from sprint.regtest import RegtestChain
from sprint.sources.zmq_intake import MESSAGES_A_TURN, Published, ZmqIntake
from tests.unit.sources.test_zmq import CorePublisher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT_S = 20.0
ONE, TWO = RegtestChain().extend(2, 1_700_000_000)
Heard = tuple[bytes, bytes, int]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as one:
        yield one


def publisher(stack: ExitStack) -> CorePublisher:
    one = CorePublisher()
    stack.callback(one.context.term)
    stack.callback(one.close)
    return one


class Listening:
    """An intake, driven as the desk does."""

    def __init__(self, stack: ExitStack, *publishers: CorePublisher) -> None:
        self.intake = ZmqIntake([one.address for one in publishers])
        stack.callback(self.intake.close)
        self.heard: list[Published] = []
        for one in publishers:
            one.wait_for_subscriptions(2, self.turn)

    def want(self, topics: set[bytes], *publishers: CorePublisher) -> None:
        """Ask for topics that nobody had asked for, and wait until these publishers know."""
        self.intake.want(topics)
        for one in publishers:
            one.wait_for_subscriptions(len(topics), self.turn)

    def turn(self) -> None:
        select.select([self.intake.fileno()], [], [], 0.01)
        self.heard += self.intake.poll()[0]

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, f"heard {[(one.topic, one.lost) for one in self.heard][-20:]}"
            self.turn()

    def read(self, count: int) -> list[Heard]:
        self.until(lambda: len(self.heard) >= count)
        heard, self.heard = self.heard, []
        return [(one.topic, one.body, one.lost) for one in heard]


def test_blocks_are_heard_and_of_other_topics_those_that_are_wanted(stack: ExitStack) -> None:
    core = publisher(stack)
    one = Listening(stack, core)
    one.want({b"rawtx"}, core)
    core.send(b"hashtx", bytes(32))
    core.socket.send_multipart([b"rawtx", b"no counter"])
    core.send(b"rawtx", ONE.coinbase)
    assert one.read(1) == [(b"rawtx", ONE.coinbase, 0)]
    core.send(b"hashblock", ONE.hash[::-1])
    core.send(b"rawblock", ONE.payload)
    assert one.read(2) == [(b"hashblock", ONE.hash[::-1], 0), (b"rawblock", ONE.payload, 0)]


def test_blocks_are_named_by_their_hash_and_what_is_none_is_skipped(stack: ExitStack) -> None:
    core = publisher(stack)
    one = Listening(stack, core)
    core.socket.send_multipart([b"rawblock", b"short", bytes(4)])
    core.socket.send_multipart([b"rawblock", ONE.payload[:80], bytes(4)])
    core.socket.send_multipart([b"hashblock", bytes(31), bytes(4)])
    core.send(b"rawblock", ONE.payload)
    one.until(lambda: bool(one.heard))
    assert [(said.node, said.block_hash) for said in one.heard] == [(str(core.address), ONE.hash)]


def test_what_is_missing_on_the_way_is_told_with_the_next_message_of_the_topic(stack: ExitStack) -> None:
    core = publisher(stack)
    one = Listening(stack, core)
    one.want({b"rawtx", b"hashtx"}, core)
    for swallow in (False, True, True, False, False):
        core.send(b"rawtx", ONE.coinbase, swallow=swallow)
    core.send(b"hashtx", bytes(32))
    assert [(topic, lost) for topic, _, lost in one.read(4)] == [
        (b"rawtx", 0),
        (b"rawtx", 2),
        (b"rawtx", 0),
        (b"hashtx", 0),
    ]


def test_a_new_connection_leaves_a_gap_even_if_the_publisher_counts_from_zero(stack: ExitStack) -> None:
    core = publisher(stack)
    one = Listening(stack, core)
    one.want({b"sequence"}, core)
    change = bytes(32) + b"A" + bytes(8)
    core.send(b"sequence", change)
    assert one.read(1) == [(b"sequence", change, 0)]
    core.close()
    one.until(lambda: not one.intake.connected)
    core.counters.clear()
    core.open()
    core.wait_for_subscriptions(3, one.turn)
    for _ in range(2):
        core.send(b"sequence", change)
    assert [lost for _, _, lost in one.read(2)] == [1, 0]


def test_what_was_said_while_nobody_wanted_it_is_no_loss(stack: ExitStack) -> None:
    core = publisher(stack)
    one = Listening(stack, core)
    for _ in range(2):
        one.want({b"rawtx"}, core)
        core.send(b"rawtx", ONE.coinbase)
        assert one.read(1) == [(b"rawtx", ONE.coinbase, 0)]
        one.intake.want(set())
        for _ in range(5):
            core.send(b"rawtx", ONE.coinbase, swallow=True)


def test_transactions_are_heard_at_another_port_of_the_first_node(stack: ExitStack) -> None:
    blocks, transactions = publisher(stack), publisher(stack)
    one = Listening(stack, blocks, transactions)
    one.want({b"rawtx"}, blocks, transactions)
    transactions.send(b"rawtx", ONE.coinbase)
    assert one.read(1) == [(b"rawtx", ONE.coinbase, 0)]


def test_of_two_publishers_of_one_topic_one_is_heard_and_the_other_when_that_is_gone(stack: ExitStack) -> None:
    first, second = publisher(stack), publisher(stack)
    one = Listening(stack, first, second)
    one.want({b"hashtx"}, first, second)
    first.send(b"hashtx", bytes(32))
    assert one.read(1) == [(b"hashtx", bytes(32), 0)]
    second.send(b"hashtx", b"\1" * 32)
    second.send(b"hashblock", ONE.hash[::-1])
    one.read(1)
    first.send(b"hashtx", b"\2" * 32)
    one.until(lambda: any(said.body == b"\2" * 32 for said in one.heard))
    assert [said.body for said in one.heard if said.topic == b"hashtx"] == [b"\2" * 32], "each once"
    one.heard.clear()
    first.close()

    def heard_from_second() -> bool:
        second.send(b"hashtx", b"\3" * 32)
        return bool(one.heard)

    one.until(heard_from_second)
    assert (one.heard[0].body, one.heard[0].lost) == (b"\3" * 32, 1), "a gap where one takes over"
    first.open()


def test_a_flood_of_one_publisher_delays_no_block_of_another(stack: ExitStack) -> None:
    busy, calm = publisher(stack), publisher(stack)
    one = Listening(stack, busy, calm)
    one.want({b"rawtx"}, busy, calm)
    flood = 50 * MESSAGES_A_TURN
    for _ in range(flood // 2):
        busy.send(b"rawtx", ONE.coinbase)
    calm.send(b"rawblock", ONE.payload)
    for _ in range(flood // 2):
        busy.send(b"rawtx", ONE.coinbase)
    busy.send(b"rawblock", TWO.payload)

    def blocks() -> list[int]:
        return [number for number, said in enumerate(one.heard) if said.topic == b"rawblock"]

    one.until(lambda: len(blocks()) == 2)
    assert blocks()[-1] < flood // 2, "nor one of its own: blocks have a connection to themselves"
