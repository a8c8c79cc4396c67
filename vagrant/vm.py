"""`./run vm KERNEL…`: the root tests inside stock Debian kernels, one after the other, and a table of what came of it.

Standard output has the table, or with --json one object; progress goes to standard error, and all that a machine
printed to .cache/kernels/RELEASE.log. The exit status is 0 only if every kernel is green.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vagrant import fetch, kernels, machine, reports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 40.0
"""A machine is given, unless --minutes says otherwise: three times what an emulated one takes on two busy cores."""
TEST_S = 600
"""One test is given: emulated, the slowest takes a tenth of that."""
TESTS = ("tests/net",)
_PROGRAM = "tests/net/test_capture_program.py::test_"
LEFT_OUT = (
    "tests/net/test_bypass.py",  # the whole product against the clock
    "tests/net/test_doctor.py",  # whose looks have time limits of their own
    "tests/net/test_capture_everything.py",  # ten thousand blocks
    "tests/net/test_capture_load.py",  # gigabytes of other traffic
    # One and the same program by the ten thousand, a matter of its logic and not of the kernel's:
    f"{_PROGRAM}an_announcement_is_captured_at_every_offset",
    f"{_PROGRAM}an_announcement_is_captured_wherever_it_is_split",
    f"{_PROGRAM}nothing_but_pass_comes_of_a_hundred_thousand_random_packets",
)
"""Where the processor is emulated, twenty to forty times slower than real, and nobody names tests: they would take an
hour. --kvm runs them."""
EPILOGUE = "What follows -- goes to pytest: files in the place of tests/net, -k, -x."


def say(text: str) -> None:
    """For whoever looks on."""
    print(f"vm: {text}", file=sys.stderr, flush=True)  # noqa: T201 - a command's progress


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command's; exits as argparse does. `pytest` is what stands behind `--`."""
    words = list(words)
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="./run vm", description=__doc__, epilog=EPILOGUE)
    parser.add_argument("kernels", nargs="+", metavar="KERNEL", help="6.1, 6.12, …, or a whole release")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which a machine is stopped (%(default)g)")
    parser.add_argument("--kvm", action="store_true", help="use the processor's virtualisation: much faster")
    parser.add_argument("--vng", type=Path, required=True, help=argparse.SUPPRESS)
    asked = parser.parse_args(words[:at])
    bad = [kernel for kernel in asked.kernels if not kernels.is_kernel(kernel)]
    if bad:
        parser.error(f"kernel {bad[0]!r}: expected a series like 6.12, or a release like 6.1.0-56")
    if asked.minutes <= 0:
        parser.error(f"--minutes {asked.minutes:g}: expected more than 0")
    asked.pytest = words[at + 1 :]
    return asked


def pytest_words(extra: Sequence[str], *, emulated: bool) -> list[str]:
    """What pytest is called with in the machine: the root tests, unless others are named."""
    chosen: list[str] = []
    if not any(word.startswith("tests") for word in extra):
        chosen = [*TESTS, *(f"--deselect={test}" for test in LEFT_OUT if emulated)]
    return ["-q", "-p", "no:cacheprovider", f"--timeout={TEST_S}", *chosen, *extra]


def watch(result: reports.Result) -> Callable[[dict[str, object]], None]:
    """Puts each line of the report into the result, and says what a looker-on wants to know."""
    done = 0

    def take(said: dict[str, object]) -> None:
        nonlocal done
        result.take(said)
        if "facts" in said:
            say(f"{result.release}: {json.dumps(said['facts'], ensure_ascii=False)}")
        if "test" not in said:
            return
        done += 1
        spent = f" in {said['seconds']} s" if "seconds" in said else ""
        reason = f": {said['reason']}" if "reason" in said else ""
        say(f"{result.release}: {done}/{result.collected or '?'} {said['outcome']}{spent} {said['test']}{reason}")
        if said.get("text"):
            print(said["text"], file=sys.stderr, flush=True)  # noqa: T201 - why a test failed

    return take


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds that file's lock; False if it isn't to be waited for and somebody else holds it."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def work_folder(cache: Path) -> Iterator[Path]:
    """A folder of this run's own, removed afterwards; those of runs that were killed are removed now."""
    for left in cache.glob("run-*"):
        with contextlib.suppress(FileNotFoundError), locked(left / "lock", wait=False) as abandoned:
            if abandoned:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="run-", dir=cache) as work, locked(Path(work) / "lock"):
        yield Path(work)


def try_kernel(asked: str, host: machine.Host, snapshot: Path, options: argparse.Namespace) -> reports.Result:
    """Fetch, boot, test."""
    result = reports.Result(asked)
    cache = host.work.parent
    try:
        with locked(cache / "fetch.lock"):  # another run may be fetching the same
            apt = fetch.Apt(cache / "apt")
            apt.update(time.time())
            result.release, folder = fetch.fetch(asked, apt, cache, say)
    except fetch.FetchError as error:
        result.error = str(error)
        return result
    say(f"{result.release}: booting")
    words = machine.command(
        host, snapshot, result.release, folder, pytest_words(options.pytest, emulated=not options.kvm)
    )
    began = time.monotonic()
    printed, log = host.work / "log", cache / f"{result.release}.log"
    try:
        timeout_s = options.minutes * 60
        result.error = machine.run(words, machine.environment(host), printed, timeout_s, watch(result))
    finally:
        printed.replace(log)
    result.seconds = round(time.monotonic() - began, 1)
    say(f"{result.release}: {'green' if result.green else 'not green'}; all that it printed is in {log}")
    return result


def main(words: Sequence[str]) -> int:
    """The command; returns its exit status."""
    options = arguments(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is open is closed
    cache = ROOT / ".cache" / "kernels"
    cache.mkdir(parents=True, exist_ok=True)
    with work_folder(cache) as work:
        host = machine.Host(ROOT, options.vng.absolute(), work, options.kvm)
        snapshot = host.snapshot()
        results = [try_kernel(kernel, host, snapshot, options) for kernel in options.kernels]
    for result in results:
        if result.error:
            say(f"{result.asked}: {result.error}")
    if options.json:
        print(json.dumps({"kernels": [result.as_json() for result in results]}))  # noqa: T201 - the command's output
    else:
        print(reports.table(results))  # noqa: T201 - likewise
    return 0 if all(result.green for result in results) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
