from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprint.errors import RemoteProtocolError
from sprint.events import Event, Source, State
from sprint.record import SIZE, Record, decode, sequence_of, state_names, state_of

VECTORS = sorted((Path(__file__).parents[1] / "vectors" / "records").glob("*.json"))
VECTOR = pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
u32, u64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
RECORDS = st.builds(
    Record,
    network=st.binary(min_size=4, max_size=4),
    session=u64,
    sequence=u64,
    event=st.sampled_from(Event),
    source=st.sampled_from(Source),
    state=st.integers(0, 255).map(State),
    height=u32,
    fork_height=u32,
    next_bits=u32,
    median_time_past=u32,
    transactions=u32,
    size=u32,
    wall_ns=u64,
    hash=st.binary(min_size=32, max_size=32),
    header=st.binary(min_size=80, max_size=80),
    seen_ns=u64,
    published_ns=u64,
)


def test_there_are_vectors() -> None:
    assert len(VECTORS) >= 4


def load(path: Path) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    vector = json.loads(path.read_text())
    return bytes.fromhex(vector["hex"]), vector["fields"], vector["json"]


@VECTOR
def test_a_vector_s_bytes_decode_to_its_fields(path: Path) -> None:
    encoded, expected, _ = load(path)
    record = decode(encoded)
    assert set(expected) == {field.name for field in fields(Record)}
    for name, value in expected.items():
        got = getattr(record, name)
        assert (got.hex() if isinstance(got, bytes) else got) == value, name


@VECTOR
def test_a_vector_s_fields_encode_to_its_bytes(path: Path) -> None:
    encoded, given_fields, _ = load(path)
    values: dict[str, Any] = {
        name: bytes.fromhex(value) if isinstance(value, str) else value for name, value in given_fields.items()
    }
    assert Record(**values).encode() == encoded


@VECTOR
def test_a_vector_s_json_form_is_as_written(path: Path) -> None:
    encoded, _, expected = load(path)
    assert json.loads(json.dumps(decode(encoded).as_dict())) == expected


@VECTOR
def test_sequence_and_state_can_be_read_without_decoding(path: Path) -> None:
    encoded, expected, _ = load(path)
    assert (sequence_of(encoded), state_of(encoded)) == (expected["sequence"], expected["state"])


@settings(deadline=None)
@given(RECORDS)
def test_every_record_is_192_bytes_that_decode_to_it(record: Record) -> None:
    encoded = record.encode()
    assert len(encoded) == SIZE == 192
    assert decode(encoded) == record
    assert decode(memoryview(encoded + b"more")) == record


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_other_bytes_are_refused_as_the_peer_s_mistake(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(data)


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (0, b"SPR2", "magic"),
        (24, b"\x00", "0 is not a valid Event"),
        (24, b"\x06", "6 is not a valid Event"),
        (25, b"\x05", "5 is not a valid Source"),
        (27, b"\x01", "unknown bits"),
        (52, b"\x01", "offset 52"),
    ],
)
def test_a_field_of_another_format_is_refused_by_name(offset: int, value: bytes, words: str) -> None:
    encoded, _, _ = load(VECTORS[0])
    with pytest.raises(RemoteProtocolError, match=words):
        decode(encoded[:offset] + value + encoded[offset + len(value) :])


def test_state_names_stand_in_the_order_of_their_bits() -> None:
    assert state_names(State.CATCHUP | State.BEST | State.PROVEN) == ["proven", "best", "catchup"]
