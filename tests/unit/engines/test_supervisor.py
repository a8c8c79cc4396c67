"""The supervisor with real processes: trivial children that speak through a pipe, and die in every way."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import time
import warnings
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sprint.engines import supervisor as module
from sprint.engines.supervisor import Child, Supervisor
from sprint.tiers import NS_PER_MS
from tests.descriptors import open_descriptors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def _other_tests_threads_do_not_matter() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
        yield


class _Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def error(self, event: str, **values: Any) -> None:
        self.lines.append((event, values))

    def said(self, event: str) -> list[dict[str, Any]]:
        return [values for line, values in self.lines if line == event]


class _Family:
    """A supervisor, and what its children say: each line `NAME PID MONOTONIC_NS`, handed to `on_word`."""

    def __init__(self) -> None:
        self._ears, self._mouth = os.pipe()
        self.log = _Log()
        self.words: list[tuple[str, int, int]] = []
        self.changes: list[tuple[str, int]] = []
        self.on_word: Callable[[str, int], None] = lambda _name, _pid: None
        self.on_change: Callable[[Child], None] = lambda _child: None
        self.supervisor: Supervisor

    def say(self, name: str) -> None:
        os.write(self._mouth, f"{name} {os.getpid()} {time.monotonic_ns()}\n".encode())

    def lives(self, name: str) -> Child:
        """One that says its name, and waits for a signal."""

        def main() -> None:
            self.say(name)
            while True:
                signal.pause()

        return Child(name, main)

    def run(self, *children: Child, watches: dict[int, Callable[[], None]] | None = None) -> None:
        watched = {self._ears: self._listen, **(watches or {})}
        self.supervisor = Supervisor(tuple(children), self.log, self._changed, watched)
        try:
            self.supervisor.run()
        finally:
            os.close(self._ears)
            os.close(self._mouth)

    def times_of(self, name: str) -> list[int]:
        return [time_ns for said, _, time_ns in self.words if said == name]

    def _changed(self, child: Child) -> None:
        self.changes.append((child.name, child.pid))
        self.on_change(child)

    def _listen(self) -> None:
        for line in os.read(self._ears, 65536).decode().splitlines():
            name, pid, time_ns = line.split()
            self.words.append((name, int(pid), int(time_ns)))
            self.on_word(name, int(pid))


_strangers: set[int] = set()
"""Children of this process that were there before the test: another test's resource tracker, say."""


@pytest.fixture(autouse=True)
def _know_the_strangers() -> None:
    _strangers.clear()
    _strangers.update(_children())


def _children() -> set[int]:
    return {int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()}


def _nobody_left() -> bool:
    """Neither a living child of ours nor a zombie."""
    return _children() <= _strangers


def _alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def test_a_child_that_was_told_to_end_together_with_us_has_not_died() -> None:
    family = _Family()
    told, teller = os.pipe()

    def on_word(_name: str, pid: int) -> None:
        os.write(teller, b"end")  # before the child's death: the next look sees both, in this order
        os.kill(pid, signal.SIGTERM)
        while _alive(pid):
            time.sleep(0.001)

    family.on_word = on_word
    child = family.lives("one")

    def stop() -> None:
        family.supervisor.stop()

    family.run(child, watches={told: stop})
    for descriptor in (told, teller):
        os.close(descriptor)
    assert (child.pid, child.restarts, family.log.lines) == (0, 0, [])
    assert _nobody_left()


def test_a_killed_child_comes_back_and_the_others_live_on() -> None:
    family = _Family()
    pids: dict[str, list[int]] = {"one": [], "two": [], "three": []}

    def on_word(name: str, pid: int) -> None:
        pids[name].append(pid)
        if [len(pids[one]) for one in ("one", "two", "three")] == [1, 1, 1]:
            os.kill(pids["two"][0], signal.SIGKILL)
        elif len(pids["two"]) == 2:
            assert _alive(pids["one"][0])
            assert _alive(pids["three"][0])
            family.supervisor.stop()

    family.on_word = on_word
    children = [family.lives(name) for name in pids]
    family.run(*children)
    assert [len(said) for said in pids.values()] == [1, 2, 1]
    assert [child.restarts for child in children] == [0, 1, 0]
    (death,) = family.log.said("Child died")
    assert death == {"child": "two", "pid": pids["two"][0], "how": "signal 9", "restarts": 1}
    assert ("two", 0) in family.changes
    assert _nobody_left()


def test_one_that_dies_again_and_again_is_started_after_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_RESTART_NS", 160 * NS_PER_MS)
    family = _Family()
    child = Child("fails", lambda: family.say("fails"), pause_ns=20 * NS_PER_MS)

    def on_word(_name: str, _pid: int) -> None:
        if len(family.words) == 7:
            family.supervisor.stop()

    family.on_word = on_word
    family.run(child)
    times = family.times_of("fails")
    pauses = [(after - before) // NS_PER_MS for before, after in pairwise(times)]
    assert all(pause >= least for pause, least in zip(pauses, [20, 40, 80, 160, 160, 160], strict=True)), pauses
    assert {line["how"] for line in family.log.said("Child died")} == {"exit code 0"}
    assert _nobody_left()


def test_however_often_it_was_killed_a_child_is_back_within_two_seconds() -> None:
    assert module.LAST_RESTART_NS < 2_000 * NS_PER_MS


def test_one_that_has_run_for_long_is_started_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEADY_NS", 0)
    family = _Family()
    child = Child("steady", lambda: family.say("steady"), pause_ns=3_600_000 * NS_PER_MS)

    def on_word(_name: str, _pid: int) -> None:
        if len(family.words) == 3:
            family.supervisor.stop()

    family.on_word = on_word
    family.run(child)
    assert child.pause_ns == module.FIRST_RESTART_NS


@pytest.mark.parametrize(
    ("error", "code"), [(ZeroDivisionError("in a child"), 1), (KeyboardInterrupt(), 1), (SystemExit(3), 1)]
)
def test_a_childs_exception_prints_a_traceback_and_runs_nothing_of_the_parents(
    error: BaseException, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    family = _Family()
    ours = os.getpid()

    def main() -> None:
        raise error

    def on_change(child: Child) -> None:
        assert os.getpid() == ours
        if child.restarts:
            family.supervisor.stop()

    family.on_change = on_change
    try:
        family.run(Child("raises", main))
    finally:
        print("after run", os.getpid() == ours)
        sys.stdout.flush()
    out, err = capfd.readouterr()
    assert out == "after run True\n"
    assert "Traceback" in err
    assert type(error).__name__ in err
    assert family.log.said("Child died")[0]["how"] == f"exit code {code}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_children_and_leaves_everything_as_it_was(number: signal.Signals) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    descriptors = open_descriptors()
    family = _Family()

    def on_word(_name: str, _pid: int) -> None:
        if len(family.words) == 3:
            os.kill(os.getpid(), number)

    family.on_word = on_word
    family.run(*(family.lives(name) for name in ("one", "two", "three")))
    assert _nobody_left()
    assert family.log.lines == []
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT}
    assert open_descriptors() == descriptors


def test_ctrl_c_is_the_supervisors_and_children_pass_over_it() -> None:
    family = _Family()

    def main() -> None:
        family.say("child")
        os.kill(os.getpid(), signal.SIGINT)
        family.say("unharmed")
        signal.pause()

    family.on_word = lambda name, _pid: family.supervisor.stop() if name == "unharmed" else None
    family.run(Child("child", main))
    assert [name for name, _, _ in family.words] == ["child", "unharmed"]


def test_one_that_does_not_end_when_asked_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_TIMEOUT_S", 0.2)
    family = _Family()

    def main() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        family.say("deaf")
        while True:
            signal.pause()

    family.on_word = lambda _name, _pid: family.supervisor.stop()
    family.run(Child("deaf", main))
    assert _nobody_left()


def test_a_child_that_is_asked_to_end_in_the_moment_of_its_birth_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM comes while it still has the supervisor's handlers."""
    library = ctypes.CDLL

    def slow(name: str | None) -> ctypes.CDLL:
        time.sleep(0.1)
        return library(name)

    monkeypatch.setattr(ctypes, "CDLL", slow)
    monkeypatch.setattr(module, "STOP_TIMEOUT_S", 2 * PATIENCE_S)
    family = _Family()
    family.on_change = lambda _child: family.supervisor.stop()
    family.run(family.lives("newborn"))
    assert family.words == []
    assert _nobody_left()


def test_children_die_with_a_killed_supervisor() -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            family = _Family()
            family.on_word = lambda _name, child: void(os.write(writing, f"{child}\n".encode()))
            family.run(*(family.lives(name) for name in ("one", "two", "three")))
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        children = [int(pipe.readline()) for _ in range(3)]
        assert all(_alive(child) for child in children)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert pipe.read() == ""  # which only comes when the last of them is going
    deadline = time.monotonic() + 2
    while any(_alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def void(_: object) -> None:
    """For a lambda that is asked for nothing."""


@pytest.mark.parametrize("function", ["fork", "pidfd_open"])
def test_a_machine_without_processes_or_descriptors_to_spare_delays_a_child_and_ends_nothing(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refusals = getattr(os, function), [2]

    def refuse(*arguments: int) -> int:
        if refusals[0]:
            refusals[0] -= 1
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        result: int = real(*arguments)
        return result

    monkeypatch.setattr(os, function, refuse)
    family = _Family()
    family.on_word = lambda _name, pid: family.supervisor.stop() if _alive(pid) and not refusals[0] else None
    family.run(family.lives("late"))
    assert [line["child"] for line in family.log.said("Child can't be started")] == ["late", "late"]
    assert family.changes[-1][0] == "late"
    assert family.changes[-1][1] > 0
    assert _nobody_left()
