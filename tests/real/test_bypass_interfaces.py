"""The product on two wires to a node: what becomes of interfaces, of who holds them, and what subscribers notice of it.

Everything is in namespaces of the test's own: the product and the test in one, a bcoin node in the other, with a wire
named alpha and one named beta between them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types

from tests.net.netns import Namespace, Veth, veth_pair
from tests.real.bcoin import BcoinNode, missing
from tests.real.captured import WAYS, wait_until_captured, ways_to
from tests.real.children import QUIET, alive, all_processes, kill_and_await, logged, until
from tests.real.product import COMPILED_WITHIN_S, Product
from tests.real.subscribers import JsonStream
from xdp import loader
from xdp.interfaces import interface
from xdp.links import Leftover, leftovers, ours

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.real.product import Event

ADDRESSES = {"alpha": ("10.78.1.1/24", "10.78.1.2/24"), "beta": ("10.78.2.1/24", "10.78.2.2/24")}
PATIENCE_S = 30.0


class Lab:
    """The wires, the node behind them, and the product in the namespace that the test is in."""

    def __init__(self, folder: Path, near: Namespace, stack: ExitStack) -> None:
        self.folder, self.near, self._stack = folder, near, stack
        self.far = stack.enter_context(Namespace())
        for name in ADDRESSES:
            self.lay(name)
        self.node = BcoinNode()
        self.node.host = "0.0.0.0"
        with self.far.entered():
            stack.enter_context(self.node)
            self.node.mine(5)

    def lay(self, name: str) -> Veth:
        """A wire of that name, as it was before."""
        return veth_pair(self.near, self.far, (name, f"{name}-far"), addresses=ADDRESSES[name])[0]

    def product(self, interfaces: str, *over: str) -> Product:
        """Not started yet; it hears the node over these wires."""
        nodes = [f"{ADDRESSES[name][1].split('/')[0]}:{self.node.p2p_port}" for name in over or ADDRESSES]
        settings = {"INTERFACE": interfaces} if interfaces else {}
        bypass = {"ENABLE_KERNEL_BYPASS": "true", "DELIVERY_WORKERS": "1", **settings, **QUIET}
        return Product(self.folder, *nodes, tier="enterprise", **bypass)

    def mine(self) -> str:
        with self.far.entered():
            (block_hash,) = self.node.mine(1)
        return block_hash


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    reason = loader.missing() or missing()
    if reason is not None:
        pytest.skip(reason)
    with Namespace() as near, near.entered(), ExitStack() as stack:
        yield Lab(tmp_path, near, stack)


def bypass_of(product: Product) -> Event:
    said: Event = product.ask("turbo-status")["kernelBypass"]
    return said


def await_active(product: Product, *names: str) -> Event:
    """Until exactly these are active; what is said of the bypass then."""

    def as_wanted(answer: Event) -> bool:
        return set(answer["kernelBypass"]["interfaces"]) == set(names)

    what = f"that {names} are active"
    said: Event = product.wait_for("turbo-status", as_wanted, what, COMPILED_WITHIN_S)["kernelBypass"]
    assert said["active"] == bool(names)
    assert said["mode"] == ("native" if names else None)
    return said


def await_reason(product: Product, reason: str) -> None:
    """Until nothing is active, for this reason."""

    def as_wanted(answer: Event) -> bool:
        bypass = answer["kernelBypass"]
        return not bypass["active"] and bypass["reason"] == reason

    product.wait_for("turbo-status", as_wanted, reason)


def states(said: Event) -> dict[str, str | None]:
    return {row["interface"]: row["reason"] for row in said["attached"]}


def links_of(name: str) -> list[str]:
    return [program.mode for program in interface(name).xdp]


def mine_until_captured(lab: Lab, product: Product, stream: JsonStream) -> None:
    """Blocks until the connection over a wire that was away is there again; each is told all the same."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        block_hash = lab.mine()
        stream.wait_for_hashes("proven", [block_hash])
        if ways_to(product, block_hash) >= WAYS:
            return
        assert time.monotonic() < give_up, product.log_tail()


def subscriber_of(product: Product) -> JsonStream:
    """Once blocks can be relayed."""
    product.wait_until_healthy()
    return JsonStream(product.stream)


def mirrors() -> list[Leftover]:
    """The private links that carry the mirror, not those that the fan-out's programs are parked on."""
    return [link for link in ours() if any(one.program == "to_xsk" for one in interface(f"{link.name[:-1]}b").xdp)]


def test_of_two_interfaces_one_may_be_deleted_and_made_again_and_the_other_never_notices(lab: Lab) -> None:
    with lab.product("alpha,beta") as product, ExitStack() as stack:
        product.wait_until_healthy()
        assert await_active(product, "alpha", "beta")["reason"] is None
        product.wait_for_log("Capture at work")  # what is attached is active; the relay may still have to take it up
        stream = stack.enter_context(JsonStream(product.stream))
        mined = [lab.mine()]
        wait_until_captured(product, mined[0])
        before = bypass_of(product)["ingest"]["announcements"]

        lab.near.delete_link("alpha")
        said = await_active(product, "beta")
        assert states(said) == {"alpha": "interface alpha: No such device", "beta": None}
        assert said["reason"] == "interface alpha: No such device"
        for _ in range(3):
            mined.append(lab.mine())
            wait_until_captured(product, mined[-1])

        lab.lay("alpha")
        assert await_active(product, "alpha", "beta")["reason"] is None
        mined.append(lab.mine())
        wait_until_captured(product, mined[-1])
        stream.wait_for_hashes("proven", mined)
        assert stream.hashes("proven") == mined
        assert bypass_of(product)["ingest"]["announcements"] > before + 3

        lab.near.set_link("beta", state="down")
        assert await_active(product, "alpha")["reason"] == "interface beta is down"
        mine_until_captured(lab, product, stream)
        active = [line["interface"] for line in logged(product, "Kernel bypass active")]
        assert sorted(active) == ["alpha", "alpha", "beta"]
        assert len(logged(product, "Capture at work")) == 1
        assert product.stop() == 0
    assert (links_of("alpha"), links_of("beta"), ours()) == ([], [], [])


def test_through_all_that_happens_to_an_interface_the_feed_goes_on_and_the_capture_comes_back(lab: Lab) -> None:
    with lab.product("alpha") as product, subscriber_of(product) as stream:
        await_active(product, "alpha")
        mine_until_captured(lab, product, stream)

        lab.near.set_link("alpha", state="down")
        await_reason(product, "interface alpha is down")
        stream.wait_for_hashes("proven", [lab.mine()])
        lab.near.set_link("alpha", state="up")
        await_active(product, "alpha")
        mine_until_captured(lab, product, stream)
        assert len(logged(product, "Kernel bypass active")) == 1

        lab.near.set_link("alpha", state="down")
        lab.near.set_link("alpha", ifname="gamma", state="up")
        await_reason(product, "interface alpha: No such device")
        stream.wait_for_hashes("proven", [lab.mine()])
        assert links_of("gamma") == []
        lab.near.set_link("gamma", state="down")
        lab.near.set_link("gamma", ifname="alpha", state="up")
        await_active(product, "alpha")
        mine_until_captured(lab, product, stream)

        (mirror,) = mirrors()
        lab.near.delete_link(mirror.name)
        product.wait_for_log("Capture at work", occurrences=2, timeout_s=COMPILED_WITHIN_S)
        await_active(product, "alpha")
        mine_until_captured(lab, product, stream)
        sequences = [one["seq"] for one in stream.events]
        assert sequences == list(range(sequences[0], sequences[0] + len(sequences)))
        assert product.stop() == 0
    assert (links_of("alpha"), ours()) == ([], [])


def test_whoever_is_killed_nothing_stays_on_either_interface_and_the_next_cleans_the_rest(lab: Lab) -> None:
    with lab.product("alpha,beta") as product, subscriber_of(product) as stream:
        await_active(product, "alpha", "beta")
        first = {entry.name for entry in ours()}
        kill_and_await(product, "bypass")
        stream.wait_for_hashes("proven", [lab.mine()])
        product.wait_for_log("Removed what a killed run had left")
        product.wait_for_log("Capture at work", occurrences=2, timeout_s=COMPILED_WITHIN_S)
        await_active(product, "alpha", "beta")
        assert leftovers() == []
        assert {entry.name for entry in ours()}.isdisjoint(first)
        mine_until_captured(lab, product, stream)

        kill_and_await(product, "relay")
        product.wait_for_log("Capture at work", occurrences=3)
        mine_until_captured(lab, product, stream)

        pids = all_processes(product)
        os.kill(product.pid, signal.SIGKILL)
        until(lambda: not any(map(alive, pids.values())), "all children's end")
    assert product.running is False
    until(lambda: not links_of("alpha") and not links_of("beta"), "the programs' end")
    assert leftovers()  # the mirror's link by its owner's mark, and those that the fan-out is parked on

    with lab.product("alpha,beta") as product:
        product.wait_until_healthy()
        product.wait_for_log("Removed what a killed run had left")
        await_active(product, "alpha", "beta")
        assert len(mirrors()) == 1
        assert leftovers() == []
        product.kill()  # everything at once
    until(lambda: not links_of("alpha") and not links_of("beta"), "the programs' end")


def test_unless_told_otherwise_it_is_those_that_lead_to_the_node_and_to_the_internet(lab: Lab) -> None:
    with IPRoute(groups=0) as route:
        gateway = {"gateway": ADDRESSES["beta"][1].split("/")[0], "oif": socket.if_nametoindex("beta")}
        route.route("add", dst="default", **gateway)
    with lab.product("", "alpha") as product:
        product.wait_until_healthy()
        await_active(product, "alpha", "beta")
        product.wait_for_log("Capture at work")
        wait_until_captured(product, lab.mine())
        lab.near.delete_link("alpha")  # the node is now on the way to the internet, which is another's
        said = await_active(product, "beta")
        assert states(said)["beta"] is None
        lab.lay("alpha")
        await_active(product, "alpha", "beta")
        rows: list[dict[str, Any]] = [json.loads(line) for line in product.log if "Kernel bypass active" in line]
        assert [row["interface"] for row in rows].count("beta") == 1
        assert product.stop() == 0
