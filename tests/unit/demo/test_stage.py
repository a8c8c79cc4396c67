"""The demo's stage: what its processes inherit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from sprint.demo.stage import Stage
from tests.real.children import status_field

if TYPE_CHECKING:
    from pathlib import Path


def test_ctrl_c_does_not_reach_a_process_of_the_demo_that_is_still_loading() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    before = multiprocessing.active_children()
    Stage._start(context, time.sleep, (60,), theirs)
    (child,) = [one for one in multiprocessing.active_children() if one not in before]
    try:
        assert child.pid is not None
        blocked = int(status_field(child.pid, "SigBlk"), 16)
        assert blocked & 1 << (signal.SIGINT - 1)
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        child.kill()
        child.join()
        ours.close()


def test_a_sprint_that_does_not_start_is_told_of_in_its_own_words(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "sprint", "demo", "--once"],
        env={**os.environ, "TIER": "bogus", "http_proxy": "http://127.0.0.1:9"},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    why, what = ended.stderr.splitlines()
    assert why == "sprint: TIER=bogus: expected one of free, pro, business, turbo, enterprise"
    assert what.startswith("sprint: Sprint, as the demo runs it, did not become healthy")
    assert (ended.returncode, ended.stdout) == (1, "")
