"""docs/wire-format.md says what the code does: every example in it is read from the page and checked."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sprint.addresses import Address
from sprint.client_datagrams import AHEAD, GRACE_NS, KEEP_ALIVE_NS
from sprint.datagrams import COOKIE_SIZE, TOKEN_SIZE, Beat, Challenge, Echo, KeepAlive
from sprint.deliveries.hello import Hello, Refusal, UdpOffer, read_hello, refusal_line, welcome_line
from sprint.deliveries.requests import (
    MAX_EXTRA,
    MAX_REQUEST,
    MAX_RESEND,
    REQUEST_BURST,
    REQUESTS_PER_S,
    GiveUp,
    read_request,
)
from sprint.deliveries.stream import HELLO_TIMEOUT_NS, STALL_TIMEOUT_NS
from sprint.deliveries.udp_leases import (
    CHALLENGE_GAP_NS,
    LEASE_NS,
    MAX_ACTIVE,
    MAX_ACTIVE_PER_NETWORK,
    PROOF_TIMEOUT_NS,
)
from sprint.deliveries.udp_limits import COOKIE_LIFE_NS, STRANGER_BURST, STRANGER_PER_S
from sprint.events import Event, Lapped, Source, State
from sprint.frames import (
    MAX_FRAME,
    Format,
    FrameDecoder,
    FrameType,
    Heartbeat,
    UdpChange,
    UdpReason,
    UdpState,
    heartbeat_frame,
    lost_frame,
    record_frame,
    udp_frame,
)
from sprint.record import LAYOUT, SIZE, decode
from sprint.tiers import NS_PER_MS, NS_PER_S, Tier

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "wire-format.md").read_text(encoding="utf-8")
BLOCKS: dict[tuple[str, str], str] = {
    (match[1], match[2]): match[3] for match in re.finditer(r"```(\w+) ([\w-]+)\n(.*?)```", PAGE, re.DOTALL)
}
SESSION = 0x0123456789ABCDEF
HEARTBEAT = Heartbeat(SESSION, 8, 1_700_000_000_500_000_000)
UDP = UdpChange(UdpState.ACTIVE, UdpReason.NONE, 9)


def from_hex(name: str) -> bytes:
    return bytes.fromhex(BLOCKS["hex", name])


def line(name: str) -> bytes:
    return BLOCKS["json", name].encode()


def table(first_columns: str, section: str) -> list[list[str]]:
    """The cells of the table in that section whose header begins so, without the header."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = text.split(f"| {first_columns} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in lines]


def test_every_example_on_the_page_is_checked_here() -> None:
    assert set(BLOCKS) == {
        ("hex", "record"), ("hex", "record-frame-head"), ("hex", "lost"), ("hex", "heartbeat"), ("hex", "udp"),
        ("json", "hello"), ("json", "welcome"), ("json", "refusal"), ("json", "resend"), ("json", "welcome-udp"),
        ("json", "record"), ("json", "lost"), ("json", "heartbeat"), ("json", "udp"),
        ("hex", "challenge"), ("hex", "echo"), ("hex", "keep-alive"), ("hex", "udp-heartbeat"), ("json", "give-up"),
    }  # fmt: skip


def test_the_record_on_the_page_is_the_vector_s() -> None:
    vector = json.loads((ROOT / "tests" / "vectors" / "records" / "main-block-1-proven.json").read_text())
    assert from_hex("record").hex() == vector["hex"]
    assert json.loads(line("record")) == vector["json"]


def test_the_record_s_lines_of_json_are_what_the_stream_sends() -> None:
    assert record_frame(from_hex("record"), Format.JSON) == line("record")
    assert lost_frame(Lapped(6, 3), Format.JSON) == line("lost")
    assert heartbeat_frame(HEARTBEAT, Format.JSON) == line("heartbeat")
    assert udp_frame(UDP, Format.JSON) == line("udp")


def test_the_frames_on_the_page_are_what_the_stream_sends() -> None:
    assert record_frame(from_hex("record"), Format.BINARY).startswith(from_hex("record-frame-head"))
    assert lost_frame(Lapped(6, 3), Format.BINARY) == from_hex("lost")
    assert heartbeat_frame(HEARTBEAT, Format.BINARY) == from_hex("heartbeat")
    assert udp_frame(UDP, Format.BINARY) == from_hex("udp")
    frames = from_hex("lost") + from_hex("heartbeat") + from_hex("udp")
    assert FrameDecoder().receive(frames) == [Lapped(6, 3), HEARTBEAT, UDP]


def test_the_datagrams_on_the_page_are_the_feed_s() -> None:
    token, cookie = bytes(range(TOKEN_SIZE)), bytes(range(0x20, 0x20 + COOKIE_SIZE))
    assert Challenge(SESSION, cookie).encode() == from_hex("challenge")
    assert Echo(token, cookie).encode() == from_hex("echo")
    assert KeepAlive(token).encode() == from_hex("keep-alive")
    assert Beat(HEARTBEAT.session, HEARTBEAT.sequence, HEARTBEAT.wall_ns).encode() == from_hex("udp-heartbeat")
    sizes = {row[0].strip("`"): int(row[2]) for row in table("first bytes", "UDP")}
    assert sizes == {
        "SPR1": SIZE,
        **{
            from_hex(name)[:4].decode(): len(from_hex(name))
            for name in ("udp-heartbeat", "challenge", "echo", "keep-alive")
        },
    }
    welcome = welcome_line(
        Tier.TURBO, 500_000, oldest=1, next_sequence=9, session=SESSION, network="main", form=Format.BINARY,
        udp=UdpOffer(Address("", 8436), token),
    )  # fmt: skip
    assert line("welcome-udp") == welcome


def test_the_reasons_on_the_page_have_their_numbers() -> None:
    rows = {int(row[0]): row[1] for row in table("reason | in JSON", "UDP")}
    assert rows == {reason.value: reason.name.lower() if reason else "null" for reason in UdpReason}


def test_the_bounds_of_udp_on_the_page_are_the_code_s() -> None:
    assert read_request(line("resend").strip()) == (6, 3)
    assert read_request(line("give-up").strip()) == GiveUp()
    assert f"`count` is 1 to {MAX_RESEND}" in PAGE
    assert f"at most {MAX_REQUEST} bytes each" in PAGE
    assert f"{REQUEST_BURST} requests may come at once and {REQUESTS_PER_S} a second" in PAGE
    assert f"after {LEASE_NS // NS_PER_S} seconds without one the lease has lapsed" in PAGE
    assert f"keep-alive every {KEEP_ALIVE_NS // NS_PER_S} seconds" in PAGE
    assert f"this server ({MAX_ACTIVE:,}) or behind this address ({MAX_ACTIVE_PER_NETWORK:,})" in PAGE
    assert f"(it takes {AHEAD:,})" in PAGE
    assert f"wait some\n{GRACE_NS // NS_PER_MS} ms first" in PAGE
    assert f"at most once in {CHALLENGE_GAP_NS // NS_PER_MS} ms" in PAGE
    assert (COOKIE_LIFE_NS, PROOF_TIMEOUT_NS, STRANGER_BURST, STRANGER_PER_S) == (10 * NS_PER_S, 5 * NS_PER_S, 4, 1)


def test_hello_and_answers_on_the_page_are_the_server_s() -> None:
    assert read_hello(line("hello")) == Hello("k-123", 5, Format.JSON)
    assert line("refusal") == refusal_line(Refusal("not accepted"))
    welcome = welcome_line(
        Tier.TURBO, 500_000, oldest=1, next_sequence=9, session=SESSION, network="main", form=Format.JSON
    )
    assert line("welcome") == welcome


def test_the_offsets_on_the_page_tile_the_record_as_the_code_packs_it() -> None:
    rows = table("offset", "Record")
    spans = [(int(offset), int(size)) for offset, size, _ in rows]
    assert spans[0][0] == 0
    assert [offset + size for offset, size in spans] == [offset for offset, _ in spans[1:]] + [SIZE]
    assert "".join(f"{size}s" for _, size in spans) == _as_bytes(LAYOUT.format)


def _as_bytes(layout: str) -> str:
    """A struct format with each field as its number of bytes: `<4sQH` → `4s8s2s`."""
    widths = {"Q": "8s", "I": "4s", "H": "2s", "B": "1s"}
    return re.sub("[QIHB]", lambda match: widths[match[0]], layout.lstrip("<"))


@pytest.mark.parametrize(("word", "kinds"), [("event", Event), ("source", Source)])
def test_events_and_sources_on_the_page_have_their_numbers(word: str, kinds: type[Event | Source]) -> None:
    row = next(row[2] for row in table("offset", "Record") if row[2].startswith(word))
    for kind in kinds:
        assert re.search(rf"\b{kind.value} (another )?{kind.name}\b", row, re.IGNORECASE), kind.name


def test_state_bits_on_the_page_have_their_numbers() -> None:
    row = next(row[2] for row in table("offset", "Record") if row[2].startswith("state"))
    named = re.findall(r"(\d) (\w+)", row)
    assert named == [(str(bit.value.bit_length() - 1), str(bit.name).lower()) for bit in State]


def test_frame_types_on_the_page_have_their_numbers() -> None:
    kinds = {int(row[0]): row[2] for row in table("type | body", "Stream: frames")}
    assert list(kinds) == [kind.value for kind in FrameType]
    for kind in FrameType:
        assert kind.name.lower() in kinds[kind]


def test_the_bounds_on_the_page_are_the_code_s() -> None:
    assert f"above {MAX_FRAME:,}" in PAGE
    assert f"are ignored up to {MAX_EXTRA:,} bytes in all" in PAGE
    assert f"within {HELLO_TIMEOUT_NS // NS_PER_S} seconds" in PAGE
    assert STALL_TIMEOUT_NS == 5 * 60 * NS_PER_S
    assert "five minutes" in PAGE


def test_the_record_on_the_page_decodes() -> None:
    assert decode(from_hex("record")).session == SESSION
