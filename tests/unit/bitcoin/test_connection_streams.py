"""Whole conversations: however the bytes are cut, and whatever sound frames contain."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from sprint.bitcoin.connection import Connection, ConnectionConfig, PeerViolation, Phase, Role
from sprint.bitcoin.framing import encode_frame
from sprint.bitcoin.messages import (
    MESSAGES,
    MSG_BLOCK,
    FeeFilter,
    GetHeaders,
    Headers,
    Inv,
    Ping,
    Pong,
    SendCmpct,
    Verack,
    Version,
    WtxidRelay,
)
from sprint.bitcoin.networks import NETWORKS

if TYPE_CHECKING:
    from sprint.bitcoin.codec import Message
    from sprint.bitcoin.peer_events import ConnectionEvent

NETWORK = NETWORKS["regtest"]
VECTORS = Path(__file__).parents[2] / "vectors" / "bitcoin"
RAW_COMPACT = bytes.fromhex(json.loads((VECTORS / "compact_blocks.json").read_text())["cases"][0]["cmpctblock"])
NOW = 1_000_000_000_000
PEER_VERSION = Version(70016, 9, 1_700_000_000, 0xABCDEF, b"/Satoshi:30.0.0/", 850_000, True)


def frame(message: Message) -> bytes:
    return encode_frame(NETWORK.magic, message.command, message.encode())


HANDSHAKE = frame(PEER_VERSION) + frame(WtxidRelay()) + frame(Verack())


def connect() -> Connection:
    return Connection(ConnectionConfig(network=NETWORK, role=Role.INITIATOR), 1, NOW, 1_700_000_000)


conversation = st.lists(
    st.sampled_from(
        [
            frame(Ping(7)),
            frame(Pong(8)),
            frame(FeeFilter(1_000)),
            frame(SendCmpct(True)),
            frame(Verack()),
            frame(Headers(bytes(160))),
            frame(Inv(((MSG_BLOCK, b"b" * 32), (1, b"t" * 32)))),
            frame(GetHeaders((b"l" * 32,))),
            encode_frame(NETWORK.magic, "cmpctblock", RAW_COMPACT),
            encode_frame(NETWORK.magic, "cmpctblock", RAW_COMPACT[:90]),
            encode_frame(NETWORK.magic, "addr", bytes(31)),
            frame(Ping(7))[:20] + bytes(12),
            frame(WtxidRelay()),
            bytes(24),
        ]
    ),
    max_size=8,
).map(b"".join)


def heard(data: bytes, cuts: list[int]) -> tuple[list[ConnectionEvent], str, bytes, object]:
    """Events, violation, answers and counters of a whole connection whose bytes are cut at those places."""
    connection = connect()
    events: list[ConnectionEvent] = []
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    ended = ""
    for start, end in pairwise(edges):
        if connection.phase is Phase.CLOSED:
            break
        try:
            events += connection.receive_data(data[start:end], NOW)
        except PeerViolation as violation:
            events += violation.events
            ended = str(violation)
    # What follows a violation in the same bytes may have been framed, and counted, before the violation was found.
    return events, ended, connection.data_to_send(), None if ended else connection.counters


@given(conversation, st.lists(st.integers(0, 5_000), max_size=12))
def test_any_cut_of_a_conversation_gives_the_same_events_and_answers(data: bytes, cuts: list[int]) -> None:
    data = HANDSHAKE + data
    assert heard(data, cuts) == heard(data, [])


@given(conversation)
def test_a_conversation_byte_by_byte_gives_the_same_events_and_answers(data: bytes) -> None:
    data = HANDSHAKE + data
    assert heard(data, list(range(len(data)))) == heard(data, [])


@given(st.lists(st.tuples(st.sampled_from(sorted(MESSAGES)), st.binary(max_size=120)), max_size=10), st.booleans())
def test_sound_frames_of_any_content_never_raise_anything_but_a_violation(
    messages: list[tuple[str, bytes]], after_handshake: bool
) -> None:
    connection = connect()
    if after_handshake:
        connection.receive_data(HANDSHAKE, NOW)
    for command, payload in messages:
        if connection.phase is not Phase.CLOSED:
            with suppress(PeerViolation):
                connection.receive_data(encode_frame(NETWORK.magic, command, payload), NOW)
