"""docs/wire-format.md says what the code does: every example in it is read from the page and checked."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sprint.deliveries.hello import Hello, Refusal, read_hello, refusal_line, welcome_line
from sprint.deliveries.requests import MAX_EXTRA
from sprint.deliveries.stream import HELLO_TIMEOUT_NS, STALL_TIMEOUT_NS
from sprint.events import Event, Lapped, Source, State
from sprint.frames import (
    MAX_FRAME,
    Format,
    FrameDecoder,
    FrameType,
    Heartbeat,
    heartbeat_frame,
    lost_frame,
    record_frame,
)
from sprint.record import LAYOUT, SIZE, decode
from sprint.tiers import NS_PER_S, Tier

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "wire-format.md").read_text(encoding="utf-8")
BLOCKS: dict[tuple[str, str], str] = {
    (match[1], match[2]): match[3] for match in re.finditer(r"```(\w+) ([\w-]+)\n(.*?)```", PAGE, re.DOTALL)
}
SESSION = 0x0123456789ABCDEF
HEARTBEAT = Heartbeat(SESSION, 8, 1_700_000_000_500_000_000)


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
        ("hex", "record"), ("hex", "record-frame-head"), ("hex", "lost"), ("hex", "heartbeat"),
        ("json", "hello"), ("json", "welcome"), ("json", "refusal"),
        ("json", "record"), ("json", "lost"), ("json", "heartbeat"),
    }  # fmt: skip


def test_the_record_on_the_page_is_the_vector_s() -> None:
    vector = json.loads((ROOT / "tests" / "vectors" / "records" / "main-block-1-proven.json").read_text())
    assert from_hex("record").hex() == vector["hex"]
    assert json.loads(line("record")) == vector["json"]


def test_the_record_s_lines_of_json_are_what_the_stream_sends() -> None:
    assert record_frame(from_hex("record"), Format.JSON) == line("record")
    assert lost_frame(Lapped(6, 3), Format.JSON) == line("lost")
    assert heartbeat_frame(HEARTBEAT, Format.JSON) == line("heartbeat")


def test_the_frames_on_the_page_are_what_the_stream_sends() -> None:
    assert record_frame(from_hex("record"), Format.BINARY).startswith(from_hex("record-frame-head"))
    assert lost_frame(Lapped(6, 3), Format.BINARY) == from_hex("lost")
    assert heartbeat_frame(HEARTBEAT, Format.BINARY) == from_hex("heartbeat")
    assert FrameDecoder().receive(from_hex("lost") + from_hex("heartbeat")) == [Lapped(6, 3), HEARTBEAT]


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
    assert f"Up to {MAX_EXTRA:,} bytes are ignored" in PAGE
    assert f"within {HELLO_TIMEOUT_NS // NS_PER_S} seconds" in PAGE
    assert STALL_TIMEOUT_NS == 5 * 60 * NS_PER_S
    assert "five minutes" in PAGE


def test_the_record_on_the_page_decodes() -> None:
    assert decode(from_hex("record")).session == SESSION
