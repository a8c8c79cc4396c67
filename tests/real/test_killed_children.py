"""Every process of the memory-optimised engine is killed while subscribers watch, and theirs is the view that decides.

Sequences without a gap, each block proven once, nothing mined that isn't told; and whoever wasn't served by the killed
one keeps the connection.
"""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.real.children import (
    BACK_WITHIN_S,
    QUIET,
    alive,
    all_processes,
    assert_whole,
    kill_and_await,
    logged,
    processes,
    records,
    until,
    wait_for_more,
)
from tests.real.product import Product
from tests.real.subscribers import JsonStream
from tests.real.test_upstreams import free_port, mining

if TYPE_CHECKING:
    from tests.real.bcoin import BcoinNode


def streams_on(product: Product, stack: ExitStack, names: list[str]) -> dict[str, JsonStream]:
    """A subscriber on each of these workers; the kernel decides which worker has whom, so some are asked in vain."""
    found: dict[str, JsonStream] = {}

    def counts() -> dict[str, int]:
        rows = product.ask("deliveries")["deliveries"]
        return {row["name"]: row["accepted"] for row in rows}

    for _ in range(64):
        before = counts()
        stream = stack.enter_context(JsonStream(product.stream))
        product.wait_for("deliveries", lambda _, before=before: counts() != before, "an accepted subscriber")  # type: ignore[misc]  # bound now
        (name,) = [name for name, count in counts().items() if count != before.get(name)]
        found.setdefault(name, stream)
        if found.keys() >= set(names):
            return found
    raise AssertionError(f"no subscriber on {set(names) - found.keys()}")


def test_each_child_that_is_killed_is_back_and_nobody_elses_subscribers_notice(
    bcoin: BcoinNode, tmp_path: Path
) -> None:
    bcoin.mine(5)
    with Product(tmp_path, bcoin.p2p_address, **QUIET, DELIVERY_WORKERS="2") as product, ExitStack() as stack:
        product.wait_until_healthy()
        session = product.ask("health")["session"]
        streams = streams_on(product, stack, ["stream-0", "stream-1"])
        reader = stack.enter_context(product.reader())
        mined = bcoin.mine(2)
        for victim in ("relay", "stream-0", "udp", "shm", "zmq", "api", "stream-1"):
            spared = [stream for name, stream in streams.items() if name != victim]
            kill_and_await(product, victim)
            mined += bcoin.mine(2)
            for stream in spared:
                if stream.ended is None:
                    stream.wait_for_hashes("validated", mined)
            if victim == "relay":
                for stream in spared:
                    assert_whole(stream, mined, 6)
            if victim in streams:
                streams[victim].wait_until_ended()
            if victim == "stream-0":
                assert streams["stream-1"].ended is None
                with JsonStream(product.stream, b'{"format":"json","since":1}\n') as late:
                    late.wait_for_hashes("validated", mined)
                    assert_whole(late, mined, 6)
            if victim != "stream-1":
                assert_whole(streams["stream-1"], mined, 6)

        health = product.wait_until_healthy()
        assert health["session"] == session
        assert {row["name"]: row["restarts"] for row in health["processes"]} == dict.fromkeys(
            ("relay", "stream-0", "stream-1", "udp", "shm", "zmq", "api"), 1
        )
        told = (record for record in records(reader, 3 * len(mined)) if record.event.name == "PROVEN")
        shown = [next(told).hash[::-1].hex() for _ in mined]
        assert shown == mined
        assert reader.lost == 0
        deaths = logged(product, "Child died")
        assert [line["child"] for line in deaths] == ["relay", "stream-0", "udp", "shm", "zmq", "api", "stream-1"]
        assert {line["how"] for line in deaths} == {"signal 9"}

        for stream in streams.values():
            stream.__exit__()
        product.wait_for("health", lambda answer: sum(answer["subscribers"].values()) <= 1, "the dead left the books")
        assert product.stop() == 0


def test_blocks_mined_while_the_relay_was_down_come_with_catchup(bcoin: BcoinNode, tmp_path: Path) -> None:
    bcoin.mine(5)
    with Product(tmp_path, bcoin.p2p_address, **QUIET, DELIVERY_WORKERS="1") as product:
        product.wait_until_healthy()
        with JsonStream(product.stream) as raw:
            mined = bcoin.mine(2)
            raw.wait_for_hashes("validated", mined)
            relay = processes(product)["relay"]
            os.kill(relay, signal.SIGSTOP)  # it hears nothing, and is dead before it could
            missed = bcoin.mine(3)
            os.kill(relay, signal.SIGKILL)
            raw.wait_for_hashes("validated", [*mined, *missed])
            (fresh,) = bcoin.mine(1)
            raw.wait_for_hashes("validated", [fresh])
            assert_whole(raw, [*mined, *missed, fresh], 6)
            late = {one["hash"]: "catchup" in one["state"] for one in raw.of("proven")}
            assert late == {**dict.fromkeys(mined, False), **dict.fromkeys(missed, True), fresh: False}
        assert product.stop() == 0
    file = next(path for path in product.data_dir.iterdir() if path.name.startswith("headers"))
    heights = range(1, bcoin.tip()[0] + 1)
    assert file.read_bytes()[80:] == b"".join(bcoin.header(bcoin.block_hash(height)) for height in heights)


def test_a_relay_killed_again_and_again_under_load_loses_nothing_and_tells_nothing_twice(
    bcoin: BcoinNode, tmp_path: Path
) -> None:
    bcoin.mine(5)
    moments = random.Random(7)
    with Product(tmp_path, bcoin.p2p_address, **QUIET, DELIVERY_WORKERS="1") as product:
        product.wait_until_healthy()
        with JsonStream(product.stream) as raw:
            with mining(bcoin) as load:
                for _ in range(5):
                    wait_for_more(raw, 10)
                    time.sleep(moments.uniform(0, 0.1))  # any moment will do: the load doesn't pause
                    kill_and_await(product, "relay")
                wait_for_more(raw, 10)
            raw.wait_for_hashes("validated", load.mined)
            assert_whole(raw, load.mined, 6)
            assert {one["event"] for one in raw.events} <= {"proven", "rebuilt", "validated"}
        assert product.stop() == 0


def test_children_of_a_killed_supervisor_end_and_the_next_start_takes_its_place(
    bcoin: BcoinNode, tmp_path: Path
) -> None:
    ports = {name: f"127.0.0.1:{free_port()}" for name in ("API_BIND", "STREAM_BIND")}
    product = Product(tmp_path, bcoin.p2p_address, **QUIET, **ports)
    with product:
        product.wait_until_healthy()
        pids = all_processes(product)
        with JsonStream(product.stream) as raw:
            raw.wait_for_hashes("validated", bcoin.mine(1))
            os.kill(product.pid, signal.SIGKILL)
            until(lambda: not any(map(alive, pids.values())), "all children's end", BACK_WITHIN_S)
            raw.wait_until_ended()
        assert (product.data_dir / "sprint.sock").exists()
        assert product.wait() == -signal.SIGKILL
    with product:
        product.wait_until_healthy()
        with (
            JsonStream(product.stream) as raw,
            product.reader() as reader,
        ):
            raw.wait_for_hashes("validated", bcoin.mine(1))
            assert reader.next(5) is not None
        assert product.stop() == 0


@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C"])
def test_it_ends_in_good_order_and_leaves_nothing_behind(how: str, bcoin: BcoinNode, tmp_path: Path) -> None:
    with Product(tmp_path, bcoin.p2p_address, **QUIET, DELIVERY_WORKERS="2") as product:
        product.wait_until_healthy()
        pids = all_processes(product)
        with JsonStream(product.stream) as raw, product.reader():
            raw.wait_for_hashes("validated", bcoin.mine(1))
            if how == "SIGTERM":
                os.kill(product.pid, signal.SIGTERM)
            else:
                os.killpg(product.pid, signal.SIGINT)
            assert product.wait() == 0
            raw.wait_until_ended()
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values()), "a process, or its zombie, is left"
        assert {path.name for path in product.data_dir.iterdir()} == {"headers-regtest.dat", "keys.sqlite"}
        assert '"Stopped"' in product.log[-1]
        assert not any("Traceback" in line or "Child died" in line for line in product.log)
