"""`sprint keys` as an operator types it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from sprint.cli_keys import period_s
from sprint.cli_reporting import UsageError
from sprint.keys import FILE_NAME, KEY

if TYPE_CHECKING:
    from pathlib import Path


def keys(data_dir: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DATA_DIR": str(data_dir), "COLUMNS": "80", **settings}
    command = [sys.executable, "-m", "sprint", "keys", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=data_dir, timeout=60, check=False
    )


def test_a_key_is_made_listed_shown_and_revoked_and_shown_in_full_once(tmp_path: Path) -> None:
    made = keys(tmp_path, "create", "--tier", "turbo", "--name", "acme", "--expires", "30d", "--connections", "7")
    assert made.returncode == 0
    key = made.stdout.strip()
    assert KEY.fullmatch(key)
    assert "not shown again" in made.stderr

    (listed,) = json.loads(keys(tmp_path, "list", "--json").stdout)
    assert (listed["name"], listed["tier"], listed["state"], listed["connections"]) == ("acme", "turbo", "valid", 7)
    assert listed["expires"] > listed["created"]
    assert listed["id"] in keys(tmp_path, "list").stdout
    shown = keys(tmp_path, "show", listed["id"])
    assert "turbo" in shown.stdout
    assert key not in shown.stdout

    revoked = keys(tmp_path, "revoke", "acme")
    assert revoked.returncode == 0
    assert json.loads(keys(tmp_path, "show", "acme", "--json").stdout)["state"] == "revoked"
    assert key.encode() not in (tmp_path / FILE_NAME).read_bytes()


def test_what_is_wrong_is_said_in_one_line_that_names_it(tmp_path: Path) -> None:
    for arguments, code, said in (
        (("create", "--tier", "gold", "--name", "x"), 2, "--tier 'gold': expected one of free, pro"),
        (("create", "--tier", "pro", "--name", "x", "--expires", "soon"), 2, "--expires 'soon'"),
        (("create", "--tier", "pro", "--name", "\t"), 2, "name"),
        (("revoke", "nobody"), 1, "no key has the id or name 'nobody'"),
        (("show", ""), 1, "no key has"),
    ):
        answer = keys(tmp_path, *arguments)
        assert answer.returncode == code, arguments
        assert said in answer.stderr
        assert answer.stderr.count("\n") == 1
        assert not answer.stdout


def test_without_any_key_one_is_told_where_none_was_found(tmp_path: Path) -> None:
    listed = keys(tmp_path, "list")
    assert (listed.returncode, listed.stdout) == (0, "")
    assert str(tmp_path / FILE_NAME) in listed.stderr
    assert json.loads(keys(tmp_path, "list", "--json").stdout) == []


def test_a_bad_configuration_is_wrong_usage_and_a_damaged_file_the_machines_fault(tmp_path: Path) -> None:
    bad = keys(tmp_path, "list", TIER="gold")
    assert (bad.returncode, bad.stderr.partition(":")[0]) == (2, "sprint")
    assert "TIER=gold" in bad.stderr
    (tmp_path / FILE_NAME).write_bytes(b"no database" * 400)
    damaged = keys(tmp_path, "list")
    assert damaged.returncode == 1
    assert damaged.stderr.count("\n") == 1
    assert FILE_NAME in damaged.stderr


def test_watch_takes_its_key_from_the_environment_where_no_other_user_can_read_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        address = "{}:{}".format(*server.getsockname())
        environment = {**os.environ, "SPRINT_KEY": "spk_of_the_environment"}
        command = [sys.executable, "-m", "sprint", "watch", "--json", address]
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as watch:
            try:
                sock, _ = server.accept()
                with sock:
                    sock.settimeout(60)
                    hello = json.loads(sock.makefile().readline())
            finally:
                watch.kill()
    assert hello["key"] == "spk_of_the_environment"


@pytest.mark.parametrize(("text", "seconds"), [("1m", 60), ("12h", 43_200), ("30d", 2_592_000), ("2w", 1_209_600)])
def test_a_period_is_a_number_and_a_unit(text: str, seconds: int) -> None:
    assert period_s(text) == seconds


@pytest.mark.parametrize("text", ["0d", "-1d", "d", "30", "1y", "30 d", "100000d", "٣d"])
def test_any_other_period_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        period_s(text)
