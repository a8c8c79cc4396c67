from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprint.bitcoin.block import Header, double_sha256, parse_block
from sprint.bitcoin.codec import MalformedError, encode_compact_size
from sprint.bitcoin.compact import BlockTxn, CmpctBlock, GetBlockTxn, PrefilledTransaction
from sprint.bitcoin.framing import Framer, encode_frame
from sprint.bitcoin.messages import (
    BLOCK_TYPES,
    MESSAGES,
    MSG_BLOCK,
    MSG_TX,
    MSG_WITNESS_BLOCK,
    GetData,
    GetHeaders,
    Headers,
    Inv,
    NotFoundMessage,
)
from sprint.bitcoin.peer_events import (
    TRANSLATIONS,
    BlockAnnounced,
    BlockReceived,
    BlocksAnnouncedByInv,
    BlockTransactionsReceived,
    BlockTransactionsRequested,
    DataRequested,
    HeadersReceived,
    HeadersRequested,
    NotFound,
    translate,
)
from sprint.errors import RemoteProtocolError
from sprint.events import Announcement

VECTORS = Path(__file__).parents[2] / "vectors" / "bitcoin"
CASE = json.loads((VECTORS / "compact_blocks.json").read_text())["cases"][0]
RAW_BLOCK, RAW_COMPACT = bytes.fromhex(CASE["block"]), bytes.fromhex(CASE["cmpctblock"])
HEADER, TRANSACTIONS = parse_block(RAW_BLOCK)


def test_a_compact_block_announces_its_header_and_how_many_transactions() -> None:
    event = translate("cmpctblock", RAW_COMPACT)
    assert event == BlockAnnounced(Announcement.CMPCTBLOCK, HEADER.hash, RAW_BLOCK[:80], 2, 0, RAW_COMPACT)
    assert isinstance(event, BlockAnnounced)
    assert CmpctBlock.parse(event.payload).transactions == event.transactions


def test_a_block_of_one_transaction_is_told_from_a_larger_one() -> None:
    empty = CmpctBlock.of_block(HEADER, TRANSACTIONS[:1], 5).encode()
    event = translate("cmpctblock", empty)
    assert isinstance(event, BlockAnnounced)
    assert event.transactions == 1


def test_a_compact_block_is_malformed_wherever_its_lists_do_not_fit() -> None:
    for length in range(len(RAW_COMPACT) - len(TRANSACTIONS[0].raw) - 1):
        with pytest.raises(MalformedError):
            translate("cmpctblock", RAW_COMPACT[:length])
    with pytest.raises(MalformedError, match="0 transactions"):
        translate("cmpctblock", RAW_COMPACT[:88] + b"\0\0")
    with pytest.raises(MalformedError, match="over 65535"):
        translate("cmpctblock", RAW_COMPACT[:88] + encode_compact_size(65_536) + bytes(6 * 65_536) + b"\0")


@pytest.mark.parametrize("count", [0, 1, 2, 2_000])
def test_headers_come_without_their_transaction_counts(count: int) -> None:
    headers = b"".join(Header(1, bytes(32), bytes(32), n, 0x207FFFFF, n).encode() for n in range(count))
    assert translate("headers", Headers(headers).encode()) == HeadersReceived(headers, count)


@given(
    st.lists(st.tuples(st.integers(0, 6) | st.sampled_from(sorted(BLOCK_TYPES)), st.binary(min_size=32, max_size=32)))
)
def test_an_inv_gives_its_blocks_in_order_and_nothing_else(inventory: list[tuple[int, bytes]]) -> None:
    hashes = tuple(name for kind, name in inventory if kind in BLOCK_TYPES)
    expected = BlocksAnnouncedByInv(hashes) if hashes else None
    assert translate("inv", Inv(tuple(inventory)).encode()) == expected


@pytest.mark.parametrize("kind", [0x0100_0002, 0x8000_0002, 0x0000_0102, 0x4000_0001])
def test_a_type_that_only_looks_like_a_block_in_its_lowest_byte_is_none(kind: int) -> None:
    assert translate("inv", Inv(((kind, bytes(32)),)).encode()) is None


def test_requests_and_answers_become_events() -> None:
    inventory = ((MSG_WITNESS_BLOCK, b"b" * 32), (MSG_TX, b"t" * 32))
    assert translate("getdata", GetData(inventory).encode()) == DataRequested(inventory)
    assert translate("notfound", NotFoundMessage(inventory).encode()) == NotFound(inventory)
    request = GetHeaders((b"a" * 32, b"b" * 32), b"s" * 32)
    assert translate("getheaders", request.encode()) == HeadersRequested(request.locator, request.stop)
    assert translate("getblocktxn", GetBlockTxn(b"a" * 32, (1, 7)).encode()) == BlockTransactionsRequested(
        b"a" * 32, (1, 7)
    )
    blocktxn = BlockTxn(b"a" * 32, tuple(TRANSACTIONS)).encode()
    assert translate("blocktxn", blocktxn) == BlockTransactionsReceived(b"a" * 32, 2, blocktxn)
    assert translate("block", RAW_BLOCK) == BlockReceived(double_sha256(RAW_BLOCK[:80]), RAW_BLOCK[:80], 2, RAW_BLOCK)


@pytest.mark.parametrize(
    ("command", "payload", "what"),
    [
        ("headers", encode_compact_size(2_001), "2001 entries"),
        ("inv", encode_compact_size(50_001), "50001 entries"),
        ("getdata", encode_compact_size(50_001), "50001 entries"),
        ("notfound", encode_compact_size(50_001), "50001 entries"),
        ("getheaders", bytes(4) + encode_compact_size(102), "102 locator hashes"),
    ],
)
def test_a_list_over_its_limit_ends_the_connection(command: str, payload: bytes, what: str) -> None:
    with pytest.raises(RemoteProtocolError, match=f"{command} with {what}"):
        translate(command, payload)


def test_messages_that_only_mean_something_in_a_conversation_are_no_events() -> None:
    for command in MESSAGES.keys() - TRANSLATIONS.keys():
        assert translate(command, b"") is None


@given(st.sampled_from(sorted(TRANSLATIONS)), st.binary(max_size=300))
def test_any_bytes_are_translated_or_refused_by_one_of_the_two_errors(command: str, payload: bytes) -> None:
    try:
        translate(command, payload)
    except (MalformedError, RemoteProtocolError):
        return


@given(st.lists(st.integers(0, (1 << 48) - 1), max_size=9), st.integers(0, 2), st.binary(max_size=9))
def test_what_the_strict_parser_takes_is_announced_alike(short_ids: list[int], prefilled: int, rest: bytes) -> None:
    known = tuple(map(PrefilledTransaction, range(prefilled), TRANSACTIONS))
    payload = CmpctBlock(RAW_BLOCK[:80], 1, tuple(short_ids), known).encode() + rest
    if not short_ids and not prefilled:
        for parse in (CmpctBlock.parse, TRANSLATIONS["cmpctblock"]):
            with pytest.raises(MalformedError, match="0 transactions"):
                parse(payload)
        return
    event = translate("cmpctblock", payload)
    assert isinstance(event, BlockAnnounced)
    assert event.transactions == CmpctBlock.parse(payload).transactions == len(short_ids) + prefilled


def test_a_captured_flow_is_read_without_a_handshake() -> None:
    magic = bytes.fromhex("f9beb4d9")
    flow = encode_frame(magic, "cmpctblock", RAW_COMPACT) + encode_frame(
        magic, "inv", Inv(((MSG_BLOCK, HEADER.hash),)).encode()
    )
    events = [translate(command, payload) for command, payload, _ in Framer(magic).receive(flow)]
    assert [type(event) for event in events] == [BlockAnnounced, BlocksAnnouncedByInv]
