"""How much bulk TCP passes an interface that is captured, beside the same interface with an empty XDP program.

A sender in a network namespace of its own fills a TCP connection over a veth pair, whose near end has, in turns, an XDP
program of two instructions that says XDP_PASS, and the whole capture with both ways out, read by a process of its own.
Native and generic XDP are each compared with themselves. Two kinds of load:

- `mixed`: bytes of no protocol on a port that isn't watched, and on a peer's connection beside it 50 announcements a
  second, compact blocks of 15 kB, headers and inv: some hundred times what a node with 125 peers hears.
- `download`: what a node in its initial download gets on the network's port: blocks of 1.5 MB, each of which is an
  announcement to the capture (600 a second at 7 Gbit/s), with transactions in between. The worst case there is.

Everybody who is measured takes turns in rounds, whose order is reversed each time. Without any program the same bytes
pass several times as fast as through the empty one; that is told too. The receiver and the capture's reader share one
CPU, the sender has the other, and with it XDP, which a veth pair runs where packets are sent.

Everything made is in two namespaces without names, which end with the processes.
"""

from __future__ import annotations

import os
import random
import selectors
import socket
import struct
import time
from contextlib import contextmanager, suppress
from ctypes import addressof, create_string_buffer
from dataclasses import dataclass, field
from itertools import cycle
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from sprint.bench.apart import Helper, be_apart, run_apart
from sprint.bench.detect_wire import FAR, FAR_ADDRESS, NEAR, bring_up, enter_namespace, lay
from sprint.bitcoin.framing import encode_frame
from sprint.bitcoin.networks import NETWORKS
from sprint.errors import HostError
from sprint.regtest import mine
from sprint.sources.capture import CaptureSource
from sprint.status import StatusBlock
from sprint.tiers import NS_PER_S
from xdp import kernel
from xdp.attachment import AttachError, attach
from xdp.capture import Capture
from xdp.loader import LoadError, load, missing
from xdp.segments import Backend

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection as Pipe

    from sprint.bench.apart import Progress
    from sprint.regtest import MinedBlock
    from xdp.capture import Handover
    from xdp.loader import Loaded

Mode = Literal["native", "generic"]
Load = Literal["mixed", "download"]
ROUNDS = 16
TOTAL_BYTES = 1_000_000_000
"""Of each way and load, all rounds together."""
NETWORK = NETWORKS["regtest"]
PORTS: dict[Load, int] = {"mixed": 5_201, "download": NETWORK.port}
ANNOUNCE_NS = 20_000_000
BLOCK_BYTES, COMPACT_BYTES, TRANSACTION_BYTES = 1_500_000, 15_000, 400
TRANSACTIONS = 7
"""A second's, of the whole network."""
UNITS = 8
"""After which they come again."""
MSG_TX, MSG_BLOCK = 1, 2
PATIENCE_S = 30.0
REMAINS_NS = 50_000_000
"""For what the reader has left for later when the load ends: mirrored copies wait for half of that."""
WARM_UP_BYTES = 10_000_000
"""Of each turn, if it has more than twice as many, not counted: TCP has to find its window again."""
RECEIVE_BYTES = 1 << 20
_XDP_FLAGS: dict[Mode, int] = {"native": kernel.XDP_FLAGS_DRV_MODE, "generic": kernel.XDP_FLAGS_SKB_MODE}
_BPF_PROG_LOAD, _PROG_TYPE_XDP, _XDP_PASS = 5, 6, 2


@dataclass(frozen=True, slots=True)
class Way:
    """What is on the interface."""

    name: str
    mode: Mode | None
    captured: bool = False


WAYS = (
    Way("no_program", None),
    Way("empty_native", "native"),
    Way("capture_native", "native", captured=True),
    Way("empty_generic", "generic"),
    Way("capture_generic", "generic", captured=True),
)


@dataclass(slots=True)
class Turns:
    """What was measured of one way and load."""

    gbit_per_s: list[float] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    heard: int = 0


def measure_bulk(progress: Progress, total_bytes: int = TOTAL_BYTES, rounds: int = ROUNDS) -> dict[str, Any]:
    """Results and ratios, of at least so many bytes for each way and load. Raises HostError where it can't be done."""
    reason = missing()
    if reason is not None:
        raise HostError(f"bulk captures a link of its own: {reason}")
    return run_apart("sprint.bench.bulk", {"total_bytes": total_bytes, "rounds": rounds}, progress)


def measure(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """measure_bulk()'s work, in this process, which must have one thread only."""
    load_before = os.getloadavg()[0]
    rounds = settings["rounds"]
    size = -(-settings["total_bytes"] // rounds)
    usable = sorted(os.sched_getaffinity(0))
    sender_cpu, receiver_cpu = (usable[0], usable[-1]) if len(usable) > 1 else (None, None)
    enter_namespace()
    sender = Helper(_send, sender_cpu)
    turns = {(kind, way.name): Turns() for kind in PORTS for way in WAYS}
    try:
        lay(sender.ask("enter"))
        sender.ask("listen")
        if receiver_cpu is not None:
            os.sched_setaffinity(0, {receiver_cpu})
        with load(NETWORK.magic, [NETWORK.port], every_magic=False) as loaded, _empty_program() as empty:
            for kind, port in PORTS.items():
                with (
                    socket.create_connection((FAR_ADDRESS, port), PATIENCE_S) as ours,
                    socket.create_connection((FAR_ADDRESS, NETWORK.port), PATIENCE_S) as beside,
                ):
                    beside.setblocking(False)
                    for number in range(rounds):
                        for way in WAYS if number % 2 else reversed(WAYS):
                            with _on_the_interface(way, loaded, empty, turns[kind, way.name]):
                                speed = _receive(ours, beside, sender, kind, size)
                            turns[kind, way.name].gbit_per_s.append(speed)
                        progress(f"bulk, {kind}", number + 1, rounds)
    except (LoadError, AttachError, OSError) as error:
        raise HostError(f"bulk: {error}") from None
    finally:
        sender.close()
    return {
        "results": {
            **{kind: {way.name: _figures(turns[kind, way.name]) for way in WAYS} for kind in PORTS},
            "bytes_of_each": size * rounds,
            "rounds": rounds,
            "sender_cpu": sender_cpu,
            "receiver_cpu": receiver_cpu,
            "load_average": {"before": load_before, "after": os.getloadavg()[0]},
        },
        "ratios": _ratios({key: one.gbit_per_s for key, one in turns.items()}),
    }


def _ratios(speeds: dict[tuple[Load, str], list[float]]) -> dict[str, float]:
    """The capture's share of what passes the empty program, larger is better; `mixed` and native if not named.

    The median of what each round says: the two follow one another there, whatever else the machine did meanwhile.
    """
    shares = {
        (kind, mode): round(
            median(
                captured / empty
                for captured, empty in zip(speeds[kind, f"capture_{mode}"], speeds[kind, f"empty_{mode}"], strict=True)
            ),
            4,
        )
        for kind in PORTS
        for mode in _XDP_FLAGS
    }
    return {
        "capture_vs_empty_xdp": shares["mixed", "native"],
        "capture_vs_empty_xdp_generic": shares["mixed", "generic"],
        "capture_vs_empty_xdp_download": shares["download", "native"],
        "capture_vs_empty_xdp_download_generic": shares["download", "generic"],
    }


def _figures(turns: Turns) -> dict[str, Any]:
    speeds = sorted(turns.gbit_per_s)
    figures: dict[str, Any] = {
        "gbit_per_s": {
            "median": round(median(speeds), 3),
            "least": round(speeds[0], 3),
            "most": round(speeds[-1], 3),
        }
    }
    return figures | ({"counters": turns.counters, "sightings": turns.heard} if turns.counters else {})


# ── what is on the interface ──


@contextmanager
def _empty_program() -> Iterator[int]:
    """XDP that passes everything: r0 = XDP_PASS; exit."""
    code = create_string_buffer(struct.pack("<BBhi", 0xB7, 0, 0, _XDP_PASS) + struct.pack("<BBhi", 0x95, 0, 0, 0))
    licence = create_string_buffer(b"GPL")
    attributes = struct.pack("=IIQQ", _PROG_TYPE_XDP, 2, addressof(code), addressof(licence))
    program, _ = kernel.bpf(_BPF_PROG_LOAD, attributes.ljust(120, b"\0"))
    try:
        yield program
    finally:
        os.close(program)


@contextmanager
def _on_the_interface(way: Way, loaded: Loaded, empty: int, turns: Turns) -> Iterator[None]:
    if way.mode is None:
        yield
    elif not way.captured:
        link = kernel.link_create(empty, socket.if_nametoindex(NEAR), kernel.ATTACH_XDP, _XDP_FLAGS[way.mode])
        try:
            yield
        finally:
            os.close(link)
    else:
        with attach(loaded, NEAR, modes=(way.mode,)) as attachment:
            handover = attachment.handover()

            def read(control: Pipe) -> None:
                attachment.leave_in_child()
                _read(control, handover)

            reader = Helper(read, None)
            try:
                reader.answer()
                yield
                counters, heard = reader.ask("stop")
            finally:
                reader.close()
            turns.heard += heard
            for name, count in counters.items():
                turns.counters[name] = turns.counters.get(name, 0) + count


def _read(control: Pipe, handover: Handover) -> None:
    """The capture's reader, as the relay is one that sleeps; until told to stop."""
    source = CaptureSource(Capture(handover), NETWORK, StatusBlock.create(1, {}), tuple(Backend))
    heard = 0
    with selectors.DefaultSelector() as selector:
        selector.register(source.fileno(), selectors.EVENT_READ)
        selector.register(control.fileno(), selectors.EVENT_READ)
        control.send("reading")
        while True:
            due_ns = source.deadline()
            wait_s = None if due_ns is None else max(0, due_ns - time.monotonic_ns()) / NS_PER_S
            ready = selector.select(wait_s)
            heard += len(source.poll(time.monotonic_ns()))
            if any(key.fileobj == control.fileno() for key, _ in ready):
                control.recv()
                give_up_ns = time.monotonic_ns() + REMAINS_NS
                while time.monotonic_ns() < give_up_ns:
                    heard += len(source.poll(time.monotonic_ns()))
                names = ("packets", "announcements", "captured", "surplus", "mirrored", "mirrorLost", "express")
                counted = source.counters()
                control.send(({name: counted[name] for name in (*names, "dropped", "socketDropped")}, heard))
                return


# ── the load ──


def _receive(ours: socket.socket, beside: socket.socket, sender: Helper, kind: Load, size: int) -> float:
    """One turn; how many Gbit/s came in once it was under way."""
    buffer = memoryview(bytearray(RECEIVE_BYTES))
    warm_up = min(WARM_UP_BYTES, size // 2)
    sender.tell(kind, size + warm_up)
    due = sender.answer()
    left, began_ns, counted = due, 0, 0
    while left:
        received = ours.recv_into(buffer, min(left, RECEIVE_BYTES))
        if not received:
            raise RuntimeError("the sender has closed the connection")
        left -= received
        if kind == "mixed":
            with suppress(BlockingIOError):
                beside.recv_into(buffer)
        if not began_ns and due - left >= warm_up:
            began_ns, counted = time.monotonic_ns(), left
    took_ns = time.monotonic_ns() - began_ns
    sender.answer()
    return counted * 8 / took_ns * NS_PER_S / 1e9


def _frame(command: str, body: bytes) -> bytes:
    return encode_frame(NETWORK.magic, command, body)


def _inv(kind: int, chance: random.Random) -> bytes:
    return _frame("inv", b"\x01" + struct.pack("<I", kind) + chance.randbytes(32))


def _block(chance: random.Random) -> MinedBlock:
    return mine(bytes(32), chance.randrange(1 << 20), 1_700_000_000, NETWORK.pow_limit_bits)


def _unit(chance: random.Random) -> bytes:
    """A block, and a second's transactions."""
    payload = _block(chance).payload
    parts = [_frame("block", payload + chance.randbytes(BLOCK_BYTES - len(payload)))]
    for _ in range(TRANSACTIONS):
        parts += [_inv(MSG_TX, chance), _frame("tx", chance.randbytes(TRANSACTION_BYTES))]
    return b"".join(parts)


def _announcements(chance: random.Random) -> list[bytes]:
    """What a peer says about a new block, by each kind of message."""
    block = _block(chance)
    return [
        _frame("cmpctblock", block.compact(0).encode().ljust(COMPACT_BYTES, b"\0")),
        _frame("headers", b"\x01" + block.header.encode() + b"\0"),
        _inv(MSG_BLOCK, chance),
    ]


def _send(control: Pipe) -> None:
    """The sender's process: its namespace, its end of the wire, and so many bytes of a kind when told."""
    control.recv()
    enter_namespace()
    control.send(os.getpid())
    control.recv()
    bring_up(FAR, FAR_ADDRESS)
    chance = random.Random(1)
    units: dict[Load, list[bytes]] = {
        "mixed": [chance.randbytes(BLOCK_BYTES) for _ in range(UNITS)],
        "download": [_unit(chance) for _ in range(UNITS)],
    }
    announcements = cycle([one for _ in range(100) for one in _announcements(chance)])
    listeners = {port: socket.create_server((FAR_ADDRESS, port)) for port in PORTS.values()}
    control.send("listening")
    connections: dict[Load, tuple[socket.socket, socket.socket]] = {}
    due_ns = 0
    while True:
        kind, least = control.recv()
        if kind not in connections:
            ours, _ = listeners[PORTS[kind]].accept()
            connections[kind] = ours, listeners[NETWORK.port].accept()[0]
        bulk, peer = connections[kind]
        # Whole units, so that each turn begins with a message.
        count = -(-least // min(map(len, units[kind])))
        sent = [units[kind][number % len(units[kind])] for number in range(count)]
        control.send(sum(map(len, sent)))
        for unit in sent:
            bulk.sendall(unit)
            if kind == "mixed" and time.monotonic_ns() >= due_ns:
                peer.sendall(next(announcements))
                due_ns = time.monotonic_ns() + ANNOUNCE_NS
        control.send("sent")


if __name__ == "__main__":
    be_apart(measure)
