"""Keys through the whole product: what a key gives, and how soon one that was revoked gives nothing."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import threading
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import pytest

from sprint.errors import SprintError
from sprint.keys import FILE_NAME, KeyStore
from sprint.tiers import Tier
from tests.real.children import all_processes, kill_and_await
from tests.real.product import COMMAND, Product, environment
from tests.real.subscribers import JsonStream, connect
from tests.real.test_udp import UdpStream, udp_row

if TYPE_CHECKING:
    from pathlib import Path

    from tests.real.bcoin import BcoinNode

ENGINES = pytest.mark.parametrize("engine", ["memory", "standard"])


def sprint_keys(product: Product, *arguments: str) -> str:
    """What `sprint keys` answers for that instance."""
    command = [*COMMAND, "keys", *arguments]
    settings = environment({"DATA_DIR": str(product.data_dir)})
    done = subprocess.run(
        command, env=settings, capture_output=True, text=True, cwd=product.data_dir, timeout=60, check=True
    )
    return done.stdout.strip()


def hello(key: str) -> bytes:
    return json.dumps({"format": "json", "key": key}).encode() + b"\n"


def refusal(product: Product, line: bytes) -> bytes:
    """All that is ever answered to this hello."""
    said = b""
    with connect(product.stream) as sock:
        sock.sendall(line)
        with suppress(ConnectionResetError):
            while data := sock.recv(4096):
                said += data
    return said


def running(tmp_path: Path, node: BcoinNode, engine: str) -> Product:
    return Product(
        tmp_path, node.p2p_address, tier="turbo", USE_SHARED_MEMORY=str(engine == "memory"), DELIVERY_WORKERS="2"
    )


@ENGINES
def test_a_subscriber_is_served_at_his_keys_tier_and_without_one_at_free(
    bcoin: BcoinNode, tmp_path: Path, engine: str
) -> None:
    with running(tmp_path, bcoin, engine) as product, ExitStack() as stack:
        product.wait_until_healthy()
        tiers = ("pro", "turbo", "enterprise")
        keys = {tier: sprint_keys(product, "create", "--tier", tier, "--name", tier) for tier in tiers}
        keyed = {tier: stack.enter_context(JsonStream(product.stream, hello(keys[tier]))) for tier in tiers}
        unkeyed = stack.enter_context(JsonStream(product.stream))

        assert {tier: stream.answer["tier"] for tier, stream in keyed.items()} == {
            "pro": "pro",
            "turbo": "turbo",
            "enterprise": "turbo",  # the instance's own is the highest
        }
        assert unkeyed.answer["tier"] == "free"
        mined = bcoin.mine(1)
        for stream in (*keyed.values(), unkeyed):
            stream.wait_for_hashes("proven", mined)


@ENGINES
def test_a_revoked_key_ends_its_sessions_only_and_lets_nobody_in_again(
    bcoin: BcoinNode, tmp_path: Path, engine: str
) -> None:
    with running(tmp_path, bcoin, engine) as product, ExitStack() as stack:
        product.wait_until_healthy()
        revoked = sprint_keys(product, "create", "--tier", "turbo", "--name", "revoked")
        good = sprint_keys(product, "create", "--tier", "turbo", "--name", "good")
        ending = [stack.enter_context(JsonStream(product.stream, hello(revoked))) for _ in range(4)]
        staying = stack.enter_context(JsonStream(product.stream, hello(good)))
        product.wait_for_subscribers(5)

        sprint_keys(product, "revoke", "revoked")

        for stream in ending:
            stream.wait_until_ended()
        product.wait_for_subscribers(1)
        mined = bcoin.mine(1)
        staying.wait_for_hashes("proven", mined)
        unknown = "spk_" + 64 * "0"
        answers = {refusal(product, hello(key)) for key in (revoked, unknown, good[:-1], "x", good.upper())}
        assert answers == {b'{"error":"not accepted"}\n'}


def test_a_revoked_key_ends_a_shared_memory_session_too(bcoin: BcoinNode, tmp_path: Path) -> None:
    with running(tmp_path, bcoin, "memory") as product:
        product.wait_until_healthy()
        with product.reader() as reader:
            product.wait_for_subscribers(1)
            sprint_keys(product, "revoke", "tests")
            product.wait_for_subscribers(0)
            mined = bcoin.mine(1)
            product.wait_for("blocks", lambda said: any(one["hash"] == mined[0] for one in said["blocks"]), "the block")
            with pytest.raises(SprintError, match="not accepted"):
                list(iter(lambda: reader.next(5), None))  # first what it can still read, then it asks to come back


@ENGINES
def test_a_revoked_key_ends_its_udp_subscriptions_too(bcoin: BcoinNode, tmp_path: Path, engine: str) -> None:
    with running(tmp_path, bcoin, engine) as product, ExitStack() as stack:
        product.wait_until_healthy()
        revoked = sprint_keys(product, "create", "--tier", "turbo", "--name", "revoked")
        ending, staying = (stack.enter_context(UdpStream(product.stream, key)) for key in (revoked, product.key))
        for stream in (ending, staying):
            stream.wait_until_active()
        assert udp_row(product, "turbo")["subscribers"] == 2

        sprint_keys(product, "revoke", "revoked")

        ending.wait_until_ended()
        assert "not accepted" in str(ending.ended)
        product.wait_for_subscribers(1)
        assert udp_row(product, "turbo")["subscribers"] == 1
        staying.wait_for_hashes("proven", bcoin.mine(1))


def test_seats_that_a_killed_worker_held_come_back(bcoin: BcoinNode, tmp_path: Path) -> None:
    with running(tmp_path, bcoin, "memory") as product:
        product.wait_until_healthy()
        all_processes(product)
        key = sprint_keys(product, "create", "--tier", "turbo", "--name", "few", "--connections", "3")
        for _ in range(3):
            with ExitStack() as stack:
                streams = [stack.enter_context(JsonStream(product.stream, hello(key))) for _ in range(3)]
                assert {stream.answer.get("tier") for stream in streams} == {"turbo"}
                for worker in ("stream-0", "stream-1"):
                    kill_and_await(product, worker)
                for stream in streams:
                    stream.wait_until_ended()
            all_processes(product)
            product.wait_for_subscribers(0)


def test_keys_are_made_and_revoked_by_several_operators_while_sessions_come_and_go(
    bcoin: BcoinNode, tmp_path: Path
) -> None:
    rounds, operators, failures = 4, 3, []
    with running(tmp_path, bcoin, "memory") as product, ExitStack() as stack:
        product.wait_until_healthy()
        file = product.data_dir / FILE_NAME
        shared = sprint_keys(product, "create", "--tier", "turbo", "--name", "shared", "--connections", str(operators))
        staying = stack.enter_context(JsonStream(product.stream, product.hello))

        def operate(who: int) -> None:
            try:
                with KeyStore(file) as store:
                    for number in range(rounds):
                        name = f"{who}-{number}"
                        key = store.create(name, Tier.PRO, int(time.time()), connections=2)
                        with (
                            JsonStream(product.stream, hello(key)) as one,
                            JsonStream(product.stream, hello(key)) as two,
                            joined(product, shared) as other,
                        ):
                            assert [one.answer.get("tier"), two.answer.get("tier")] == ["pro", "pro"]
                            store.revoke(name, int(time.time()))
                            one.wait_until_ended()
                            two.wait_until_ended()
                            assert refusal(product, hello(key)) == b'{"error":"not accepted"}\n'
                            assert other.ended is None
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=operate, args=(who,)) for who in range(operators)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)

        assert failures == []
        product.wait_for_subscribers(1)
        again = [stack.enter_context(joined(product, shared)) for _ in range(operators)]
        assert {stream.answer["tier"] for stream in again} == {"turbo"}
        staying.wait_for_hashes("proven", bcoin.mine(1))


def joined(product: Product, key: str) -> JsonStream:
    """A stream by that key, once there is a seat: one that was left is free when the server has noticed."""
    while True:
        stream = JsonStream(product.stream, hello(key))
        if "retry" not in stream.answer:
            return stream
        with stream:
            time.sleep(0.01)


def test_an_expired_key_ends_its_session(bcoin: BcoinNode, tmp_path: Path) -> None:
    with running(tmp_path, bcoin, "memory") as product:
        product.wait_until_healthy()
        with JsonStream(product.stream, product.hello) as stream:
            product.wait_for_subscribers(1)
            # An operator can't make a key that ends in a moment, so the end is moved there.
            with sqlite3.connect(product.data_dir / FILE_NAME) as database:
                database.execute("UPDATE keys SET expires_s = 1, changed = changed + 1")
            database.close()
            stream.wait_until_ended()


def test_a_keys_connections_are_limited_over_all_workers_and_come_back(bcoin: BcoinNode, tmp_path: Path) -> None:
    with running(tmp_path, bcoin, "memory") as product, ExitStack() as stack:
        product.wait_until_healthy()
        key = sprint_keys(product, "create", "--tier", "turbo", "--name", "few", "--connections", "3")
        streams = [stack.enter_context(JsonStream(product.stream, hello(key))) for _ in range(3)]
        assert {stream.answer["tier"] for stream in streams} == {"turbo"}
        for _ in range(4):  # whichever worker is asked
            assert json.loads(refusal(product, hello(key))) == {"error": "too many subscribers", "retry": True}
        streams[0].sock.shutdown(socket.SHUT_RDWR)
        product.wait_for_subscribers(2)
        with JsonStream(product.stream, hello(key)) as again:
            assert again.answer["tier"] == "turbo"


def test_one_address_has_only_so_many_connections_over_all_workers(bcoin: BcoinNode, tmp_path: Path) -> None:
    product = Product(tmp_path, bcoin.p2p_address, tier="turbo", DELIVERY_WORKERS="2", CONNECTIONS_PER_ADDRESS="3")
    with product, ExitStack() as stack:
        product.wait_until_healthy()
        for _ in range(3):
            stack.enter_context(JsonStream(product.stream))
        product.wait_for_subscribers(3)
        for _ in range(4):
            assert b"too many subscribers" in refusal(product, b"{}\n")


def test_a_key_file_that_can_not_be_read_is_told_and_the_free_tier_served(bcoin: BcoinNode, tmp_path: Path) -> None:
    product = running(tmp_path, bcoin, "memory")
    product.data_dir.mkdir(parents=True)
    (product.data_dir / FILE_NAME).write_bytes(b"no database" * 400)
    with product:
        product.wait_until_healthy()
        assert FILE_NAME in product.wait_for_log("Keys can't be read")
        with JsonStream(product.stream) as stream:
            stream.wait_for_hashes("proven", bcoin.mine(1))
        assert b"not accepted" in refusal(product, hello("spk_" + 64 * "0"))
    assert (product.data_dir / FILE_NAME).read_bytes() == b"no database" * 400
