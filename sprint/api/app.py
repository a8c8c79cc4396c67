"""The HTTP API as a Flask application: routes, parameters, errors.

It reads the status block and the clock and nothing else, so that it runs beside the relay in one process as well as in
a process of its own over shared memory. Every answer is JSON, errors included, and none may be cached.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from flask import Flask, request
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import BadRequest, HTTPException

from sprint.api import views
from sprint.api.turbo_status import turbo_status
from sprint.status import BLOCKS

if TYPE_CHECKING:
    from flask.typing import ResponseReturnValue
    from werkzeug.wrappers import Response

    from sprint.status import StatusBlock

DEFAULT_BLOCKS = 20
ECHO_LIMIT = 80
"""Of what a client sent, an error repeats no more than this many characters."""


class _GuideJSON(DefaultJSONProvider):
    """JSON as the guide prints it: keys in their order, µ as µ, two spaces of indent."""

    sort_keys = False
    ensure_ascii = False
    compact = False


class _Api(Flask):
    json_provider_class = _GuideJSON


def create_app(status: StatusBlock) -> Flask:
    """The API over this status block.

    Errors are `{"error": "one line"}`: 400 for a bad query value, 404, 405, 500. `/api/health` answers 503 with the
    same keys as its 200 when something is wrong.
    """
    app = _Api("sprint.api", static_folder=None)
    # `//api` is an unknown path, not a redirect with a page of HTML.
    app.url_map.merge_slashes = False

    def tier_status() -> ResponseReturnValue:
        facts, bypass = status.facts, status.bypass
        return turbo_status(facts if bypass is None else {**facts, "kernelBypass": bypass})

    def health() -> ResponseReturnValue:
        answer = views.health(status, time.monotonic_ns(), time.time_ns())
        return answer, 200 if answer["status"] == "ok" else 503

    def blocks() -> ResponseReturnValue:
        answer = views.blocks(status, _whole_number("limit", 1, BLOCKS, DEFAULT_BLOCKS))
        # Not indented: only Python's slow encoder can, and in one process the relay waits for the GIL meanwhile.
        return app.response_class(app.json.dumps(answer, separators=(",", ":")) + "\n", mimetype="application/json")

    def sources() -> ResponseReturnValue:
        return views.sources(status)

    def deliveries() -> ResponseReturnValue:
        return views.deliveries(status)

    def index() -> ResponseReturnValue:
        return {
            "service": "Bitcoin Sprint",
            "version": status.facts["version"],
            "endpoints": {path: subject for path, (_, subject) in endpoints.items()},
        }

    endpoints = {
        "/": (index, "This list."),
        "/api/turbo-status": (tier_status, "The tier in force, its targets, and the kernel bypass."),
        "/api/health": (health, "200 when blocks can be relayed, else 503 with what is wrong."),
        "/api/blocks": (blocks, f"The newest blocks and who saw them when; ?limit=1..{BLOCKS}."),
        "/api/sources": (sources, "The upstreams: who is first, by how much, and what fails."),
        "/api/deliveries": (deliveries, "What was delivered on time, late or not at all, by tier."),
    }
    for path, (view, _) in endpoints.items():
        app.add_url_rule(path, view_func=view)
    app.register_error_handler(HTTPException, _error)
    app.after_request(_headers)
    return app


def _whole_number(name: str, low: int, high: int, default: int) -> int:
    """A query parameter's value. Raises BadRequest with one line naming parameter, value and what is allowed."""
    text = request.args.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise BadRequest(f"{name}={_echo(text)}: expected a whole number from {low} to {high}")
    return int(text)


def _error(error: HTTPException) -> ResponseReturnValue:
    lines = {
        404: f"{_echo(request.path)}: no such resource; / lists what there is",
        405: f"{_echo(request.method)} {_echo(request.path)}: expected one of {_allowed(error)}",
        500: "internal error: the log has its cause",
    }
    code = error.code or 500
    body: dict[str, Any] = {"error": lines.get(code) or " ".join((error.description or error.name).split())}
    # The exception's own headers hold Allow; its Content-Type describes the HTML that isn't sent.
    kept = [(name, value) for name, value in error.get_headers() if name != "Content-Type"]
    return body, code, kept


def _allowed(error: HTTPException) -> str:
    methods = getattr(error, "valid_methods", None) or ()
    return ", ".join(sorted(methods))


def _echo(text: str) -> str:
    printable = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[:ECHO_LIMIT])
    return printable + ("…" if len(text) > ECHO_LIMIT else "")


def _headers(response: Response) -> Response:
    response.headers["Cache-Control"] = "no-store"
    # An error repeats what the client sent: a browser must not take it for a page.
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response
