"""Peers that announce blocks over real TCP connections, as a script wants it; and what a plain socket then has heard.

A Script holds bursts, and a burst pieces: bytes, each for one of the connections, each a send() of its own. As a
program this is the process behind all of these peers: it opens its connections, sends a burst whenever a byte comes in
by standard input, and ends with that. The blocks are those of sprint.regtest; what a socket was told is found out
without anything of the product's.
"""

from __future__ import annotations

import pickle
import socket
import struct
import sys
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sprint.regtest import MinedBlock, mine

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Iterator, Sequence

REGTEST_MAGIC = bytes.fromhex("fabfb5da")
REGTEST_BITS = 0x207FFFFF
MSG_TX, MSG_BLOCK, MSG_WITNESS_FLAG = 1, 2, 0x40000000
MINED_AT = 1_700_000_000
PATIENCE_S = 20.0
MAX_AT_ONCE = 3
"""Headers of one message."""


class Said(NamedTuple):
    """One block as one message announces it."""

    command: str
    hash: bytes


@dataclass(slots=True)
class Script:
    """What the peers do. The connections that they accept come first, then those that they open."""

    accept: int
    connect: int
    ours: tuple[str, int]
    """Where they listen."""
    theirs: tuple[str, int]
    """Where they connect to."""
    bursts: list[list[tuple[int, bytes]]] = field(default_factory=list)

    def sizes(self, burst: int) -> dict[int, int]:
        """Bytes by connection."""
        total: dict[int, int] = {}
        for connection, piece in self.bursts[burst]:
            total[connection] = total.get(connection, 0) + len(piece)
        return total


# ── what is said ──


def message(command: str, payload: bytes = b"") -> bytes:
    """A whole message of the v1 transport."""
    checksum = sha256(sha256(payload).digest()).digest()[:4]
    return REGTEST_MAGIC + struct.pack("<12sI4s", command.encode(), len(payload), checksum) + payload


def mine_chain(count: int, extra: bytes = b"/net test/") -> list[MinedBlock]:
    """Valid blocks of regtest, each on top of the one before; the first has a parent that is nobody's."""
    blocks: list[MinedBlock] = []
    previous = sha256(extra).digest()
    for height in range(1, count + 1):
        blocks.append(mine(previous, height, MINED_AT + height, REGTEST_BITS, extra))
        previous = blocks[-1].hash
    return blocks


def announce(blocks: Sequence[MinedBlock], command: str, chance: random.Random) -> bytes:
    """One message about these blocks; `cmpctblock` and `block` are about one."""
    if command == "headers":
        return message(command, bytes([len(blocks)]) + b"".join(block.header.encode() + b"\0" for block in blocks))
    (block,) = blocks
    if command == "inv":
        kind = MSG_BLOCK | MSG_WITNESS_FLAG * chance.randrange(2)
        entries = [struct.pack("<I", kind) + block.hash]
        entries += [struct.pack("<I", MSG_TX) + chance.randbytes(32) for _ in range(chance.randrange(4))]
        return message(command, bytes([len(entries)]) + b"".join(entries))
    if command == "cmpctblock":
        return message(command, block.compact(chance.getrandbits(64)).encode())
    return message(command, block.payload)


def announce_all(blocks: Sequence[MinedBlock], chance: random.Random) -> Iterator[bytes]:
    """These blocks in order, by one message or another; `headers` tells of up to three at once."""
    at = 0
    while at < len(blocks):
        command = chance.choice(("inv", "headers", "cmpctblock", "block"))
        count = chance.randint(1, MAX_AT_ONCE) if command == "headers" else 1
        yield announce(blocks[at : at + count], command, chance)
        at += count


def small_talk(chance: random.Random) -> bytes:
    """What peers say besides: most often nothing."""
    return chance.choice((
        b"",
        b"",
        b"",
        message("ping", chance.randbytes(8)),
        message("tx", chance.randbytes(chance.randrange(60, 900))),
        message("inv", b"\1" + struct.pack("<I", MSG_TX) + chance.randbytes(32)),
    ))  # fmt: skip


def cut(stream: bytes, chance: random.Random, *, finely: bool = True) -> Iterator[bytes]:
    """The stream in pieces: as a whole, at random places, or (`finely`) in crumbs down to single bytes."""
    how = chance.randrange(4)
    at = 0
    while at < len(stream):
        if how == 0:
            size = len(stream)
        elif how == 1 and finely:
            size = chance.choice((1, 1, 1, 2, 3, 23, 24, 25, 80, 81, 300))
        else:
            size = chance.randint(1 if finely else 100, 1400)
        yield stream[at : at + size]
        at += size


def announced(stream: bytes) -> list[Said]:
    """What a plain socket that received these bytes has been told, in order. The stream ends with a whole message."""
    told: list[Said] = []
    at = 0
    while at < len(stream):
        magic, raw_command, length, checksum = struct.unpack_from("<4s12sI4s", stream, at)
        payload = stream[at + 24 : at + 24 + length]
        assert (magic, len(payload)) == (REGTEST_MAGIC, length)
        assert sha256(sha256(payload).digest()).digest()[:4] == checksum
        command = raw_command.rstrip(b"\0").decode()
        told += [Said(command, block_hash) for block_hash in _hashes(command, payload)]
        at += 24 + length
    return told


def _hashes(command: str, payload: bytes) -> Iterable[bytes]:
    if command in {"cmpctblock", "block"}:
        return [_double(payload[:80])]
    if command == "headers":
        return [_double(payload[at : at + 80]) for at in range(1, len(payload), 81)]
    if command == "inv":
        entries = [payload[at : at + 36] for at in range(1, len(payload), 36)]
        return [entry[4:] for entry in entries if entry[0] == MSG_BLOCK]
    return []


def _double(data: bytes) -> bytes:
    return sha256(sha256(data).digest()).digest()


# ── the peers' process ──


def _open(script: Script) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in script.ours[0] else socket.AF_INET
    with socket.create_server(script.ours, family=family, backlog=script.accept + 1) as listener:
        listener.settimeout(PATIENCE_S)
        print("listening", flush=True)
        for _ in range(script.accept):
            accepted, _ = listener.accept()
            yield accepted
    for _ in range(script.connect):
        yield socket.create_connection(script.theirs, PATIENCE_S)


def _run(script: Script) -> None:
    connections = list(_open(script))
    for connection in connections:
        connection.settimeout(PATIENCE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    print("connected", flush=True)
    for burst in script.bursts:
        if not sys.stdin.buffer.read(1):
            return
        for number, piece in burst:
            connections[number].sendall(piece)
    sys.stdin.buffer.read(1)


if __name__ == "__main__":
    _run(pickle.loads(Path(sys.argv[1]).read_bytes()))
