"""The relay's log through its pipe: whole lines or none, whatever the values, and never a wait."""

from __future__ import annotations

import fcntl
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprint.engines.relay_log import PipeLog

if TYPE_CHECKING:
    from collections.abc import Iterator

PIPE_BUF = 4096


class _Log:
    """What the supervisor's log was told."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def info(self, event: str, **values: Any) -> None:
        self.lines.append(("info", event, values))

    def warning(self, event: str, **values: Any) -> None:
        self.lines.append(("warning", event, values))

    def error(self, event: str, **values: Any) -> None:
        self.lines.append(("error", event, values))


class _Pipe:
    def __init__(self) -> None:
        self.log = PipeLog()
        self.told = _Log()

    def forward(self) -> list[tuple[str, str, dict[str, Any]]]:
        """All that has come."""
        before = -1
        while len(self.told.lines) != before:
            before = len(self.told.lines)
            self.log.forward(self.told)
        lines, self.told.lines = self.told.lines, []
        return lines

    def close(self) -> None:
        os.close(self.log._reading)
        os.close(self.log._writing)


@pytest.fixture(name="pipe")
def _pipe() -> Iterator[_Pipe]:
    pipe = _Pipe()
    yield pipe
    pipe.close()


def test_lines_come_out_as_they_went_in_and_in_order(pipe: _Pipe) -> None:
    pipe.log.info("Upstream connected", peer="a:1", height=7)
    pipe.log.warning("Upstream lost", peer="a:1")
    pipe.log.error("Headers not saved", error="disk\nfull \N{SNOWMAN}", waiting=3)
    assert pipe.forward() == [
        ("info", "Upstream connected", {"peer": "a:1", "height": 7}),
        ("warning", "Upstream lost", {"peer": "a:1"}),
        ("error", "Headers not saved", {"error": "disk\nfull \N{SNOWMAN}", "waiting": 3}),
    ]
    assert pipe.forward() == []


def test_a_full_pipe_loses_lines_and_time_is_not_lost_and_how_many_is_told(pipe: _Pipe) -> None:
    fcntl.fcntl(pipe.log._writing, fcntl.F_SETPIPE_SZ, PIPE_BUF)
    ended = threading.Event()

    def talk() -> None:
        for number in range(1_000):
            pipe.log.info("line", number=number)
        ended.set()

    talker = threading.Thread(target=talk, daemon=True)
    talker.start()
    assert ended.wait(20), "a full pipe blocks"
    talker.join()
    kept = pipe.forward()
    assert [values["number"] for _, _, values in kept] == list(range(len(kept)))
    assert 10 < len(kept) < 1_000
    pipe.log.info("again")
    assert pipe.forward() == [("warning", "Log lines lost", {"count": 1_000 - len(kept)}), ("info", "again", {})]
    pipe.log.info("and again")
    assert pipe.forward() == [("info", "and again", {})]


def test_a_line_that_would_be_too_long_is_cut_and_still_one_line(pipe: _Pipe) -> None:
    pipe.log.warning("Upstream lost", peer="a:1", error="\N{COLLISION SYMBOL}" * 5_000)
    ((level, event, values),) = pipe.forward()
    assert (level, event) == ("warning", "Upstream lost")
    assert values["peer"] == "'a:1'"
    assert values["error"].startswith("'\N{COLLISION SYMBOL}")
    pipe.log.info("x" * 10_000, **{f"value{number}": "\0" * 90 for number in range(100)})
    ((level, event, values),) = pipe.forward()
    assert event == "x" * 100
    assert "value0" in values


class _Odd:
    def __str__(self) -> str:
        return "odd\nthing"


def _circular() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


@pytest.mark.parametrize(
    "value", [b"\xff\n", _Odd(), "\ud800", float("nan"), 1 << 200, {b"key": 1}, _circular(), {(1, 2): "\n"}, None]
)
def test_any_value_gives_one_whole_line(pipe: _Pipe, value: object) -> None:
    pipe.log.info("before")
    pipe.log.error("odd", value=value)
    pipe.log.info("after")
    lines = pipe.forward()
    assert [(level, event) for level, event, _ in lines] == [("info", "before"), ("error", "odd"), ("info", "after")]
    assert list(lines[1][2]) == ["value"]


@settings(max_examples=100, deadline=None)
@given(lines=st.lists(st.tuples(st.text(max_size=300), st.text(max_size=3_000)), max_size=12))
def test_every_line_fits_an_atomic_write_and_is_read_back_whole(lines: list[tuple[str, str]]) -> None:
    pipe = _Pipe()
    try:
        for event, value in lines:
            pipe.log.info(event, value=value)
        raw = os.read(pipe.log._reading, 1 << 20) if lines else b""
        assert all(len(line) <= PIPE_BUF for line in raw.splitlines(keepends=True))
        for at in range(0, len(raw), 700):  # as a reader may happen to be handed it
            os.write(pipe.log._writing, raw[at : at + 700])
            pipe.log.forward(pipe.told)
        told = pipe.told.lines
        assert len(told) == len(lines)
        for (event, value), (_, said, values) in zip(lines, told, strict=True):
            assert said == event or (len(said) == 100 and event.startswith(said))
            assert values["value"] in {value, repr(value)[:100]}
    finally:
        pipe.close()
