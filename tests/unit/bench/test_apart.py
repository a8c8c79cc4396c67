"""A measurement in a process of its own: what it says comes back, and nothing of it outlives who asked for it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from sprint.bench.apart import Helper, run_apart
from sprint.errors import HostError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path

MODULE = """
import os
import time

from sprint.bench.apart import Helper, be_apart
from sprint.errors import HostError


def echo(control):
    while True:
        (question,) = control.recv()
        control.send((question, os.getpid()))


def measure(settings, progress):
    if "refuse" in settings:
        raise HostError(settings["refuse"])
    if "fail" in settings:
        raise ValueError(settings["fail"])
    helper = Helper(echo, None)
    answer, helper_pid = helper.ask(settings["question"])
    progress("asking", 1, 2)
    if "hang" in settings:
        try:
            with open(settings["hang"], "w") as pids:
                pids.write(f"{os.getpid()} {helper_pid}\\n")
            time.sleep(3600)
        finally:
            with open(settings["hang"], "w") as cleaned:
                cleaned.write("cleaned\\n")
    helper.close()
    return {"answer": answer, "session_leader": os.getpid() == os.getsid(0)}


be_apart(measure)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "measurement.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "measurement"


def test_progress_and_result_come_back(module: str) -> None:
    steps: list[tuple[str, int, int]] = []
    result = run_apart(module, {"question": [1, "µs"]}, lambda *step: steps.append(step))
    assert result == {"answer": [1, "µs"], "session_leader": True}
    assert steps == [("asking", 1, 2)]


def test_a_refusal_comes_back_as_such(module: str) -> None:
    with pytest.raises(HostError, match="no shared memory"):
        run_apart(module, {"refuse": "no shared memory"}, lambda *_: None)


def test_a_failure_is_no_result(module: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="measurement ended with 1 and no result"):
        run_apart(module, {"fail": "a mistake of ours"}, lambda *_: None)
    assert "a mistake of ours" in capfd.readouterr().err


def readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 20)[0])


def said(fifo: int) -> str:
    assert readable(fifo)
    return os.read(fifo, 100).decode()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_measurement_and_helpers_end_with_the_one_who_asked_and_clean_up(
    module: str, how: signal.Signals, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    fifo = os.open(pids, os.O_RDWR)
    asking = (
        "from sprint.bench.apart import run_apart\n"
        f"run_apart({module!r}, {{'question': 1, 'hang': {str(pids)!r}}}, lambda *_: None)"
    )
    with subprocess.Popen([sys.executable, "-c", asking], stderr=subprocess.DEVNULL) as process:
        descriptors = [os.pidfd_open(int(pid)) for pid in said(fifo).split()]
        process.send_signal(how)
        assert said(fifo) == "cleaned\n"
        assert all(readable(descriptor) for descriptor in descriptors)
        assert process.wait(20)
    for descriptor in (fifo, *descriptors):
        os.close(descriptor)


def test_a_helper_that_dies_is_no_answer() -> None:
    def die(control: Connection) -> None:
        control.recv()
        os._exit(3)

    helper = Helper(die, None)
    with pytest.raises(RuntimeError, match="ended without an answer"):
        helper.ask("anything")
    helper.close()


def test_a_helper_runs_on_the_cpu_it_is_given() -> None:
    cpu = max(os.sched_getaffinity(0))
    helper = Helper(lambda control: control.send(os.sched_getaffinity(0)), cpu)
    assert helper.answer() == {cpu}
    helper.close()
