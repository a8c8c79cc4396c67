"""What Sprint adds to the host's network for the bypass, and how it goes away again even when its owner was killed.

Two things outlive a killed process: private veth pairs (the mirror, and the fan-out's parking places), and, on kernels
without TCX, the clsact filter that clones into the mirror. Both bear who made them (a prefix, and an owner's mark: pid,
the time it started, its pid namespace), so that the next start and `sprint doctor --clean` find what is orphaned, by
leftovers() and clean().

Rule: nothing is changed or removed that doesn't bear our mark, nor while its owner lives or can't be judged. All in the
network namespace of the calling thread; nothing is kept open (see interfaces about pyroute2).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import socket
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdp.interfaces import LinkMonitor, rtnetlink

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "spr"
_PAIR_NAME = re.compile(rf"{PREFIX}([0-9a-f]{{1,6}})-([0-9a-f]{{1,3}})([ab])")
"""Owner's pid and a number, hexadecimal (pid_max is 2**22), then which end: at most 15 characters (IFNAMSIZ)."""
GROUP = 0x53505231
"""IFLA_GROUP of our links, "SPR1": set as the link is made, where the alias can only follow a moment later."""
_MARK = re.compile(r"bitcoin-sprint pid=(\d+) started=(\d+) pidns=(\d+)(?: (clsact))?")
MIRROR_MTU = 3_498
"""Nearly the largest that veth takes with a native program that knows no fragments: a frame must fit one page."""
PARKED_MTU = 1_500
RUNNING_TIMEOUT_S = 2.0
_INGRESS, _EGRESS = 0xFFFFFFF2, 0xFFFFFFF3  # TC_H_CLSACT with TC_H_MIN_INGRESS, …_EGRESS
_ETH_P_ALL = 3
_GONE = {errno.ENODEV, errno.ENOENT, errno.EINVAL}


class OwnerState(Enum):
    """Whether the process that made something is still there."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"
    """Its pid is of another pid namespace (a container's), or its mark isn't written yet."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, told from a later one of the same pid."""

    pid: int
    started: int
    """Clock ticks after boot (proc(5), stat, field 22)."""
    pid_namespace: int

    @classmethod
    def this_process(cls) -> Owner:
        """The calling one."""
        return cls(os.getpid(), _started(os.getpid()) or 0, _pid_namespace())

    def __str__(self) -> str:
        return f"bitcoin-sprint pid={self.pid} started={self.started} pidns={self.pid_namespace}"

    @property
    def state(self) -> OwnerState:
        """As far as it can be told from here."""
        if self.pid_namespace != _pid_namespace():
            return OwnerState.UNKNOWN
        return OwnerState.ALIVE if _started(self.pid) == self.started else OwnerState.DEAD


def _pid_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def _started(pid: int) -> int | None:
    """When the process of that pid started; None when there is none, or only a zombie."""
    try:
        # The name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in {"Z", "X"} else int(fields[19])


# ── the mirror's veth pair ──


@dataclass(frozen=True, slots=True)
class MirrorLink:
    """A private veth pair. The mirror's: tc clones into `near`; native XDP on `far` redirects what comes out of it."""

    near: str
    near_index: int
    far: str
    far_index: int
    mtu: int

    def delete(self) -> None:
        """Remove both ends; no error when they are gone."""
        _delete_link(self.near_index, self.near)


@contextlib.contextmanager
def mirror_link(mtu: int = MIRROR_MTU, owner: Owner | None = None) -> Iterator[MirrorLink]:
    """create_mirror(), deleted at the end."""
    link = create_mirror(mtu, owner)
    try:
        yield link
    finally:
        link.delete()


def create_mirror(mtu: int = MIRROR_MTU, owner: Owner | None = None) -> MirrorLink:
    """Make a veth pair, without IPv6, one queue, up and ready to carry; `owner` is this process unless named.

    Raises OSError: EPERM without CAP_NET_ADMIN, EOPNOTSUPP without veth, ETIMEDOUT when it doesn't come up.
    """
    owner = owner or Owner.this_process()
    with LinkMonitor() as monitor, rtnetlink("mirror link") as route:
        link = _add_pair(route, owner, mtu)
        near = link.near
        try:
            for name, index in ((link.far, link.far_index), (near, link.near_index)):
                _sign(route, name, index, owner)
                route.link("set", index=index, state="up")
            # An end whose carrier the kernel hasn't noticed yet drops what it should send, silently.
            give_up = time.monotonic() + RUNNING_TIMEOUT_S
            waiting = select.poll()
            waiting.register(monitor, select.POLLIN)
            while any(_operstate(route, index) != "UP" for index in (link.near_index, link.far_index)):
                if time.monotonic() > give_up:
                    raise OSError(errno.ETIMEDOUT, f"mirror link {near}: no carrier after {RUNNING_TIMEOUT_S:g} s")
                waiting.poll(50)
                monitor.poll()
        except BaseException:
            link.delete()
            raise
    return link


def create_parked(owner: Owner | None = None) -> MirrorLink:
    """A veth pair that carries nothing: `near` is up, for a program to be attached to; `far` isn't.

    So no packet ever comes in at `near`. Raises OSError as create_mirror() does.
    """
    owner = owner or Owner.this_process()
    with rtnetlink("parked link") as route:
        link = _add_pair(route, owner, PARKED_MTU)
        try:
            for name, index in ((link.far, link.far_index), (link.near, link.near_index)):
                _sign(route, name, index, owner)
            route.link("set", index=link.near_index, state="up")
        except BaseException:
            link.delete()
            raise
    return link


def _add_pair(route: Any, owner: Owner, mtu: int) -> MirrorLink:
    taken = {link.get("ifname") for link in route.get_links()}
    stems = (f"{PREFIX}{owner.pid:x}-{number:x}" for number in range(1 << 12))
    near, far = next((f"{stem}a", f"{stem}b") for stem in stems if not {f"{stem}a", f"{stem}b"} & taken)
    ends = {"mtu": mtu, "group": GROUP, "num_tx_queues": 1, "num_rx_queues": 1}
    route.link("add", ifname=near, kind="veth", peer={"ifname": far, **ends}, **ends)
    return MirrorLink(near, socket.if_nametoindex(near), far, socket.if_nametoindex(far), mtu)


def _sign(route: Any, name: str, index: int, owner: Owner) -> None:
    """The owner's mark; and no IPv6, which would speak by itself."""
    route.link("set", index=index, ifalias=str(owner))
    _switch_off_ipv6(name)


def _operstate(route: Any, index: int) -> str | None:
    (link,) = route.get_links(index)
    state: str | None = link.get("operstate")
    return state


def _switch_off_ipv6(name: str) -> None:
    """Or its neighbour discovery would arrive in the socket. /proc/sys/net shows the calling thread's namespace."""
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")


def _delete_link(index: int, name: str) -> None:
    try:
        with rtnetlink(f"deleting {name}") as route:
            # Not by index alone, which may be another's by now.
            if any(link.get("ifname") == name and link.get("group") == GROUP for link in list(route.get_links(index))):
                route.link("del", index=index)
    except OSError as error:
        if error.errno not in _GONE:
            raise


# ── clsact, for kernels without TCX ──


@dataclass(frozen=True, slots=True)
class IngressFilter:
    """A BPF program of ours on an interface's clsact ingress."""

    interface_index: int
    priority: int
    handle: int
    name: str
    """What the kernel keeps for us: the owner's mark, and whether the qdisc is ours too."""

    def remove(self) -> None:
        """Remove it, and the qdisc if we made that and nobody else uses it; no error when they are gone."""
        index = self.interface_index
        try:
            with rtnetlink(f"removing the filter on interface {index}") as route:
                info = self.priority << 16 | socket.htons(_ETH_P_ALL)
                if (self.priority, self.handle, self.name) in _bpf_filters(route, index):
                    route.tc("del-filter", "bpf", index=index, handle=self.handle, info=info, parent=_INGRESS)
                mark = _MARK.fullmatch(self.name)
                used = [*route.get_filters(index, parent=_INGRESS), *route.get_filters(index, parent=_EGRESS)]
                if mark is not None and mark[4] and not used:
                    route.tc("del", "clsact", index=index)
        except OSError as error:
            if error.errno not in _GONE:
                raise


@contextlib.contextmanager
def ingress_filter(index: int, program_fd: int, owner: Owner | None = None) -> Iterator[IngressFilter]:
    """add_ingress_filter(), removed at the end."""
    added = add_ingress_filter(index, program_fd, owner)
    try:
        yield added
    finally:
        added.remove()


def add_ingress_filter(index: int, program_fd: int, owner: Owner | None = None) -> IngressFilter:
    """Run a SCHED_CLS program (direct action) on what comes in on an interface; it outlives this process.

    It runs before the filters that are there, where their priorities leave room, and lets them run by returning
    TC_ACT_UNSPEC. The clsact qdisc is made if there is none. Raises OSError.
    """
    owner = owner or Owner.this_process()
    name = str(owner)
    with rtnetlink(f"tc ingress of interface {index}") as route:
        if not any(qdisc.get("kind") == "clsact" for qdisc in list(route.get_qdiscs(index=index))):
            route.tc("add", "clsact", index=index)
            name += " clsact"
        before = set(_bpf_filters(route, index))
        # Behind a filter that accepts, ours would never run; nor may it share a priority, and its fate, with another.
        priorities = [priority for priority, *_ in _filters(route, index)] or [2]
        where = {"index": index, "parent": _INGRESS, "protocol": _ETH_P_ALL, "prio": min(priorities) - 1}
        where["prio"] = where["prio"] or max(priorities) + 1
        try:
            route.tc("add-filter", "bpf", fd=program_fd, name=name, direct_action=True, **where)
        except BaseException:
            if name.endswith(" clsact"):
                route.tc("del", "clsact", index=index)
            raise
        (added,) = set(_bpf_filters(route, index)) - before
    return IngressFilter(index, *added)


def _filters(route: Any, index: int) -> Iterator[tuple[int, int, Any]]:
    """Priority, handle and message of each filter on an interface's ingress."""
    for message in route.get_filters(index, parent=_INGRESS):
        yield message["info"] >> 16, message["handle"], message


def _bpf_filters(route: Any, index: int) -> Iterator[tuple[int, int, str]]:
    """Priority, handle and name of each BPF filter on an interface's ingress."""
    for priority, handle, message in _filters(route, index):
        options = message.get_attr("TCA_OPTIONS")
        if message.get("kind") == "bpf" and handle and options is not None:
            yield priority, handle, options.get_attr("TCA_BPF_NAME") or ""


# ── what a killed run left ──


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something of ours on this host; whether it is orphaned is `state`."""

    name: str
    """Of the link, or of the interface that the filter is on."""
    index: int
    owner: Owner | None
    state: OwnerState
    filter: IngressFilter | None = None
    """None for a link."""

    def __str__(self) -> str:
        what = "tc filter on" if self.filter else "private link"
        return f"{what} {self.name}, owner {self.owner or 'unknown'}: {self.state.value}"


def ours() -> list[Leftover]:
    """Everything that bears our mark in this network namespace, whoever of us it belongs to."""
    found: dict[str, Leftover] = {}
    filters = []
    with rtnetlink("looking for what is ours") as route:
        with_clsact = {qdisc["index"] for qdisc in list(route.get_qdiscs()) if qdisc.get("kind") == "clsact"}
        for link in list(route.get_links()):
            name, index = link.get("ifname"), link["index"]
            named = _PAIR_NAME.fullmatch(name)
            if named and link.get(("linkinfo", "kind")) == "veth" and link.get("group") == GROUP:
                owner = _owner(link.get("ifalias"))
                state = owner.state if owner else _state_of_unmarked(int(named[1], 16))
                if named[3] == "a" or name[:-1] not in found:
                    found[name[:-1]] = Leftover(name, index, owner, state)
            for priority, handle, label in list(_bpf_filters(route, index)) if index in with_clsact else ():
                owner = _owner(label)
                if owner is not None:
                    entry = IngressFilter(index, priority, handle, label)
                    filters.append(Leftover(name, index, owner, owner.state, entry))
    return filters + list(found.values())


def leftovers() -> list[Leftover]:
    """What is ours and orphaned."""
    return [entry for entry in ours() if entry.state is OwnerState.DEAD]


def clean() -> list[Leftover]:
    """Remove what is orphaned, and return it. Raises OSError when the kernel refuses; what was removed stays so."""
    orphaned = leftovers()
    for entry in orphaned:
        if entry.filter is not None:
            entry.filter.remove()
        else:
            _delete_link(entry.index, entry.name)
    return orphaned


def _owner(mark: str | None) -> Owner | None:
    match = _MARK.fullmatch(mark or "")
    return Owner(int(match[1]), int(match[2]), int(match[3])) if match else None


def _state_of_unmarked(pid: int) -> OwnerState:
    """Of a link whose maker hadn't written the mark: either it is about to, or it was killed just then."""
    return OwnerState.DEAD if _started(pid) is None else OwnerState.UNKNOWN
