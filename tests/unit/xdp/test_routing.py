"""rtnetlink's messages as they are read: whatever bytes come, nothing is read beyond them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xdp.fanout_table import Pacing
from xdp.pacing import pace, slowest
from xdp.routing import ATTRIBUTE, HEADER, NEIGHBOUR, attributes, mac_of, messages


@given(st.binary(max_size=200))
def test_any_bytes_are_read_as_messages_within_them(data: bytes) -> None:
    end = 0
    for _, at, until in messages(data):
        assert end <= at <= until <= len(data)
        end = until


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes_are_read_as_attributes_within_them(data: bytes, at: int) -> None:
    assert sum(len(value) + ATTRIBUTE.size for _, value in attributes(data, at, len(data))) <= len(data)


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=20)), max_size=8))
def test_attributes_are_told_as_they_were_written(told: list[tuple[int, bytes]]) -> None:
    data = b"".join(
        ATTRIBUTE.pack(ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4) for kind, value in told
    )
    assert list(attributes(data, 0, len(data))) == told


def test_messages_are_told_one_by_one() -> None:
    two = b"".join(HEADER.pack(HEADER.size + 4, kind, 0, 0, 0) + bytes(4) for kind in (7, 8))
    assert list(messages(two)) == [(7, 16, 20), (8, 36, 40)]


def neighbour(state: int, mac: bytes) -> bytes:
    return NEIGHBOUR.pack(2, 1, state, 0, 0) + ATTRIBUTE.pack(4 + len(mac), 2) + mac


def test_a_neighbour_has_a_mac_address_only_while_the_kernel_would_send_by_it() -> None:
    mac = bytes.fromhex("020304050607")
    for state in (0x02, 0x04, 0x08, 0x10, 0x40, 0x80):
        assert mac_of(neighbour(state, mac)) == mac
    for state in (0x00, 0x01, 0x20):  # none, incomplete, failed
        assert mac_of(neighbour(state, mac)) is None
    assert mac_of(neighbour(0x02, b"")) is None
    assert mac_of(neighbour(0x40, bytes(6))) is None  # a tunnel's


def test_a_link_is_paced_by_its_speed_and_half_its_ring() -> None:
    assert pace(1000, 1024) == Pacing(gap_ns=342 * 8, burst=512)
    assert pace(10_000, 100) == Pacing(gap_ns=342 * 0.8, burst=64)
    assert slowest([None, pace(1000, 256), None, pace(10_000, 4096)]) == Pacing(342 * 8, 128)
    assert slowest([None]) is None
