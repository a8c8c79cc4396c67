"""Next hops against the kernel's own tables: what is found, what isn't, and what is told when it changes."""

from __future__ import annotations

import os
import select
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest
from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types

from tests.net.netns import Namespace, Veth, veth_pair
from tests.net.slowness import SLOWNESS
from xdp import neighbours
from xdp.datagrams import NextHop, packed
from xdp.neighbours import NextHops

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces and links")
PATIENCE_S = 5.0 * SLOWNESS
US, PEER, FAR_AWAY = packed("10.60.0.1"), packed("10.60.0.2"), packed("192.0.2.7")
US6, PEER6 = packed("fd60::1"), packed("fd60::2")


@pytest.fixture
def pair() -> Iterator[tuple[Veth, Veth]]:
    """Our end, in the namespace that the test is in, and a peer that answers."""
    with Namespace() as near, Namespace() as far, near.entered():
        yield veth_pair(near, far, addresses=("10.60.0.1/24", "10.60.0.2/24"))


@pytest.fixture
def hops(pair: tuple[Veth, Veth]) -> Iterator[NextHops]:
    with NextHops() as made:
        yield made


def news(hops: NextHops, address: bytes) -> None:
    """Until there is news of an address."""
    give_up = time.monotonic() + PATIENCE_S
    while address not in hops.poll():
        left = give_up - time.monotonic()
        assert left > 0, "no news"
        select.select([hops], [], [], left)


def found(hops: NextHops, address: bytes) -> NextHop:
    """What it resolves to, once the kernel has found the neighbour out."""
    give_up = time.monotonic() + PATIENCE_S
    while (hop := hops.resolve(address)) is None:
        left = give_up - time.monotonic()
        assert left > 0, "not resolved"
        select.select([hops], [], [], min(left, 0.05))
        hops.poll()
    return hop


def change(what: str, command: str, **fields: Any) -> None:
    with IPRoute(groups=0) as route:
        getattr(route, what)(command, **fields)


def test_a_neighbour_on_the_link_is_found_out_by_the_kernel_and_told(pair: tuple[Veth, Veth], hops: NextHops) -> None:
    near, far = pair
    assert hops.resolve(PEER) is None  # nobody has asked yet
    news(hops, PEER)
    assert hops.resolve(PEER) == NextHop(near.index, near.mac, far.mac, US)


def test_somebody_behind_a_gateway_is_reached_by_its_mac_address(pair: tuple[Veth, Veth], hops: NextHops) -> None:
    near, far = pair
    assert hops.resolve(FAR_AWAY) is None
    change("route", "add", dst="192.0.2.0/24", gateway="10.60.0.2")
    news(hops, FAR_AWAY)
    assert found(hops, FAR_AWAY) == NextHop(near.index, near.mac, far.mac, US)


def test_ipv6_is_followed_the_same_way_and_link_local_is_not() -> None:
    with Namespace() as space, Namespace() as other, space.entered():
        near, far = veth_pair(space, other, addresses=("fd60::1/64", "fd60::2/64"))
        with NextHops() as hops:
            assert found(hops, PEER6) == NextHop(near.index, near.mac, far.mac, US6)
            assert hops.resolve(packed("fe80::2")) is None
            with pytest.raises(ValueError, match="link-local"):
                packed("fe80::2%near")


@pytest.mark.parametrize("address", ["127.0.0.1", "10.60.0.1", "::1", "224.0.0.1", "10.60.0.255", "203.0.113.9"])
def test_what_no_frame_leads_to_has_no_next_hop(hops: NextHops, address: str) -> None:
    assert hops.resolve(packed(address)) is None


def test_a_neighbour_that_changes_its_mac_address_is_told_and_corrected(
    pair: tuple[Veth, Veth], hops: NextHops
) -> None:
    near, far = pair
    assert found(hops, PEER).destination_mac == far.mac
    other = "02:00:00:00:00:77"
    change("neigh", "replace", dst="10.60.0.2", lladdr=other, ifindex=near.index, state=0x80)
    news(hops, PEER)
    assert found(hops, PEER).destination_mac == bytes.fromhex(other.replace(":", ""))


def test_a_neighbour_that_is_gone_is_told_and_asked_for_again(pair: tuple[Veth, Veth], hops: NextHops) -> None:
    near, far = pair
    found(hops, PEER)
    change("neigh", "del", dst="10.60.0.2", ifindex=near.index)
    news(hops, PEER)
    assert found(hops, PEER).destination_mac == far.mac


def test_a_route_withdrawn_and_one_that_comes_are_told(pair: tuple[Veth, Veth], hops: NextHops) -> None:
    change("route", "add", dst="192.0.2.0/24", gateway="10.60.0.2")
    found(hops, FAR_AWAY)
    found(hops, PEER)
    hops.poll()
    change("route", "del", dst="192.0.2.0/24")
    news(hops, FAR_AWAY)
    assert hops.resolve(FAR_AWAY) is None
    change("route", "add", dst="198.51.100.0/24", gateway="10.60.0.2")
    change("route", "add", dst="192.0.2.0/24", gateway="10.60.0.2")
    news(hops, FAR_AWAY)
    assert found(hops, FAR_AWAY)


def test_a_route_to_somewhere_else_is_no_news(pair: tuple[Veth, Veth], hops: NextHops) -> None:
    found(hops, PEER)
    hops.poll()
    change("route", "add", dst="198.51.100.0/24", gateway="10.60.0.2")
    select.select([hops], [], [], PATIENCE_S)
    assert hops.poll() == set()
    change("route", "add", dst="::/0", type="blackhole", family=socket.AF_INET6)  # of the other family, likewise
    select.select([hops], [], [], PATIENCE_S)
    assert hops.poll() == set()
    change("route", "add", dst="0.0.0.0/0", gateway="10.60.0.2")
    assert hops.poll() == {PEER}


def test_an_address_of_ours_that_is_only_confirmed_is_no_news_but_one_that_changes_is(
    pair: tuple[Veth, Veth], hops: NextHops
) -> None:
    """As a router does it with IPv6's, every few minutes or seconds."""
    found(hops, PEER)
    ours: dict[str, Any] = {"index": pair[0].index, "address": "10.60.0.1", "prefixlen": 24}
    change("addr", "replace", **ours, preferred_lft=3_600, valid_lft=7_200)
    assert PEER in hops.poll()
    for lifetime_s in (3_601, 3_602):
        change("addr", "replace", **ours, preferred_lft=lifetime_s, valid_lft=7_200)
    assert hops.poll() == set()
    change("addr", "replace", **ours, preferred_lft=0, valid_lft=7_200)  # deprecated: the kernel may prefer another
    assert PEER in hops.poll()
    change("addr", "del", **ours)
    assert PEER in hops.poll()


def test_an_interface_that_goes_down_or_away_is_told(pair: tuple[Veth, Veth], hops: NextHops) -> None:
    near, _ = pair
    found(hops, PEER)
    near.namespace.set_link(near.name, state="down")
    news(hops, PEER)
    assert hops.resolve(PEER) is None
    near.namespace.set_link(near.name, state="up")
    news(hops, PEER)
    assert found(hops, PEER)
    near.namespace.delete_link(near.name)
    news(hops, PEER)
    assert hops.resolve(PEER) is None


def test_an_address_that_is_forgotten_is_no_news_any_more(pair: tuple[Veth, Veth], hops: NextHops) -> None:
    near, _ = pair
    found(hops, PEER)
    hops.forget(PEER)
    hops.forget(PEER)
    near.namespace.set_link(near.name, state="down")
    select.select([hops], [], [], PATIENCE_S)
    assert hops.poll() == set()


def test_a_neighbour_in_use_is_checked_again(pair: tuple[Veth, Veth], hops: NextHops) -> None:
    near, far = pair
    found(hops, PEER)
    stale = "02:00:00:00:00:99"
    change("neigh", "replace", dst="10.60.0.2", lladdr=stale, ifindex=near.index, state=0x04)
    news(hops, PEER)
    assert found(hops, PEER).destination_mac.hex(":") == stale
    # Stale and wrong: the kernel finds out once it is told that somebody sends there.
    with open(f"/proc/sys/net/ipv4/neigh/{near.name}/delay_first_probe_time", "w") as delay:
        delay.write("0")
    with open(f"/proc/sys/net/ipv4/neigh/{near.name}/retrans_time_ms", "w") as pause:
        pause.write("20")
    hops.keep_alive()
    give_up = time.monotonic() + PATIENCE_S
    while (hop := hops.resolve(PEER)) is None or hop.destination_mac != far.mac:
        assert time.monotonic() < give_up
        select.select([hops], [], [], 0.05)
        hops.poll()


def test_no_more_addresses_are_followed_than_the_limit(hops: NextHops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "LIMIT", 2)
    hops.resolve(PEER)
    hops.resolve(FAR_AWAY)
    hops.resolve(PEER)
    with pytest.raises(ValueError, match="2 addresses are followed already"):
        hops.resolve(packed("10.60.0.3"))


def test_news_of_others_than_the_kernel_is_not_listened_to(pair: tuple[Veth, Veth], hops: NextHops) -> None:
    found(hops, PEER)
    hops.poll()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as liar:
        liar.bind((0, 0))
        port = hops._news.getsockname()[0]
        message = bytes.fromhex("24000000180000000000000000000000") + bytes(20)
        liar.sendto(message, (port, 0))
        select.select([hops], [], [], PATIENCE_S)
        assert hops.poll() == set()
