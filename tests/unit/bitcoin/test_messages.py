from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprint.bitcoin.block import parse_block
from sprint.bitcoin.codec import MalformedError, Message, encode_compact_size
from sprint.bitcoin.compact import BlockTxn, CmpctBlock, GetBlockTxn
from sprint.bitcoin.framing import encode_frame
from sprint.bitcoin.messages import (
    MESSAGES,
    Block,
    FeeFilter,
    GetData,
    GetHeaders,
    Headers,
    Inv,
    NotFoundMessage,
    Ping,
    Pong,
    SendAddrV2,
    SendCmpct,
    SendHeaders,
    Verack,
    Version,
    WtxidRelay,
)
from sprint.errors import LocalProtocolError, RemoteProtocolError

VECTORS = Path(__file__).parents[2] / "vectors" / "bitcoin"
RAW_BLOCK = bytes.fromhex(json.loads((VECTORS / "compact_blocks.json").read_text())["cases"][0]["block"])
HEADER, TRANSACTIONS = parse_block(RAW_BLOCK)
MAIN_MAGIC = bytes.fromhex("f9beb4d9")

u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
hashes = st.binary(min_size=32, max_size=32)
inventories = st.lists(st.tuples(u32, hashes), max_size=6).map(tuple)

STRATEGIES: dict[str, st.SearchStrategy[Message]] = {
    "version": st.builds(
        Version,
        version=st.integers(-(1 << 31), (1 << 31) - 1),
        services=u64,
        time=st.integers(-(1 << 63), (1 << 63) - 1),
        nonce=u64,
        user_agent=st.binary(max_size=256),
        start_height=st.integers(-(1 << 31), (1 << 31) - 1),
        relay=st.booleans(),
    ),
    "verack": st.just(Verack()),
    "wtxidrelay": st.just(WtxidRelay()),
    "sendaddrv2": st.just(SendAddrV2()),
    "sendheaders": st.just(SendHeaders()),
    "sendcmpct": st.builds(SendCmpct, st.booleans(), u64),
    "feefilter": st.builds(FeeFilter, u64),
    "ping": st.builds(Ping, u64),
    "pong": st.builds(Pong, u64),
    "getheaders": st.builds(GetHeaders, st.lists(hashes, max_size=101).map(tuple), hashes, u32),
    "headers": st.builds(Headers, st.lists(st.binary(min_size=80, max_size=80), max_size=6).map(b"".join)),
    "inv": st.builds(Inv, inventories),
    "getdata": st.builds(GetData, inventories),
    "notfound": st.builds(NotFoundMessage, inventories),
    "cmpctblock": st.builds(CmpctBlock.of_block, st.just(HEADER), st.just(TRANSACTIONS), u64),
    "block": st.just(Block(RAW_BLOCK)),
    "getblocktxn": st.builds(
        GetBlockTxn, hashes, st.sets(st.integers(0, 65_534), max_size=9).map(lambda found: tuple(sorted(found)))
    ),
    "blocktxn": st.builds(BlockTxn, hashes, st.lists(st.sampled_from(TRANSACTIONS), max_size=4).map(tuple)),
}


def test_every_message_of_the_registry_is_tested() -> None:
    assert STRATEGIES.keys() == MESSAGES.keys()
    assert len(MESSAGES) == 18


@given(st.data())
def test_every_message_survives_the_round_trip_and_ignores_trailing_bytes(data: st.DataObject) -> None:
    for command, strategy in STRATEGIES.items():
        message = data.draw(strategy)
        payload = message.encode()
        parsed = MESSAGES[command].parse(payload)
        assert parsed == message
        assert parsed.encode() == payload
        assert len(payload) <= MESSAGES[command].max_size
        if command != "block":
            assert MESSAGES[command].parse(payload + b"later") == message


@pytest.mark.parametrize("command", sorted(STRATEGIES))
def test_every_message_is_malformed_at_every_length_it_is_cut_to(command: str) -> None:
    example: dict[str, Message] = {
        "version": Version(70016, 1, 2, 3, b"/x/", 4, False),
        "sendcmpct": SendCmpct(True),
        "feefilter": FeeFilter(1000),
        "ping": Ping(1),
        "pong": Pong(2),
        "getheaders": GetHeaders((b"a" * 32, b"b" * 32)),
        "headers": Headers(b"h" * 240),
        "inv": Inv(((2, b"a" * 32), (1, b"b" * 32))),
        "getdata": GetData(((2, b"a" * 32),)),
        "notfound": NotFoundMessage(((2, b"a" * 32),)),
        "cmpctblock": CmpctBlock.of_block(HEADER, TRANSACTIONS, 7),
        "block": Block(RAW_BLOCK),
        "getblocktxn": GetBlockTxn(b"a" * 32, (0, 300)),
        "blocktxn": BlockTxn(b"a" * 32, tuple(TRANSACTIONS)),
    }
    if command not in example:
        assert MESSAGES[command]().encode() == b""
        return
    payload = example[command].encode()
    sound = set()
    for length in range(len(payload)):
        try:
            MESSAGES[command].parse(payload[:length])
        except MalformedError:
            continue
        sound.add(length)
    if command == "version":
        # After the receiver's address, the nonce, the user agent and the height.
        assert sound == {46, 80, 84, 88}
    elif command == "block":
        assert sound
        assert min(sound) >= 81 + 2 * 60
    else:
        assert sound == set()


@given(st.sampled_from(sorted(MESSAGES)), st.binary(max_size=400))
def test_any_bytes_parse_or_are_refused_by_one_of_the_two_errors(command: str, payload: bytes) -> None:
    try:
        message = MESSAGES[command].parse(payload)
    except (MalformedError, RemoteProtocolError):
        return
    assert message.command == command


def test_a_locator_of_101_hashes_is_legal_and_of_102_is_not() -> None:
    full = GetHeaders((b"l" * 32,) * 101)
    assert GetHeaders.parse(full.encode()) == full
    over = full.encode().replace(encode_compact_size(101), encode_compact_size(102), 1) + bytes(32)
    with pytest.raises(RemoteProtocolError, match="102 locator hashes: at most 101"):
        GetHeaders.parse(over)
    with pytest.raises(LocalProtocolError, match="102 locator hashes"):
        GetHeaders((b"l" * 32,) * 102).encode()


def test_2000_headers_are_legal_and_2001_are_not() -> None:
    full = Headers(bytes(80 * 2_000))
    assert Headers.parse(full.encode()) == full
    assert full.count == 2_000
    with pytest.raises(RemoteProtocolError, match="2001 entries: at most 2000"):
        Headers.parse(encode_compact_size(2_001) + bytes(81 * 2_001))
    with pytest.raises(LocalProtocolError, match="2001 entries"):
        Headers(bytes(80 * 2_001)).encode()


@pytest.mark.parametrize("message", [Inv, GetData, NotFoundMessage])
def test_50000_inventory_entries_are_legal_and_50001_are_not(message: type[Inv | GetData | NotFoundMessage]) -> None:
    full = message(((1, bytes(32)),) * 50_000)
    assert message.parse(full.encode()) == full
    with pytest.raises(RemoteProtocolError, match="50001 entries: at most 50000"):
        message.parse(encode_compact_size(50_001) + bytes(36 * 50_001))
    with pytest.raises(LocalProtocolError, match="50001 entries"):
        message(((1, bytes(32)),) * 50_001).encode()


@pytest.mark.parametrize("position", [0, 1, 1999])
def test_headers_with_a_transaction_count_are_malformed(position: int) -> None:
    payload = bytearray(Headers(bytes(80 * 2_000)).encode())
    payload[3 + 81 * position + 80] = 1
    with pytest.raises(MalformedError, match="transaction count"):
        Headers.parse(bytes(payload))


def test_headers_of_a_broken_length_are_our_own_mistake() -> None:
    with pytest.raises(LocalProtocolError, match="multiple of 80"):
        Headers(bytes(81)).encode()


def test_a_user_agent_of_256_bytes_is_legal_and_of_257_is_not() -> None:
    longest = Version(70016, 0, 0, 1, b"u" * 256, 0, True)
    assert Version.parse(longest.encode()) == longest
    with pytest.raises(LocalProtocolError, match="257 bytes of user agent"):
        Version(70016, 0, 0, 1, b"u" * 257, 0, True).encode()
    payload = longest.encode()
    with pytest.raises(MalformedError, match="over 256"):
        Version.parse(payload[:80] + encode_compact_size(257) + b"u" * 257 + payload[-5:])


def test_messages_are_immutable_and_carry_no_dictionary() -> None:
    for message in (Ping(1), Verack(), Inv(())):
        with pytest.raises((AttributeError, TypeError)):
            message.nonce = 2  # type: ignore[union-attr,misc]  # that this fails is what is tested
        assert not hasattr(message, "__dict__")


# python-bitcoinlib as an oracle, both ways, for what it knows. Its `headers` forgets the transaction count that follows
# each entry, so it is asked about one header only.


def by_bitcoinlib(message: Message) -> Any:
    bitcoinlib = pytest.importorskip("bitcoin.messages")
    return bitcoinlib.MsgSerializable.from_bytes(encode_frame(MAIN_MAGIC, message.command, message.encode()))


@given(STRATEGIES["version"].filter(lambda message: isinstance(message, Version) and message.version >= 70001))
def test_python_bitcoinlib_reads_our_version(message: Version) -> None:
    theirs = by_bitcoinlib(message)
    assert (theirs.nVersion, theirs.nServices, theirs.nTime) == (message.version, message.services, message.time)
    assert (theirs.nNonce, theirs.strSubVer) == (message.nonce, message.user_agent)
    assert (theirs.nStartingHeight, bool(theirs.fRelay)) == (message.start_height, message.relay)


def test_we_read_the_version_of_python_bitcoinlib() -> None:
    bitcoinlib = pytest.importorskip("bitcoin.messages")
    theirs = bitcoinlib.msg_version()
    theirs.nStartingHeight = 700_000
    stream = io.BytesIO()
    theirs.msg_ser(stream)
    ours = Version.parse(stream.getvalue())
    assert (ours.version, ours.services, ours.nonce) == (theirs.nVersion, theirs.nServices, theirs.nNonce)
    assert (ours.user_agent, ours.start_height, ours.relay) == (theirs.strSubVer, 700_000, True)


@given(u64)
def test_python_bitcoinlib_reads_our_ping_and_pong(nonce: int) -> None:
    assert by_bitcoinlib(Ping(nonce)).nonce == nonce
    assert by_bitcoinlib(Pong(nonce)).nonce == nonce


@given(inventories)
def test_python_bitcoinlib_reads_our_inventories(inventory: tuple[tuple[int, bytes], ...]) -> None:
    for message in (Inv(inventory), GetData(inventory), NotFoundMessage(inventory)):
        # It takes the type for signed.
        assert [(entry.type & 0xFFFF_FFFF, entry.hash) for entry in by_bitcoinlib(message).inv] == list(inventory)


@given(st.builds(GetHeaders, st.lists(hashes, max_size=101).map(tuple), hashes))
def test_python_bitcoinlib_reads_our_getheaders(message: GetHeaders) -> None:
    theirs = by_bitcoinlib(message)
    assert (tuple(theirs.locator.vHave), theirs.hashstop) == (message.locator, message.stop)


def test_python_bitcoinlib_reads_our_headers_block_and_empty_messages() -> None:
    theirs = by_bitcoinlib(Headers(RAW_BLOCK[:80]))
    assert [header.GetHash() for header in theirs.headers] == [Block(RAW_BLOCK).hash]
    assert by_bitcoinlib(Block(RAW_BLOCK)).block.serialize() == RAW_BLOCK
    assert by_bitcoinlib(Verack()).command == b"verack"
