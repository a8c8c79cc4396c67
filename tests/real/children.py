"""The memory-optimised engine's processes as a test sees them: by name, by /proc, and by what their death costs."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sprint.record import decode
from tests.real.product import ProductError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sprint.record import Record
    from sprint.shared_reader import SharedReader
    from tests.real.product import Event, Product
    from tests.real.subscribers import JsonStream

BACK_WITHIN_S = 2.0
QUIET = {"OPTIMIZE_SYSTEM": "false"}
"""Nothing spins: two cores are shared by all tests."""


def processes(product: Product) -> dict[str, int]:
    """Name → pid of the children that are alive, as /api/health has them."""
    rows = product.ask("health")["processes"]
    return {row["name"]: row["pid"] for row in rows if row["pid"]}


def all_processes(product: Product) -> dict[str, int]:
    """The same, once all are alive."""
    answer = product.wait_for("health", lambda one: all(row["pid"] for row in one["processes"]), "all processes")
    return {row["name"]: row["pid"] for row in answer["processes"]}


def kill_and_await(product: Product, name: str) -> int:
    """SIGKILL to the child of that name; returns its successor's pid, which must be there within two seconds."""
    old = processes(product)[name]
    os.kill(old, signal.SIGKILL)
    deadline = time.monotonic() + BACK_WITHIN_S
    while time.monotonic() < deadline:
        with suppress(OSError):  # it may be the API that was killed
            new = processes(product).get(name, old)
            if new != old:
                return new
        time.sleep(0.01)
    raise ProductError(f"{name} was not back within {BACK_WITHIN_S} s\n{product.log_tail()}")


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.005)


def status_field(pid: int, name: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        field, _, value = line.partition(":")
        if field == name:
            return value.strip()
    raise KeyError(name)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for_more(log: JsonStream, count: int) -> None:
    """Until so many more events have come."""
    enough = len(log.events) + count
    log.wait_until(lambda told: len(told) >= enough, f"{count} more events")


def logged(product: Product, words: str) -> list[Event]:
    return [json.loads(line) for line in list(product.log) if words in line]


def assert_whole(log: JsonStream, mined: list[str], first_height: int) -> None:
    """This subscriber missed nothing, and was told nothing twice."""
    assert [one["seq"] for one in log.events] == list(range(log.events[0]["seq"], log.events[-1]["seq"] + 1))
    assert log.hashes("proven") == mined
    assert [one["height"] for one in log.of("proven")] == list(range(first_height, first_height + len(mined)))
    assert log.of("lost") == []
    assert len({one["session"] for one in log.events}) == 1


def records(reader: SharedReader, count: int) -> Iterator[Record]:
    for _ in range(count):
        found = reader.next(10)
        assert isinstance(found, memoryview), found
        record = reader.copy()
        assert record is not None
        yield decode(record)
