"""The subscriber table, written by one process: who gets a frame, in which order, and how it is reached.

A join, a leave or a change takes microseconds and never waits for a run that goes on, nor is waited for (fanout_maps
says how). What a run sees is the table as it stood when it began, less those who have left meanwhile; each of them
exactly once. Capacity is bounded: SUBSCRIBERS, and INTERFACES that they are reached by.
"""

from __future__ import annotations

import contextlib
import struct
import sys
from array import array
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, final

from xdp import kernel
from xdp.datagrams import IPV6_HEADERS, NextHop, udp_headers
from xdp.fanout_maps import (
    EGRESS,
    ENTRIES,
    INTERFACES,
    RUN_CPUS,
    RUNS,
    SNAPSHOTS,
    SUBSCRIBERS,
    FanoutHandover,
    MappedArray,
    Rank,
    Sender,
    Step,
    long,
    word,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

_SUBSCRIBER = EGRESS.layouts["subscriber"]
_SNAPSHOT_WORDS = EGRESS.layouts["snapshot"].size // 4
_RUN_WORDS, _RUN_LONGS = EGRESS.layouts["run"].size // 4, EGRESS.layouts["run"].size // 8
_ENTRY_HEADERS = EGRESS.constants["ENTRY_HEADERS"]
_ENTRY = struct.Struct(f"=BxHII{_ENTRY_HEADERS}s")
"""From `size` on."""
_REST = struct.Struct(f"={IPV6_HEADERS - _ENTRY_HEADERS}s")
"""From `headers` on."""
if " ".join(m.name for m in _SUBSCRIBER.members[:7]) != "active size zero device ip_sum udp_sum headers[0]":
    raise ImportError("egress.h: struct subscriber isn't what fanout_table writes")
_ENTRY_WORDS, _ENTRY_LONGS, _ACTIVE = _SUBSCRIBER.size // 4, _SUBSCRIBER.size // 8, word("subscriber", "active")
_FIRST_HEADERS = long("subscriber", "headers[0]")
_PINNED, _STEP = long("run", "pinned"), word("run", "step")
_PROBE_MAC = bytes.fromhex("0180c200000e")
"""Of LLDP (IEEE 802.1AB): nobody's own, and no bridge forwards it."""
_PROBE_SOURCE, _PROBE_DESTINATION = bytes((192, 0, 2, 83)), bytes((192, 0, 2, 82))
"""TEST-NET-1 (RFC 5737): nobody's."""
_PROBE_PORT = 9  # discard (RFC 863)


class TableFullError(Exception):
    """No place for one more, now: the subscriber has to be served another way."""


class Pacing(NamedTuple):
    """For links with a speed: `burst` frames on end, and on the average one each `gap_ns`."""

    gap_ns: float
    burst: int


class _Member(NamedTuple):
    entry: int
    rank: Rank
    place: int
    """Among those of its rank."""
    next_hop: NextHop
    address: bytes
    port: int


@final
class FanoutTable:
    """The only writer of the table, a context manager. A new one starts empty, whatever an earlier one left there."""

    def __init__(self, handover: FanoutHandover, source_port: int) -> None:
        """Map it and empty it; `source_port` is what datagrams come from. Raises OSError."""
        self._handover = handover
        self._source_port = source_port
        with contextlib.ExitStack() as undo:

            def mapped(fd: int, entry_bytes: int, entries: int) -> MappedArray:
                area = MappedArray(fd, entry_bytes, entries)
                undo.callback(area.close)
                return area

            self._entries = mapped(handover.subscribers_fd, _SUBSCRIBER.size, 2 * ENTRIES)
            self._orders = mapped(handover.orders_fd, 4, SNAPSHOTS * SUBSCRIBERS)
            self._snapshots = mapped(handover.snapshots_fd, EGRESS.layouts["snapshot"].size, SNAPSHOTS)
            self._directory = mapped(handover.directory_fd, EGRESS.layouts["directory"].size, 1)
            self._runs = mapped(handover.runs_fd, EGRESS.layouts["run"].size, RUNS)
            self._undo = undo.pop_all()
        self._members: dict[int, _Member] = {}
        self._ranks = {rank: array("I") for rank in Rank}
        """Entries in the order in which they are visited."""
        self._slots: dict[Rank, list[int]] = {rank: [] for rank in Rank}
        """Whose they are."""
        self._ipv6 = 0
        self._devices: dict[int, int] = {}
        self._free_devices = list(range(INTERFACES - 1, -1, -1))
        self._version = self._directory.longs[long("directory", "version")]
        self._free: deque[tuple[int, int]] = deque()
        self._leaving: list[int] = []
        """Entries that the next snapshot doesn't name any more."""
        self._behind: dict[int, int] = {}
        """Subscribers by interface."""
        self._batches = 0
        self._dirty = False
        self._next_slot = 0
        for entry in range(ENTRIES):
            self._entries.words[entry * _ENTRY_WORDS + _ACTIVE] = 0
        self._publish()
        self._free.extend((entry, self._version) for entry in range(ENTRIES))
        for number in range(INTERFACES):
            kernel.map_delete(handover.devices_fd, struct.pack("=I", number))

    # ── subscribers ──

    def add(self, next_hop: NextHop, address: bytes, port: int, rank: Rank) -> int:
        """From the next publication on: its slot, by which it is named until it is removed.

        `address` is 4 or 16 bytes, of the next hop's family. Raises TableFullError, ValueError, and OSError when the
        interface can't be put into the DEVMAP.
        """
        if len(self._members) >= SUBSCRIBERS:
            raise TableFullError(f"{SUBSCRIBERS} subscribers are served already")
        entry = self._write(next_hop, address, port)
        slot = self._next_slot
        self._next_slot += 1
        order = self._ranks[rank]
        self._members[slot] = _Member(entry, rank, len(order), next_hop, address, port)
        order.append(entry)
        self._slots[rank].append(slot)
        self._ipv6 += len(address) == 16
        self._changed()
        return slot

    def update(self, slot: int, next_hop: NextHop) -> None:
        """Another way to the same subscriber. Raises KeyError, and as add() does; the old way stays then.

        Where only the neighbour's MAC address is another, runs that go on see it at once; else the next one does.
        """
        member = self._members[slot]
        old = member.next_hop
        if old._replace(destination_mac=next_hop.destination_mac) == next_hop:
            if len(next_hop.destination_mac) != 6:
                raise ValueError(f"next hop {next_hop}: a MAC address of 6 bytes is expected")
            # Six bytes, and two that are the same as before: one store, so that nobody sees half of it.
            first = int.from_bytes(next_hop.destination_mac + next_hop.source_mac[:2], sys.byteorder)
            self._entries.longs[member.entry * _ENTRY_LONGS + _FIRST_HEADERS] = first
            self._members[slot] = member._replace(next_hop=next_hop)
            return
        entry = self._write(next_hop, member.address, member.port)
        self._count_device(old.ifindex, -1)
        self._leaving.append(member.entry)
        self._ranks[member.rank][member.place] = entry
        self._members[slot] = member._replace(entry=entry, next_hop=next_hop)
        self._changed()

    def remove(self, slot: int) -> None:
        """Nothing more is sent to it, not even by a run that goes on. Raises KeyError."""
        member = self._members.pop(slot)
        self._entries.words[member.entry * _ENTRY_WORDS + _ACTIVE] = 0
        self._leaving.append(member.entry)
        self._count_device(member.next_hop.ifindex, -1)
        self._ipv6 -= len(member.address) == 16
        order, slots = self._ranks[member.rank], self._slots[member.rank]
        last_entry, last_slot = order.pop(), slots.pop()
        if last_slot != slot:  # the last one takes its place
            order[member.place], slots[member.place] = last_entry, last_slot
            self._members[last_slot] = self._members[last_slot]._replace(place=member.place)
        self._changed()

    def next_hop(self, slot: int) -> NextHop:
        """By which it is reached now. Raises KeyError."""
        return self._members[slot].next_hop

    def __len__(self) -> int:
        """Subscribers in it."""
        return len(self._members)

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Changes within become visible together, at the end: for many at once, whose orders would be copied each."""
        self._batches += 1
        try:
            yield
        finally:
            self._batches -= 1
            if self._dirty:
                self._changed()

    # ── interfaces ──

    def forget_interface(self, ifindex: int) -> None:
        """One that is gone; its place in the DEVMAP is free again. Raises ValueError while it has subscribers."""
        if ifindex not in self._devices:
            return
        if self._behind.get(ifindex):
            raise ValueError(f"interface {ifindex}: {self._behind[ifindex]} subscribers are reached by it")
        number = self._devices.pop(ifindex)
        kernel.map_delete(self._handover.devices_fd, struct.pack("=I", number))  # the kernel has done so if it is gone
        self._free_devices.append(number)

    @contextlib.contextmanager
    def probe(self, ifindex: int, mac: bytes) -> Iterator[int]:
        """An entry that no order names, for FanoutRun.prove(): a frame that nobody takes for his own, from `mac`.

        The interface is put into the DEVMAP anew: the kernel strikes one off that leaves the network namespace, even
        if it comes back with the same number.
        """
        if ifindex in self._devices:
            self._map_device(self._devices[ifindex], ifindex)
        entry = self._write(
            NextHop(ifindex, mac, _PROBE_MAC, _PROBE_SOURCE), _PROBE_DESTINATION, _PROBE_PORT, counted=False
        )
        try:
            yield entry
        finally:
            self._entries.words[entry * _ENTRY_WORDS + _ACTIVE] = 0
            self._free.append((entry, self._version))

    def pace(self, pacing: Pacing | None) -> None:
        """For all senders, from their next publication on; None: as fast as it goes, for virtual links."""
        self._directory.words[word("directory", "burst")] = pacing.burst if pacing else 0
        gap = round(pacing.gap_ns * 1000) if pacing else 0
        self._directory.longs[long("directory", "gap_ps")] = gap

    def narrow(self, yes: bool) -> None:
        """Whether some interface has one TX queue only: then no sender uses a second CPU, which would cost frames."""
        self._directory.words[word("directory", "narrow")] = int(yes)

    def step(self, sender: Sender) -> Step | None:
        """Where a sender stands on the ladder, as it has said itself; None while there is none."""
        said = self._runs.words[sender * RUN_CPUS * _RUN_WORDS + _STEP]
        return Step(said - 1) if said else None

    def vouch(self, *, changed: bool = False) -> None:
        """Interfaces have been proven: senders that stepped down try again with their next publication.

        One that has stepped down again and again waits longer each time, unless a link has `changed`.
        """
        for name in ("changes", "proofs") if changed else ("proofs",):
            at = word("directory", name)
            self._directory.words[at] = (self._directory.words[at] + 1) & 0xFFFFFFFF

    # ── memory ──

    def _write(self, next_hop: NextHop, address: bytes, port: int, *, counted: bool = True) -> int:
        headers = udp_headers(next_hop, address, port, self._source_port)
        device = self._device(next_hop.ifindex)
        entry = self._take_entry()
        if counted:
            self._count_device(next_hop.ifindex, 1)
        at = entry * _SUBSCRIBER.size
        self._entries.words[entry * _ENTRY_WORDS + _ACTIVE] = 0
        _ENTRY.pack_into(
            self._entries.bytes, at + 4, len(headers.frame), device, headers.ip_sum, headers.udp_sum, headers.frame
        )
        if len(headers.frame) > _ENTRY_HEADERS:
            rest = (entry + ENTRIES) * _SUBSCRIBER.size + _FIRST_HEADERS * 8
            _REST.pack_into(self._entries.bytes, rest, headers.frame[_ENTRY_HEADERS:])
        self._entries.words[entry * _ENTRY_WORDS + _ACTIVE] = 1
        return entry

    def _take_entry(self) -> int:
        if not self._free and self._leaving:
            self._publish()
        longs = self._runs.longs
        pins = [pin for run in range(RUNS) if (pin := longs[run * _RUN_LONGS + _PINNED])]
        if not self._free or any(pin < self._free[0][1] for pin in pins):
            raise TableFullError(f"all {ENTRIES} entries are taken, or still being read by a run")
        return self._free.popleft()[0]

    def _device(self, ifindex: int) -> int:
        known = self._devices.get(ifindex)
        if known is not None:
            return known
        if not self._free_devices:
            raise TableFullError(f"subscribers are reached by {INTERFACES} interfaces already")
        number = self._free_devices[-1]
        self._map_device(number, ifindex)
        self._devices[ifindex] = self._free_devices.pop()
        return number

    def _map_device(self, number: int, ifindex: int) -> None:
        kernel.map_update(self._handover.devices_fd, struct.pack("=I", number), struct.pack("=I", ifindex))

    def _count_device(self, ifindex: int, change: int) -> None:
        self._behind[ifindex] = self._behind.get(ifindex, 0) + change

    def _changed(self) -> None:
        self._dirty = True
        if not self._batches:
            self._publish()

    def _publish(self) -> None:
        """The order as it is now, as a new snapshot."""
        longs = self._runs.longs
        pinned = {pin % SNAPSHOTS for run in range(RUNS) if (pin := longs[run * _RUN_LONGS + _PINNED])}
        version = self._version + 1
        while version % SNAPSHOTS in pinned:
            version += 1
        number = version % SNAPSHOTS
        first, second = self._ranks[Rank.FIRST], self._ranks[Rank.SECOND]
        count, at = len(first) + len(second), number * SUBSCRIBERS
        self._orders.words[at : at + len(first)] = memoryview(first)
        self._orders.words[at + len(first) : at + count] = memoryview(second)
        base = number * (EGRESS.layouts["snapshot"].size // 4)
        self._snapshots.longs[base // 2 + long("snapshot", "version")] = version
        interfaces = sum(1 for reached in self._behind.values() if reached)
        values = {"first": len(first), "count": count, "with_ipv6": int(self._ipv6 > 0), "interfaces": interfaces}
        for name, value in values.items():
            self._snapshots.words[base + word("snapshot", name)] = value
        self._directory.longs[long("directory", "version")] = self._version = version
        self._free.extend((entry, version) for entry in self._leaving)
        self._leaving.clear()
        self._dirty = False

    def close(self) -> None:
        """Unmap; what is in the table stays in it. Harmless if repeated."""
        self._undo.close()

    def __enter__(self) -> FanoutTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
