"""What a running Sprint says of itself, asked by a command beside it: one GET of its API, bounded and by no proxy."""

from __future__ import annotations

import http.client
import json
from typing import TYPE_CHECKING, Any, Final

from sprint.errors import SprintError

if TYPE_CHECKING:
    from sprint.addresses import Address

TIMEOUT_S: Final = 5.0
MAX_ANSWER: Final = 1 << 20
"""Bytes; the longest answer, /api/sources with all its rows, has some 30,000."""


class NoAnswerError(SprintError):
    """Nobody answers there, or not as Sprint does; the message names the address and says which."""


def fetch(api: Address, name: str, timeout_s: float = TIMEOUT_S) -> tuple[int, bytes]:
    """Status and body of GET /api/NAME, whoever answers. Raises NoAnswerError."""
    connection = http.client.HTTPConnection(api.host, api.port, timeout=timeout_s)
    try:
        connection.request("GET", f"/api/{name}")
        with connection.getresponse() as answer:
            body = answer.read(MAX_ANSWER + 1)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NoAnswerError(f"http://{api}/api/{name}: {reason}") from None
    except http.client.HTTPException:
        raise NoAnswerError(f"http://{api}/api/{name}: whoever answers doesn't speak HTTP") from None
    finally:
        connection.close()
    if len(body) > MAX_ANSWER:
        raise NoAnswerError(f"http://{api}/api/{name}: an answer longer than {MAX_ANSWER} bytes")
    return answer.status, body


def ask(api: Address, name: str, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """The object that /api/NAME answers with, a 503's included. Raises NoAnswerError."""
    status, body = fetch(api, name, timeout_s)
    if status not in (http.client.OK, http.client.SERVICE_UNAVAILABLE):
        raise NoAnswerError(f"http://{api}/api/{name}: answers {status}")
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise NoAnswerError(f"http://{api}/api/{name}: the answer is no JSON object: this isn't Sprint's API")
    return told
