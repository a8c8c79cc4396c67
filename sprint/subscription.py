"""What subscribers over TCP and in shared memory have in common: the server's one line of answer, and its errors."""

from __future__ import annotations

import json
from typing import Any, Final

from sprint.errors import RemoteProtocolError, SprintError

MAX_ANSWER: Final = 4096
"""Bytes of the server's answer to the hello; today's have fewer than 200."""
ANSWER_TIMEOUT_NS: Final = 5_000_000_000


class SubscriptionRefusedError(SprintError):
    """The server answered the hello with an error; asking again with the same hello won't help."""


class ServerFullError(SprintError):
    """The server refuses for now: the same hello may be accepted later."""


class ConnectionLostError(SprintError):
    """The connection ended, or nothing came for too long, and reconnecting was not wanted."""


def read_answer(line: bytes) -> dict[str, Any]:
    """The answer to the hello, with or without its newline.

    Raises SubscriptionRefusedError or ServerFullError when it is a refusal, RemoteProtocolError when it is no JSON
    object.
    """
    try:
        answer = json.loads(line.decode())
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise RemoteProtocolError(f"answer to the hello is no JSON object: {line[:200]!r}")
    if "error" in answer:
        words = f"the server refused: {str(answer['error'])[:200]!r}"
        raise ServerFullError(words) if answer.get("retry") is True else SubscriptionRefusedError(words)
    return answer
