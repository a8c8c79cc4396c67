"""When a subscriber connects again: after what, and how soon."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Final

from sprint.client_protocol import UnprovenRecordError
from sprint.errors import RemoteProtocolError, SprintError
from sprint.subscription import ConnectionLostError, ServerFullError

if TYPE_CHECKING:
    from collections.abc import Callable

FIRST_RETRY_S: Final = 0.25
LAST_RETRY_S: Final = 5.0

TROUBLE: Final = (OSError, asyncio.TimeoutError, RemoteProtocolError, ServerFullError, ConnectionLostError)
"""What ends a connection; asyncio's TimeoutError is no OSError before Python 3.11."""


class Pauses:
    """How long to wait before the next connection: growing and jittered, from the start again once items came."""

    def __init__(self, reconnect: bool, on_trouble: Callable[[Exception], None] | None = None) -> None:
        """`on_trouble` is told of each error after which it is tried again."""
        self._reconnect = reconnect
        self._on_trouble = on_trouble
        self._pause_s = FIRST_RETRY_S

    def reset(self) -> None:
        """Something came."""
        self._pause_s = FIRST_RETRY_S

    def after(self, error: Exception) -> float:
        """Seconds to wait after that error; raises it, or what it means to the caller, when there is to be no more."""
        if isinstance(error, UnprovenRecordError):
            raise error
        if not self._reconnect:
            if isinstance(error, SprintError):
                raise error
            raise ConnectionLostError(str(error) or "nothing came for too long") from error
        if self._on_trouble is not None:
            self._on_trouble(error)
        pause_s = self._pause_s * random.uniform(0.5, 1.0)
        self._pause_s = min(2 * self._pause_s, LAST_RETRY_S)
        return pause_s
