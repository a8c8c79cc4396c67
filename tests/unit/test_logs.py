"""Log lines: one for each event, whatever it holds, to the letter where people look for them."""

from __future__ import annotations

import errno
import io
import json
import re
import sys
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from sprint import logs
from sprint.logs import LINE_LIMIT, configure, logger, render_json, render_text

if TYPE_CHECKING:
    from collections.abc import Iterator

GUIDE_LINE = "⚡ Turbo mode enabled: writeDeadline=500µs sharedMemory=true blockBufferSize=2048"
ANY_TEXT = st.text(st.characters(codec=None), max_size=60)
ANY_VALUE = st.one_of(
    ANY_TEXT,
    st.none(),
    st.booleans(),
    st.integers(),
    st.binary(max_size=20),
    st.lists(ANY_TEXT, max_size=3),
    st.builds(object),
)
ANY_EVENT = st.dictionaries(st.text("abcdef_", min_size=1, max_size=8), ANY_VALUE, max_size=5)


@pytest.fixture(autouse=True)
def unconfigured_afterwards() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def announce_turbo() -> None:
    logger().info("⚡ Turbo mode enabled", writeDeadline="500µs", sharedMemory=True, blockBufferSize=2048)


def assert_one_plain_line(line: str) -> None:
    assert line.isprintable(), f"{line!r} holds control characters"
    assert len(line.splitlines()) == 1


def test_the_guide_s_line_comes_out_to_the_letter(capsys: pytest.CaptureFixture[str]) -> None:
    configure("text")
    announce_turbo()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(f"{stamp} info    {re.escape(GUIDE_LINE)}\n", capsys.readouterr().err)


def test_in_json_the_same_event_is_an_object_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    configure("json")
    announce_turbo()
    line = capsys.readouterr().err
    event = json.loads(line)
    stamp = event.pop("timestamp")
    assert event == {
        "event": "⚡ Turbo mode enabled",
        "level": "info",
        "writeDeadline": "500µs",
        "sharedMemory": True,
        "blockBufferSize": 2048,
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", stamp)
    assert "⚡ Turbo mode enabled" in line, "grep must find the words"
    assert line.endswith("}\n")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_each_event_is_one_line_and_debugging_is_off(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure(log_format)
    log = logger()
    log.debug("Unseen")
    log.info("Listening", api="127.0.0.1:8080")
    log.warning("Upstream lost", peer="a:8333\nFORGED error line")
    log.error("Headers not saved", error="disk\r\nfull\x1b[2J")
    lines = capsys.readouterr().err.split("\n")
    assert lines.pop() == ""
    words = ["Listening", "Upstream lost", "Headers not saved"]
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))
    assert all(line.isprintable() for line in lines)


@given(ANY_TEXT, ANY_EVENT)
def test_a_line_of_text_is_one_line_whatever_its_values_hold(words: str, values: dict[str, Any]) -> None:
    line = render_text(None, "info", {**values, "event": words, "level": "info", "timestamp": "now"})
    assert_one_plain_line(line)
    assert line.startswith("now info    ")
    assert len(line) <= LINE_LIMIT


@given(ANY_TEXT, ANY_EVENT)
def test_a_json_line_is_one_line_that_parses_whatever_its_values_hold(words: str, values: dict[str, Any]) -> None:
    line = render_json(None, "info", {**values, "event": words})
    assert_one_plain_line(line)
    parsed = json.loads(line)
    assert parsed["event"] == words
    for name, value in values.items():
        if isinstance(value, (str, int, list, type(None))) and name != "event":
            assert parsed[name] == value


def test_values_are_written_as_operators_write_them() -> None:
    values = {"on": True, "off": False, "text": "two words", "count": 3, "none": None, "event": "Words"}
    line = render_text(None, "info", values)
    assert line.endswith(' Words: on=true off=false text="two words" count=3 none=None')


def test_an_event_without_values_ends_with_its_words() -> None:
    assert render_text(None, "info", {"event": "Stopped", "level": "info", "timestamp": "now"}) == "now info    Stopped"


@pytest.mark.parametrize("render", [render_text, render_json])
def test_a_peer_s_endless_text_is_cut(render: Any) -> None:
    line = render(None, "info", {"event": "Upstream lost", "error": "x" * 1_000_000})
    assert LINE_LIMIT - 100 < len(line) < LINE_LIMIT + 100


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EPIPE, errno.EIO])
def test_a_line_that_can_t_be_written_stops_nothing(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(code, "refused")

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", Full())
        configure("text")
    for level in ("info", "warning", "error", "critical"):
        getattr(logger(), level)("Lost")
    assert capsys.readouterr() == ("", "")


def test_the_limit_leaves_room_for_the_guide_s_lines() -> None:
    assert len(GUIDE_LINE) * 10 < logs.LINE_LIMIT
