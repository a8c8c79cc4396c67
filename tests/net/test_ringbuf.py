"""The BPF ring buffer through its mapping: a simulated kernel for what can't be timed, real programs for the rest."""

from __future__ import annotations

import concurrent.futures
import ctypes
import mmap
import os
import queue
import random
import select
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from xdp.ringbuf import BUSY, DISCARD, RingBuffer
from xdp.rings import RingCorruptError, UnsupportedMachineError

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: loads BPF programs")
PAGE = mmap.PAGESIZE
PATIENCE_S = 5.0


class Kernel:
    """The producer's side, over the same bytes; what it writes appears in both halves of the data."""

    def __init__(self, size: int, start: int = 0) -> None:
        self.size, self.at = size, start
        self.control, self.shared = bytearray(PAGE), bytearray(PAGE + 2 * size)
        self.control[:8] = self.shared[:8] = start.to_bytes(8, "little")

    def reader(self) -> RingBuffer:
        return RingBuffer(memoryview(self.control), memoryview(self.shared), self.size)

    @property
    def free(self) -> int:
        return self.size - (self.at - int.from_bytes(self.control[:8], "little"))

    def _put(self, position: int, raw: bytes) -> None:
        for n, byte in enumerate(raw):
            at = (position + n) % self.size
            self.shared[PAGE + at] = self.shared[PAGE + self.size + at] = byte

    def reserve(self, length: int) -> int | None:
        """Where the record is, or None without room."""
        whole = (length + 8 + 7) // 8 * 8
        if whole > self.free:
            return None
        record = self.at
        self._put(record, struct.pack("<II", length | BUSY, 0))
        self.at += whole
        self.shared[:8] = self.at.to_bytes(8, "little")
        return record

    def commit(self, record: int, payload: bytes, bits: int = 0) -> None:
        self._put(record + 8, payload)
        self._put(record, struct.pack("<I", len(payload) | bits))


def payload_of(number: int, length: int) -> bytes:
    return random.Random(number).randbytes(length)


@settings(deadline=None, max_examples=150)
@given(
    start=st.sampled_from([0, 8, 2**32 - 64, 2**40 + 248]),
    steps=st.lists(st.tuples(st.sampled_from("wdpr"), st.integers(0, 100)), max_size=120),
)
def test_every_record_comes_once_in_order_and_whole_in_any_rhythm(start: int, steps: list[tuple[str, int]]) -> None:
    kernel = Kernel(256, start)
    reader = kernel.reader()
    expected: list[bytes] = []
    got: list[bytes] = []
    held: list[tuple[memoryview, bytes]] = []
    discarded = 0
    for number, (step, value) in enumerate(steps):
        if step in "wd" and (record := kernel.reserve(value)) is not None:
            payload = payload_of(number, value)
            kernel.commit(record, payload, DISCARD if step == "d" else 0)
            if step == "w":
                expected.append(payload)
            else:
                discarded += 1
        elif step == "p":
            views = reader.poll(value % 5)
            held += [(view, bytes(view)) for view in views]
            got += [bytes(view) for view in views]
        elif step == "r":
            assert all(view == copy for view, copy in held), "a record changed while it was held"
            held.clear()
            reader.release()
    while views := reader.poll() or (reader.poll() if discarded > reader.discarded else []):
        got += [bytes(view) for view in views]
    assert got == expected
    assert (reader.records, reader.discarded) == (len(expected), discarded)
    reader.release()
    assert kernel.free == kernel.size


def test_a_busy_record_holds_up_those_after_it() -> None:
    kernel = Kernel(256)
    reader = kernel.reader()
    first, second, third = (kernel.reserve(8) for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    kernel.commit(third, b"third...")
    kernel.commit(first, b"first...")
    assert reader.poll() == [b"first..."]
    assert reader.poll() == []
    assert reader.busy == 2
    kernel.commit(second, b"second..")
    assert reader.poll() == [b"second..", b"third..."]


def test_room_of_discarded_records_is_given_back_without_a_release() -> None:
    kernel = Kernel(64)
    reader = kernel.reader()
    for number in range(100):
        record = kernel.reserve(24)
        assert record is not None, number
        kernel.commit(record, bytes(24), DISCARD)
        assert reader.poll() == []
        assert kernel.free == 64
    assert reader.discarded == 100


def test_but_never_while_a_record_before_them_is_held() -> None:
    kernel = Kernel(64)
    reader = kernel.reader()
    for bits in (0, DISCARD):
        record = kernel.reserve(8)
        assert record is not None
        kernel.commit(record, b"8 bytes.", bits)
    (view,) = reader.poll()
    assert reader.poll() == []
    assert kernel.free == 32
    assert bytes(view) == b"8 bytes."
    reader.release()
    assert kernel.free == 64


def test_a_view_cannot_be_read_after_its_release() -> None:
    kernel = Kernel(64)
    reader = kernel.reader()
    record = kernel.reserve(8)
    assert record is not None
    kernel.commit(record, b"8 bytes.")
    (view,) = reader.poll()
    reader.release()
    with pytest.raises(ValueError, match="released"):
        view[0]


def test_what_was_not_released_comes_again_to_the_next_reader() -> None:
    kernel = Kernel(256)
    for number in range(4):
        record = kernel.reserve(8)
        assert record is not None
        kernel.commit(record, bytes([number]) * 8)
    reader = kernel.reader()
    assert len(reader.poll(2)) == 2
    reader.release()
    assert len(reader.poll(1)) == 1
    reader.close()
    assert kernel.reader().poll() == [b"\2" * 8, b"\3" * 8]


def test_a_record_past_the_producer_is_an_error_not_garbage() -> None:
    kernel = Kernel(256)
    record = kernel.reserve(8)
    assert record is not None
    kernel.commit(record, b"8 bytes.")
    kernel.shared[PAGE : PAGE + 4] = (200).to_bytes(4, "little")
    with pytest.raises(RingCorruptError, match="200 bytes"):
        kernel.reader().poll()


@pytest.mark.parametrize(("size", "length"), [(0, PAGE), (100, PAGE + 200), (4096, PAGE + 4096)])
def test_memory_of_the_wrong_size_is_refused(size: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"ring buffer of {size} bytes in {length}"):
        RingBuffer(memoryview(bytearray(PAGE)), memoryview(bytearray(length)), size)


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(UnsupportedMachineError, match="aarch64"):
        Kernel(64).reader()


# ── real programs ──

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


@needs_root
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


@needs_root
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


@needs_root
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


@needs_root
def test_a_second_reader_goes_on_where_the_first_released(spinning: Producer) -> None:
    spinning.write(10)
    with RingBuffer.open(spinning.ring) as first:
        first.poll(4)
        first.release()
        first.poll(4)
    with RingBuffer.open(spinning.ring) as second:
        assert [bytes(view) for view in second.poll()] == [expected_record(n) for n in range(4, 10)]


@needs_root
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


@needs_root
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


@needs_root
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


@needs_root
def test_a_record_that_is_being_written_is_waited_for_not_read() -> None:
    with (
        create_map(RINGBUF, 0, 0, 4096) as ring,
        load_program(SCHED_CLS, slow(ring, 20_000)) as program,
        RingBuffer.open(ring) as reader,
    ):
        for _ in range(20):
            writer = threading.Thread(target=run, args=(program,))
            writer.start()
            deadline = time.monotonic() + PATIENCE_S
            while not (views := reader.poll()):
                assert time.monotonic() < deadline
            assert [view.tobytes() for view in views] == [struct.pack("<Q", 0x600D)]
            reader.release()
            writer.join()
            if reader.busy:
                break
        assert reader.busy, "the reader never met the record in the making: nothing was tested"


@needs_root
def test_another_kind_of_map_is_refused() -> None:
    with create_map(ARRAY, 4, 4, 1) as array, pytest.raises(ValueError, match="map type 2, 27"):
        RingBuffer.open(array)
    with open("/dev/null") as file, pytest.raises(ValueError, match="map type none"):
        RingBuffer.open(file.fileno())
    with pytest.raises(OSError, match="isn't open"):
        RingBuffer.open(9999)


@needs_root
def test_close_gives_back_every_descriptor_and_leaves_the_callers(spinning: Producer) -> None:
    before = os.listdir("/proc/self/fd")
    reader = RingBuffer.open(spinning.ring)
    spinning.write(1)
    (view,) = reader.poll()
    reader.close()
    reader.close()
    assert os.listdir("/proc/self/fd") == before
    with pytest.raises(ValueError, match="released"):
        view[0]
    os.fstat(spinning.ring)


@needs_root
def test_the_data_cannot_be_written_through_the_mapping(spinning: Producer) -> None:
    with RingBuffer.open(spinning.ring) as reader:
        spinning.write(1)
        (view,) = reader.poll()
        assert view.readonly
        with pytest.raises((TypeError, BufferError)):
            ctypes.c_char.from_buffer(view)
