from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprint.errors import RemoteProtocolError
from sprint.events import Event, Lapped, Source, State
from sprint.frames import (
    MAX_FRAME,
    Format,
    FrameDecoder,
    Heartbeat,
    Item,
    UdpChange,
    UdpReason,
    UdpState,
    heartbeat_frame,
    lost_frame,
    record_frame,
    udp_frame,
)
from sprint.record import Record

RECORD = Record(
    b"\xf9\xbe\xb4\xd9", 5, 9, Event.VALIDATED, Source.P2P, State.PROVEN | State.VALIDATED, 100, 0, 0x1D00FFFF, 1231,
    2, 300, 1_700_000_000_000_000_000, bytes(range(32)), bytes(80), 11, 12,
)  # fmt: skip

u64 = st.integers(0, (1 << 64) - 1)
ITEMS = st.one_of(
    st.builds(Heartbeat, u64, u64, u64),
    st.builds(Lapped, u64, u64),
    st.builds(UdpChange, st.sampled_from(UdpState), st.sampled_from(UdpReason), u64),
    st.builds(lambda n, h: replace(RECORD, sequence=n, hash=h), u64, st.binary(min_size=32, max_size=32)),
)


def frame(item: Item, form: Format = Format.BINARY) -> bytes:
    if isinstance(item, Record):
        return record_frame(item.encode(), form)
    if isinstance(item, UdpChange):
        return udp_frame(item, form)
    return lost_frame(item, form) if isinstance(item, Lapped) else heartbeat_frame(item, form)


@settings(deadline=None)
@given(st.lists(ITEMS, max_size=8), st.data())
def test_frames_cut_anywhere_decode_to_the_same_items(items: list[Item], data: st.DataObject) -> None:
    stream = b"".join(frame(item) for item in items)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=12)))
    decoder = FrameDecoder()
    decoded: list[Item] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        decoded += decoder.receive(stream[start:end])
    assert decoded == items
    assert decoder.unfinished == 0


def test_frames_byte_by_byte_decode_to_the_same_items() -> None:
    items: list[Item] = [RECORD, Lapped(1, 2), Heartbeat(3, 4, 5)]
    decoder = FrameDecoder()
    decoded: list[Item] = []
    for byte in b"".join(frame(item) for item in items):
        decoded += decoder.receive(bytes([byte]))
    assert decoded == items


def test_a_length_counts_the_type_and_the_body() -> None:
    assert record_frame(RECORD.encode(), Format.BINARY)[:5] == bytes.fromhex("c100000001")
    assert len(record_frame(RECORD.encode(), Format.BINARY)) == 4 + 193


@pytest.mark.parametrize("length", [0, MAX_FRAME + 1, (1 << 32) - 1])
def test_an_impossible_length_ends_the_stream(length: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"frame of {length} bytes"):
        FrameDecoder().receive(length.to_bytes(4, "little"))


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_a_known_type_with_a_body_of_another_length_ends_the_stream(kind: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"type {kind} with 3 bytes"):
        FrameDecoder().receive((4).to_bytes(4, "little") + bytes([kind, 0, 0, 0]))


def test_what_came_before_the_error_is_handed_out_before_it() -> None:
    decoder = FrameDecoder()
    assert decoder.receive(frame(Lapped(1, 2)) + bytes(4)) == [Lapped(1, 2)]
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match="frame of 0 bytes"):
            decoder.receive(frame(Lapped(1, 2)))


def test_an_unknown_type_is_passed_over() -> None:
    unknown = (MAX_FRAME).to_bytes(4, "little") + b"\x99" + bytes(MAX_FRAME - 1)
    assert FrameDecoder().receive(unknown + frame(Lapped(1, 2))) == [Lapped(1, 2)]


def test_a_record_frame_without_a_record_ends_the_stream() -> None:
    with pytest.raises(RemoteProtocolError, match="magic"):
        FrameDecoder().receive((193).to_bytes(4, "little") + b"\x01" + bytes(192))


@settings(deadline=None)
@given(st.lists(st.binary(max_size=6000), max_size=6))
def test_a_hostile_server_can_make_the_decoder_hold_one_frame_and_no_more(chunks: list[bytes]) -> None:
    decoder = FrameDecoder()
    for chunk in chunks:
        try:
            decoder.receive(chunk)
        except RemoteProtocolError:
            return
        assert decoder.unfinished <= MAX_FRAME + 4


@given(ITEMS)
def test_json_is_one_line_an_item(item: Item) -> None:
    line = frame(item, Format.JSON)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    value = json.loads(line)
    if isinstance(item, Record):
        assert value["event"] == "validated"
        assert (value["seq"], value["hash"]) == (item.sequence, item.hash[::-1].hex())
        assert value["state"] == ["proven", "validated"]
    elif isinstance(item, Lapped):
        assert value == {"event": "lost", "first": item.first, "lost": item.lost}
    elif isinstance(item, UdpChange):
        assert (value["event"], value["state"], value["next"]) == ("udp", item.state.name.lower(), item.next)
        assert value["reason"] == (item.reason.name.lower() if item.reason else None)
    else:
        assert (value["event"], value["seq"], value["session"]) == ("heartbeat", item.sequence, f"{item.session:016x}")
        assert value["time"] == pytest.approx(item.wall_ns / 1e9)
