"""Waiting with a limit, in asyncio: as asyncio.wait_for(), whose Python 3.10 and 3.11 forget that they were cancelled.

There, a cancellation in the very turn of the loop in which something has come is lost, and a subscriber whom nobody
wants any more goes on for ever. Here it wins; what has come by then is let go of.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from sprint.subscription import ANSWER_TIMEOUT_NS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sprint.addresses import Address

_READ: Final = 1 << 16
T = TypeVar("T")


async def within(timeout_s: float, what: Awaitable[T], let_go: Callable[[T], object] | None = None) -> T:
    """Its result. Raises asyncio.TimeoutError when there is none in time, and whatever it raises itself.

    `let_go` gets a result that comes after that, or after a cancellation, so that it can be closed.
    """
    task = asyncio.ensure_future(what)
    try:
        await asyncio.wait({task}, timeout=timeout_s)
        if not task.done():
            raise asyncio.TimeoutError
    except BaseException:
        task.cancel()
        task.add_done_callback(partial(_let_go, let_go))
        raise
    return task.result()


async def open_connection(where: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As asyncio's, for as long as a server may take to answer. Raises OSError, asyncio.TimeoutError."""
    opening = asyncio.open_connection(where.host, where.port, limit=_READ)
    return await within(ANSWER_TIMEOUT_NS / 1e9, opening, lambda streams: streams[1].close())


def _let_go(let_go: Callable[[T], object] | None, task: asyncio.Future[T]) -> None:
    if task.cancelled() or task.exception() is not None:  # asked for, or asyncio would complain that nobody had
        return
    if let_go is not None:
        let_go(task.result())
