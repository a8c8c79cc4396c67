"""The BPF ring buffer through its mapping, filled by programs that the kernel runs (tests/unit has the arithmetic)."""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import queue
import select
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.descriptors import open_descriptors
from tests.net.slowness import SLOWNESS
from tests.net.tiny_bpf import (
    ARRAY,
    CSUM_DIFF,
    EXIT,
    LOOKUP,
    RB_DISCARD,
    RB_FORCE_WAKEUP,
    RB_NO_WAKEUP,
    RB_OUTPUT,
    RB_RESERVE,
    RB_SUBMIT,
    RINGBUF,
    SCHED_CLS,
    Insn,
    add,
    and_,
    call,
    create_map,
    entry,
    jump_if_not,
    jump_if_set,
    jump_if_zero,
    load,
    load_map,
    load_program,
    mov,
    mov_reg,
    mul,
    run,
    store,
)
from xdp.ringbuf import RingBuffer

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: loads BPF programs")
PATIENCE_S = 5.0 * SLOWNESS


COUNT, FULL = 0, 1
WORDS = 32


def numbered(ring: int, counters: int, flags: int) -> Iterator[Insn]:
    """Writes the next number as u64 over 8 to 248 bytes, a length that depends on it; counts what found no room."""
    yield from (Insn(0x62, 10, 0, -4, COUNT), mov_reg(2, 10), add(2, -4), *load_map(1, counters), call(LOOKUP))
    yield from (jump_if_not(0, 0, 2), mov(0, 1), EXIT, mov_reg(7, 0), load(8, 6, 7, 0))
    for n in range(WORDS):
        yield store(8, 10, -8 * (n + 2), 6)
    # 8 + number × 7 mod 256, less 8 where that is more than there is: all residues of 8 occur
    yield from (mov_reg(3, 6), mul(3, 7), and_(3, 0xFF), Insn(0xB5, 3, 0, 1, 240), mov(3, 240), add(3, 8))
    yield from (*load_map(1, ring), mov_reg(2, 10), add(2, -8 * (WORDS + 1)), mov(4, flags), call(RB_OUTPUT))
    yield from (jump_if_not(0, 0, 4), load(8, 1, 7, 0), add(1, 1), store(8, 7, 0, 1), Insn(0x05, offset=3))
    yield from (load(8, 1, 7, 8), add(1, 1), store(8, 7, 8, 1))
    yield from (mov(0, 0), EXIT)


def length_of(number: int) -> int:
    return 8 + min(number * 7 & 0xFF, 240)


def expected_record(number: int) -> bytes:
    length = length_of(number)
    return (struct.pack("<Q", number) * WORDS)[:length]


class Producer:
    """A ring buffer, and a program that writes numbered records into it."""

    def __init__(self, ring: int, counters: int, program: int) -> None:
        self.ring, self.counters, self.program = ring, counters, program

    def write(self, count: int) -> None:
        run(self.program, count)

    @property
    def written(self) -> int:
        return entry(self.counters, 0, 16) & (2**64 - 1)

    @property
    def full(self) -> int:
        return entry(self.counters, 0, 16) >> 64


def producer(size: int, flags: int = RB_NO_WAKEUP) -> Iterator[Producer]:
    with (
        create_map(RINGBUF, 0, 0, size) as ring,
        create_map(ARRAY, 4, 16, 1) as counters,
        load_program(SCHED_CLS, numbered(ring, counters, flags)) as program,
    ):
        yield Producer(ring, counters, program)


@pytest.fixture
def spinning() -> Iterator[Producer]:
    yield from producer(16384)


@pytest.fixture
def waking() -> Iterator[Producer]:
    yield from producer(16384, 0)


def test_a_hundred_thousand_records_of_every_length_come_whole_and_in_order(spinning: Producer) -> None:
    # 100,000 of 136 bytes on average go 870 times round 16 KiB, in batches that never fill it.
    number = 0
    with RingBuffer.open(spinning.ring) as reader:
        while number < 100_000:
            spinning.write(50)
            while views := reader.poll(7):
                for view in views:
                    assert view == expected_record(number)
                    number += 1
                reader.release()
        assert number == 100_000
        assert (reader.records, reader.discarded, reader.busy) == (number, 0, 0)
    assert (spinning.written, spinning.full) == (100_000, 0)


def test_a_program_that_writes_while_python_reads_loses_and_tears_nothing(spinning: Producer) -> None:
    count = 2_000_000
    writer = threading.Thread(target=spinning.write, args=(count,))
    with RingBuffer.open(spinning.ring) as reader:
        number = 0
        writer.start()
        while True:
            done = not writer.is_alive()
            views = reader.poll()
            for view in views:
                assert view == expected_record(number)
                number += 1
            reader.release()
            if done and not views:
                break
        writer.join()
    assert number == spinning.written
    assert spinning.written + spinning.full == count


def test_a_full_buffer_refuses_the_program_and_goes_on_after_release(spinning: Producer) -> None:
    with RingBuffer.open(spinning.ring) as reader:
        spinning.write(1000)
        kept, refused = spinning.written, spinning.full
        assert 0 < kept < 1000
        assert refused == 1000 - kept
        views = reader.poll(10_000)
        assert [bytes(view) for view in views] == [expected_record(n) for n in range(kept)]
        spinning.write(5)
        assert reader.poll() == []
        reader.release()
        spinning.write(5)
        assert [bytes(view) for view in reader.poll()] == [expected_record(n) for n in range(kept, kept + 5)]


def test_a_second_reader_goes_on_where_the_first_released(spinning: Producer) -> None:
    spinning.write(10)
    with RingBuffer.open(spinning.ring) as first:
        first.poll(4)
        first.release()
        first.poll(4)
    with RingBuffer.open(spinning.ring) as second:
        assert [bytes(view) for view in second.poll()] == [expected_record(n) for n in range(4, 10)]


def test_the_descriptor_is_readable_while_something_is_unreleased(waking: Producer) -> None:
    with RingBuffer.open(waking.ring) as reader, select.epoll() as epoll:
        epoll.register(reader, select.EPOLLIN)
        assert epoll.poll(0) == []
        for number in range(20):
            waking.write(1)
            assert epoll.poll(PATIENCE_S) == [(reader.fileno(), select.EPOLLIN)]
            assert reader.poll() == [expected_record(number)]
            reader.release()
            assert epoll.poll(0) == []


def test_a_sleeping_reader_is_woken_by_a_submit_with_wake_up() -> None:
    started: queue.SimpleQueue[int] = queue.SimpleQueue()
    for made in producer(16384, RB_FORCE_WAKEUP):
        with RingBuffer.open(made.ring) as reader, select.epoll() as epoll:
            epoll.register(reader, select.EPOLLIN)
            # Somebody who is asleep when it is written, not one who comes later and finds it.
            asleep = concurrent.futures.ThreadPoolExecutor(
                1, initializer=lambda: started.put(threading.get_native_id())
            )
            with asleep:
                woken = asleep.submit(epoll.poll, PATIENCE_S)
                state = Path(f"/proc/self/task/{started.get()}/syscall")
                deadline = time.monotonic() + PATIENCE_S
                while not state.read_text().startswith("232 ") and time.monotonic() < deadline:
                    os.sched_yield()
                made.write(1)
                assert woken.result() == [(reader.fileno(), select.EPOLLIN)]
            assert reader.poll() == [expected_record(0)]


def discarding(ring: int, counters: int) -> list[Insn]:
    """Reserves 24 bytes, writes the next number, and submits every fourth only."""
    return [
        Insn(0x62, 10, 0, -4, COUNT),
        mov_reg(2, 10),
        add(2, -4),
        *load_map(1, counters),
        call(LOOKUP),
        jump_if_not(0, 0, 2),
        mov(0, 1),
        EXIT,
        mov_reg(7, 0),
        load(8, 6, 7, 0),
        mov_reg(8, 6),
        add(8, 1),
        store(8, 7, 0, 8),
        *load_map(1, ring),
        mov(2, 24),
        mov(3, 0),
        call(RB_RESERVE),
        jump_if_not(0, 0, 2),
        mov(0, 1),
        EXIT,
        store(8, 0, 0, 6),
        mov_reg(1, 0),
        mov(2, RB_NO_WAKEUP),
        jump_if_set(6, 3, 3),
        call(RB_SUBMIT),
        mov(0, 0),
        EXIT,
        call(RB_DISCARD),
        mov(0, 0),
        EXIT,
    ]


def test_records_that_the_program_discards_are_passed_over_and_counted() -> None:
    with (
        create_map(RINGBUF, 0, 0, 4096) as ring,
        create_map(ARRAY, 4, 16, 1) as counters,
        load_program(SCHED_CLS, discarding(ring, counters)) as program,
        RingBuffer.open(ring) as reader,
    ):
        got = []
        for _ in range(100):
            assert run(program, 40) == 0
            for _ in range(40):
                got += [int.from_bytes(view[:8], "little") for view in reader.poll(3)]
                reader.release()
        assert got == list(range(0, 4000, 4))
        assert reader.discarded == 3000


def slow(ring: int, rounds: int) -> list[Insn]:
    """Reserves a record, is busy for a while with checksums over its stack, then submits it."""
    return [
        *(Insn(0x7A, 10, 0, -8 * (n + 1), n) for n in range(64)),
        *load_map(1, ring),
        mov(2, 8),
        mov(3, 0),
        call(RB_RESERVE),
        jump_if_not(0, 0, 2),
        mov(0, 1),
        EXIT,
        mov_reg(6, 0),
        mov(7, rounds),
        mov_reg(1, 10),
        add(1, -512),
        mov(2, 512),
        mov(3, 0),
        mov(4, 0),
        mov(5, 0),
        call(CSUM_DIFF),
        add(7, -1),
        jump_if_zero(7, 1),
        Insn(0x05, offset=-10),
        Insn(0x7A, 6, 0, 0, 0x600D),
        mov_reg(1, 6),
        mov(2, RB_NO_WAKEUP),
        call(RB_SUBMIT),
        mov(0, 0),
        EXIT,
    ]


@pytest.fixture
def other_cpu() -> Iterator[int]:
    """The test's thread stays on one CPU; this is another."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("needs two CPUs: a program isn't interrupted for its reader")
    mine, other, *_ = sorted(allowed)
    os.sched_setaffinity(0, {mine})
    yield other
    os.sched_setaffinity(0, allowed)


def test_a_record_that_is_being_written_is_waited_for_not_read(other_cpu: int) -> None:
    def write() -> None:
        os.sched_setaffinity(0, {other_cpu})
        run(program, 500)

    with (
        create_map(RINGBUF, 0, 0, 16384) as ring,
        load_program(SCHED_CLS, slow(ring, 5_000)) as program,
        RingBuffer.open(ring) as reader,
    ):
        # Nearly all of the time that this takes, there is a record in the making.
        writer = threading.Thread(target=write)
        writer.start()
        deadline = time.monotonic() + 4 * PATIENCE_S
        while reader.records < 500:
            assert time.monotonic() < deadline
            assert all(view == struct.pack("<Q", 0x600D) for view in reader.poll())
            reader.release()
        writer.join()
        assert reader.busy, "the reader never met the record in the making: nothing was tested"


def test_another_kind_of_map_is_refused() -> None:
    with create_map(ARRAY, 4, 4, 1) as array, pytest.raises(ValueError, match="map type 2, 27"):
        RingBuffer.open(array)
    with open("/dev/null") as file, pytest.raises(ValueError, match="map type none"):
        RingBuffer.open(file.fileno())
    with pytest.raises(OSError, match="isn't open"):
        RingBuffer.open(9999)


def test_close_gives_back_every_descriptor_and_leaves_the_callers(spinning: Producer) -> None:
    before = open_descriptors()
    reader = RingBuffer.open(spinning.ring)
    spinning.write(1)
    (view,) = reader.poll()
    reader.close()
    reader.close()
    assert open_descriptors() == before
    with pytest.raises(ValueError, match="released"):
        view[0]
    os.fstat(spinning.ring)


def test_the_data_cannot_be_written_through_the_mapping(spinning: Producer) -> None:
    with RingBuffer.open(spinning.ring) as reader:
        spinning.write(1)
        (view,) = reader.poll()
        assert view.readonly
        with pytest.raises((TypeError, BufferError)):
            ctypes.c_char.from_buffer(view)
