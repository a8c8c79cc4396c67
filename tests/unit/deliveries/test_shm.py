"""Shared memory for local readers: what is handed over, who is refused, who is woken when, and the accounts of it."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import select
import socket
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from sprint.deliveries import shm
from sprint.deliveries.hello import MAX_HELLO
from sprint.errors import HostError
from sprint.events import State
from sprint.record import STATE_OFFSET
from sprint.ring import Ring
from sprint.shared_memory import SEALS, map_read_only
from sprint.tiers import PROFILES, Tier
from tests.descriptors import open_descriptors
from tests.unit.shm_host import (
    PATIENCE_S,
    SESSION,
    Client,
    Host,
    Local,
    on_a_loop,
    reader,
    record_of,
    refusal,
    serving,
    until,
)

if TYPE_CHECKING:
    from pathlib import Path

MS = 1_000_000
KEY_ONLY = "the hello takes a key only: where to begin in the ring is the reader's own choice"
F_GET_SEALS = 1034


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shm.sock"


# What is handed over


@pytest.mark.parametrize("tier", ["turbo", "enterprise"])
def test_a_subscriber_of_a_top_tier_gets_the_ring_and_is_told_what_it_is(path: Path, tier: str) -> None:
    with serving(path, slots=16) as host, closing(Client(path, json.dumps({"key": tier}).encode() + b"\n")) as client:
        assert client.answer() == {
            "tier": tier,
            "session": f"{SESSION:016x}",
            "network": "regtest",
            "layout": 1,
            "slots": 16,
            "recordSize": 192,
        }
        memory, wake = client.descriptors
        assert os.fstat(memory)[:3] == os.fstat(host.memory.descriptor)[:3]
        assert fcntl.fcntl(memory, F_GET_SEALS) == SEALS
        assert fcntl.fcntl(memory, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert os.readlink(f"/proc/self/fd/{wake}") == "anon_inode:[eventpoll]"
        ring = Ring.attach(map_read_only(memory))
        host.put(20)
        assert (ring.session, ring.slots, ring.tail) == (SESSION, 16, 20)
        assert ring.copy(20) == host.ring.copy(20)


def test_each_reader_is_woken_once_a_publication_and_not_before(path: Path) -> None:
    with serving(path) as host, reader(path) as one, reader(path, b'{"key":"enterprise"}\n') as other:
        for each in (one, other):
            assert not each.woken()
        for _ in range(3):
            host.put()
            for each in (one, other):
                assert each.woken(PATIENCE_S)
                assert not each.woken()


def test_signals_that_a_reader_did_not_wait_for_become_one(path: Path) -> None:
    with serving(path) as host, reader(path) as client:
        for _ in range(5):
            published = host.accounts.processing.count
            host.put()
            until(lambda: host.accounts.processing.count > published)  # noqa: B023 - called before the next round
        assert client.woken()
        assert not client.woken()


def test_another_loop_can_watch_what_a_reader_was_given(path: Path) -> None:
    with serving(path) as host, reader(path) as client, select.epoll() as outer:
        outer.register(client.descriptors[1], select.EPOLLIN)
        assert outer.poll(0) == []
        host.put()
        assert outer.poll(PATIENCE_S) == [(client.descriptors[1], select.EPOLLIN)]
        assert client.woken()
        assert outer.poll(0) == []


def test_two_hundred_readers_are_all_woken_and_accounted_for(path: Path) -> None:
    with serving(path) as host:
        clients = [Client(path, b'{"key":"enterprise"}\n' if each % 4 else b"{}\n") for each in range(267)]
        tier = host.accounts.tiers[Tier.ENTERPRISE]
        try:
            answers = [client.answer() for client in clients]
            readers = [client for client in clients if client.descriptors]
            assert (len(readers), sum("error" in answer for answer in answers)) == (200, 67)
            until(lambda: tier.subscribers == host.accounts.accepted == 200)
            assert host.accounts.refused == 67
            host.put()
            for client in readers:
                assert client.woken(PATIENCE_S)
            until(lambda: host.accounts.processing.count == 1)
            assert tier.on_time + tier.late == 200
            assert tier.relay_latency.count == tier.write_time.count == 200
            assert (tier.dropped, tier.overwritten) == (0, 0)
            assert tier.relay_latency.max_ns > 0
        finally:
            for client in clients:
                client.close()
        until(lambda: host.accounts.disconnected == 200)
        assert tier.subscribers == 0


# To whom


@pytest.mark.parametrize(
    ("hello", "error"),
    [
        (b'{"key":"nobody"}\n', "not accepted"),
        (b"{}\n", "tier free has no shared memory: enterprise and turbo have"),
        (b'{"key":"pro"}\n', "tier pro has no shared memory: enterprise and turbo have"),
        (b'{"key":"business"}\n', "tier business has no shared memory: enterprise and turbo have"),
        (b'{"key":"turbo","since":1}\n', KEY_ONLY),
        (b'{"key":"turbo","format":"json"}\n', KEY_ONLY),
        (b"GET / HTTP/1.1\r\n\r\n", "hello is not JSON: expected one line with an object"),
        (b"x" * MAX_HELLO, f"hello longer than {MAX_HELLO} bytes"),
        (b"x" * (1 << 20), f"hello longer than {MAX_HELLO} bytes"),
    ],
)  # fmt: skip
def test_who_is_refused_is_told_why_and_gets_no_descriptor(path: Path, hello: bytes, error: str) -> None:
    with serving(path) as host:
        with closing(Client(path, hello)) as client:
            assert client.answer() == {"error": error}
            assert client.descriptors == []
            assert client.closed()
        until(lambda: host.accounts.refused == 1)
        assert host.accounts.accepted == 0
        with reader(path):  # and nobody else is the worse for it
            until(lambda: host.accounts.accepted == 1)


def test_who_says_no_hello_in_time_is_sent_away(path: Path) -> None:
    with serving(path, hello_timeout_ns=50 * MS):
        assert refusal(path, b'{"key":') == {"error": "no hello in time"}


def test_no_more_readers_than_agreed_are_taken_and_a_place_that_gets_free_is_given_again(path: Path) -> None:
    with serving(path, max_readers=2) as host:
        with reader(path), reader(path):
            assert refusal(path, b'{"key":"turbo"}\n') == {"error": "too many subscribers", "retry": True}
        until(lambda: host.accounts.disconnected == 2)
        with reader(path):
            pass


def test_one_user_can_be_kept_from_taking_all_places(path: Path) -> None:
    with serving(path, max_readers=10, max_readers_per_user=1), reader(path):
        assert refusal(path, b'{"key":"turbo"}\n')["retry"] is True


# In this process: order, accounts, what the kernel refuses


def test_enterprise_is_woken_first_and_within_a_tier_the_first_one_rotates(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(local: Local) -> None:
        clients = [await local.client(tier) for tier in ("turbo", "enterprise", "turbo", "enterprise", "turbo")]
        names = {
            each.eventfd: f"{tier.label}{place}"
            for tier, roster in local.delivery._rosters.items()
            for place, each in enumerate(roster)
        }
        woken: list[str] = []
        monkeypatch.setattr(os, "eventfd_write", lambda descriptor, _value: woken.append(names[descriptor]))
        starts = set()
        for _ in range(6):
            local.host.writer.claim()[:] = record_of(local.host.writer.next_sequence)
            local.host.writer.commit(best=True)
            woken.clear()
            local.delivery.publish()
            assert sorted(woken) == ["enterprise0", "enterprise1", "turbo0", "turbo1", "turbo2"]
            assert all(name.startswith("enterprise") for name in woken[:2])
            starts |= {woken[0], woken[2]}
        assert starts == set(names.values())
        for client in clients:
            client.close()

    on_a_loop(path, test)


def test_a_signal_delivers_every_record_since_the_last_and_the_overwritten_ones_are_told_apart(path: Path) -> None:
    async def test(local: Local) -> None:
        clients = [await local.client("turbo") for _ in range(3)]
        accounts = local.host.accounts.tiers[Tier.TURBO]
        local.host.put(5)
        local.delivery.publish()
        assert (accounts.on_time + accounts.late, accounts.overwritten) == (15, 0)
        local.delivery.publish()  # nothing new
        assert accounts.on_time + accounts.late == 15
        assert local.host.accounts.processing.count == 1
        local.host.put(64 + 7)  # the ring holds 64
        local.delivery.publish()
        assert (accounts.on_time + accounts.late, accounts.overwritten) == (15 + 3 * 64, 3 * 7)
        for client in clients:
            client.close()

    on_a_loop(path, test)


def test_relay_latency_is_counted_from_the_first_sighting_but_not_for_a_catch_up(path: Path) -> None:
    now = 1_000_000 * MS

    def clock() -> int:
        nonlocal now
        now += MS  # each look at the clock takes a millisecond
        return now

    async def test(local: Local) -> None:
        client = await local.client("turbo")
        accounts = local.host.accounts.tiers[Tier.TURBO]
        local.host.write(record_of(1, seen_ns=now - 20 * MS))
        local.delivery.publish()
        assert (accounts.on_time, accounts.late, accounts.over_target) == (0, 1, 1)
        assert accounts.relay_latency.count == 1
        assert 20 * MS < accounts.relay_latency.max_ns < 25 * MS
        assert accounts.write_time.max_ns == MS
        old = bytearray(record_of(2))
        old[STATE_OFFSET : STATE_OFFSET + 2] = (State.PROVEN | State.CATCHUP).to_bytes(2, "little")
        local.host.write(bytes(old))
        local.delivery.publish()
        assert accounts.late == 2
        assert accounts.relay_latency.count == 1
        client.close()

    on_a_loop(path, test, clock=clock, hello_timeout_ns=1 << 62)


def test_a_signal_within_the_write_deadline_that_was_asked_for_is_on_time(path: Path) -> None:
    async def test(local: Local) -> None:
        client = await local.client("turbo")
        local.host.put()
        local.delivery.publish()
        accounts = local.host.accounts.tiers[Tier.TURBO]
        assert (accounts.on_time, accounts.late) == (1, 0)
        client.close()

    on_a_loop(path, test, write_deadline_ns=dict.fromkeys(Tier, 10**12))


def test_what_was_published_before_the_start_is_no_delivery(path: Path) -> None:
    async def run() -> None:
        local = Local(path)
        local.host.put(3)
        local.start()
        client = await local.client("turbo")
        local.delivery.publish()
        assert local.host.accounts.tiers[Tier.TURBO].on_time == 0
        client.close()
        local.close()

    asyncio.run(run())


@pytest.mark.parametrize("refused", ["eventfd", "epoll", "send_fds"])
def test_a_process_that_is_out_of_descriptors_refuses_for_now_and_keeps_none(
    path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    def full(*_: object) -> int:
        raise OSError(24, "Too many open files")

    async def test(local: Local) -> None:
        first = await local.client("turbo")
        first.answer()
        before = open_descriptors()
        with monkeypatch.context() as patch:
            patch.setattr({"eventfd": os, "epoll": select, "send_fds": socket}[refused], refused, full)
            client = await local.client("turbo")
        assert client.answer() == {"error": "no reader can be taken now: Too many open files", "retry": True}
        client.close()
        while local.delivery._reception is not None and local.delivery._reception._arrivals:
            await asyncio.sleep(0.001)
        assert open_descriptors() == before
        assert local.host.accounts.accepted == 1
        again = await local.client("turbo")
        assert again.answer()["tier"] == "turbo"
        again.close()
        first.close()

    on_a_loop(path, test)


def test_memory_that_is_not_sealed_is_never_handed_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(path)
    monkeypatch.setattr(host.memory, "seals", lambda: SEALS & ~0x10)
    with pytest.raises(HostError, match="seals 0x7 can't be handed over: 0x17 expected"):
        host.delivery()
    os.close(host.memory.descriptor)
    os.close(host.channel.fileno())


def test_closing_ends_every_connection_and_removes_the_socket(path: Path) -> None:
    async def test(local: Local) -> None:
        client = await local.client("turbo")
        client.answer()
        early = Client(path, b"")
        await asyncio.sleep(0)
        local.delivery.close()
        local.delivery.close()
        assert client.closed()
        assert early.closed()
        assert not path.exists()
        assert local.host.accounts.disconnected == 1
        client.close()
        early.close()

    on_a_loop(path, test)


def test_closing_leaves_a_socket_that_another_server_has_put_there(path: Path) -> None:
    async def test(local: Local) -> None:
        path.unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            other.bind(os.fspath(path))
            other.listen()
            local.delivery.close()
            assert path.exists()

    on_a_loop(path, test)


def test_signals_are_given_while_no_reader_is_there(path: Path) -> None:
    with serving(path) as host:
        host.put(10)
        until(lambda: host.accounts.processing.count >= 1)
        with reader(path) as client:
            assert not client.woken()
            began = time.monotonic()
            host.put()
            assert client.woken(PATIENCE_S)
            assert time.monotonic() - began < PATIENCE_S


def test_the_tiers_that_have_shared_memory_are_those_of_the_memory_engine() -> None:
    assert shm._TIERS == (Tier.ENTERPRISE, Tier.TURBO)
    assert all(PROFILES[tier].memory_engine for tier in shm._TIERS)
