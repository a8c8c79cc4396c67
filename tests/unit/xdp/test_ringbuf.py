"""The arithmetic of the BPF ring buffer's reader against a simulated kernel that writes the same memory."""

from __future__ import annotations

import mmap
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdp.ringbuf import BUSY, DISCARD, RingBuffer
from xdp.rings import RingCorruptError, UnsupportedMachineError

PAGE = mmap.PAGESIZE


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


def test_a_peek_tells_where_the_records_are_and_holds_them_until_the_release() -> None:
    kernel = Kernel(64)
    reader = kernel.reader()
    for round_ in range(5):
        for payload, bits in ((b"8 bytes.", 0), (b"not this", DISCARD), (b"and this one", 0)):
            record = kernel.reserve(len(payload))
            assert record is not None, round_
            kernel.commit(record, payload, bits)
        assert [bytes(reader.data[start:end]) for start, end in reader.peek()] == [b"8 bytes.", b"and this one"]
        assert reader.peek() == []
        assert kernel.free == 8
        reader.release()
        assert kernel.free == 64
    assert (reader.records, reader.discarded) == (10, 5)


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
