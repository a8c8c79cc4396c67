"""Which interfaces the kernel bypass takes when nobody names any."""

from __future__ import annotations

import select
import socket
from typing import TYPE_CHECKING

import pytest

from sprint import uplinks
from sprint.addresses import Address
from sprint.settings import MAX_INTERFACES
from sprint.tiers import NS_PER_S
from sprint.uplinks import LAST_LOOK_NS, SOMEWHERE_ELSE, Uplinks, default_interfaces
from xdp.interfaces import interface_towards

if TYPE_CHECKING:
    from collections.abc import Iterator

NODE, OTHER_NODE, HERE = Address("198.51.100.7", 8333), Address("2001:db8:7::1", 8333), Address("127.0.0.1", 8333)


class Host:
    """Interfaces and where each address leads, instead of this host's own."""

    def __init__(self) -> None:
        self.routes = {HERE.host: "lo"}
        self.names = {"lo", "wan", "lan", "six"}

    def interface_towards(self, address: str) -> str:
        if self.routes.get(address) not in self.names:
            raise OSError(101, "Network is unreachable")
        return self.routes[address]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host()
    monkeypatch.setattr(uplinks, "interface_towards", made.interface_towards)
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(sorted(made.names))))
    return made


def test_it_is_those_that_lead_to_each_node_and_to_the_internet_each_once_and_never_lo(host: Host) -> None:
    host.routes |= {NODE.host: "lan", OTHER_NODE.host: "lan", SOMEWHERE_ELSE[0]: "wan", SOMEWHERE_ELSE[1]: "six"}
    assert default_interfaces([HERE, NODE, OTHER_NODE]) == (("lan", "wan", "six"), ())


def test_for_a_node_on_this_host_it_is_the_one_that_leads_to_the_node_s_peers(host: Host) -> None:
    host.routes[SOMEWHERE_ELSE[0]] = "wan"
    assert default_interfaces([HERE]) == (("wan",), ())


def test_a_node_that_nothing_leads_to_is_told_and_the_others_are_found(host: Host) -> None:
    host.routes[NODE.host] = "lan"
    names, problems = default_interfaces([OTHER_NODE, NODE])
    assert names == ("lan",)
    assert problems == ("nothing leads to 2001:db8:7::1: Network is unreachable",)


def test_a_name_is_resolved_and_all_its_addresses_count(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(name: str, port: int, **options: int) -> list[tuple[object, ...]]:
        if options.get("flags", 0):
            raise socket.gaierror("not numeric")
        assert name == "node.example"
        return [(2, 1, 6, "", (NODE.host, port)), (10, 1, 6, "", (OTHER_NODE.host, port, 0, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    host.routes |= {NODE.host: "lan", OTHER_NODE.host: "six"}
    assert default_interfaces([Address("node.example", 8333)]) == (("lan", "six"), ())


def test_a_name_without_an_address_is_told(host: Host) -> None:
    host.routes[SOMEWHERE_ELSE[0]] = "wan"
    names, problems = default_interfaces([Address("no-such-host.invalid", 8333)])
    assert names == ("wan",)
    assert problems[0].startswith("no-such-host.invalid can't be resolved: ")


def test_a_link_local_address_leads_where_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_interfaces([Address("fe80::1%lo", 8333)])[1] == ()
    monkeypatch.setattr(socket, "if_indextoname", lambda index: f"number {index}")
    assert interface_towards("fe80::1%7") == "number 7"


@pytest.fixture
def followed(host: Host) -> Iterator[Uplinks]:
    """Uplinks to NODE, which is behind lan, while the internet is behind wan."""
    host.routes |= {NODE.host: "lan", SOMEWHERE_ELSE[0]: "wan"}
    made = Uplinks([NODE])
    made.look(0)
    assert made.names == ("lan", "wan")
    yield made
    made.close()


def test_a_route_that_fails_takes_no_interface_from_the_list(followed: Uplinks, host: Host) -> None:
    del host.routes[NODE.host]
    followed.look(LAST_LOOK_NS)
    assert set(followed.names) == {"lan", "wan"}
    assert followed.problems == ("nothing leads to 198.51.100.7: Network is unreachable",)


def test_an_interface_that_is_deleted_is_awaited_while_nothing_else_leads_there(followed: Uplinks, host: Host) -> None:
    host.names.remove("lan")
    followed.look(LAST_LOOK_NS)
    assert followed.names == ("wan", "lan")
    host.routes[NODE.host] = "six"
    followed.look(2 * LAST_LOOK_NS)
    assert followed.names == ("six", "wan")
    assert followed.problems == ()


def test_routes_are_looked_at_every_ten_seconds_and_soon_after_a_change(followed: Uplinks, host: Host) -> None:
    now_ns = 0
    while followed._pause_ns < LAST_LOOK_NS or followed._look_ns <= now_ns:
        now_ns += NS_PER_S
        followed.look(now_ns)
    host.routes[NODE.host] = "six"
    followed.look(followed._look_ns - 1)
    assert "six" not in followed.names
    followed.look_soon(now_ns)
    followed.look(now_ns + NS_PER_S // 4)
    assert followed.names[0] == "six"


def test_there_are_never_more_than_eight_and_what_is_there_goes_first(host: Host) -> None:
    nodes = [Address(f"198.51.100.{number}", 8333) for number in range(12)]
    host.routes |= {node.host: f"eth{number}" for number, node in enumerate(nodes)}
    host.names |= set(host.routes.values())
    made = Uplinks(nodes)
    made.look(0)
    assert made.names == tuple(f"eth{number}" for number in range(MAX_INTERFACES))
    host.names.remove("eth0")
    made.look(LAST_LOOK_NS)
    assert made.names == tuple(f"eth{number}" for number in range(1, MAX_INTERFACES + 1))
    made.close()


def test_its_descriptor_tells_when_a_name_has_been_resolved(host: Host) -> None:
    made = Uplinks([Address("no-such-host.invalid", 8333)])
    made.look(0)
    assert made.problems == ()
    assert select.select([made], [], [], 20)[0]
    made.look(1)
    assert len(made.problems) == 1
    made.close()
