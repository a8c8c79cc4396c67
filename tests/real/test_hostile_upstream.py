"""One of two upstreams lies, floods, breaks the protocol: nothing false comes out, and the honest blocks all do."""

from __future__ import annotations

import hashlib
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.real.product import Product
from tests.real.scripted_peer import (
    MAX_PAYLOAD,
    REGTEST_MAGIC,
    ScriptedPeer,
    cmpctblock_payload,
    compact_size,
    double_sha256,
    headers_payload,
    make_branch,
    make_header,
    message,
)
from tests.real.subscribers import JsonStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.real.bcoin import BcoinNode
    from tests.real.product import Event

HEIGHT = 300
"""More than twice the 144 blocks that a branch may lack in work."""
FLAT_KB = 24 * 1024
"""What a flood may cost at its height: one unfinished message of 4 MB, its copies, and the interpreter's own waste."""
SPAM_HEADERS = 100_000
UNKNOWN_PARENTS = 40_000
JUNK_MESSAGES = 80
MOST_JUNK_MESSAGES = 5 * JUNK_MESSAGES
"""Where the flood itself keeps the honest node from mining, on one CPU, it takes more until three blocks have come."""


both_engines = pytest.mark.parametrize("siege", ["turbo", "business"], indirect=True)
"""The top tiers run on one engine, the others on another."""


@dataclass(frozen=True)
class Siege:
    """A Sprint that has caught up with an honest node, and is connected to a hostile one."""

    honest: BcoinNode
    hostile: ScriptedPeer
    product: Product
    stream: JsonStream

    def assert_only_honest_blocks(self, mined: list[str]) -> None:
        """Wait for the honest node's blocks: they must be all that was ever told."""
        self.stream.wait_for_hashes("validated", mined)
        assert self.stream.hashes("proven") == mined
        assert self.stream.hashes("validated") == mined
        assert [one["seq"] for one in self.stream.events] == list(range(1, len(self.stream.events) + 1))
        assert [one["height"] for one in self.stream.of("proven")] == list(range(HEIGHT + 1, HEIGHT + 1 + len(mined)))
        assert self.product.ask("health")["status"] == "ok"
        self.product.wait_for_tip(HEIGHT + len(mined))
        assert self.product.sources()[self.honest.p2p_address]["connects"] == 1

    @contextmanager
    def memory_stays_flat(self) -> Iterator[None]:
        """Neither now nor at its highest may Sprint's memory grow by more than FLAT_KB."""
        before_kb, _ = self.product.resident_kb()
        yield
        after_kb, highest_kb = self.product.resident_kb()
        assert after_kb - before_kb < FLAT_KB / 2
        assert highest_kb - before_kb < FLAT_KB


@pytest.fixture
def siege(bcoin: BcoinNode, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Siege]:
    tier = getattr(request, "param", "turbo")
    bcoin.mine(HEIGHT)
    with ScriptedPeer(HEIGHT) as hostile, Product(tmp_path, bcoin.p2p_address, hostile.address, tier=tier) as product:
        product.wait_until_healthy()
        hostile.open()
        hostile.wait_for_handshakes(1)
        with JsonStream(product.stream) as stream:
            yield Siege(bcoin, hostile, product, stream)


def forged_headers(node: BcoinNode, label: str) -> dict[str, tuple[str, bytes]]:
    """What is wrong with it → the reason it is refused for, and a header that is sound in all other ways."""
    height, tip_hash = node.tip()
    tip = bytes.fromhex(tip_hash)[::-1]
    then = int.from_bytes(node.header(tip_hash)[68:72], "little") + 1
    old = int.from_bytes(node.header(node.block_hash(height - 20))[68:72], "little")
    deep = bytes.fromhex(node.block_hash(100))[::-1]
    version_1 = make_header(tip, then, label=label, version=1)
    return {
        "no work": ("no_work", make_header(tip, then, label=label, work=False)),
        "nBits beyond the limit": ("no_work", make_header(tip, then, label=label, bits=0x2100FFFF)),
        "nBits that are not the chain's": ("bad_bits", make_header(tip, then, label=label, bits=0x207FFFFE)),
        "harder nBits than the chain's": ("bad_bits", make_header(tip, then, label=label, bits=0x1F7FFFFF)),
        "a parent that nobody knows": ("unknown_parent", make_header(double_sha256(b"nobody"), then, label=label)),
        "three hours ahead": ("time_too_new", make_header(tip, int(time.time()) + 3 * 3600, label=label)),
        "before the median time": ("time_too_old", make_header(tip, old, label=label)),
        "version 1": ("bad_version", version_1),
        "version 3": ("bad_version", make_header(tip, then, label=label, version=3)),
        "negative version": ("bad_version", make_header(tip, then, label=label, version=-1)),
        "on top of a refused one": ("known_invalid", make_header(double_sha256(version_1), then + 1, label=label)),
        "two hundred blocks down": ("low_work", make_header(deep, then, label=label)),
    }


def test_forged_headers_are_never_published_by_whatever_message_they_come(siege: Siege) -> None:
    mined: list[str] = []
    for how in ("cmpctblock", "headers", "a run of headers", "block"):
        for what, (_, header) in forged_headers(siege.honest, how).items():
            if how == "a run of headers":
                siege.hostile.send("headers", headers_payload([header, *make_branch(header, 11, what)]))
            elif how == "block":
                siege.hostile.send("block", header + b"\x01" + coinbase())
            else:
                siege.hostile.announce(header, how)
        siege.hostile.wait_for_answer()
        mined += siege.honest.mine(1) + siege.honest.mine(2)
        siege.assert_only_honest_blocks(mined)


def coinbase() -> bytes:
    """A transaction of the least size that parses."""
    return (
        b"\x01\0\0\0\x01"
        + bytes(32)
        + b"\xff\xff\xff\xff\x01\x51\xff\xff\xff\xff\x01"
        + bytes(8)
        + b"\x01\x51"
        + bytes(4)
    )


def test_refusals_are_counted_by_reason_where_the_api_shows_them(siege: Siege) -> None:
    expected: dict[str, int] = {}
    for reason, header in forged_headers(siege.honest, "counted").values():
        siege.hostile.announce(header, "cmpctblock")
        if reason != "unknown_parent":  # that one is held, for its parent may come
            expected[reason] = expected.get(reason, 0) + 1
    siege.hostile.wait_for_answer()

    def counted(answer: dict[str, dict[str, int]]) -> bool:
        return {reason: count for reason, count in answer["rejected"].items() if count} == expected

    siege.product.wait_for("health", counted, f"rejections {expected}", timeout_s=5)


@both_engines
def test_a_flood_of_junk_headers_costs_neither_memory_nor_disk_nor_a_block(siege: Siege) -> None:
    parents = [siege.honest.header(siege.honest.block_hash(height)) for height in range(1, 26)]
    unknown = [make_header(double_sha256(b"%d" % number), 1_700_000_000) for number in range(UNKNOWN_PARENTS)]
    inv = compact_size(50_000) + b"".join(b"\x02\0\0\0" + hashlib.sha256(b"%d" % n).digest() for n in range(50_000))
    mined = []
    with siege.memory_stays_flat():
        sent = 0
        while sent < SPAM_HEADERS:
            # Valid but for their work: no branch of 100 from that far down comes within 144 blocks of the tip.
            branch = make_branch(parents[sent // 100 % len(parents)], 100, f"spam {sent}")
            siege.hostile.send("headers", headers_payload(branch))
            sent += len(branch)
            if sent % (SPAM_HEADERS // 5) == 0:
                mined += siege.honest.mine(1)
                siege.stream.wait_for_hashes("proven", mined)
                siege.hostile.send("inv", inv)
        for header in unknown:
            siege.hostile.send("cmpctblock", cmpctblock_payload(header))
        siege.hostile.wait_for_answer()
        siege.assert_only_honest_blocks(mined + siege.honest.mine(1))
    assert siege.product.header_file.stat().st_size == 80 * (1 + siege.honest.tip()[0])


@both_engines
def test_320_megabytes_of_junk_do_not_hold_up_the_honest_nodes_blocks(siege: Siege) -> None:
    body = hashlib.shake_128(b"junk").digest(MAX_PAYLOAD)
    checked = message("block", body)
    junk = [checked, checked[:20] + bytes(4) + checked[24:], message("junk", body), message("cmpctblock", body)]
    begun, enough, done = threading.Event(), threading.Event(), threading.Event()
    errors: list[Exception] = []
    sent = 0

    def flood() -> None:
        nonlocal sent
        try:
            while sent < JUNK_MESSAGES or (sent < MOST_JUNK_MESSAGES and not enough.is_set()):
                siege.hostile.send_raw(junk[sent % len(junk)])
                sent += 1
                begun.set()
            siege.hostile.wait_for_answer()
        except Exception as error:
            errors.append(error)
        finally:
            begun.set()
            done.set()

    mined: list[str] = []
    during = 0
    with siege.memory_stays_flat():
        thread = threading.Thread(target=flood, daemon=True)
        thread.start()
        assert begun.wait(30)
        while not done.is_set():
            mined += siege.honest.mine(1)
            siege.stream.wait_for_hashes("proven", mined)
            during += not done.is_set()
            if during >= 3:
                enough.set()
        thread.join()
        assert not errors
        assert during >= 3, "no block came while the junk did"
        siege.assert_only_honest_blocks(mined)
    source = siege.product.sources()[siege.hostile.address]
    assert source["connects"] == 1
    received = sent * len(checked)
    siege.product.wait_for(
        "sources", lambda told: told["sources"][1]["bytes_received"] >= received, f"{received} bytes accounted for"
    )


def break_up(siege: Siege, data: bytes, words: str) -> None:
    """Send what ends a connection; Sprint must say why, and come back."""
    peer = siege.hostile
    handshakes = peer.handshakes
    peer.send_raw(data)
    peer.wait_for_hang_up()
    peer.wait_for_handshakes(handshakes + 1)

    def says_why(answer: dict[str, list[Event]]) -> bool:
        return any(
            source["name"] == peer.address and words in (source["last_error"] or "") for source in answer["sources"]
        )

    siege.product.wait_for("sources", says_why, f"{words!r} as that upstream's last error")


def test_a_broken_protocol_ends_the_connection_with_its_reason_and_sprint_comes_back(siege: Siege) -> None:
    magic = bytes.fromhex("f9beb4d9")
    break_up(siege, magic + message("ping", bytes(8))[4:], "magic f9beb4d9")
    oversize = REGTEST_MAGIC + b"block".ljust(12, b"\0") + (MAX_PAYLOAD + 1).to_bytes(4, "little") + bytes(4)
    break_up(siege, oversize, "4000001 bytes")
    header = siege.honest.header(siege.honest.tip()[1])
    break_up(siege, message("headers", headers_payload([header] * 2_001)), "2001")
    break_up(siege, message("inv", compact_size(50_001) + bytes(36 * 50_001)), "50001")
    siege.assert_only_honest_blocks(siege.honest.mine(2))


def test_a_message_cut_off_by_the_connections_end_leaves_nothing_behind(siege: Siege) -> None:
    tip = siege.honest.tip()[1]
    header = make_header(bytes.fromhex(tip)[::-1], int(time.time()) + 60, label="half told")
    whole = message("headers", headers_payload([header]))
    for count, size in enumerate((10, 24, 60, len(whole) - 1), 2):
        siege.hostile.send_raw(whole[:size])
        siege.hostile.hang_up()
        siege.hostile.wait_for_handshakes(count)
    siege.hostile.wait_for_answer()
    siege.assert_only_honest_blocks(siege.honest.mine(2))


def skipped(address: str, count: int) -> Callable[[dict[str, list[Event]]], bool]:
    """Whether /api/sources counts so many skipped messages of that upstream."""
    return lambda told: any(one["name"] == address and one["skipped_messages"] == count for one in told["sources"])


def test_unsound_messages_are_counted_and_skipped_as_core_does(siege: Siege) -> None:
    header = siege.honest.header(siege.honest.tip()[1])
    good = message("headers", headers_payload([header]))
    unsound = [
        good[:20] + bytes(4) + good[24:],
        message("junk", b"of no known type"),
        message("headers", headers_payload([header])[:-5]),
        message("cmpctblock", cmpctblock_payload(header)[:90]),
        message("ping", bytes(3)),
        message("verack"),
        message("version", bytes(100)),
    ]
    before = siege.product.sources()[siege.hostile.address]["skipped_messages"]
    for data in unsound:
        siege.hostile.send_raw(data)
    siege.hostile.wait_for_answer()
    siege.product.wait_for("sources", skipped(siege.hostile.address, before + len(unsound)), "all of them counted")
    assert siege.hostile.handshakes == 1
    siege.assert_only_honest_blocks(siege.honest.mine(2))
