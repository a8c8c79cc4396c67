"""The table against a model, over plain memory: what runs see is what should be there, and what they hold stays."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xdp import fanout_table, kernel
from xdp.datagrams import NextHop
from xdp.fanout_maps import (
    EGRESS,
    ENTRIES,
    RUNS,
    SNAPSHOTS,
    SUBSCRIBERS,
    FanoutHandover,
    MappedArray,
    Rank,
    Sender,
)
from xdp.fanout_table import FanoutTable, Pacing, TableFullError

if TYPE_CHECKING:
    from collections.abc import Iterator

ENTRY, RUN = EGRESS.layouts["subscriber"].size, EGRESS.layouts["run"].size
SIZES = {"subscribers": 2 * ENTRY * ENTRIES, "orders": 4 * SNAPSHOTS * SUBSCRIBERS}
HOPS = [
    NextHop(index, bytes([2] * 6), bytes([4 + index, 0, 0, 0, 0, mac]), bytes(4)) for index in (2, 3) for mac in (1, 2)
]


@contextlib.contextmanager
def memory() -> Iterator[FanoutHandover]:
    """What the maps would be, without a kernel's."""
    fds = {}
    try:
        for name in ("program", "subscribers", "orders", "snapshots", "directory", "runs", "devices"):
            fds[f"{name}_fd"] = os.memfd_create(name)
            os.ftruncate(fds[f"{name}_fd"], SIZES.get(name, 8192))
        yield FanoutHandover(contexts=tuple(range(RUNS)), **fds)
    finally:
        for fd in fds.values():
            os.close(fd)


@contextlib.contextmanager
def devices() -> Iterator[dict[bytes, bytes]]:
    """A DEVMAP without interfaces behind it."""
    there: dict[bytes, bytes] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "map_update", lambda _fd, key, value: there.update({key: value}))
        patch.setattr(kernel, "map_delete", lambda _fd, key: there.pop(key, None) is not None)
        yield there


class Machine(RuleBasedStateMachine):
    """Joins, moves and leaves, while runs hold orders."""

    def __init__(self) -> None:
        super().__init__()
        self.undo = contextlib.ExitStack()
        self.devices = self.undo.enter_context(devices())
        self.handover = self.undo.enter_context(memory())
        self.table = self.undo.enter_context(FanoutTable(self.handover, 8436))
        self.pins = MappedArray(self.handover.runs_fd, RUN, RUNS)
        self.undo.callback(self.pins.close)
        self.members: dict[int, tuple[NextHop, bytes, int, Rank]] = {}
        self.held: dict[int, tuple[int, list[int], list[bytes], set[int]]] = {}
        self.next = 0

    def order(self, version: int) -> list[int]:
        base = version % SNAPSHOTS
        (_, _, count, *_) = EGRESS.layouts["snapshot"].packing.unpack_from(self.table._snapshots.bytes, base * 64)
        return self.table._orders.words[base * SUBSCRIBERS : base * SUBSCRIBERS + count].tolist()

    def entry(self, number: int) -> bytes:
        return bytes(self.table._entries.bytes[number * ENTRY : (number + 1) * ENTRY])

    @rule(hop=st.sampled_from(HOPS), rank=st.sampled_from(Rank), many=st.integers(1, 4))
    def join(self, hop: NextHop, rank: Rank, many: int) -> None:
        with self.table.batch():
            for _ in range(many):
                self.next += 1
                address = self.next.to_bytes(4, "big")
                slot = self.table.add(hop, address, 1 + self.next, rank)
                assert slot not in self.members
                self.members[slot] = (hop, address, 1 + self.next, rank)

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.members)))
        self.table.remove(slot)
        del self.members[slot]

    @precondition(lambda self: self.members)
    @rule(data=st.data(), hop=st.sampled_from(HOPS))
    def move(self, data: st.DataObject, hop: NextHop) -> None:
        slot = data.draw(st.sampled_from(sorted(self.members)))
        self.table.update(slot, hop)
        self.members[slot] = (hop, *self.members[slot][1:])

    @rule(run=st.integers(0, RUNS - 1))
    def hold(self, run: int) -> None:
        version = self.table._version
        self.pins.longs[run * RUN // 8] = version
        order = self.order(version)
        self.held[run] = (version, order, [self.entry(number) for number in order], set())

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[run]
        self.pins.longs[run * RUN // 8] = 0

    @invariant()
    def the_current_order_names_everybody_once_the_first_rank_first(self) -> None:
        order = self.order(self.table._version)
        told = []
        for number in order:
            entry = self.entry(number)
            assert entry[0] == 1
            told.append((entry[16:22], entry[16 + 30 : 16 + 34], int.from_bytes(entry[16 + 36 : 16 + 38], "big")))
        due = {(hop.destination_mac, address, port): rank for hop, address, port, rank in self.members.values()}
        assert sorted(told) == sorted(due)
        assert [due[who] for who in told] == sorted(due.values())
        assert len(self.table) == len(self.members)

    @invariant()
    def what_a_run_holds_stays_but_for_leaving_and_the_neighbours_mac_address(self) -> None:
        for version, order, entries, _ in self.held.values():
            assert self.order(version) == order
            for number, entry in zip(order, entries, strict=True):
                now = self.entry(number)
                assert now[4:16] + now[22:] == entry[4:16] + entry[22:]

    def teardown(self) -> None:
        self.undo.close()


TestTheTable = Machine.TestCase
TestTheTable.settings = settings(
    max_examples=12, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_a_device_keeps_its_number_and_gives_it_back_when_nobody_is_behind_it() -> None:
    with devices() as there, memory() as handover, FanoutTable(handover, 8436) as table:
        slots = [table.add(hop, bytes(4), 9, Rank.FIRST) for hop in HOPS]
        assert sorted(there.values()) == [(2).to_bytes(4, "little"), (3).to_bytes(4, "little")]
        with pytest.raises(ValueError, match="interface 2: 2 subscribers"):
            table.forget_interface(2)
        for slot in slots:
            table.remove(slot)
        table.forget_interface(2)
        table.forget_interface(2)
        assert list(there.values()) == [(3).to_bytes(4, "little")]


def test_more_than_the_table_holds_are_refused_and_nothing_is_spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout_table, "SUBSCRIBERS", 3)
    with devices(), memory() as handover, FanoutTable(handover, 8436) as table:
        slots = [table.add(HOPS[0], bytes([10, 0, 0, n]), 9, Rank.FIRST) for n in range(3)]
        with pytest.raises(TableFullError, match="3 subscribers are served already"):
            table.add(HOPS[0], bytes(4), 9, Rank.FIRST)
        table.remove(slots[1])
        table.add(HOPS[0], bytes(4), 9, Rank.FIRST)
        assert len(table) == 3


def test_an_interface_that_the_kernel_refuses_leaves_the_table_as_it_was() -> None:
    with devices(), memory() as handover, FanoutTable(handover, 8436) as table:

        def refuse(*_: object) -> None:
            raise OSError(19, "no such device")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "map_update", refuse)
            with pytest.raises(OSError, match="no such device"):
                table.add(HOPS[0], bytes(4), 9, Rank.FIRST)
        assert len(table) == 0
        table.add(HOPS[0], bytes(4), 9, Rank.FIRST)


def test_what_the_senders_are_told_stands_in_the_directory() -> None:
    with devices(), memory() as handover, FanoutTable(handover, 8436) as table:
        table.pace(Pacing(gap_ns=2.5, burst=128))
        layout = EGRESS.layouts["directory"]
        told = layout.unpack(table._directory.bytes)
        assert (told["gap_ps"], told["burst"], told["proofs"]) == (2500, 128, 0)
        table.pace(None)
        table.vouch()
        told = layout.unpack(table._directory.bytes)
        assert (told["gap_ps"], told["burst"], told["proofs"]) == (0, 0, 1)
        assert table.step(Sender.WORKER) is None
