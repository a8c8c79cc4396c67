"""The rehearsal runs the whole path as often as it is told, shows nothing outside, and harms nobody when it fails."""

from __future__ import annotations

import secrets
import socket
import time

import pytest

from sprint.addresses import Address
from sprint.app_relay import open_rehearsal
from sprint.bitcoin.networks import REGTEST
from sprint.engines import rehearsal as module
from sprint.engines.rehearsal import BLOCKS, Rehearsal
from sprint.errors import HostError
from sprint.sources.upstream import Upstream
from tests.descriptors import open_descriptors


def test_each_performance_publishes_one_block_into_a_ring_of_its_own_and_begins_anew_after_the_last() -> None:
    delivered: list[int] = []
    rehearsal = open_rehearsal(deliver=lambda: delivered.append(rehearsal.performed))
    try:
        for number in range(1, 3 * BLOCKS + 2):
            rehearsal.perform()
            assert rehearsal.performed == len(delivered) == number
    finally:
        rehearsal.close()


def test_it_leaves_no_descriptor_behind() -> None:
    before = len(open_descriptors())
    rehearsal = open_rehearsal()
    rehearsal.perform()
    rehearsal.close()
    assert len(open_descriptors()) == before


@pytest.mark.parametrize("end", ["theirs", "ours"])
def test_once_its_connection_has_gone_it_does_nothing_and_says_nothing(end: str) -> None:
    rehearsal = open_rehearsal()
    rehearsal.perform()
    if end == "theirs":
        rehearsal._theirs.close()
    else:
        assert rehearsal._upstream.socket is not None
        rehearsal._upstream.socket.close()
        rehearsal._upstream.socket = None
    for _ in range(3):
        rehearsal.perform()
    assert rehearsal.performed == 1
    rehearsal.close()


def test_an_end_that_reads_nothing_stops_it_before_anything_blocks() -> None:
    rehearsal = open_rehearsal()
    heard = rehearsal._hear
    rehearsal._hear = list  # type: ignore[method-assign]  # nothing comes any more
    for _ in range(200_000):
        rehearsal.perform()
        if rehearsal._over:
            break
    else:
        pytest.fail("nothing bounds what is sent")
    rehearsal._hear = heard  # type: ignore[method-assign]
    rehearsal.perform()
    assert rehearsal.performed == 0
    rehearsal.close()


def test_an_hour_on_the_wall_clock_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal = open_rehearsal()
    now_ns = time.time_ns()
    for hours in (1, -1, 0):
        monkeypatch.setattr(time, "time_ns", lambda hours=hours: now_ns + hours * 3_600_000_000_000)
        before = rehearsal.performed
        for _ in range(BLOCKS + 1):
            rehearsal.perform()
        assert rehearsal.performed == before + BLOCKS + 1
    rehearsal.close()


def test_a_handshake_without_an_answer_is_the_machines_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        upstream = Upstream(Address(*address), REGTEST, secrets.randbits(64), lambda: 0)
        upstream.candidates = [(socket.AF_INET, address)]
        upstream.connect(time.monotonic_ns(), high_bandwidth=True)
        theirs, _ = listener.accept()
    silent, other = socket.socketpair()
    with theirs, silent, other:
        with pytest.raises(HostError, match="handshake"):
            Rehearsal(upstream, silent)
        upstream.close()
