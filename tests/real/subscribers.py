"""Subscribers that look at Sprint from outside: a plain socket, the client library, a command.

Each gathers what it is told in a thread of its own, as the JSON format shows it; every wait is bounded and says what
was awaited.
"""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from sprint.client import events
from sprint.record import Record
from tests.real.product import STOP_TIMEOUT_S, WAIT_TIMEOUT_S, ProductError, dying_with_us, environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from typing_extensions import Self

    from tests.real.product import Event

JSON_HELLO = b'{"format":"json"}\n'


class EventLog:
    """What one subscriber was told, gathered in a thread; `events` grows, heartbeats are only counted."""

    def __init__(self, told: Iterable[Event]) -> None:
        self.events: list[Event] = []
        self.heartbeats: list[Event] = []
        self.ended: str | None = None
        """Why there will be no more."""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._gather, args=(told,), daemon=True)
        self._thread.start()

    def wait_until(
        self, condition: Callable[[list[Event]], bool], what: str, timeout_s: float = WAIT_TIMEOUT_S
    ) -> None:
        """Wait until the events so far fulfil the condition."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not condition(self.events):
                left_s = deadline - time.monotonic()
                if self.ended is not None or left_s <= 0:
                    told = [(one["event"], one.get("height")) for one in self.events[-20:]]
                    raise ProductError(f"not within {timeout_s:g} s (ended: {self.ended}): {what}; told were {told}")
                self._changed.wait(min(left_s, 0.5))

    def wait_for_hashes(self, name: str, hashes: Iterable[str], timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Wait until each of these hashes had its event of that name."""
        wanted = set(hashes)
        self.wait_until(lambda _: wanted <= set(self.hashes(name)), f"{name} of {len(wanted)} blocks", timeout_s)

    def wait_until_ended(self, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Wait until the stream has ended."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise ProductError(f"the stream has not ended within {timeout_s:g} s")

    def wait_for_heartbeat(self) -> Event:
        """The next heartbeat: everything that was published before it has been told by now."""
        count = len(self.heartbeats)
        self.wait_until(lambda _: len(self.heartbeats) > count, "a heartbeat")
        return self.heartbeats[-1]

    def hashes(self, name: str) -> list[str]:
        """The hashes of the events of that name, in order."""
        return [one["hash"] for one in list(self.events) if one["event"] == name]

    def of(self, name: str) -> list[Event]:
        """The events of that name, in order."""
        return [one for one in list(self.events) if one["event"] == name]

    def _gather(self, told: Iterable[Event]) -> None:
        why = "end of the stream"
        try:
            for one in told:
                with self._changed:
                    (self.heartbeats if one["event"] == "heartbeat" else self.events).append(one)
                    self._changed.notify_all()
        except Exception as error:
            why = repr(error)
        with self._changed:
            self.ended = why
            self._changed.notify_all()


class JsonStream(EventLog):
    """A subscriber as `nc` would be one: a plain socket and lines of JSON. `answer` is what the hello was answered."""

    def __init__(self, address: str, hello: bytes = JSON_HELLO, *, half_close: bool = False) -> None:
        self.sock = connect(address)
        self.sock.sendall(hello)
        if half_close:
            self.sock.shutdown(socket.SHUT_WR)
        self.sock.settimeout(None)
        self._file = self.sock.makefile("rb")
        self.answer: Event = json.loads(self._file.readline() or b"{}")
        super().__init__(json.loads(line) for line in self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # the server was faster
            self.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(STOP_TIMEOUT_S)
        self._file.close()
        self.sock.close()


class ClientStream(EventLog):
    """A subscriber by `sprint.client`: binary, each header's work checked. Ends with the connection."""

    def __init__(self, address: str) -> None:
        self._subscribed = threading.Event()
        super().__init__(self._told(address))
        if not self._subscribed.wait(WAIT_TIMEOUT_S):
            raise ProductError(f"sprint.client was not accepted: {self.ended}")

    def _told(self, address: str) -> Iterator[Event]:
        for item in events(address, reconnect=False):
            self._subscribed.set()
            if isinstance(item, Record):
                yield item.as_dict()


class CommandStream(EventLog):
    """A subscriber that is a command which prints a line of JSON an event, such as `sprint watch --json`."""

    def __init__(self, *command: str, stdin: bytes | None = None) -> None:
        self._process = subprocess.Popen(
            [*dying_with_us(), *command],
            env=environment({}),
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        if stdin is not None:
            assert self._process.stdin is not None
            self._process.stdin.write(stdin)
            self._process.stdin.close()
        lines = (json.loads(line) for line in self._process.stdout)
        super().__init__(line for line in lines if "event" in line)  # the first of a raw stream answers the hello

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join(STOP_TIMEOUT_S)
        assert self._process.stdout is not None
        self._process.stdout.close()


def connect(address: str) -> socket.socket:
    """A blocking connection to host:port, ten seconds its longest wait."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)
