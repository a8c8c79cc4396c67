"""The line between the process that holds the kernel bypass and one that works with what it holds.

It is a socket pair (AF_UNIX, SOCK_SEQPACKET) that both were forked with, so it outlives either, and each may find a
successor of the other at its end. What goes over it:

- `<kind>?` asks for what is handed over of that kind, now and whenever that has changed;
- a message of JSON with descriptors (SCM_RIGHTS) hands it over: `kind`, and facts of that kind's own;
- with `"ended": true` there is nothing of that kind any more;
- `{"started": true}` says that the holder is a new one, which knows of no question: what the old one had handed over
  has ended with it.

Both ends never block. A full line loses the message: who isn't reading is dead, and its successor asks.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from typing import Any, NamedTuple

CAPTURE, EGRESS = "capture", "egress"
MAX_MESSAGE = 4096
MAX_ASKED = 64
MAX_DESCRIPTORS = 32


class HandedOver(NamedTuple):
    """The newest that came; the descriptors are the receiver's."""

    facts: dict[str, Any] | None
    """None: it has ended."""
    descriptors: list[int]


class AskingEnd:
    """For one kind. The socket stays the caller's."""

    def __init__(self, control: socket.socket, kind: str) -> None:
        control.setblocking(False)
        self._control = control
        self._kind = kind
        self.ask()

    def fileno(self) -> int:
        """Readable when take() has something."""
        return self._control.fileno()

    def take(self) -> HandedOver | None:
        """The newest of what came since the last time, or None; older ones and other kinds are closed unseen."""
        newest: HandedOver | None = None
        with suppress(OSError):  # nothing more, or nobody there
            while True:
                message, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE, MAX_DESCRIPTORS)
                if not message:
                    break
                facts = json.loads(message)
                if facts.get("started"):
                    self.ask()
                elif facts.pop("kind", None) != self._kind:
                    close_all(descriptors)
                    continue
                if newest is not None:
                    close_all(newest.descriptors)
                over = facts.get("started") or facts.get("ended")
                newest = HandedOver(None if over else facts, descriptors)
        return newest

    def ask(self) -> None:
        """Have it handed over, once more if it was before."""
        with suppress(OSError):
            self._control.send(f"{self._kind}?".encode())


class HoldingEnd:
    """For whatever is asked. The socket stays the caller's."""

    def __init__(self, control: socket.socket) -> None:
        control.setblocking(False)
        self._control = control
        self.kinds: set[str] = set()
        """What has been asked for so far."""
        with suppress(OSError):
            control.send(b'{"started": true}')

    def fileno(self) -> int:
        """Readable when there are questions."""
        return self._control.fileno()

    def asked(self) -> set[str]:
        """The kinds that are asked for now."""
        kinds = set()
        with suppress(OSError):
            while message := self._control.recv(MAX_ASKED):
                kinds.add(message.decode("ascii", "replace").removesuffix("?"))
        self.kinds |= kinds
        return kinds

    def hand_over(self, kind: str, found: tuple[dict[str, Any], list[int]] | None) -> None:
        """Facts fit for JSON, and descriptors, which stay the caller's; None: it has ended."""
        facts, descriptors = ({"ended": True}, []) if found is None else found
        with suppress(OSError):
            socket.send_fds(self._control, [json.dumps({"kind": kind, **facts}).encode()], descriptors)


def close_all(descriptors: list[int]) -> None:
    """Of what was handed over and isn't wanted."""
    for descriptor in descriptors:
        os.close(descriptor)
