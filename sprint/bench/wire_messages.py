"""Messages parsed a second: our wire protocol beside python-bitcoinlib on the same bytes, in turns, in one run.

One stream of framed messages (see `messages_by_kind`) is parsed from beginning to end by either side; rounds alternate,
so that a slow moment of the machine meets both. Each side has to come to the same result, every block hash and ping
nonce in the stream, and that is compared before anything is timed.

How to read the ratio: it depends on the mix. Both sides hash with the same OpenSSL, one double SHA-256 for each
checksum and each header, and no parser can be faster than that: a ping, a cmpctblock or a single block's inv gain
little, a header at most about five times. What gains is what need not become an object: a flow with transaction relay,
as a node's connections are, consists mostly of those. Therefore the figures for each kind, and for the stream without
the transactions' inv (what our own connections hear, which ask for no transactions), are given beside it.
"""

from __future__ import annotations

import contextlib
import io
import random
from importlib import import_module
from statistics import median
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from sprint.bitcoin.block import HEADER_SIZE, Header, header_hashes, parse_transaction
from sprint.bitcoin.compact import CmpctBlock, PrefilledTransaction
from sprint.bitcoin.framing import Framer, encode_frame
from sprint.bitcoin.messages import MSG_BLOCK, MSG_WTX, Headers, Inv, Ping
from sprint.bitcoin.peer_events import BlockAnnounced, BlocksAnnouncedByInv, HeadersReceived, translate
from sprint.errors import SprintError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAIN_MAGIC = bytes.fromhex("f9beb4d9")

_CHUNK = 65_536
"""Bytes handed over at a time, as a socket would."""

_COINBASE = bytes.fromhex("0100000001" + "00" * 32 + "ffffffff03510101ffffffff0100f2052a01000000015100000000")


class BitcoinlibMissingError(SprintError):
    """python-bitcoinlib isn't installed; it comes with the development dependencies."""


Kinds = dict[str, list[bytes]]
"""Framed messages by kind: the command, and where it matters what fills the message."""


def _kinds_of_an_hour(draw: random.Random) -> Kinds:
    def header() -> bytes:
        return Header(
            0x2000_0000, draw.randbytes(32), draw.randbytes(32), 1_700_000_000, 0x1703_4219, draw.getrandbits(32)
        ).encode()

    def compact() -> bytes:
        short_ids = tuple(draw.getrandbits(48) for _ in range(draw.randint(1_500, 4_000)))
        return CmpctBlock(header(), draw.getrandbits(64), short_ids, (coinbase,)).encode()

    def frames(command: str, payloads: list[bytes]) -> list[bytes]:
        return [encode_frame(MAIN_MAGIC, command, payload) for payload in payloads]

    def inv(kind: int, count: int) -> bytes:
        return Inv(tuple((kind, draw.randbytes(32)) for _ in range(count))).encode()

    coinbase = PrefilledTransaction(0, parse_transaction(_COINBASE))
    caught_up = b"".join(header() for _ in range(draw.randint(2, 2_000)))
    return {
        "inv_transactions": frames("inv", [inv(MSG_WTX, 35) for _ in range(720)]),
        "ping": frames("ping", [Ping(draw.getrandbits(64)).encode() for _ in range(30)]),
        "cmpctblock": frames("cmpctblock", [compact() for _ in range(6)]),
        "headers_one": frames("headers", [Headers(header()).encode() for _ in range(6)]),
        "inv_block": frames("inv", [inv(MSG_BLOCK, 1) for _ in range(6)]),
        "headers_many": frames("headers", [Headers(caught_up).encode()]),
    }


def messages_by_kind(seed: int = 1, hours: int = 6) -> Kinds:
    """What a node's connection hears, the sizes drawn at random but the same for the same seed.

    An hour is: 720 inv of 35 transactions (Core trickles them every 5 s, at about 7 a second), 30 pings, 6 blocks, each
    by one cmpctblock of 1,500 to 4,000 short ids, one headers of 1 entry and one inv, and 1 headers of 2 to 2,000
    entries (catching up after a reconnect).
    """
    draw = random.Random(seed)
    kinds = _kinds_of_an_hour(draw)
    for _ in range(hours - 1):
        for kind, frames in _kinds_of_an_hour(draw).items():
            kinds[kind] += frames
    return kinds


def mixed_stream(kinds: Kinds, seed: int = 1) -> bytes:
    """All of them, shuffled, as one stream of bytes."""
    frames = [frame for of_kind in kinds.values() for frame in of_kind]
    random.Random(seed).shuffle(frames)
    return b"".join(frames)


def read_by_sprint(data: bytes) -> Iterator[bytes]:
    """Every block hash and ping nonce of the stream, by our framer and our translation.

    Does: frame in chunks of 64 KiB, verify each checksum, parse each message into its event (a ping into its message),
    hash each header of `headers` and `cmpctblock`, give out each block hash that an `inv` names. Of a cmpctblock
    everything but the prefilled transactions is checked.
    """
    framer = Framer(MAIN_MAGIC)
    view = memoryview(data)
    for start in range(0, len(data), _CHUNK):
        for command, payload, _ in framer.receive(view[start : start + _CHUNK]):
            if command == "ping":
                yield Ping.parse(payload).nonce.to_bytes(8, "little")
                continue
            event = translate(command, payload)
            if event is None:
                continue
            if isinstance(event, BlockAnnounced):
                yield event.hash
            elif isinstance(event, HeadersReceived):
                yield from header_hashes(event.headers)
            elif isinstance(event, BlocksAnnouncedByInv):
                yield from event.hashes


def _bitcoinlib(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as missing:
        raise BitcoinlibMissingError(
            "python-bitcoinlib is not installed; this comparison needs the development dependencies"
        ) from missing


def bitcoinlib_reader() -> Callable[[bytes], Iterator[bytes]]:
    """The same result by python-bitcoinlib. Raises BitcoinlibMissingError.

    Does: `MsgSerializable.stream_deserialize` message by message from one BytesIO over the whole stream (so it is
    spared the chunks), which verifies each checksum and parses headers, inv and ping into objects; `GetHash` of each
    header, `hash` of each block entry. Two things it can't do as it comes. Its `headers` forgets the transaction count
    after each entry and misreads every header but the first, so a subclass reads that byte, in its own manner and with
    its own functions. It doesn't know cmpctblock: it verifies the checksum and gives back None, so the payload is found
    by the stream's position and its header parsed by its CBlockHeader; the short ids it is spared.
    """
    messages, core = _bitcoinlib("bitcoin.messages"), _bitcoinlib("bitcoin.core")
    serialize = _bitcoinlib("bitcoin.core.serialize")
    deserialize = messages.MsgSerializable.stream_deserialize
    msg_headers, msg_inv, msg_ping = messages.msg_headers, messages.msg_inv, messages.msg_ping
    parse_header = core.CBlockHeader.deserialize

    def headers_with_counts(cls: Any, stream: io.BytesIO, /, **_: object) -> Any:
        message = cls()
        for _entry in range(serialize.VarIntSerializer.stream_deserialize(stream)):
            message.headers.append(core.CBlockHeader.stream_deserialize(stream))
            serialize.ser_read(stream, 1)
        return message

    msg_whole_headers = type("msg_whole_headers", (msg_headers,), {"msg_deser": classmethod(headers_with_counts)})

    def results(data: bytes) -> Iterator[bytes]:
        stream = io.BytesIO(data)
        start, end = 0, len(data)
        while start < end:
            message = deserialize(stream)
            if isinstance(message, msg_headers):
                for header in message.headers:
                    yield header.GetHash()
            elif isinstance(message, msg_inv):
                for entry in message.inv:
                    if entry.type == MSG_BLOCK:
                        yield entry.hash
            elif isinstance(message, msg_ping):
                yield message.nonce.to_bytes(8, "little")
            elif message is None and data[start + 4 : start + 16].rstrip(b"\0") == b"cmpctblock":
                yield parse_header(data[start + 24 : start + 24 + HEADER_SIZE]).GetHash()
            start = stream.tell()

    def read(data: bytes) -> Iterator[bytes]:
        known = messages.messagemap[b"headers"]
        messages.messagemap[b"headers"] = msg_whole_headers
        try:
            # It prints a line for each command that it doesn't know.
            with contextlib.redirect_stdout(io.StringIO()):
                yield from results(data)
        finally:
            messages.messagemap[b"headers"] = known

    return read


def _timed(read: Callable[[bytes], Iterator[bytes]], data: bytes) -> int:
    began = perf_counter_ns()
    for _ in read(data):
        pass
    return perf_counter_ns() - began


def messages_per_second(seconds: float = 5.0) -> dict[str, float]:
    """Parses the stream by both sides in turns for about `seconds`, at least one round each.

    Returns `sprint` and `bitcoinlib` (messages a second) and `ratio` (how many times as many), each the median over the
    rounds; `messages` and `bytes` of the stream, `rounds`; then, medians of five rounds each, `ratio_<kind>` for each
    kind of message alone and `ratio_without_transactions` for the stream without the inv of transactions. Raises
    BitcoinlibMissingError without python-bitcoinlib, SprintError should the two sides differ in what they read.
    """
    read_by_bitcoinlib = bitcoinlib_reader()
    kinds = messages_by_kind()
    data = mixed_stream(kinds)
    ours, theirs = list(read_by_sprint(data)), list(read_by_bitcoinlib(data))
    if ours != theirs:
        raise SprintError(f"the two sides differ: {len(ours)} results here, {len(theirs)} by python-bitcoinlib")
    rounds_ns: list[tuple[int, int]] = []
    until_ns = perf_counter_ns() + int(seconds * 1e9)
    while not rounds_ns or perf_counter_ns() < until_ns:
        rounds_ns.append((_timed(read_by_sprint, data), _timed(read_by_bitcoinlib, data)))
    messages = sum(map(len, kinds.values()))
    result = {
        "sprint": messages * 1e9 / median(ours_ns for ours_ns, _ in rounds_ns),
        "bitcoinlib": messages * 1e9 / median(theirs_ns for _, theirs_ns in rounds_ns),
        "ratio": median(theirs_ns / ours_ns for ours_ns, theirs_ns in rounds_ns),
        "messages": float(messages),
        "bytes": float(len(data)),
        "rounds": float(len(rounds_ns)),
    }
    parts = {kind: b"".join(frames) for kind, frames in kinds.items()}
    parts["without_transactions"] = mixed_stream({k: v for k, v in kinds.items() if k != "inv_transactions"})
    for part, alone in parts.items():
        result[f"ratio_{part}"] = median(
            _timed(read_by_bitcoinlib, alone) / _timed(read_by_sprint, alone) for _ in range(5)
        )
    return result
