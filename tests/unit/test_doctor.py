"""The doctor's words: states, verdict, exit codes, JSON; and that no check can stop the others."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from sprint import config
from sprint.doctor import Finding, Need, State, as_dicts, bypass, examine, exit_code, remove_leftovers
from sprint.doctor.examination import Check, run
from sprint.doctor.findings import MAX_TEXT, bypass_request, needs_of, verdict
from sprint.doctor.report import table
from sprint.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path

BYPASS = {"TIER": "enterprise", "ENABLE_KERNEL_BYPASS": "true"}


def configured(folder: Path, **settings: str) -> config.Config:
    """That of an operator who sets these, and whose node is nowhere."""
    return config.load({"BITCOIN_NODE": "127.0.0.1:1", "API_BIND": "127.0.0.1:1", **settings}, folder)


def shown(findings: list[Finding], width: int = 200) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table(findings))
    return captured.get()


# ── the verdict ──


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"TIER": "free"}, {Need.FEED}),
        ({"TIER": "turbo"}, {Need.FEED, Need.MEMORY}),
        ({"TIER": "enterprise"}, {Need.FEED, Need.MEMORY}),
        (BYPASS, {Need.FEED, Need.MEMORY, Need.BYPASS}),
        ({**BYPASS, "TIER": "turbo"}, {Need.FEED, Need.MEMORY}),
        ({**BYPASS, "USE_SHARED_MEMORY": "false"}, {Need.FEED}),
    ],
)
def test_each_configuration_needs_what_it_promises(tmp_path: Path, settings: dict[str, str], needs: set[Need]) -> None:
    assert needs_of(configured(tmp_path, **settings)) == needs


@pytest.mark.parametrize(
    ("state", "need", "tier", "expected", "code"),
    [
        (State.OK, Need.FEED, "free", State.OK, 0),
        (State.MISSING, Need.FEED, "free", State.MISSING, 1),
        (State.DEGRADED, Need.FEED, "free", State.DEGRADED, 0),
        (State.UNKNOWN, Need.FEED, "free", State.DEGRADED, 0),
        (State.MISSING, Need.BYPASS, "free", State.OK, 0),
        (State.MISSING, Need.BYPASS, "enterprise", State.MISSING, 1),
        (State.DEGRADED, Need.BYPASS, "enterprise", State.DEGRADED, 0),
        (State.MISSING, Need.MEMORY, "business", State.OK, 0),
        (State.MISSING, Need.MEMORY, "turbo", State.MISSING, 1),
        (State.MISSING, None, "enterprise", State.OK, 0),
    ],
)
def test_only_what_the_configuration_promises_decides(
    tmp_path: Path, state: State, need: Need | None, tier: str, expected: State, code: int
) -> None:
    finding = Finding("thing", "of interest", state, "said", "", need)
    judged = verdict([finding], configured(tmp_path, TIER=tier, ENABLE_KERNEL_BYPASS="true"))
    assert (judged.state, exit_code([finding, judged])) == (expected, code)
    assert ("thing of interest" in judged.detail) == (expected is not State.OK)
    assert bool(judged.remedy) == (expected is not State.OK)


@pytest.mark.parametrize(
    ("settings", "state", "remedy"),
    [
        ({"TIER": "free"}, State.OK, ""),
        ({"TIER": "enterprise"}, State.DEGRADED, "ENABLE_KERNEL_BYPASS=true"),
        (BYPASS, State.OK, ""),
        ({**BYPASS, "TIER": "pro"}, State.DEGRADED, "TIER=enterprise"),
        ({**BYPASS, "USE_SHARED_MEMORY": "false"}, State.DEGRADED, "USE_SHARED_MEMORY=true"),
    ],
)
def test_a_bypass_asked_for_in_vain_is_told_with_its_setting(
    tmp_path: Path, settings: dict[str, str], state: State, remedy: str
) -> None:
    finding = bypass_request(configured(tmp_path, **settings))
    assert (finding.state, remedy in finding.remedy) == (state, True)


# ── how it is said ──


def test_json_has_the_five_keys_and_nothing_that_breaks_a_line() -> None:
    findings = [Finding("a", "b", State.OK, "c\x1b[31m\n"), Finding("d", "", State.MISSING, "e" * 5_000, "f")]
    told = json.loads(json.dumps(as_dicts(findings)))
    assert told[0] == {"check": "a", "subject": "b", "state": "ok", "detail": "c [31m ", "remedy": ""}
    assert told[1] | {"detail": ""} == {"check": "d", "subject": "", "state": "missing", "detail": "", "remedy": "f"}
    assert len(told[1]["detail"]) == MAX_TEXT


def test_what_a_peer_wrote_is_shown_as_it_is_and_not_as_markup() -> None:
    text = shown([Finding("node", "[bold]a[/]", State.OK, "/[red]Satoshi[/]:1/"), Finding("x", "", State.OK, "[/]")])
    assert "node [bold]a[/]" in text
    assert "/[red]Satoshi[/]:1/" in text


def test_each_line_has_its_mark_and_a_remedy_its_own_line() -> None:
    text = shown([Finding("a", "", State.OK, "fine"), Finding("b", "", State.DEGRADED, "slow", "sysctl -w x=1")])
    assert [line.split() for line in text.splitlines()] == [
        ["ok", "a", "fine"],
        ["degraded", "b", "slow"],
        ["→", "sysctl", "-w", "x=1"],
    ]


# ── no check stops the others ──


def test_a_check_that_fails_and_one_that_hangs_become_lines_and_the_others_go_on() -> None:
    release = threading.Event()

    def fail() -> list[Finding]:
        raise RuntimeError("of all things")

    def hang() -> list[Finding]:
        release.wait(30)
        return []

    def answer() -> list[Finding]:
        return [Finding("third", "", State.OK, "here")]

    try:
        findings = run([Check("first", fail, 5), Check("second", hang, 0.05), Check("third", answer, 5)])
    finally:
        release.set()
    assert [(each.check, each.state) for each in findings] == [
        ("first", State.UNKNOWN),
        ("second", State.UNKNOWN),
        ("third", State.OK),
    ]
    assert "RuntimeError: of all things" in findings[0].detail
    assert "no answer within 0.05 s" in findings[1].detail


def test_a_heavy_check_waits_for_the_others_and_keeps_its_place() -> None:
    order: list[str] = []

    def heavy() -> list[Finding]:
        order.append("heavy")
        return [Finding("heavy", "", State.OK, "done")]

    def light() -> list[Finding]:
        order.append("light")
        return [Finding("light", "", State.OK, "done")]

    findings = run([Check("heavy", heavy, 5, heavy=True), Check("light", light, 5)])
    assert (order, [each.check for each in findings]) == (["light", "heavy"], ["heavy", "light"])


def test_a_failure_of_what_is_needed_shows_in_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: config.Config) -> list[Finding]:
        raise RuntimeError("of all things")

    monkeypatch.setattr("sprint.doctor.nodes.nodes", fail)
    *_, judged = examine(configured(tmp_path), quick=True)
    assert (judged.state, "nodes" in judged.detail) == (State.DEGRADED, True)


def test_this_host_is_examined_without_an_exception_and_every_line_is_whole(tmp_path: Path) -> None:
    findings = examine(configured(tmp_path), quick=True)
    names = [each.name for each in findings]
    assert len(set(names)) == len(names)
    assert findings[-1].check == "tier"
    for each in findings:
        assert each.check, each
        assert each.detail, each
        assert "could not be examined" not in each.detail, each
        assert bool(each.remedy) == (each.state is not State.OK), each
    by_name = {each.name: each for each in findings}
    assert platform.python_version() in by_name["python"].detail
    assert platform.release() in by_name["kernel"].detail


def test_a_host_that_tells_nothing_is_a_list_of_findings(tmp_path: Path) -> None:
    findings = examine(configured(tmp_path), quick=True, root=tmp_path / "none", environ={})
    states = {each.name: each.state for each in findings}
    for name in ("capability CAP_NET_ADMIN", "clock source", "sysctl net.core.somaxconn", "real-time runtime"):
        assert states[name] is State.UNKNOWN, name
    assert states["kernel headers"] is State.MISSING
    assert not [each for each in findings if "could not be examined" in each.detail]


def test_quick_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(bypass, "missing", lambda: None)
    monkeypatch.setattr(bypass, "load", refuse)
    (quick,) = bypass.programs(configured(tmp_path), quick=True)
    assert (quick.state, "--quick" in quick.detail) == (State.OK, True)
    with pytest.raises(AssertionError, match="compiled"):
        bypass.programs(configured(tmp_path), quick=False)


def test_a_refused_cleaning_is_one_line_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("sprint.doctor.clean", refuse)
    with pytest.raises(HostError, match="Operation not permitted: run it as root"):
        remove_leftovers()


def test_the_command_prints_json_and_exits_by_the_verdict(tmp_path: Path) -> None:
    """There is no node, so no tier can keep its promise."""
    environ = {**os.environ, "BITCOIN_NODE": "127.0.0.1:1", "TIER": "free", "API_BIND": "127.0.0.1:1"}
    command = [sys.executable, "-m", "sprint", "doctor", "--json", "--quick"]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    told = json.loads(done.stdout)
    assert all(list(each) == ["check", "subject", "state", "detail", "remedy"] for each in told)
    assert {each["state"] for each in told} <= {"ok", "degraded", "missing", "unknown"}
    assert told[-1]["check"] == "tier"
    assert "node 127.0.0.1:1" in told[-1]["detail"]


def test_a_bad_configuration_is_told_as_everywhere(tmp_path: Path) -> None:
    environ = {**os.environ, "TIER": "bogus"}
    command = [sys.executable, "-m", "sprint", "doctor"]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sprint: TIER=bogus")
