"""The UDP feed of the real product: a bcoin node mines, and whatever is killed, its subscribers miss nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from contextlib import ExitStack, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import pytest

from sprint.addresses import Address, parse_address
from sprint.client_datagrams import DatagramProtocol
from sprint.client_retry import Pauses
from sprint.client_udp import datagram_events
from sprint.datagrams import CHALLENGE_MAGIC, HEARTBEAT_MAGIC, Challenge, Echo, KeepAlive, from_server
from sprint.events import Lapped
from sprint.frames import UdpChange
from sprint.keys import FILE_NAME, KeyStore
from sprint.record import Record
from sprint.tiers import Tier
from tests.real.children import QUIET, all_processes, kill_and_await, processes
from tests.real.product import WAIT_TIMEOUT_S, Product
from tests.real.subscribers import EventLog, JsonStream

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from typing_extensions import Self

    from tests.net.netns import Namespace
    from tests.real.bcoin import BcoinNode
    from tests.real.product import Event


class _Pauses(Pauses):
    """Until the test is over."""

    over = False

    def after(self, error: Exception) -> float:
        if self.over:
            raise error
        return super().after(error)


class UdpStream(EventLog):
    """A subscriber by sprint.client and UDP; changes of the way are events too. Left, it doesn't connect again."""

    def __init__(self, address: str, key: str, namespace: Namespace | None = None) -> None:
        """In that network namespace, or in the test's."""
        self._pauses = _Pauses(reconnect=True)
        super().__init__(self._told(parse_address(address), key, namespace))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pauses.over = True  # it ends with its connection

    def _told(self, address: Address, key: str, namespace: Namespace | None) -> Iterator[Event]:
        with nullcontext() if namespace is None else namespace.entered():  # of the thread that gathers
            for item in datagram_events(address, DatagramProtocol(key=key), self._pauses):
                if isinstance(item, Record):
                    yield item.as_dict()
                elif isinstance(item, UdpChange):
                    yield {"event": "udp", "state": item.state.name.lower(), "reason": item.reason.name.lower()}
                elif isinstance(item, Lapped):
                    yield {"event": "lost", "first": item.first}

    def wait_until_active(self, times: int = 1) -> None:
        self.wait_until(
            lambda told: sum(one["event"] == "udp" and one["state"] == "active" for one in told) >= times,
            f"UDP active, {times} times",
        )


class Stubborn:
    """One who doesn't care that his session is over, and goes on to say by UDP that he is there."""

    def __init__(self, product: Product, key: str, host: str = "127.0.0.1") -> None:
        """He is in this thread's network namespace, at that address."""
        stream = parse_address(product.stream)
        self._datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._datagrams.bind((host, 0))
        self._datagrams.settimeout(WAIT_TIMEOUT_S)
        self._tcp = socket.create_connection(stream, WAIT_TIMEOUT_S)
        hello = {"key": key, "format": "json", "udp": f":{self._datagrams.getsockname()[1]}"}
        self._tcp.sendall(json.dumps(hello).encode() + b"\n")
        offer = json.loads(self._tcp.makefile("rb").readline())["udp"]
        self._token = bytes.fromhex(offer["token"])
        self._server = (stream.host, parse_address(f"0.0.0.0{offer['address']}").port)
        challenge = from_server(self.wait_for(CHALLENGE_MAGIC))
        assert isinstance(challenge, Challenge)
        self._datagrams.sendto(Echo(self._token, challenge.cookie).encode(), self._server)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tcp.close()
        self._datagrams.close()

    def wait_for(self, magic: bytes) -> bytes:
        """The next datagram that begins so."""
        while not (data := self._datagrams.recv(2048)).startswith(magic):
            pass
        return data

    def arrived(self) -> list[bytes]:
        """What has come by now, after one more keep-alive."""
        self._datagrams.sendto(KeepAlive(self._token).encode(), self._server)
        self._datagrams.setblocking(False)
        came = []
        with suppress(BlockingIOError):
            while True:
                came.append(self._datagrams.recv(2048))
        return came


def udp_row(product: Product, tier: str) -> dict[str, Any]:
    rows = {row["name"]: row for row in product.ask("deliveries")["deliveries"]}
    account: dict[str, Any] = rows["udp"]["tiers"][tier]
    return account


def assert_whole(log: UdpStream, mined: list[str]) -> None:
    """Everything once; what was repaired may have come late."""
    assert sorted(log.hashes("proven")) == sorted(mined)
    sequences = [one["seq"] for one in log.events if "seq" in one]
    assert sorted(sequences) == list(range(min(sequences), max(sequences) + 1))
    assert log.of("lost") == []


def test_udp_subscribers_miss_nothing_whatever_is_killed(bcoin: BcoinNode, tmp_path: Path) -> None:
    bcoin.mine(5)
    with ExitStack() as stack, Product(tmp_path, bcoin.p2p_address, **QUIET, DELIVERY_WORKERS="1") as product:
        product.wait_until_healthy()
        all_processes(product)
        logs = [stack.enter_context(UdpStream(product.stream, product.key)) for _ in range(3)]
        for log in logs:
            log.wait_until_active()
        mined = bcoin.mine(3)
        for log in logs:
            log.wait_for_hashes("validated", mined)
        assert udp_row(product, "turbo")["subscribers"] == 3
        assert sum(udp_row(product, "turbo")[name] for name in ("on_time", "late")) >= 3 * 3
        active = 1
        for victim in ("udp", "stream-0", "relay", "udp"):
            if victim == "udp":
                # It hears nothing any more and is dead before it could: what is published meanwhile goes nowhere.
                os.kill(processes(product)["udp"], signal.SIGSTOP)
                mined += bcoin.mine(1)
            kill_and_await(product, victim)
            mined += bcoin.mine(1)
            active += victim != "relay"  # which nobody has to prove anything to
            for log in logs:
                log.wait_for_hashes("validated", mined)
                log.wait_until_active(active)
        for log in logs:
            assert_whole(log, mined)
            assert log.ended is None
        assert udp_row(product, "turbo")["subscribers"] == 3
        assert product.stop() == 0


def test_the_standard_engine_serves_udp_too(bcoin: BcoinNode, tmp_path: Path) -> None:
    bcoin.mine(5)
    with ExitStack() as stack, Product(tmp_path, bcoin.p2p_address, USE_SHARED_MEMORY="false") as product:
        assert product.wait_until_healthy()["engine"] == "standard"
        log = stack.enter_context(UdpStream(product.stream, product.key))
        log.wait_until_active()
        mined = bcoin.mine(3)
        log.wait_for_hashes("validated", mined)
        assert_whole(log, mined)
        assert udp_row(product, "turbo")["subscribers"] == 1
        with JsonStream(product.stream, b'{"format":"json","udp":":9"}\n') as keyless:
            assert "tier free has none" in keyless.answer["error"]
        assert product.stop() == 0


def test_a_key_that_is_revoked_or_expires_gets_no_datagram_more_whatever_its_holder_says(
    bcoin: BcoinNode, tmp_path: Path
) -> None:
    with ExitStack() as stack, Product(tmp_path, bcoin.p2p_address, **QUIET) as product:
        product.wait_until_healthy()
        store = stack.enter_context(KeyStore(product.data_dir / FILE_NAME))
        now_s = int(time.time())
        keys = [
            store.create("revoked", Tier.TURBO, now_s, connections=1),
            store.create("expiring", Tier.TURBO, now_s, connections=1, expires_s=now_s + 4),
        ]
        log = stack.enter_context(UdpStream(product.stream, product.key))
        log.wait_until_active()
        ending = [stack.enter_context(Stubborn(product, key)) for key in keys]
        for one in ending:
            one.wait_for(HEARTBEAT_MAGIC)
        store.revoke("revoked", int(time.time()))
        row = product.wait_for(
            "deliveries",
            lambda answer: any(
                one["name"] == "udp" and one["tiers"]["turbo"]["subscribers"] == 1 for one in answer["deliveries"]
            ),
            "one subscriber by UDP",
        )
        assert row["udp"]["lapsed"] == 0
        for one in ending:
            one.arrived()
        mined = bcoin.mine(1)
        log.wait_for_hashes("validated", mined)
        assert [one.arrived() for one in ending] == [[], []]
        assert product.stop() == 0


@pytest.mark.parametrize("tier", ["free", "business"])
def test_lower_tiers_have_no_udp_socket(bcoin: BcoinNode, tmp_path: Path, tier: str) -> None:
    with Product(tmp_path, bcoin.p2p_address, tier=tier) as product:
        listening = next(line for line in product.log if '"Listening"' in line)
        assert '"udp"' not in listening
        with JsonStream(product.stream, b'{"format":"json","udp":":9"}\n') as asking:
            assert asking.answer == {"error": "udp is not served here: subscribe without it"}
        assert product.stop() == 0
