"""Sprint as its operator runs it: the real command in a process of its own.

Owns that process and what it logs. Rules: all that is known of the product comes by its environment, its log, HTTP
and the stream; every wait is bounded and says what was awaited; no Sprint outlives its test: the kernel ends it with
the test process, however that ends.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sprint.keys import FILE_NAME as KEY_FILE
from sprint.keys import MAX_CONNECTIONS, KeyStore
from sprint.settings import variables
from sprint.shared_reader import SharedReader
from sprint.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Self

Event = dict[str, Any]
"""A record or a loss as the JSON format shows it."""

START_TIMEOUT_S = 30.0  # one second here; a loaded two-core machine may take many times that
STOP_TIMEOUT_S = 20.0
WAIT_TIMEOUT_S = 30.0
COMPILED_WITHIN_S = 70.0  # the product gives a compiler of BPF programs up after a minute; it takes 3 s of a free CPU
POLL_INTERVAL_S = 0.02
QUIET_S = 2.0  # nothing has been left to say for so long
MAX_LOG_LINES = 20_000
COMMAND = (sys.executable, "-m", "sprint")


class ProductError(Exception):
    """Sprint did not do what was awaited in time. The text holds the end of its log."""


class Product:
    """`sprint run` on free loopback ports, as a context manager that starts and ends it.

    `nodes` are the upstreams' addresses, `settings` further environment variables. `folder` is its own: DATA_DIR is
    `folder`/data, so that a second Product in the same folder is the same Sprint, restarted.
    """

    def __init__(self, folder: Path, *nodes: str, tier: str = "turbo", **settings: str) -> None:
        self.data_dir = folder / "data"
        self.header_file = self.data_dir / "headers-regtest.dat"
        self.log: deque[str] = deque(maxlen=MAX_LOG_LINES)
        """The lines of its log, of all its lives."""
        self.api = ""
        self.stream = ""
        self._settings = {
            "TIER": tier,
            "NETWORK": "regtest",
            "BITCOIN_NODE": ",".join(nodes),
            "DATA_DIR": str(self.data_dir),
            "API_BIND": "127.0.0.1:0",
            "STREAM_BIND": "127.0.0.1:0",
            "UDP_BIND": "127.0.0.1:0",
            "ZMQ_BIND": "127.0.0.1:0",
            "LOG_FORMAT": "json",
            **settings,
        }
        self._folder = folder
        self._key: str | None = None
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def key(self) -> str:
        """A key to the instance's own tier, as an operator would have made it."""
        if self._key is None:
            with KeyStore(self.data_dir / KEY_FILE) as store:
                tier = Tier.from_label(self._settings["TIER"])
                self._key = store.create("tests", tier, int(time.time()), connections=MAX_CONNECTIONS)
        return self._key

    @property
    def hello(self) -> bytes:
        """A hello with that key, for a stream of JSON lines."""
        return b'{"format":"json","key":"%s"}\n' % self.key.encode()

    def reader(self) -> SharedReader:
        """A reader of its shared memory, by that key."""
        return SharedReader(self.data_dir / "sprint.sock", key=self.key)

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ProductError("Sprint is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and wait until it listens; with text logs, until it says anything at all."""
        if self._process is not None:
            raise ProductError("Sprint is running already")
        self._folder.mkdir(parents=True, exist_ok=True)
        self.api = self.stream = ""
        self._process = subprocess.Popen(
            [*dying_with_us(), *COMMAND, "run"],
            cwd=self._folder,
            env=environment(self._settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, args=(self._process,), daemon=True)
        self._reader.start()
        if self._settings["LOG_FORMAT"] == "json":
            self._await(lambda: bool(self.stream), "that it listens", START_TIMEOUT_S)

    def wait_until_healthy(self) -> Event:
        """Wait until blocks can be relayed; returns the answer of /api/health."""
        answer: Event = self.wait_for("health", lambda one: one["status"] == "ok", "health")
        return answer

    def ask_raw(self, path: str) -> tuple[int, str]:
        """Status and body of one answer of the API."""
        try:
            with urllib.request.urlopen(f"http://{self.api}/api/{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def ask(self, path: str) -> Any:
        """One answer of the API, a 503's included."""
        return json.loads(self.ask_raw(path)[1])

    def deliveries(self) -> Event:
        """/api/deliveries, the sums over all workers: the stream's own counters, and `tiers` by name."""
        total: Event = {"tiers": {}}
        for row in self.ask("deliveries")["deliveries"]:
            _add(total, {name: row[name] for name in ("accepted", "refused", "disconnected")})
            for tier, accounts in row["tiers"].items():
                _add(total["tiers"].setdefault(tier, {}), accounts)
        return total

    def sources(self) -> dict[str, Event]:
        """/api/sources by name."""
        return {source["name"]: source for source in self.ask("sources")["sources"]}

    def wait_for(
        self, path: str, condition: Callable[[Any], bool], what: str, timeout_s: float = WAIT_TIMEOUT_S
    ) -> Any:
        """Ask the API until its answer fulfils the condition; returns that answer."""
        deadline = time.monotonic() + timeout_s
        answer: Any = None
        while self.running and time.monotonic() < deadline:
            answer = self.ask(path)
            if condition(answer):
                return answer
            time.sleep(POLL_INTERVAL_S)
        raise ProductError(f"not within {timeout_s:g} s: {what}; {path} says {answer}\n{self.log_tail()}")

    def wait_for_tip(self, height: int) -> None:
        """Wait until the API shows this height: the books are written after the deliveries."""
        self.wait_for("health", lambda answer: answer["tip_height"] == height, f"tip height {height}")

    def wait_for_last_sequence(self, least: int) -> int:
        """The last record's sequence: at least so many, and no further one for a while.

        How many there are isn't known: the memory engine tells of whole blocks, too, as far as it could fetch them.
        """
        self.wait_for("health", lambda answer: answer["sequence"] >= least, f"{least} records")
        last, since = 0, time.monotonic()
        while time.monotonic() < since + QUIET_S:
            now = int(self.ask("health")["sequence"])
            if now != last:
                last, since = now, time.monotonic()
            time.sleep(POLL_INTERVAL_S)
        return last

    def wait_for_subscribers(self, count: int) -> None:
        """Wait until so many subscribers are counted."""
        self.wait_for("health", lambda answer: sum(answer["subscribers"].values()) == count, f"{count} subscribers")

    def wait_for_log(self, words: str, *, occurrences: int = 1, timeout_s: float = WAIT_TIMEOUT_S) -> str:
        """Wait for a line of the log with these words; returns the last one."""

        def found() -> list[str]:
            return [line for line in list(self.log) if words in line]

        self._await(lambda: len(found()) >= occurrences, f"{words!r} in the log", timeout_s)
        return found()[-1]

    def log_tail(self) -> str:
        """The last lines of what it logged."""
        return "\n".join(list(self.log)[-40:])

    def resident_kb(self) -> tuple[int, int]:
        """Resident memory now, and its highest since the start, in kB: of the process and all that it has started."""
        now_kb = highest_kb = 0
        for pid in processes_of(self.pid):
            with suppress(OSError, KeyError):  # it has ended
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                fields = dict(line.split(":", 1) for line in lines)
                now_kb += int(fields["VmRSS"].split()[0])
                highest_kb += int(fields["VmHWM"].split()[0])
        return now_kb, highest_kb

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Its exit code, once it has ended by itself."""
        process = self._process
        if process is None:
            raise ProductError("Sprint is not running")
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ProductError(f"Sprint has not ended within {timeout_s:g} s\n{self.log_tail()}") from None
        self._reap()
        return code

    def stop(self) -> int:
        """End it as its operator would; returns the exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL to it and all that it has started: nothing is flushed, nothing is said."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._reap()

    def _await(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not condition():
                if not self.running or time.monotonic() > deadline:
                    state = "not within the time" if self.running else "Sprint has ended"
                    raise ProductError(f"{state}: {what}\n{self.log_tail()}")
                self._changed.wait(0.1)

    def _read_log(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            with self._changed:
                self.log.append(line.rstrip("\n"))
                if '"Listening"' in line:
                    entry = json.loads(line)
                    self.api, self.stream = entry["api"], entry["stream"]
                self._changed.notify_all()

    def _reap(self) -> None:
        process, self._process = self._process, None
        if self._reader is not None:
            self._reader.join(STOP_TIMEOUT_S)
        if process is not None and process.stderr is not None:
            process.stderr.close()


def processes_of(leader: int) -> list[int]:
    """The process that Product started as `leader`, and all that it has started: those of its session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if os.getsid(int(folder.name)) == leader:
                found.append(int(folder.name))
    return found


def _add(total: Event, counters: Event) -> None:
    for name, value in counters.items():
        if isinstance(value, int):
            total[name] = total.get(name, 0) + value


def environment(settings: dict[str, str]) -> dict[str, str]:
    """Our own environment, but of Sprint's variables only these."""
    ours = {variable.name for variable in variables()}
    return {name: value for name, value in os.environ.items() if name not in ours} | settings


def dying_with_us() -> list[str]:
    """What to put before a command so that the kernel ends it with us."""
    setpriv = shutil.which("setpriv")
    return [] if setpriv is None else [setpriv, "--pdeathsig", "KILL"]


def run_sprint(*arguments: str, timeout_s: float = 60.0, **settings: str) -> subprocess.CompletedProcess[str]:
    """One run of the command to its end, with what it printed."""
    return subprocess.run(
        [*dying_with_us(), *COMMAND, *arguments],
        env=environment(settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
