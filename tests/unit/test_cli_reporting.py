"""What every command does alike, as its process shows it: one line, an exit code, and never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sprint.cli_reporting import INTERRUPTED, READER_GONE, REFUSED, WRONG_USAGE, UsageError, reporting
from sprint.errors import ConfigError, HostError
from sprint.keys import FILE_NAME, KeyStore
from sprint.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping

NOBODY = "127.0.0.1:9"
FULL = Path("/dev/full")


def shell(line: str, folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """What a shell makes of a line in which $SPRINT stands for the command."""
    environment: Mapping[str, str] = {
        **os.environ,
        "SPRINT": f"{sys.executable} -m sprint",
        "DATA_DIR": str(folder),
        "API_BIND": NOBODY,
        **settings,
    }
    return subprocess.run(
        ["/bin/bash", "-c", line],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def make_keys(folder: Path, *names: str) -> None:
    with KeyStore(folder / FILE_NAME) as store:
        for name in names:
            store.create(name, Tier.PRO, 1, connections=1)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("TIER", "gold", "expected one of free"), WRONG_USAGE, "sprint: TIER=gold: expected one of free\n"),
        (UsageError("ADDRESS 'x y': expected host:port"), WRONG_USAGE, "sprint: ADDRESS 'x y': expected host:port\n"),
        (HostError("first\nsecond\x1b[2J"), REFUSED, "sprint: first\N{REPLACEMENT CHARACTER}second"),
        (KeyboardInterrupt(), INTERRUPTED, ""),
    ],
)
def test_a_refusal_is_one_line_and_its_exit_code(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, reporting():
        raise error
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert said.startswith(words)
    assert said.count("\n") == bool(words)
    assert all(letter.isprintable() for letter in said.rstrip("\n"))


def test_an_error_of_ours_is_not_taken_for_an_output_that_cannot_be_written() -> None:
    with pytest.raises(FileNotFoundError), reporting():
        raise FileNotFoundError(2, "No such file", "precious")
    with pytest.raises(ValueError, match="defect"), reporting():
        raise ValueError("defect")


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    "command", ["keys list", "keys list --json", "keys show one", "doctor --quick --json", "--help", "-u keys list"]
)
def test_output_that_the_disk_has_no_room_for_is_one_line_and_exit_code_1(command: str, tmp_path: Path) -> None:
    make_keys(tmp_path, "one")
    settings = {"PYTHONUNBUFFERED": "1"} if command.startswith("-u ") else {}  # nothing stays in a buffer then
    ended = shell(f"$SPRINT {command.removeprefix('-u ')} > /dev/full", tmp_path, **settings)
    assert (ended.returncode, ended.stderr) == (1, "sprint: standard output: No space left on device\n")


@pytest.mark.parametrize("command", ["keys list", "keys list --json", "run --help"])
def test_a_reader_that_has_gone_ends_a_command_without_a_word(command: str, tmp_path: Path) -> None:
    make_keys(tmp_path, "one")
    ended = shell(f"$SPRINT {command} | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert ended.returncode in (REFUSED, READER_GONE)  # rich and typer, where they write, end with 1 by themselves
    assert ended.stderr == ""


@pytest.mark.parametrize("redirect", ["> /dev/full", ">&-"])
def test_a_key_that_could_not_be_shown_is_revoked(redirect: str, tmp_path: Path) -> None:
    ended = shell(f"$SPRINT keys create --tier turbo --name lost {redirect}", tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith("sprint: standard output: ")
    assert ended.stderr.count("\n") == 1
    with KeyStore(tmp_path / FILE_NAME) as store:
        (lost,) = store.list()
    assert lost.revoked_s


@pytest.mark.parametrize("settings", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "TERM": "dumb"}])
def test_a_terminal_without_our_letters_gets_them_escaped_and_json_stays_json(
    settings: dict[str, str], tmp_path: Path
) -> None:
    make_keys(tmp_path, "café")
    listed = shell("$SPRINT keys list", tmp_path, **settings)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "caf" in listed.stdout
    (key,) = json.loads(shell("$SPRINT keys list --json", tmp_path, **settings).stdout)
    assert key["name"] == "café"
    examined = shell("$SPRINT doctor --quick", tmp_path, **settings)
    assert "Traceback" not in examined.stdout + examined.stderr


def test_with_every_standard_stream_closed_no_file_takes_their_place(tmp_path: Path) -> None:
    ended = shell("$SPRINT keys create --tier pro --name one <&- >&- 2>&-", tmp_path)
    assert ended.returncode == 1
    assert (tmp_path / FILE_NAME).read_bytes().startswith(b"SQLite format 3")
    assert b"sprint:" not in (tmp_path / FILE_NAME).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("status 'a b:80'", 2, "ADDRESS 'a b:80': expected host:port"),
        ("status http://127.0.0.1:8080", 2, "ADDRESS "),
        ("status 127.0.0.1:99999", 2, "expected 1 to 65535"),
        (f"status {NOBODY}", 1, f"http://{NOBODY}/api/health: Connection refused"),
        ("status", 1, f"http://{NOBODY}/api/health: Connection refused"),
        ("watch 'a b'", 2, "ADDRESS 'a b': expected host:port"),
        ("watch :::", 2, "ADDRESS "),
        ("bench nix", 2, "no benchmark 'nix': one of "),
        ("bench wire --plot x.png", 2, "--plot: nothing to draw of wire"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(arguments: str, code: int, words: str, tmp_path: Path) -> None:
    ended = shell(f"$SPRINT {arguments}", tmp_path)
    assert ended.returncode == code
    assert words in ended.stderr
    assert ended.stderr.startswith("sprint: ")
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""
