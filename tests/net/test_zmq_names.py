"""Publishers that are given by name: one with an IPv6 address only, and one whose name nobody answers for."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_S = 60.0

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="root and unshare are needed for a mount namespace"
)


def heard(kind: str, folder: Path) -> str:
    """What the child hears of its publisher."""
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.net.zmq_names"]
    done = subprocess.run([*command, kind, str(folder)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6 on loopback")
def test_a_publisher_whose_name_has_an_ipv6_address_only_is_found(tmp_path: Path) -> None:
    assert heard("ipv6", tmp_path) == "Sighting"


def test_a_name_that_nobody_answers_for_keeps_no_other_publisher_unheard(tmp_path: Path) -> None:
    assert heard("silent", tmp_path) == "Sighting"
