from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sprint.datagrams import (
    CHALLENGE_SIZE,
    COOKIE_SIZE,
    KEEP_ALIVE_SIZE,
    MAX_FROM_CLIENT,
    TOKEN_SIZE,
    Beat,
    Challenge,
    Echo,
    KeepAlive,
    from_client,
    from_server,
)
from tests.unit.test_client import record

u64 = st.integers(0, (1 << 64) - 1)
tokens = st.binary(min_size=TOKEN_SIZE, max_size=TOKEN_SIZE)
cookies = st.binary(min_size=COOKIE_SIZE, max_size=COOKIE_SIZE)


@given(st.one_of(st.builds(Echo, tokens, cookies), st.builds(KeepAlive, tokens)))
def test_what_a_client_says_is_understood_and_nothing_longer_or_shorter_is(said: Echo | KeepAlive) -> None:
    data = said.encode()
    assert len(data) <= MAX_FROM_CLIENT
    assert from_client(data) == said
    assert from_client(data[:-1]) is None
    assert from_client(data + b"\0") is None
    assert from_server(data) is None


@given(st.one_of(st.builds(Beat, u64, u64, u64), st.builds(Challenge, u64, cookies)))
def test_what_a_server_says_is_understood_and_nothing_longer_or_shorter_is(said: Beat | Challenge) -> None:
    data = said.encode()
    assert from_server(data) == said
    assert from_server(data[:-1]) is None
    assert from_server(data + b"\0") is None
    assert from_client(data) is None


@given(st.binary(max_size=300))
def test_anything_else_is_nothing(data: bytes) -> None:
    if data[:4] not in {b"SPRE", b"SPRK"}:
        assert from_client(data) is None
    if data[:4] not in {b"SPR1", b"SPRH", b"SPRC"}:
        assert from_server(data) is None


def test_a_record_is_its_own_datagram() -> None:
    data = record(7).encode()
    assert from_server(data) == data
    assert from_server(data[:-1]) is None


def test_no_challenge_is_longer_than_what_can_cause_it() -> None:
    assert CHALLENGE_SIZE <= KEEP_ALIVE_SIZE
