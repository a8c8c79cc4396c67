"""What a killed run left on the host: found and removed, and nothing else touched."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types

from tests.net.netns import Namespace, Veth, veth_pair
from xdp.links import (
    GROUP,
    Owner,
    OwnerState,
    clean,
    create_mirror,
    create_parked,
    leftovers,
    mirror_link,
    ours,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces and links")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def space() -> Iterator[Namespace]:
    """A namespace that the test is in."""
    with Namespace() as made, made.entered():
        yield made


@pytest.fixture
def pair(space: Namespace) -> tuple[Veth, Veth]:
    """A "NIC" in the test's namespace, and what it is plugged into."""
    return veth_pair(space, space, ("nic", "wire"))


def names() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def qdiscs(index: int) -> list[str]:
    with IPRoute(groups=0) as route:
        return [qdisc.get("kind") for qdisc in route.get_qdiscs(index=index)]


def dead_owner() -> Owner:
    """A process that has been, in this pid namespace."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return Owner(child, 1, Owner.this_process().pid_namespace)


KILLED = """
import os, sys
from xdp.links import create_mirror, add_ingress_filter
from tests.net.tiny_bpf import EXIT, SCHED_CLS, load_program, mov
mirror = create_mirror()
with load_program(SCHED_CLS, mov(0, -1), EXIT) as program:
    add_ingress_filter(int(sys.argv[1]), program)
print(mirror.near, flush=True)
sys.stdin.read()
"""


@needs_root
def test_what_a_killed_process_left_is_found_and_removed_and_nothing_while_it_lived(pair: tuple[Veth, Veth]) -> None:
    nic = pair[0]
    options = {"stdin": -1, "stdout": -1, "cwd": ROOT, "text": True}
    process = nic.namespace.start([sys.executable, "-c", KILLED, str(nic.index)], **options)
    with process, mirror_link() as living:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert leftovers() == []
        assert clean() == []
        assert {entry.name for entry in ours()} == {"nic", name, living.near}
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = leftovers()
        assert {(entry.name, entry.filter is not None) for entry in found} == {("nic", True), (name, False)}
        assert all(f"pid={process.pid}" in str(entry) for entry in found)
        assert clean() == found
        assert clean() == []
        assert names() == {"lo", "nic", "wire", living.near, living.far}
        assert "clsact" not in qdiscs(nic.index)


@needs_root
def test_a_killed_fan_outs_parked_links_are_removed(space: Namespace) -> None:
    living = create_parked()
    dead = [create_parked(dead_owner()) for _ in range(3)]
    assert {entry.name for entry in clean()} == {link.near for link in dead}
    assert names() == {"lo", living.near, living.far}
    living.delete()
    assert names() == {"lo"}


@needs_root
def test_a_zombie_counts_as_dead(space: Namespace) -> None:
    child = os.fork()
    if child == 0:
        create_mirror()
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    try:
        assert len(clean()) == 1
    finally:
        os.waitpid(child, 0)


def like_ours(space: Namespace, name: str, peer: str, **attributes: object) -> None:
    with IPRoute(groups=0) as route:
        alias = attributes.pop("ifalias", None)
        both = {"kind": "veth", **attributes}
        route.link("add", ifname=name, peer={"ifname": peer, **attributes}, **both)
        if alias:
            route.link("set", ifname=name, index=socket.if_nametoindex(name), ifalias=alias)


@needs_root
@pytest.mark.parametrize(
    ("name", "peer", "group", "alias"),
    [
        ("spr1a-0a", "spr1a-0b", 0, True),
        ("sprite0", "sprite1", GROUP, True),
        ("spr1a-0", "eth7", GROUP, True),
        ("sprzz-0a", "sprzz-0b", GROUP, True),
        ("veth1", "veth2", GROUP, True),
    ],
)
def test_what_only_looks_like_ours_is_never_touched(
    space: Namespace, name: str, peer: str, group: int, alias: bool
) -> None:
    like_ours(space, name, peer, group=group, ifalias=str(dead_owner()) if alias else None)
    assert ours() == []
    assert clean() == []
    assert names() == {"lo", name, peer}


@needs_root
def test_a_bridge_with_our_name_and_mark_is_never_touched(space: Namespace) -> None:
    with IPRoute(groups=0) as route:
        route.link("add", ifname="spr1a-0a", kind="bridge", group=GROUP)
    assert clean() == []
    assert names() == {"lo", "spr1a-0a"}


@needs_root
def test_an_owner_of_another_pid_namespace_is_not_judged(space: Namespace) -> None:
    dead = dead_owner()
    with mirror_link(owner=Owner(dead.pid, dead.started, dead.pid_namespace + 1)):
        (entry_,) = ours()
        assert entry_.state is OwnerState.UNKNOWN
        assert clean() == []
        assert len(names()) == 3


@needs_root
def test_a_later_process_of_the_same_pid_is_another_owner(space: Namespace) -> None:
    this = Owner.this_process()
    assert this.state is OwnerState.ALIVE
    with mirror_link(owner=Owner(this.pid, this.started - 1, this.pid_namespace)) as mirror:
        assert [entry_.name for entry_ in clean()] == [mirror.near]


@needs_root
def test_a_pair_whose_maker_was_killed_before_it_could_be_marked_is_removed(space: Namespace) -> None:
    like_ours(space, f"spr{os.getpid():x}-0a", f"spr{os.getpid():x}-0b", group=GROUP)
    dead = dead_owner().pid
    like_ours(space, f"spr{dead:x}-0a", f"spr{dead:x}-0b", group=GROUP)
    assert [entry_.state for entry_ in ours()] == [OwnerState.UNKNOWN, OwnerState.DEAD]
    assert [entry_.name for entry_ in clean()] == [f"spr{dead:x}-0a"]
