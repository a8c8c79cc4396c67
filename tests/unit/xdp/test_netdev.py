"""Answers of generic netlink, whole, cut short and random."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdp.netdev import XdpFeature, answer_attributes, xdp_features


def answer(attributes: dict[int, bytes], kind: int = 30) -> bytes:
    body = struct.pack("=BBH", 1, 1, 0)
    for number, value in attributes.items():
        body += struct.pack("=HH", 4 + len(value), number) + value + bytes(-len(value) % 4)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 0) + body


@given(st.dictionaries(st.integers(1, 0x3FFF), st.binary(max_size=40), max_size=6), st.integers(0, 300))
def test_attributes_come_back_as_they_were_written_as_far_as_they_are_whole(
    attributes: dict[int, bytes], cut: int
) -> None:
    raw = answer(attributes)
    assert answer_attributes(raw) == attributes
    some = answer_attributes(raw[:cut])
    assert some.items() <= attributes.items()


@given(st.binary(max_size=200))
def test_random_bytes_are_some_attributes_or_an_error_of_the_kernels(raw: bytes) -> None:
    with contextlib.suppress(OSError):
        answer_attributes(raw)


def test_flags_above_an_attributes_type_are_left_out() -> None:
    assert answer_attributes(answer({0x8001: b"nested"})) == {1: b"nested"}


def test_a_refusal_is_the_kernels_error() -> None:
    refusal = struct.pack("=IHHIIi", 36, 2, 0, 1, 0, -errno.ENODEV) + bytes(16)
    with pytest.raises(OSError, match="No such device") as caught:
        answer_attributes(refusal)
    assert caught.value.errno == errno.ENODEV
    assert answer_attributes(struct.pack("=IHHIIi", 36, 2, 0, 1, 0, 0) + bytes(16)) == {}


def test_the_loopback_can_nothing_natively() -> None:
    assert xdp_features(socket.if_nametoindex("lo")) in {XdpFeature(0), None}


def test_an_interface_that_is_not_there_is_an_error() -> None:
    if xdp_features(socket.if_nametoindex("lo")) is None:
        pytest.skip("before Linux 6.3 the kernel doesn't tell")
    with pytest.raises(OSError, match="No such device"):
        xdp_features(0x7FFFFFF0)
