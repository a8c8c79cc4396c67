"""docs/deployment.md: its settings load, and its key commands do what the page says."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sprint.config import ENV_FILE, load
from sprint.events import Event

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "deployment.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```ini\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_is_a_good_file_without_a_warning(example: str, tmp_path: Path) -> None:
    (tmp_path / ENV_FILE).write_text(example, encoding="utf-8")
    loaded = load({}, tmp_path)
    assert loaded.warnings == ()
    assert f"TIER={loaded.tier.label}" in example


def test_there_is_one_for_a_pool_an_exchange_and_a_lightning_node() -> None:
    assert len(EXAMPLES) == 3


def test_every_event_has_a_row_that_says_who_acts_on_it() -> None:
    rows = re.findall(r"^\| ([A-Z]+) \| [^|]+ \| [^|]+ \| [^|]+ \|$", PAGE, re.MULTILINE)
    assert rows == [event.name for event in Event]


def test_lnd_s_two_addresses_differ_as_text_and_are_both_where_sprint_publishes() -> None:
    """lnd refuses to start with the same one twice ("must be set to different addresses")."""
    addresses = re.findall(r"^bitcoind\.zmqpubraw\w+=tcp://(\S+):(\d+)$", PAGE, re.MULTILINE)
    assert len(addresses) == len(set(addresses)) == 2
    published = load({"TIER": "turbo"}, Path("/nonexistent")).zmq_bind
    for host, port in addresses:
        assert (socket.gethostbyname(host), int(port)) == published


def test_the_node_publishes_where_the_examples_listen() -> None:
    addresses = set(re.findall(r"^zmqpub\w+=tcp://(\S+)", PAGE, re.MULTILINE))
    assert addresses == set(re.findall(r"^ZMQ_NODE=(\S+)$", PAGE, re.MULTILINE))


def test_the_key_commands_work_as_written(tmp_path: Path) -> None:
    commands = re.findall(r"^\./run sprint (keys .*)$", PAGE, re.MULTILINE)
    assert len(commands) == 3
    answers = [
        subprocess.run(
            [sys.executable, "-m", "sprint", *command.split()],
            env={**os.environ, "DATA_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        for command in commands
    ]
    assert answers[0].stdout.startswith("spk_")
    assert "acme" in answers[1].stdout
    assert "revoked" in answers[2].stderr
