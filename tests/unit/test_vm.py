"""`./run vm` without a machine: what it is called with, what reports come to, and that nothing is left running.

The machines here are shell scripts that print what a guest prints.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vagrant import machine, reports, vm

if TYPE_CHECKING:
    from collections.abc import Callable

VNG = ["--vng", "/opt/vng"]


def said(**facts: Any) -> dict[str, Any]:
    parsed = reports.parse(reports.line(**facts) + "\r\n")
    assert parsed is not None
    return parsed


def result(*lines: dict[str, Any]) -> reports.Result:
    made = reports.Result("6.1", release="6.1.0-56-amd64")
    for each in lines:
        made.take(each)
    return made


# ── the command line ──


def test_kernels_stand_before_and_pytest_s_arguments_after_the_dashes() -> None:
    asked = vm.arguments([*VNG, "6.1", "6.12", "--json", "--", "-k", "native", "--json"])
    assert (asked.kernels, asked.json, asked.pytest) == (["6.1", "6.12"], True, ["-k", "native", "--json"])


@pytest.mark.parametrize("words", [[], ["6"], ["6.1", "--minutes", "0"], ["6.1", "--minutes", "many"], ["6.1", "-x"]])
def test_a_command_that_can_t_be_meant_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        vm.arguments([*VNG, *words])
    assert stopped.value.code == 2
    assert "./run vm" in capsys.readouterr().err


def test_the_root_tests_are_run_unless_others_are_named() -> None:
    assert "tests/net" in vm.pytest_words(["-k", "native"], emulated=True)
    named = vm.pytest_words(["tests/net/test_bypass.py"], emulated=True)
    assert "tests/net" not in named
    assert not [word for word in named if word.startswith("--deselect")]


def test_what_takes_too_long_emulated_is_left_out_only_there_and_exists() -> None:
    words = vm.pytest_words([], emulated=True)
    assert [word.removeprefix("--deselect=") for word in words if "--deselect" in word] == list(vm.LEFT_OUT)
    for test in vm.LEFT_OUT:
        path, _, name = test.partition("::")
        assert f"def {name}" in (vm.ROOT / path).read_text(encoding="utf-8")
    assert not [word for word in vm.pytest_words([], emulated=False) if "--deselect" in word]


def test_the_guest_s_words_survive_the_shell_in_between(tmp_path: Path) -> None:
    host = machine.Host(Path("/a b"), Path("/opt/vng"), tmp_path)
    words = machine.command(host, Path("/snap"), "6.1.0-56-amd64", Path("/k"), ["-k", "not (x or y)"])
    assert words[:3] == ["/opt/vng", "--run", "/k/boot/vmlinuz-6.1.0-56-amd64"]
    assert "--disable-kvm" in words
    guest = shlex.split(words[words.index("--exec") + 1])
    assert guest == ["bash", "/snap/vagrant/guest.sh", "/a b", "/snap", "/k", "40", "-k", "not (x or y)"]


def test_the_copy_of_a_checkout_has_its_own_files_and_nothing_that_a_set_up_made(tmp_path: Path) -> None:
    root, work = tmp_path / "checkout", tmp_path / "work"
    for path in ("sprint/a.py", ".venv/b", ".cache/c", ".git/d", "tests/real/node/node_modules/e", "vagrant/f"):
        (root / path).parent.mkdir(parents=True)
        (root / path).touch()
    work.mkdir()
    copy = machine.Host(root, Path("/opt/vng"), work).snapshot()
    assert sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()) == [
        "sprint/a.py",
        "vagrant/f",
    ]


# ── reports ──


@pytest.mark.parametrize("text", ["", "....", reports.MARK, reports.MARK + "{", reports.MARK + "[1]", "@@sprint-vm"])
def test_what_is_no_line_of_a_report_is_none(text: str) -> None:
    assert reports.parse(text) is None


def test_outcomes_are_counted_and_a_test_that_failed_twice_is_one() -> None:
    made = result(
        said(collected=4),
        said(test="a", outcome="passed", seconds=1.0),
        said(test="b", outcome="skipped", seconds=0.0, reason="no TCX"),
        said(test="c", outcome="skipped", seconds=0.0, reason="no TCX"),
        said(test="d", outcome="failed", seconds=0.1, text="assert"),
        said(test="d", outcome="failed", seconds=0.2, text="teardown"),
        said(facts={"veth": "native", "tcx": False, "live_frames": True}),
        said(ended=1),
    )
    assert (made.collected, made.passed, made.skipped, made.failed) == (4, 1, {"no TCX": 2}, ["d"])
    made.seconds = 125.4
    assert made.row() == ("6.1.0-56-amd64", "1", "2", "1", "native", "?", "yes", "no", "?", "2:05")
    assert not made.green
    assert json.loads(json.dumps(made.as_json()))["green"] is False


def test_a_kernel_is_green_only_if_its_tests_came_to_their_end_and_one_passed() -> None:
    passed = said(test="a", outcome="passed", seconds=1.0)
    assert result(passed, said(ended=0)).green
    assert not result(passed).green
    assert not result(passed, said(ended=2)).green
    assert not result(said(test="a", outcome="skipped", reason="no root"), said(ended=0)).green
    stopped = result(passed, said(ended=0))
    stopped.error = "stopped after 1 minutes"
    assert not stopped.green


def test_the_table_has_a_row_for_each_kernel() -> None:
    lines = reports.table([result(), result()]).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {len(reports.COLUMNS) + 1}


def test_an_error_of_several_lines_stays_in_one_row_of_the_table() -> None:
    made = result()
    made.error = "the machine ended before its tests did (status 1):\n    Kernel panic | so"
    assert len(reports.table([made]).splitlines()) == 3


# ── the machine's process ──


def run_script(tmp_path: Path, script: str, timeout_s: float = 30.0) -> tuple[str | None, list[dict[str, object]]]:
    lines: list[dict[str, object]] = []
    error = machine.run(["bash", "-c", script], dict(os.environ), tmp_path / "log", timeout_s, lines.append)
    return error, lines


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_a_machine_s_report_is_taken_and_all_that_it_prints_is_kept(tmp_path: Path) -> None:
    error, lines = run_script(
        tmp_path, f"echo booting; echo '{reports.line(collected=3)}'; echo '{reports.line(ended=0)}'"
    )
    assert error is None
    assert lines == [{"collected": 3}, {"ended": 0}]
    assert "booting" in (tmp_path / "log").read_text()


def test_a_machine_that_ends_before_its_tests_did_is_told_with_its_last_words(tmp_path: Path) -> None:
    error, _ = run_script(tmp_path, "echo Kernel panic; exit 7")
    assert error is not None
    assert "status 7" in error
    assert "Kernel panic" in error


def test_a_machine_that_takes_too_long_is_ended_with_everything_that_it_started(tmp_path: Path) -> None:
    error, _ = run_script(tmp_path, f"exec -a sleeper-{tmp_path.name} sleep 300 & wait", timeout_s=0.5)
    assert error == "stopped after 0.00833333 minutes"
    wait_until(lambda: not processes_named(f"sleeper-{tmp_path.name}"))


def test_whoever_is_interrupted_leaves_no_machine_behind(tmp_path: Path) -> None:
    def interrupt(_: dict[str, object]) -> None:
        raise KeyboardInterrupt

    script = f"exec -a sleeper-{tmp_path.name} sleep 300 & echo '{reports.line(collected=1)}'; wait"
    with pytest.raises(KeyboardInterrupt):
        machine.run(["bash", "-c", script], dict(os.environ), tmp_path / "log", 60, interrupt)
    wait_until(lambda: not processes_named(f"sleeper-{tmp_path.name}"))


def processes_named(name: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().split(b"\0")[0].decode(errors="replace")
        except OSError:
            continue
        if command == name:
            found.append(path.parent.name)
    return found
