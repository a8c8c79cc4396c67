"""The API's routes, parameters and errors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.api.conftest import fill

if TYPE_CHECKING:
    from flask.testing import FlaskClient

    from sprint.status import StatusBlock

PATHS = ("/", "/api/turbo-status", "/api/health", "/api/blocks", "/api/sources", "/api/deliveries")


@pytest.mark.parametrize("path", PATHS)
def test_every_resource_is_json_and_never_cached(client: FlaskClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.mimetype == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    assert isinstance(response.get_json(), dict)


@pytest.mark.parametrize("path", PATHS)
def test_head_answers_as_get_without_a_body(client: FlaskClient, path: str) -> None:
    response = client.head(path)
    assert response.status_code == 200
    assert response.data == b""
    assert response.mimetype == "application/json"


def test_the_index_lists_what_there_is(client: FlaskClient) -> None:
    answer = client.get("/").get_json()
    assert tuple(answer["endpoints"]) == PATHS
    assert answer["version"] == "0.1.0"


@pytest.mark.parametrize("path", ["/api/none", "/api//health", "/api/blocks/", "/static/x", "/%0a%00"])
def test_an_unknown_path_is_404_in_json(client: FlaskClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404
    assert response.mimetype == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    assert_one_line(response.get_json())


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_a_wrong_method_is_405_in_json_and_names_the_right_ones(client: FlaskClient, method: str) -> None:
    response = client.open("/api/health", method=method)
    assert response.status_code == 405
    assert response.get_json() == {"error": f"{method} /api/health: expected one of GET, HEAD, OPTIONS"}
    assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
    assert response.mimetype == "application/json"


def test_a_failure_of_ours_is_500_in_json_and_keeps_its_cause_to_the_log(
    client: FlaskClient, status: StatusBlock, caplog: pytest.LogCaptureFixture
) -> None:
    status.facts = {}
    response = client.get("/api/turbo-status")
    assert response.status_code == 500
    assert response.get_json() == {"error": "internal error: the log has its cause"}
    assert "KeyError" in caplog.text


@pytest.mark.parametrize("value", ["0", "65", "-1", "1e1", "", "x", "٣", "+5", "1_0", " 5", "999999999999"])
def test_a_bad_limit_is_400_naming_parameter_value_and_what_is_allowed(client: FlaskClient, value: str) -> None:
    response = client.get("/api/blocks", query_string={"limit": value})
    assert response.status_code == 400
    assert response.get_json() == {"error": f"limit={value}: expected a whole number from 1 to 64"}


def test_a_hostile_value_is_echoed_in_one_bounded_line(client: FlaskClient) -> None:
    response = client.get("/api/blocks", query_string={"limit": "\n\r\x1b[2J" + "9" * 5_000})
    assert response.status_code == 400
    assert len(response.data) < 400
    assert_one_line(response.get_json())


@pytest.mark.parametrize(("query", "count"), [("", 20), ("?limit=1", 1), ("?limit=64", 30), ("?limit=007", 7)])
def test_limit_bounds_the_blocks(client: FlaskClient, status: StatusBlock, query: str, count: int) -> None:
    for sequence in range(1, 31):
        fill(status.next_block_row(), sequence)
    told = client.get(f"/api/blocks{query}").get_json()["blocks"]
    assert [block["seq"] for block in told] == list(range(30, 30 - count, -1))


def test_health_is_503_with_the_same_keys_when_something_is_wrong(client: FlaskClient, status: StatusBlock) -> None:
    healthy = client.get("/api/health")
    status.relay.caught_up = 0
    response = client.get("/api/health")
    assert response.status_code == 503
    assert list(json.loads(response.data)) == list(json.loads(healthy.data))
    assert response.get_json()["status"] == "unhealthy"
    assert client.head("/api/health").status_code == 503


def assert_one_line(answer: dict[str, Any]) -> None:
    """An error's body: one printable line and nothing else."""
    assert set(answer) == {"error"}
    assert answer["error"].isprintable()
