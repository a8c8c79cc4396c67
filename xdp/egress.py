"""The udp worker's half of the egress: which rung of the ladder serves each subscriber, and how that changes.

    LIVE_FRAMES  in the fan-out's table: the relay's runs reach him, nothing is left to do here
    AF_XDP       transmit() sends to him, from frames that stand ready
    SENDMMSG     neither: the caller's plain socket has to (sendmmsg.Multisend, or one by one)

An interface is on the first rung when its driver says that it can and a frame has been seen to leave by it; the one is
asked again by every tick(), the other by some. A subscriber whose next hop isn't known, or is none that frames lead to,
is on the last rung until poll() or tick() says otherwise. A relay that has stepped down takes its subscribers with it,
until an interface is proven anew and it has said that it sends again.

Nothing here blocks for longer than netlink's answers, and nothing raises for what the network does. Bounded by
SUBSCRIBERS. Needs the network namespace of the fan-out; one thread.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from xdp.egress_frames import RETRY_NS, Frames, Member
from xdp.fanout_maps import RUN_CPUS, SUBSCRIBERS, FanoutHandover, Rank, Sender, Step
from xdp.fanout_run import FanoutRun
from xdp.fanout_table import FanoutTable, TableFullError
from xdp.neighbours import NextHops
from xdp.netdev import XdpFeature, xdp_features
from xdp.pacing import pacing, slowest, tx_queues

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable
    from types import TracebackType

    from xdp.datagrams import NextHop

KEEP_ALIVE_NS = 20_000_000_000
"""Between two checks of the neighbours; the kernel's own patience with one is some 30 s (base_reachable_time)."""
RETRIES_A_TICK = 500
"""Of those whose way is unknown, at some ten microseconds each. What changes is told by events: this mends the rest."""

Change = tuple["Hashable", Step]
"""A subscriber, and the rung that serves him from now on."""


@dataclass
class _Interface:
    """What is known of one that frames leave by."""

    mac: bytes
    live: bool = False
    reason: str | None = None
    """Why it isn't."""


@final
class Egress:
    """Everybody who is served by UDP, each on the best rung that leads to him; a context manager."""

    def __init__(self, handover: FanoutHandover | None, source_port: int, source: bytes | None = None) -> None:
        """Without a handover there is no first rung.

        Frames come from `source_port`, and from the address `source`, of 4 or 16 bytes; None: from the one that the
        kernel prefers on the way to each subscriber. Raises OSError.
        """
        self._source_port = source_port
        self._source = source
        self._members: dict[Hashable, Member] = {}
        self._at: dict[bytes, set[Hashable]] = {}
        """Who is at an address."""
        self._interfaces: dict[int, _Interface] = {}
        self._frames: dict[int, Frames] = {}
        self._keep_alive_ns = self._retry_ns = 0
        self._now_ns = 0
        self._was_live = False
        self._link_news = 0
        self._changed = False
        """A link has changed since the table last vouched."""
        self._to_retry: list[Hashable] = []
        self.failed = 0
        """Frames of the second rung that the kernel didn't take."""
        with contextlib.ExitStack() as undo:
            self._hops = undo.enter_context(NextHops())
            self._table = undo.enter_context(FanoutTable(handover, source_port)) if handover else None
            self._run = undo.enter_context(FanoutRun(handover, Sender.WORKER)) if handover else None
            undo.callback(self._close_frames)
            self._undo = undo.pop_all()
        self._was_live = self._relay_is_live()

    # ── what is known ──

    @property
    def step(self) -> Step:
        """The best rung there is for anybody now."""
        if self._relay_is_live() and (not self._interfaces or any(i.live for i in self._interfaces.values())):
            return Step.LIVE_FRAMES
        return Step.AF_XDP if any(frames.transmitter for frames in self._frames.values()) else Step.SENDMMSG

    @property
    def reason(self) -> str | None:
        """Why somebody is on a lower rung than the first; None if nobody is known to be."""
        if self._table is None:
            return "no fan-out is loaded"
        if self._table.step(Sender.RELAY) is None:
            return "the relay makes no runs"
        if not self._relay_is_live():
            return "the relay's live frames have failed repeatedly"
        told = [f"{_name(index)}: {i.reason}" for index, i in self._interfaces.items() if i.reason]
        return "; ".join(told) or None

    def counts(self) -> dict[Step, int]:
        """Subscribers on each rung."""
        counted = dict.fromkeys(Step, 0)
        for member in self._members.values():
            counted[member.step] += 1
        return counted

    def _relay_is_live(self) -> bool:
        return self._table is not None and self._table.step(Sender.RELAY) is Step.LIVE_FRAMES

    # ── subscribers ──

    def join(self, key: Hashable, address: bytes, port: int, rank: Rank) -> Step:
        """Serve an address of 4 or 16 bytes from now on, `key` being its name: by which rung.

        Raises ValueError for a key that is there, and beyond SUBSCRIBERS.
        """
        if key in self._members:
            raise ValueError(f"subscriber {key!r} has joined already")
        if len(self._members) >= SUBSCRIBERS:
            raise ValueError(f"{SUBSCRIBERS} subscribers are served already")
        member = self._members[key] = Member(key, address, port, rank)
        self._at.setdefault(address, set()).add(key)
        self._place(member)
        return member.step

    def batch(self) -> contextlib.AbstractContextManager[None]:
        """Joins and leaves within reach the table together: for thousands, each of which would copy its order."""
        return self._table.batch() if self._table is not None else contextlib.nullcontext()

    def leave(self, key: Hashable) -> None:
        """Serve it no more; no error if it isn't there."""
        member = self._members.pop(key, None)
        if member is None:
            return
        self._take_off(member)
        there = self._at[member.address]
        there.discard(key)
        if not there:
            del self._at[member.address]
            self._hops.forget(member.address)

    def transmit(self, payload: bytes | memoryview) -> int:
        """To everybody on the second rung, the first rank first: how many the kernel took."""
        sent = 0
        for frames in self._frames.values():
            taken, refused = frames.transmit(payload, self._now_ns)
            sent += taken
            self.failed += refused
        return sent

    def beat(self, payload: bytes | memoryview, go_on: Callable[[], bool]) -> int | None:
        """To everybody on the first rung, this side's own run: how many drivers took it; None: frames don't lead there.

        `go_on` as FanoutRun.send()'s.
        """
        if self._run is None:
            return None
        sent = self._run.send(payload, go_on=go_on).transmitted
        return sent if self._run.step is Step.LIVE_FRAMES else None

    # ── changes ──

    def fileno(self) -> int:
        """Readable when poll() has something."""
        return self._hops.fileno()

    def poll(self) -> list[Change]:
        """Routes, neighbours and interfaces have changed: who is served by another rung than before."""
        addresses = self._hops.poll()
        keys = [key for address in addresses for key in self._at.get(address, ())]
        if self._link_news != self._hops.link_news:
            self._link_news, self._changed = self._hops.link_news, True
            keys += self._behind({index for index in list(self._interfaces) if self._prove(index)})
        return self._place_anew(dict.fromkeys(keys)) if keys else []

    def tick(self, now_ns: int) -> list[Change]:
        """To be called each second or so, `now_ns` of CLOCK_MONOTONIC: proofs, retries; as poll()."""
        self._now_ns = now_ns
        if now_ns >= self._keep_alive_ns:
            self._hops.keep_alive()
            self._keep_alive_ns = now_ns + KEEP_ALIVE_NS
        due = now_ns >= self._retry_ns
        changed = {index for index in list(self._interfaces) if self._prove(index, thoroughly=due)}
        # The relay stepped down, or is back: everybody's rung may be another.
        live, before = self._relay_is_live(), self._was_live
        self._was_live = live
        again = self._behind(changed) + [
            key
            for key, member in self._members.items()
            if live is not before
            or (member.step is Step.AF_XDP and self._frames[self._ifindex(member)].transmitter is None)
        ]
        if not live and (due or self._changed):
            self._vouch()
        if due:
            self._retry_ns = now_ns + RETRY_NS
            self._pace()  # a link may have another speed, or other queues, than when it was first used
            if self._run is not None and any(interface.live for interface in self._interfaces.values()):
                self._run.restore()  # proofs have just gone by it
            self._to_retry = [key for key, member in self._members.items() if self._may_rise(member)]
        again += [key for key in self._to_retry[-RETRIES_A_TICK:] if key in self._members]
        del self._to_retry[-RETRIES_A_TICK:]
        changes = self._place_anew(dict.fromkeys(again)) if again else []
        self._forget_idle()
        return changes

    def _behind(self, interfaces: set[int]) -> list[Hashable]:
        """Who is reached by one of these."""
        if not interfaces:
            return []
        return [key for key, member in self._members.items() if member.hop and member.hop.ifindex in interfaces]

    def _place_anew(self, keys: Iterable[Hashable]) -> list[Change]:
        changes: list[Change] = []
        with self.batch():
            for key in keys:
                member = self._members[key]
                before = member.step
                self._place(member)
                if member.step is not before:
                    changes.append((key, member.step))
        return changes

    def _place(self, member: Member) -> None:
        """On the best rung that leads to him."""
        hop = self._next_hop(member)
        if member.step is Step.LIVE_FRAMES and hop is not None and self._is_live(hop):
            if hop != member.hop:
                assert self._table is not None
                try:
                    self._table.update(member.slot, hop)
                except (TableFullError, OSError):
                    self._take_off(member)
                else:
                    member.hop = hop
                    return
            else:
                return
        self._take_off(member)
        member.hop = hop
        if hop is None:
            return
        if self._is_live(hop) and self._table is not None:
            with contextlib.suppress(TableFullError, OSError):
                member.slot = self._table.add(hop, member.address, member.port, member.rank)
                member.step = Step.LIVE_FRAMES
                return
        frames = self._frames.setdefault(hop.ifindex, Frames(hop.ifindex, self._source_port))
        if frames.open(self._now_ns) and frames.add(member, self._now_ns):
            member.step = Step.AF_XDP

    def _may_rise(self, member: Member) -> bool:
        """Without any news: his way wasn't known, or there was no place in the table just then."""
        if member.step is Step.AF_XDP:
            interface = self._interfaces.get(self._ifindex(member))
            return interface is not None and interface.live and self._was_live
        return member.step is Step.SENDMMSG

    def _take_off(self, member: Member) -> None:
        if member.step is Step.LIVE_FRAMES:
            assert self._table is not None
            self._table.remove(member.slot)
        elif member.step is Step.AF_XDP:
            self._frames[self._ifindex(member)].remove(member)
        member.step = Step.SENDMMSG

    def _next_hop(self, member: Member) -> NextHop | None:
        try:
            source = self._source
            return self._hops.resolve(member.address, source if source and len(source) == len(member.address) else None)
        except (OSError, ValueError):
            return None

    @staticmethod
    def _ifindex(member: Member) -> int:
        assert member.hop is not None
        return member.hop.ifindex

    # ── interfaces ──

    def _is_live(self, hop: NextHop) -> bool:
        if not self._relay_is_live():
            return False
        if hop.ifindex not in self._interfaces:
            self._interfaces[hop.ifindex] = _Interface(hop.source_mac)
            self._prove(hop.ifindex)
            self._pace()
        return self._interfaces[hop.ifindex].live

    def _vouch(self) -> None:
        """Prove what the relay's subscribers would be reached by, and tell it if it may send again: those behind
        interfaces that take no frame aren't in its table."""
        ways = {member.hop.ifindex: member.hop.source_mac for member in self._members.values() if member.hop}
        for ifindex, mac in ways.items():
            self._interfaces.setdefault(ifindex, _Interface(mac))
            self._prove(ifindex)
        if self._table is not None and any(self._interfaces[ifindex].live for ifindex in ways):
            self._table.vouch(changed=self._changed)
            self._changed = False

    def _prove(self, ifindex: int, *, thoroughly: bool = True) -> bool:
        """Ask the driver, and send a frame; whether the answer is another than before."""
        interface = self._interfaces[ifindex]
        before = interface.live
        interface.reason = self._refusal(ifindex, interface.mac, send=thoroughly or not before)
        interface.live = interface.reason is None
        return interface.live != before

    def _refusal(self, ifindex: int, mac: bytes, *, send: bool) -> str | None:
        if self._table is None or self._run is None:
            return "no fan-out is loaded"
        try:
            told = xdp_features(ifindex)
            if told is not None and not told & XdpFeature.NDO_XMIT:
                return "its driver takes no redirected frames (no ndo_xdp_xmit; a veth's peer needs XDP or GRO)"
            if not send:
                return None
            with self._table.probe(ifindex, mac) as entry:
                return self._run.prove(entry)
        except (OSError, TableFullError) as error:
            return str(error)

    def _forget_idle(self) -> None:
        """Interfaces that nobody is behind: they may be gone, and their place in the DEVMAP is wanted."""
        used = {member.hop.ifindex for member in self._members.values() if member.hop is not None}
        for ifindex in [index for index in self._interfaces if index not in used]:
            del self._interfaces[ifindex]
            if self._table is not None:
                self._table.forget_interface(ifindex)
            self._pace()
        for ifindex in [index for index, frames in self._frames.items() if not frames.members]:
            self._frames.pop(ifindex).close()

    def _pace(self) -> None:
        if self._table is None:
            return
        paces, narrow = [], False
        for ifindex in self._interfaces:
            with contextlib.suppress(OSError):
                name = socket.if_indextoname(ifindex)
                paces.append(pacing(name))
                narrow |= tx_queues(name) < RUN_CPUS
        self._table.pace(slowest(paces))
        self._table.narrow(narrow)

    def _close_frames(self) -> None:
        for frames in self._frames.values():
            frames.close()
        self._frames.clear()

    def close(self) -> None:
        """Everybody leaves. Harmless if repeated."""
        if self._table is not None and self._members:
            with self._table.batch():
                for member in self._members.values():
                    self._take_off(member)
        self._members.clear()
        self._undo.close()

    def __enter__(self) -> Egress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _name(ifindex: int) -> str:
    with contextlib.suppress(OSError):
        return socket.if_indextoname(ifindex)
    return f"interface {ifindex}"
