from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from sprint.bitcoin.block import Header
from sprint.bitcoin.codec import Message, encode_compact_size
from sprint.bitcoin.connection import (
    MAX_UNSENT_PONGS,
    MAX_UNSENT_SIZE,
    MIN_PEER_VERSION,
    Connection,
    ConnectionConfig,
    PeerViolation,
    Phase,
    Role,
)
from sprint.bitcoin.framing import Framer, encode_frame
from sprint.bitcoin.messages import (
    MESSAGES,
    MSG_BLOCK,
    Block,
    GetHeaders,
    Headers,
    Inv,
    Ping,
    Pong,
    SendAddrV2,
    SendCmpct,
    SendHeaders,
    Verack,
    Version,
    WtxidRelay,
)
from sprint.bitcoin.networks import NETWORKS
from sprint.bitcoin.peer_events import (
    BlockAnnounced,
    BlocksAnnouncedByInv,
    ConnectionEvent,
    HandshakeCompleted,
    HeadersReceived,
    HeadersRequested,
    LatencyMeasured,
)
from sprint.errors import LocalProtocolError, RemoteProtocolError

NETWORK = NETWORKS["regtest"]
VECTORS = Path(__file__).parents[2] / "vectors" / "bitcoin"
RAW_COMPACT = bytes.fromhex(json.loads((VECTORS / "compact_blocks.json").read_text())["cases"][0]["cmpctblock"])
NOW = 1_000_000_000_000
SECOND = 1_000_000_000

PEER_VERSION = Version(70016, 9, 1_700_000_000, 0xABCDEF, b"/Satoshi:30.0.0/", 850_000, True)


def frame(message: Message) -> bytes:
    return encode_frame(NETWORK.magic, message.command, message.encode())


def frames(*messages: Message) -> bytes:
    return b"".join(map(frame, messages))


def sent(connection: Connection) -> list[Message]:
    framer = Framer(NETWORK.magic)
    return [MESSAGES[command].parse(payload) for command, payload, _ in framer.receive(connection.data_to_send())]


def connect(role: Role = Role.INITIATOR, nonce: int = 1, high_bandwidth: bool = False) -> Connection:
    config = ConnectionConfig(network=NETWORK, role=role, compact_high_bandwidth=high_bandwidth)
    return Connection(config, nonce, NOW, 1_700_000_000)


def ready(high_bandwidth: bool = False) -> tuple[Connection, Ping]:
    """A connection after its handshake with nothing unsent, and the ping it has sent."""
    connection = connect(high_bandwidth=high_bandwidth)
    connection.receive_data(frames(PEER_VERSION, Verack()), NOW)
    ping = sent(connection)[-1]
    assert isinstance(ping, Ping)
    return connection, ping


def test_two_connections_complete_the_handshake_with_each_other_in_both_roles() -> None:
    initiator, responder = connect(Role.INITIATOR, nonce=1), connect(Role.RESPONDER, nonce=2)
    events: dict[Role, list[ConnectionEvent]] = {Role.INITIATOR: [], Role.RESPONDER: []}
    for step in range(1, 6):
        now = NOW + step * 1_000_000
        events[Role.RESPONDER] += responder.receive_data(initiator.data_to_send(), now)
        events[Role.INITIATOR] += initiator.receive_data(responder.data_to_send(), now)
    for role, connection in ((Role.INITIATOR, initiator), (Role.RESPONDER, responder)):
        assert connection.phase is Phase.READY
        assert [type(event) for event in events[role]] == [HandshakeCompleted, LatencyMeasured]
        assert connection.compact_version_agreed == 2
        assert connection.peer_wants_headers
        assert not connection.peer_wants_compact_high_bandwidth
        assert connection.counters.skipped == 0
    assert initiator.peer_version is not None
    assert initiator.peer_version.nonce == 2


def test_an_initiator_speaks_first_and_a_responder_waits() -> None:
    (version,) = sent(connect(Role.INITIATOR, nonce=77))
    assert version == Version(70016, 0, 1_700_000_000, 77, b"/BitcoinSprint:0.1.0/", 0, False)
    assert connect(Role.RESPONDER).data_to_send() == b""


def test_after_the_peers_version_come_the_abilities_and_verack_and_after_its_verack_the_wishes() -> None:
    connection = connect(high_bandwidth=True)
    connection.data_to_send()
    assert connection.receive_data(frame(PEER_VERSION), NOW) == []
    assert connection.phase is Phase.AWAITING_VERACK
    assert sent(connection) == [WtxidRelay(), SendAddrV2(), Verack()]
    assert connection.receive_data(frame(Verack()), NOW) == [HandshakeCompleted(PEER_VERSION)]
    assert sent(connection)[:-1] == [SendHeaders(), SendCmpct(True, 2)]


def test_a_responder_sends_its_version_before_anything_else() -> None:
    connection = connect(Role.RESPONDER)
    connection.receive_data(frame(PEER_VERSION), NOW)
    assert [message.command for message in sent(connection)] == ["version", "wtxidrelay", "sendaddrv2", "verack"]


def test_a_peer_of_70015_is_not_offered_what_came_with_70016() -> None:
    connection = connect()
    connection.data_to_send()
    older = Version(70015, 9, 0, 5, b"/bcoin:1.0.2/", 0, True)
    assert connection.receive_data(frames(older, Verack()), NOW) == [HandshakeCompleted(older)]
    assert [message.command for message in sent(connection)] == ["verack", "sendheaders", "sendcmpct", "ping"]


@pytest.mark.parametrize("version", [70014, 31800, 0, -1])
def test_a_peer_too_old_for_compact_blocks_is_refused_with_the_reason(version: int) -> None:
    connection = connect()
    with pytest.raises(RemoteProtocolError, match=f"version at byte 0 .*protocol version {version}: at least 70015"):
        connection.receive_data(frame(Version(version, 0, 0, 5, b"", 0, True)), NOW)
    assert connection.phase is Phase.CLOSED
    assert MIN_PEER_VERSION == 70015


@pytest.mark.parametrize("role", list(Role))
def test_a_connection_to_ourselves_is_found_by_the_nonce(role: Role) -> None:
    with pytest.raises(RemoteProtocolError, match="connected to ourselves"):
        connect(role, nonce=5).receive_data(frame(Version(70016, 0, 0, 5, b"", 0, True)), NOW)


def test_whatever_comes_before_version_is_counted_and_skipped() -> None:
    connection = connect()
    early = frames(Verack(), Ping(1), SendHeaders(), SendCmpct(True), WtxidRelay(), Inv(((MSG_BLOCK, bytes(32)),)))
    assert connection.receive_data(early, NOW) == []
    assert connection.counters.unexpected == 6
    assert not connection.peer_wants_headers
    assert connection.receive_data(frames(PEER_VERSION, Verack()), NOW) == [HandshakeCompleted(PEER_VERSION)]


def test_before_verack_only_the_abilities_are_listened_to() -> None:
    connection = connect()
    connection.receive_data(frame(PEER_VERSION), NOW)
    connection.data_to_send()
    assert connection.receive_data(frames(Ping(1), Inv(((MSG_BLOCK, bytes(32)),)), Headers(b"")), NOW) == []
    assert connection.data_to_send() == b""
    assert connection.counters.unexpected == 3
    connection.receive_data(frames(WtxidRelay(), SendAddrV2(), SendHeaders(), SendCmpct(True)), NOW)
    assert connection.counters.unexpected == 3
    assert connection.peer_wants_headers
    assert connection.peer_wants_compact_high_bandwidth


def test_a_second_version_or_verack_is_counted_and_skipped() -> None:
    connection = connect()
    other = Version(70016, 0, 0, 99, b"/other/", 0, True)
    connection.receive_data(frames(PEER_VERSION, other, Verack(), Verack(), other), NOW)
    assert connection.phase is Phase.READY
    assert connection.peer_version == PEER_VERSION
    assert connection.counters.unexpected == 3


@pytest.mark.parametrize("late", [WtxidRelay(), SendAddrV2()])
def test_an_ability_declared_after_verack_ends_the_connection(late: Message) -> None:
    connection, _ = ready()
    with pytest.raises(RemoteProtocolError, match=f"{late.command} at byte .*between version and verack"):
        connection.receive_data(frame(late), NOW)
    assert connection.phase is Phase.CLOSED


def test_a_malformed_version_is_skipped_and_the_handshake_can_still_succeed() -> None:
    connection = connect()
    connection.receive_data(encode_frame(NETWORK.magic, "version", bytes(45)), NOW)
    assert connection.peer_version is None
    assert connection.counters.malformed == 1
    connection.receive_data(frames(PEER_VERSION, Verack()), NOW)
    assert connection.phase is Phase.READY


def test_a_ping_is_answered_with_its_nonce() -> None:
    connection, _ = ready()
    assert connection.receive_data(frames(Ping(0xFFFF_FFFF_FFFF_FFFF), Ping(0)), NOW) == []
    assert sent(connection) == [Pong(0xFFFF_FFFF_FFFF_FFFF), Pong(0)]


def test_a_flood_of_pings_does_not_fill_our_buffer() -> None:
    connection, _ = ready()
    connection.receive_data(frame(Ping(1)) * MAX_UNSENT_PONGS, NOW)
    assert len(connection.data_to_send()) == 32 * MAX_UNSENT_PONGS
    connection.receive_data(frame(Ping(1)) * MAX_UNSENT_PONGS, NOW)
    with pytest.raises(RemoteProtocolError, match="pings without reading"):
        connection.receive_data(frame(Ping(1)), NOW)


def test_a_pong_gives_the_latency_once_and_a_wrong_one_is_counted() -> None:
    connection, ping = ready()
    assert connection.receive_data(frame(Pong(ping.nonce ^ 1)), NOW + 3) == []
    assert connection.receive_data(frames(Pong(ping.nonce), Pong(ping.nonce)), NOW + 1_234) == [LatencyMeasured(1_234)]
    assert connection.counters.unexpected == 2


def test_the_handshake_is_overdue_at_its_deadline_and_not_before() -> None:
    connection = connect()
    connection.receive_data(frame(PEER_VERSION), NOW + SECOND)
    assert connection.deadline() == NOW + 5 * SECOND
    assert connection.on_timer(NOW + 5 * SECOND - 1) == []
    with pytest.raises(RemoteProtocolError, match="still awaiting verack after 5 s, 126 bytes received"):
        connection.on_timer(NOW + 5 * SECOND)
    assert connection.phase is Phase.CLOSED
    assert connection.deadline() is None
    assert connection.on_timer(NOW + 100 * SECOND) == []


def test_pings_follow_each_other_at_the_interval_while_they_are_answered() -> None:
    connection, ping = ready()
    nonces = {ping.nonce}
    now = NOW
    for _ in range(3):
        connection.receive_data(frame(Pong(ping.nonce)), now + SECOND)
        assert connection.deadline() == now + 30 * SECOND
        now += 30 * SECOND
        assert connection.on_timer(now - 1) == []
        assert connection.data_to_send() == b""
        assert connection.on_timer(now) == []
        (next_ping,) = sent(connection)
        assert isinstance(next_ping, Ping)
        ping = next_ping
        nonces.add(ping.nonce)
    assert len(nonces) == 4


def test_a_pong_that_is_overdue_ends_the_connection_whatever_else_is_heard() -> None:
    connection, _ = ready()
    connection.receive_data(frame(Ping(3)), NOW + 19 * SECOND)
    assert connection.deadline() == NOW + 20 * SECOND
    with pytest.raises(RemoteProtocolError, match="still awaiting pong after 20 s"):
        connection.on_timer(NOW + 20 * SECOND)
    assert connection.phase is Phase.CLOSED


def test_announcements_become_events_in_their_order() -> None:
    connection, _ = ready()
    header = Header.parse(RAW_COMPACT).encode()
    data = encode_frame(NETWORK.magic, "cmpctblock", RAW_COMPACT) + frames(
        Headers(header), Headers(b""), Inv(((1, bytes(32)),)), Inv(((MSG_BLOCK, b"b" * 32),)), GetHeaders((b"l" * 32,))
    )
    compact, *others = connection.receive_data(data, NOW)
    assert isinstance(compact, BlockAnnounced)
    assert compact.payload == RAW_COMPACT
    assert others == [
        HeadersReceived(header, 1),
        HeadersReceived(b"", 0),
        BlocksAnnouncedByInv((b"b" * 32,)),
        HeadersRequested((b"l" * 32,), bytes(32)),
    ]


def test_sendcmpct_of_another_version_is_ignored_and_the_last_of_version_2_counts() -> None:
    connection, _ = ready()
    connection.receive_data(frames(SendCmpct(True, 1), SendCmpct(True, 3)), NOW)
    assert (connection.compact_version_agreed, connection.peer_wants_compact_high_bandwidth) == (0, False)
    connection.receive_data(frame(SendCmpct(True, 2)), NOW)
    assert (connection.compact_version_agreed, connection.peer_wants_compact_high_bandwidth) == (2, True)
    connection.receive_data(frame(SendCmpct(False, 2)), NOW)
    assert (connection.compact_version_agreed, connection.peer_wants_compact_high_bandwidth) == (2, False)


def test_compact_blocks_can_be_asked_for_in_either_mode() -> None:
    connection, _ = ready()
    connection.request_compact(high_bandwidth=True)
    connection.request_compact(high_bandwidth=False)
    assert sent(connection) == [SendCmpct(True, 2), SendCmpct(False, 2)]


def test_nothing_can_be_sent_before_the_handshake_or_after_the_end() -> None:
    connection = connect()
    with pytest.raises(LocalProtocolError, match="getheaders can't be sent while the connection is awaiting version"):
        connection.send(GetHeaders((bytes(32),)))
    connection, _ = ready()
    connection.close()
    connection.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        connection.send(GetHeaders((bytes(32),)))
    with pytest.raises(LocalProtocolError, match="closed"):
        connection.receive_data(b"", NOW)


def test_what_is_sent_comes_out_once_in_order() -> None:
    connection, _ = ready()
    connection.send(Ping(1))
    connection.send(Inv(()))
    assert connection.data_to_send() == frames(Ping(1), Inv(()))
    assert connection.data_to_send() == b""


def test_a_peer_that_does_not_read_can_not_make_us_hold_more_than_four_messages() -> None:
    connection, _ = ready()
    block = Block(bytes(4_000_000))
    queued = 0
    while queued <= MAX_UNSENT_SIZE:
        connection.send(block)
        queued += 4_000_024
    with pytest.raises(LocalProtocolError, match="still unsent"):
        connection.send(Ping(1))
    assert len(connection.data_to_send()) == queued
    connection.send(Ping(1))


@pytest.mark.parametrize(
    ("command", "payload", "reason"),
    [
        ("headers", encode_compact_size(2_001), "headers with 2001 entries"),
        ("inv", encode_compact_size(50_001), "inv with 50001 entries"),
        ("getdata", encode_compact_size(50_001), "getdata with 50001 entries"),
        ("getheaders", bytes(4) + encode_compact_size(102) + bytes(33 * 32), "getheaders with 102 locator hashes"),
    ],
)
def test_a_list_over_its_limit_ends_the_connection_and_says_where(command: str, payload: bytes, reason: str) -> None:
    connection, _ = ready()
    offset = connection.bytes_received + 32
    data = frame(Ping(1)) + encode_frame(NETWORK.magic, command, payload)
    with pytest.raises(RemoteProtocolError, match=f"{command} at byte {offset} of the stream: {reason}"):
        connection.receive_data(data, NOW)
    assert connection.phase is Phase.CLOSED


def test_101_locator_hashes_are_answered_with_an_event() -> None:
    connection, _ = ready()
    (event,) = connection.receive_data(frame(GetHeaders((bytes(32),) * 101)), NOW)
    assert isinstance(event, HeadersRequested)
    assert len(event.locator) == 101


def test_another_networks_magic_ends_the_connection() -> None:
    connection = connect()
    with pytest.raises(RemoteProtocolError, match="magic f9beb4d9 at byte 0 of the stream: fabfb5da was expected"):
        connection.receive_data(encode_frame(NETWORKS["main"].magic, "verack", b""), NOW)
    assert connection.phase is Phase.CLOSED


def test_what_was_said_before_a_violation_is_handed_over_with_it() -> None:
    connection, _ = ready()
    with pytest.raises(PeerViolation, match="magic 00000000") as caught:
        connection.receive_data(frame(Inv(((MSG_BLOCK, b"b" * 32),))) + bytes(24), NOW)
    assert caught.value.events == (BlocksAnnouncedByInv((b"b" * 32,)),)


def test_bad_checksums_unknown_types_and_malformed_bodies_are_counted_and_the_connection_lives() -> None:
    connection, _ = ready()
    inv = frame(Inv(((MSG_BLOCK, bytes(32)),)))
    data = (
        inv[:20] + bytes(4) + inv[24:]
        + encode_frame(NETWORK.magic, "addrv2", bytes(100))
        + encode_frame(NETWORK.magic, "inv", b"\x02" + bytes(36))
        + encode_frame(NETWORK.magic, "cmpctblock", bytes(80))
        + encode_frame(NETWORK.magic, "feefilter", bytes(7))
        + encode_frame(NETWORK.magic, "ping", bytes(7))
        + encode_frame(NETWORK.magic, "ping", bytes(1_025))
        + inv
    )  # fmt: skip
    assert connection.receive_data(data, NOW) == [BlocksAnnouncedByInv((bytes(32),))]
    counters = connection.counters
    assert (counters.bad_checksum, counters.unknown_type, counters.over_bound) == (1, 1, 1)
    assert (counters.malformed, counters.unexpected, counters.skipped) == (4, 0, 7)


def test_the_table_names_known_messages_and_says_what_each_does() -> None:
    assert {command for _, command in Connection.TRANSITIONS} == MESSAGES.keys()
    for (phase, _), transition in Connection.TRANSITIONS.items():
        assert phase is not Phase.CLOSED
        assert transition.handle.__doc__


def test_every_field_of_the_configuration_has_a_docstring_line() -> None:
    source = Path(__file__).parents[3].joinpath("sprint", "bitcoin", "connection.py").read_text()
    for field in fields(ConnectionConfig):
        line = source.index(f"\n    {field.name}: ")
        assert source[line:].split("\n")[2].strip().startswith('"""'), field.name
