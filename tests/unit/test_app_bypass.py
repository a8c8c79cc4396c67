"""Which interface the kernel bypass takes when nobody names one, and how often it tries in vain."""

from __future__ import annotations

import socket
import time

import pytest

from sprint import app_bypass
from sprint.app_bypass import SOMEWHERE_ELSE, BypassProcess, default_interface
from sprint.config import load as load_config
from sprint.status import StatusBlock
from sprint.tiers import NS_PER_S
from xdp.loader import LoadError


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Where each address leads, instead of this host's own routes."""
    known: dict[str, str] = {}

    def interface_towards(address: str) -> str:
        if address not in known:
            raise OSError(f"no route to {address}")
        return known[address]

    monkeypatch.setattr(app_bypass, "interface_towards", interface_towards)
    return known


def test_it_is_the_one_that_leads_to_the_node(routes: dict[str, str]) -> None:
    routes["198.51.100.7"] = "enp3s0"
    assert default_interface("198.51.100.7") == "enp3s0"


def test_for_a_node_on_this_host_it_is_the_one_that_leads_to_the_node_s_peers(routes: dict[str, str]) -> None:
    routes.update({"127.0.0.1": "lo", SOMEWHERE_ELSE: "enp4s0"})
    assert default_interface("127.0.0.1") == "enp4s0"


def test_a_node_behind_ipv6_leads_somewhere_too(routes: dict[str, str]) -> None:
    routes["2001:db8::1"] = "enp5s0"
    assert default_interface("2001:db8::1") == "enp5s0"


def test_a_host_that_nothing_leads_to_is_an_error_to_report(routes: dict[str, str]) -> None:
    with pytest.raises(OSError, match="no route"):
        default_interface("198.51.100.8")


def test_a_name_without_an_address_is_an_error_to_report() -> None:
    with pytest.raises(socket.gaierror):
        default_interface("no-such-host.invalid")


class _Log:
    def __init__(self) -> None:
        self.reasons: list[str] = []

    def warning(self, _event: str, *, reason: str) -> None:
        self.reasons.append(reason)


def test_what_fails_is_tried_again_at_growing_pauses_and_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_keywords: object) -> None:
        raise LoadError("bcc is not importable")

    monkeypatch.setattr(app_bypass, "load", refuse)
    config = load_config({"TIER": "enterprise", "ENABLE_KERNEL_BYPASS": "true", "INTERFACE": "nosuch0"})
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    log = _Log()
    pauses = []
    with ours, theirs:
        process = BypassProcess(config, StatusBlock.create(1, {}), ours, log)
        for _ in range(9):
            before_ns = time.monotonic_ns()
            process._try_to_attach()
            pauses.append(round((process._retry_ns - before_ns) / NS_PER_S))
        assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
        assert log.reasons == ["bcc is not importable"]
        process._look_again()
        assert process._retry_ns == 0
