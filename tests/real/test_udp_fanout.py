"""The product's UDP subscribers behind a wire, served by live frames: what is killed or changed costs them nothing.

The product is in one namespace of the test's own, a bcoin node and the subscribers in another.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types

from sprint.datagrams import HEARTBEAT_MAGIC
from sprint.keys import FILE_NAME, KeyStore
from sprint.tiers import Tier
from tests.net.netns import Namespace, Veth, veth_pair
from tests.net.subscribers import switch_gro
from tests.real.bcoin import BcoinNode, missing
from tests.real.children import QUIET, kill_and_await
from tests.real.product import COMPILED_WITHIN_S, Product
from tests.real.test_udp import Stubborn, UdpStream, assert_whole
from xdp import loader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.real.product import Event

NEAR, FAR = "10.79.1.1", "10.79.1.2"
BOUND = "10.79.1.9"
"""Served at: not the address that the kernel itself would send from."""
MANY = 3


class Lab:
    """The wire, the node behind it, and the product on this side."""

    def __init__(self, folder: Path, near: Namespace, stack: ExitStack) -> None:
        self._stack = stack
        self.far = stack.enter_context(Namespace())
        self.wire: Veth
        _, self.wire = veth_pair(near, self.far, ("wire", "wire-far"), addresses=(f"{NEAR}/24", f"{FAR}/24"))
        with IPRoute(groups=0) as route:
            route.addr("add", index=near.index("wire"), address=BOUND, prefixlen=24)
        switch_gro(self.wire, on=True)
        self.node = BcoinNode()
        self.node.host = "0.0.0.0"
        with self.far.entered():
            stack.enter_context(self.node)
            self.node.mine(5)
        settings = {
            "ENABLE_KERNEL_BYPASS": "true",
            "INTERFACE": "wire",
            "DELIVERY_WORKERS": "1",
            "STREAM_BIND": f"{BOUND}:0",
            "UDP_BIND": f"{BOUND}:0",
            **QUIET,
        }
        address = f"{FAR}:{self.node.p2p_port}"
        self.product = stack.enter_context(Product(folder, address, tier="enterprise", **settings))

    def mine(self, count: int = 1) -> list[str]:
        with self.far.entered():
            return self.node.mine(count)

    def subscribe(self) -> UdpStream:
        stream = self._stack.enter_context(UdpStream(self.product.stream, self.product.key, self.far))
        stream.wait_until_active()
        return stream

    def wait_for_rung(self, rung: str, live: int) -> Event:
        answer: Event = self.product.wait_for(
            "deliveries",
            lambda answer: (answer["udp"]["rung"], answer["udp"]["by_live_frames"]) == (rung, live),
            f"{live} subscribers by live frames, the best rung being {rung}",
            COMPILED_WITHIN_S,  # where it is the bypass that was killed
        )
        return answer

    def egress(self) -> dict[str, int]:
        counted: dict[str, int] = self.product.ask("turbo-status")["kernelBypass"]["egress"]
        return counted

    def row(self, name: str) -> dict[str, Any]:
        rows = {row["name"]: row for row in self.product.ask("deliveries")["deliveries"]}
        account: dict[str, Any] = rows[name]["tiers"]["enterprise"]
        return account


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    reason = loader.missing() or missing()
    if reason is not None:
        pytest.skip(reason)
    with Namespace() as near, near.entered(), ExitStack() as stack:
        yield Lab(tmp_path, near, stack)


def test_subscribers_behind_a_wire_are_served_in_one_call_and_miss_nothing_whatever_happens(lab: Lab) -> None:
    product = lab.product
    product.wait_until_healthy()
    product.wait_for_log("Fan-out at work", timeout_s=COMPILED_WITHIN_S)
    streams = [lab.subscribe() for _ in range(MANY)]
    lab.wait_for_rung("live_frames", MANY)
    mined = lab.mine(3)

    def all_have_them() -> None:
        for stream in streams:
            stream.wait_for_hashes("validated", mined)

    all_have_them()
    for stream in streams:
        stream.wait_for_hashes("rebuilt", mined)
    records = 3 * len(mined)
    product.wait_for(
        "turbo-status",
        lambda answer: answer["kernelBypass"]["egress"] == {"subscribers": MANY, "sent": MANY * records, "dropped": 0},
        f"{records} records to {MANY} subscribers in the status",
    )
    fanout = lab.row("fanout")
    assert fanout["on_time"] + fanout["late"] == MANY * records
    assert lab.row("udp")["subscribers"] == MANY
    assert sum(lab.row("udp")[name] for name in ("on_time", "late", "dropped")) == 0  # the worker had nothing to send

    with KeyStore(product.data_dir / FILE_NAME) as store:
        key = store.create("revoked", Tier.ENTERPRISE, int(time.time()), connections=1)
        with lab.far.entered():
            ending = Stubborn(product, key, FAR)
        with ending:
            lab.wait_for_rung("live_frames", MANY + 1)
            ending.wait_for(HEARTBEAT_MAGIC)
            store.revoke("revoked", int(time.time()))
            lab.wait_for_rung("live_frames", MANY)
            ending.arrived()
            mined += lab.mine()
            all_have_them()
            assert ending.arrived() == []

    for victim in ("udp", "relay", "bypass", "stream-0"):
        kill_and_await(product, victim)
        mined += lab.mine()
        all_have_them()
        lab.wait_for_rung("live_frames", MANY)
        mined += lab.mine()
        all_have_them()

    switch_gro(lab.wire, on=False)  # the driver takes no live frames any more
    mined += lab.mine()
    all_have_them()
    product.wait_for("deliveries", lambda answer: answer["udp"]["by_live_frames"] == 0, "nobody by live frames")
    sent = lab.egress()["sent"]
    mined += lab.mine()
    all_have_them()
    assert lab.egress()["sent"] == sent
    assert product.ask("deliveries")["udp"]["reason"]  # the driver's, or the relay's, whoever noticed first
    switch_gro(lab.wire, on=True)
    lab.wait_for_rung("live_frames", MANY)  # with no record to try it with
    mined += lab.mine()
    all_have_them()
    product.wait_for("turbo-status", lambda one: one["kernelBypass"]["egress"]["sent"] > sent, "live frames again")

    for stream in streams:
        assert_whole(stream, mined)
    assert product.stop() == 0
