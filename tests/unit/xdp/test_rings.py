"""The arithmetic of AF_XDP rings against a simulated kernel on the other side of the same memory."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from xdp.rings import (
    MODULUS,
    NEED_WAKEUP,
    CompletionRing,
    FillRing,
    RingCorruptError,
    RingOffsets,
    RxRing,
    TxRing,
    UnsupportedMachineError,
    require_strong_order,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# Parts in an order, and with gaps, that the code can't have guessed.
OFFSETS = RingOffsets(producer=192, consumer=64, descriptors=320, flags=8)
FENCE = 0xA5
"""Fills what no ring may touch."""


class Kernel:
    """The other side of a ring: its own view of the same bytes, with no code in common with what is tested."""

    def __init__(self, entries: int, slot_bytes: int, start: int) -> None:
        self.entries, self.slot_bytes = entries, slot_bytes
        self.memory = bytearray([FENCE]) * (OFFSETS.descriptors + entries * slot_bytes + 64)
        self.producer = self.consumer = start
        self.flags = 0

    def _get(self, at: int) -> int:
        return int.from_bytes(self.memory[at : at + 4], "little")

    def _set(self, at: int, value: int) -> None:
        self.memory[at : at + 4] = (value % MODULUS).to_bytes(4, "little")

    @property
    def producer(self) -> int:
        return self._get(OFFSETS.producer)

    @producer.setter
    def producer(self, value: int) -> None:
        self._set(OFFSETS.producer, value)

    @property
    def consumer(self) -> int:
        return self._get(OFFSETS.consumer)

    @consumer.setter
    def consumer(self, value: int) -> None:
        self._set(OFFSETS.consumer, value)

    @property
    def flags(self) -> int:
        return self._get(OFFSETS.flags)

    @flags.setter
    def flags(self, value: int) -> None:
        self._set(OFFSETS.flags, value)

    @property
    def queued(self) -> int:
        return (self.producer - self.consumer) % MODULUS

    def _slot(self, position: int) -> int:
        return OFFSETS.descriptors + position % self.entries * self.slot_bytes

    def take(self, count: int) -> list[tuple[int, int, int]]:
        """Consume what was submitted, as the kernel does with the fill and TX rings."""
        taken = []
        for _ in range(min(count, self.queued)):
            form = "<QII" if self.slot_bytes == 16 else "<Q"
            values = struct.unpack_from(form, self.memory, self._slot(self.consumer))
            taken.append((*values, 0, 0)[:3])
            self.consumer += 1
        return taken

    def give(self, frames: list[tuple[int, int, int]]) -> int:
        """Produce as the kernel does into the RX and completion rings; returns how many there was room for."""
        room = min(len(frames), self.entries - self.queued)
        for address, length, options in frames[:room]:
            at = self._slot(self.producer)
            if self.slot_bytes == 16:
                struct.pack_into("<QII", self.memory, at, address, length, options)
            else:
                struct.pack_into("<Q", self.memory, at, address)
            self.producer += 1
        return room

    def untouched(self) -> bool:
        """Whether every byte outside indices, flags and slots is as it was."""
        owned = {*range(OFFSETS.producer, OFFSETS.producer + 4), *range(OFFSETS.consumer, OFFSETS.consumer + 4)}
        owned |= {*range(OFFSETS.flags, OFFSETS.flags + 4)}
        owned |= {*range(OFFSETS.descriptors, OFFSETS.descriptors + self.entries * self.slot_bytes)}
        return all(byte == FENCE for at, byte in enumerate(self.memory) if at not in owned)


STARTS = st.one_of(st.integers(0, 3), st.integers(MODULUS - 40, MODULUS - 1), st.integers(0, MODULUS - 1))
SIZES = st.sampled_from([1, 2, 4, 8, 64])


def frame(number: int) -> tuple[int, int, int]:
    """What the n-th frame looks like: every field differs from its neighbours'."""
    return number * 0x1_0000_0001 % 2**64, number * 7 % 2**32, number * 13 % 2**32


class ProducerMachine(RuleBasedStateMachine):
    """Reserve, write and submit in any rhythm: the kernel gets each entry once, in order, never an unwritten one."""

    def __init__(self) -> None:
        super().__init__()
        self.written = self.taken = 0
        self.pending: list[int] = []

    @initialize(entries=SIZES, start=STARTS, wide=st.booleans())
    def create(self, entries: int, start: int, wide: bool) -> None:
        self.wide = wide
        self.kernel = Kernel(entries, 16 if wide else 8, start)
        kind = TxRing if wide else FillRing
        self.ring: TxRing | FillRing = kind(memoryview(self.kernel.memory), OFFSETS, entries)

    @rule(count=st.integers(0, 70))
    def reserve(self, count: int) -> None:
        positions = self.ring.reserve(count)
        free = self.kernel.entries - self.kernel.queued - len(self.pending)
        assert len(positions) == min(count, free)
        for position in positions:
            if isinstance(self.ring, TxRing):
                self.ring[position] = frame(self.written)
            else:
                self.ring[position] = frame(self.written)[0]
            self.pending.append(self.written)
            self.written += 1

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def submit(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.pending)))
        self.ring.submit(count)
        del self.pending[:count]

    @rule(count=st.integers(0, 70))
    def kernel_takes(self, count: int) -> None:
        for values in self.kernel.take(count):
            expected = frame(self.taken)
            assert values == (expected if self.wide else (expected[0], 0, 0))
            self.taken += 1

    @invariant()
    def nothing_is_lost_or_early(self) -> None:
        if self.written:
            assert self.kernel.queued == self.written - len(self.pending) - self.taken

    def teardown(self) -> None:
        if hasattr(self, "kernel"):
            assert self.kernel.untouched()


class ConsumerMachine(RuleBasedStateMachine):
    """Peek and release in any rhythm: we read each entry once, in order, and the kernel never overwrites a held one."""

    def __init__(self) -> None:
        super().__init__()
        self.given = self.read = self.released = 0
        self.held: list[tuple[int, int]] = []

    @initialize(entries=SIZES, start=STARTS, wide=st.booleans())
    def create(self, entries: int, start: int, wide: bool) -> None:
        self.kernel = Kernel(entries, 16 if wide else 8, start)
        kind = RxRing if wide else CompletionRing
        self.ring: RxRing | CompletionRing = kind(memoryview(self.kernel.memory), OFFSETS, entries)

    def value(self, position: int) -> tuple[int, int, int]:
        entry = self.ring[position]
        return (entry, 0, 0) if isinstance(entry, int) else entry

    def expected(self, number: int) -> tuple[int, int, int]:
        return frame(number) if isinstance(self.ring, RxRing) else (frame(number)[0], 0, 0)

    @rule(count=st.integers(0, 70))
    def kernel_gives(self, count: int) -> None:
        self.given += self.kernel.give([frame(self.given + n) for n in range(count)])

    @rule(limit=st.integers(0, 70))
    def peek(self, limit: int) -> None:
        positions = self.ring.peek(limit)
        assert len(positions) == min(limit, self.given - self.read)
        for position in positions:
            self.held.append((position, self.read))
            self.read += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.held)))
        self.ring.release(count)
        self.released += count
        del self.held[:count]

    @invariant()
    def what_is_held_stays(self) -> None:
        for position, number in self.held:
            assert self.value(position) == self.expected(number)
        if self.given:
            assert self.kernel.queued == self.given - self.released

    def teardown(self) -> None:
        if hasattr(self, "kernel"):
            assert self.kernel.untouched()


TestProducer = ProducerMachine.TestCase
TestProducer.settings = settings(max_examples=70, stateful_step_count=40, deadline=None)
TestConsumer = ConsumerMachine.TestCase
TestConsumer.settings = settings(max_examples=70, stateful_step_count=40, deadline=None)


@given(start=STARTS, entries=SIZES)
def test_a_ring_goes_round_past_the_wrap_of_its_indices_many_times(start: int, entries: int) -> None:
    kernel = Kernel(entries, 16, MODULUS - entries - 1 if start % 2 else start)
    ring = RxRing(memoryview(kernel.memory), OFFSETS, entries)
    for number in range(3 * entries + 5):
        assert kernel.give([frame(number)]) == 1
        (position,) = ring.peek(8)
        assert ring[position] == frame(number)
        ring.release(1)
    assert kernel.queued == 0


@pytest.mark.parametrize("kind", [FillRing, TxRing])
def test_no_more_is_submitted_than_was_reserved(kind: Callable[..., FillRing | TxRing]) -> None:
    ring = kind(memoryview(Kernel(8, 16, MODULUS - 1).memory), OFFSETS, 8)
    ring.reserve(3)
    with pytest.raises(ValueError, match="3 are reserved"):
        ring.submit(4)
    with pytest.raises(ValueError, match="a count"):
        ring.reserve(-1)
    ring.submit(3)


@pytest.mark.parametrize("kind", [RxRing, CompletionRing])
def test_no_more_is_released_than_was_peeked(kind: Callable[..., RxRing | CompletionRing]) -> None:
    kernel = Kernel(8, 16, MODULUS - 1)
    ring = kind(memoryview(kernel.memory), OFFSETS, 8)
    kernel.give([frame(n) for n in range(5)])
    assert len(ring.peek(2)) == 2
    with pytest.raises(ValueError, match="2 are peeked"):
        ring.release(3)
    with pytest.raises(ValueError, match="a count"):
        ring.peek(-1)
    ring.release(2)
    assert kernel.queued == 3


def test_indices_that_contradict_each_other_are_an_error_not_garbage() -> None:
    kernel = Kernel(8, 16, 100)
    rx = RxRing(memoryview(kernel.memory), OFFSETS, 8)
    kernel.producer = 109
    with pytest.raises(RingCorruptError):
        rx.peek(64)
    kernel = Kernel(8, 8, 100)
    fill = FillRing(memoryview(kernel.memory), OFFSETS, 8)
    kernel.consumer = 101
    with pytest.raises(RingCorruptError):
        fill.reserve(9)


def test_a_ring_goes_on_where_the_shared_indices_stand() -> None:
    kernel = Kernel(8, 16, 5)
    kernel.give([frame(0), frame(1)])
    ring = RxRing(memoryview(kernel.memory), OFFSETS, 8)
    assert [ring[position] for position in ring.peek(8)] == [frame(0), frame(1)]


def test_the_kernels_wish_to_be_woken_is_read_from_the_flags() -> None:
    kernel = Kernel(8, 8, 0)
    ring = FillRing(memoryview(kernel.memory), OFFSETS, 8)
    assert not ring.needs_wakeup
    kernel.flags = NEED_WAKEUP
    assert ring.needs_wakeup


@pytest.mark.parametrize("entries", [0, -8, 3, 12])
def test_a_size_that_is_no_power_of_two_is_refused(entries: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        RxRing(memoryview(bytearray(4096)), OFFSETS, entries)


def test_memory_is_let_go_of_on_close() -> None:
    memory = bytearray(4096)
    ring = TxRing(memoryview(memory), OFFSETS, 8)
    ring.close()
    memory.append(0)  # raises BufferError while anything still looks into it
    with pytest.raises(ValueError, match="released"):
        ring.reserve(9)


@pytest.mark.parametrize("machine", ["aarch64", "riscv64", "ppc64le", "i686", ""])
def test_a_machine_whose_memory_order_is_too_weak_is_refused_by_name(machine: str) -> None:
    with pytest.raises(UnsupportedMachineError, match=f"machine {machine}:"):
        require_strong_order(machine)


def test_rings_are_refused_on_such_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(UnsupportedMachineError, match="aarch64"):
        FillRing(memoryview(bytearray(4096)), OFFSETS, 8)
