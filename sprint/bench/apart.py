"""A measurement in a fresh process of one thread, which may fork; its progress and its result come back as lines.

The process that draws the progress bar has a thread for that, which would take the interpreter from whatever is being
timed, and must not fork. So the measurement runs by `python -m`, and everything that it forks dies with it, as it dies
with the one who asked, however that ends.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sprint.errors import HostError, SprintError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

Progress = Callable[[str, int, int], None]
"""Told the step, how much of it is done, and how much there is."""

ANSWER_TIMEOUT_S = 120.0
"""Longer than any one step of a benchmark takes, even on a machine that is busy with something else."""
END_TIMEOUT_S = 5.0
"""How long a measurement that is told to end may take to remove what it made."""
_PR_SET_PDEATHSIG = 1


def run_apart(module: str, settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Run `module` by itself, hand on its progress, and return its result.

    Raises HostError with what it says when it refuses on purpose, RuntimeError when it fails in any other way.
    """
    command = [sys.executable, "-m", module, json.dumps(settings), str(os.getpid())]
    result: dict[str, Any] | None = None
    # A session of its own: see _ask_for_the_cpu().
    with subprocess.Popen(  # noqa: S603 - our own interpreter
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                said = json.loads(line)
                if "refused" in said:
                    raise HostError(said["refused"])
                if "step" in said:
                    progress(said["step"], said["done"], said["total"])
                else:
                    result = said["result"]
        except BaseException:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_TIMEOUT_S)
            process.kill()
            raise
    if process.returncode or result is None:
        raise RuntimeError(f"{module} ended with {process.returncode} and no result: what it says stands above")
    return result


def be_apart(measure: Callable[[dict[str, Any], Progress], dict[str, Any]]) -> None:
    """The main of such a module: measure with the settings given, and say what comes out."""
    settings, parent = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    die_with(int(parent), signal.SIGTERM)
    _ask_for_the_cpu()

    def say(**what: Any) -> None:
        sys.stdout.write(f"{json.dumps(what)}\n")
        sys.stdout.flush()

    try:
        result = measure(json.loads(settings), lambda step, done, total: say(step=step, done=done, total=total))
    except SprintError as error:
        say(refused=str(error))
        return
    say(result=result)


def die_with(parent: int, number: signal.Signals) -> None:
    """Let the kernel send this process that signal when `parent`, which started it, ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before we could ask
        os._exit(1)


def _ask_for_the_cpu() -> None:
    """Be nicest to ourselves, as far as we may: what else runs here shall not decide how the measurement comes out.

    Where the kernel groups processes by session (CONFIG_SCHED_AUTOGROUP, see sched(7)), it is the group's value that
    counts; the group is ours alone and ends with us.
    """
    with suppress(OSError):  # only root may
        os.setpriority(os.PRIO_PROCESS, 0, -20)
        Path("/proc/self/autogroup").write_text("-20", encoding="ascii")


class Helper:
    """A forked process that answers what is sent to it, and ends with us."""

    def __init__(self, main: Callable[[Connection], None], cpu: int | None) -> None:
        """Fork: from a process of one thread only. `cpu`: run on that one alone; None: anywhere."""
        context = multiprocessing.get_context("fork")
        self.control, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_be_helper, args=(main, theirs, os.getpid(), cpu), daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, *question: object) -> Any:
        """Send and wait for the answer. Raises RuntimeError when the process ends or takes too long instead."""
        self.tell(*question)
        return self.answer()

    def tell(self, *question: object) -> None:
        """Send without waiting."""
        self.control.send(question)

    def answer(self) -> Any:
        """Wait for an answer; raises as ask() does."""
        ready = wait([self.control, self._process.sentinel], ANSWER_TIMEOUT_S)
        if self.control not in ready:
            raise RuntimeError(f"no answer within {ANSWER_TIMEOUT_S:.0f} s" if not ready else "ended without an answer")
        try:
            return self.control.recv()
        except EOFError:
            raise RuntimeError("ended without an answer") from None

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self.control.close()


def _be_helper(main: Callable[[Connection], None], control: Connection, parent: int, cpu: int | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with(parent, signal.SIGKILL)
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    main(control)
