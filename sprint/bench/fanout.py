"""What it takes to tell 1 to 50,000 subscribers of one record, by each way, over the same veth pair.

On the *wire* an XDP program at the far end stamps each subscriber's frame as it comes in, and drops it: what the sender
and the link can do. On *sockets* the far end has a real one for each subscriber, in two processes that do nothing but
read and stamp: what arrives, the far end's own cost included, which on one machine is most of it. There, the same
record also goes out by TCP: our stream, libzmq, Redis and NATS, each with two receiving processes of its own.

All ways take turns in each round, and take turns at being first. Times begin right before the publishing call, and all
clocks are CLOCK_MONOTONIC. On the wire the sender is awake (fanout_datagrams), as the product's relay is; to the number
that the ratios are of, it also sends after having slept, as every publisher to sockets does. A publication that didn't
reach everybody has no time, but counts as loss. The sender, or server, has one CPU and the receivers another, where
there are two. Live frames on two CPUs take the receivers' as well, which on the wire is idle; libzmq and NATS, whose
threads use it, have all, and Redis, which is the slower for it, one.
"""

from __future__ import annotations

import os
import resource
import secrets
import time
from array import array
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, NamedTuple

from sprint.bench.apart import Helper, be_apart, run_apart
from sprint.bench.detect_wire import FAR_ADDRESS, NEAR_ADDRESS, enter_namespace
from sprint.bench.fanout_datagrams import be_datagram_sender
from sprint.bench.fanout_figures import AF_XDP, LIVE, LIVE_TWO, PEERS, SENDMMSG, STREAM, Rounds, last_ms, loss, ratios
from sprint.bench.fanout_peers import Kind, be_peer_publisher, kinds, version_of
from sprint.bench.fanout_receivers import Receivers, Round
from sprint.bench.fanout_sink import FIRST_PORT, MOST, Sink
from sprint.bench.fanout_stream import FRAME_SIZE, GREETING, PORT, be_stream_publisher
from sprint.bench.fanout_wire import be_far_end, lay
from sprint.bench.surroundings import Surroundings, cpu_ns
from sprint.errors import HostError
from sprint.events import Event, Source, State
from sprint.record import SIZE, Record
from xdp.loader import LoadError, missing

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from sprint.bench.apart import Progress
    from sprint.bench.fanout_wire import Wire

SUBSCRIBERS = 10_000
SIZES = (1, 100, 1_000, 10_000, MOST)
WIRE_ROUNDS, SOCKET_ROUNDS = 50, 40
WIRE_ROUNDS_OF_MANY = 20
"""Beyond SUBSCRIBERS."""
WARM_UP = 3
SETTLE_S = 0.02
"""Between two publications, so that what the last one left to do doesn't fall into the next."""
PATIENCE_S = 3.0
CLOCK_EACH = 8
"""Frames for which the far end reads its clock once: it runs on the sender's CPU, as no real wire's far end does."""
SPARE_DESCRIPTORS = 128
_WIRE_WAYS = (LIVE, LIVE_TWO, AF_XDP, SENDMMSG)
_UDP_WAYS = (LIVE, AF_XDP, SENDMMSG)


def measure_fanout(progress: Progress, subscribers: int = SUBSCRIBERS, rounds: int | None = None) -> dict[str, Any]:
    """Results and ratios, for `subscribers` and for each of SIZES below; `rounds` of each way, None: as many as told.

    Raises HostError where BPF programs can't be loaded, or for more than MOST subscribers.
    """
    reason = missing()
    if reason is not None:
        raise HostError(f"fanout sends over a link of its own: {reason}")
    if subscribers > MOST:
        raise HostError(f"--subscribers {subscribers}: each has a port of one address, and {MOST} is the most")
    return run_apart("sprint.bench.fanout", {"subscribers": subscribers, "rounds": rounds}, progress)


def measure(settings: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """measure_fanout()'s work, in this process, which must have one thread only."""
    surroundings = Surroundings()
    most, rounds = settings["subscribers"], settings["rounds"]
    sizes = [*(size for size in SIZES if size < most), most]
    sockets_most = min(most, SUBSCRIBERS, _allow_descriptors() - SPARE_DESCRIPTORS)
    reference = max(size for size in sizes if size <= SUBSCRIBERS)
    cpus = _cpus()
    progress("loading and connecting", 0, 1)
    enter_namespace()
    try:
        with ExitStack() as stack:
            bench = _Bench(stack, cpus, most, sockets_most)
            progress("loading and connecting", 1, 1)
            measured = [bench.measure_size(size, rounds, progress, both=size == reference) for size in sizes]
    except (LoadError, OSError) as error:
        raise HostError(f"fanout: {error}") from None
    at_reference = next(one for one in measured if one["subscribers"] == reference)
    wire, asleep, sockets = at_reference["wire"], at_reference["wire_asleep"], at_reference["sockets"] or {}
    live = [
        (one["subscribers"], found[way])
        for one in measured
        for found, ways in (
            (one["wire"], (LIVE, LIVE_TWO)),
            (one["wire_asleep"] or {}, (LIVE, LIVE_TWO)),
            (one["sockets"] or {}, (LIVE,)),
        )
        for way in ways
        if way in found
    ]
    return {
        "results": {
            "reference_subscribers": reference,
            "live_wire_last_ms_p50": last_ms(wire, LIVE),
            "live_wire_two_cpus_last_ms_p50": last_ms(wire, LIVE_TWO),
            "live_wire_asleep_last_ms_p50": last_ms(asleep, LIVE),
            "live_wire_asleep_vs_sendmmsg_wire_asleep": ratios(asleep, {})["live_wire_vs_sendmmsg_wire"],
            "live_sockets_last_ms_p50": last_ms(sockets, LIVE),
            "loss_before_repair": round(loss(live), 8),
            "sizes": measured,
            "record_bytes": SIZE,
            "sockets_up_to": sockets_most,
            "left_out": bench.left_out,
            "peers": {peer: version_of(peer) for peer in PEERS if peer not in bench.left_out},
            "join_us": bench.join_us,
            "sender_cpu": cpus.sender,
            "second_cpu": cpus.second,
            "receiver_cpus": cpus.receivers,
            **surroundings.figures(),
        },
        "ratios": ratios(wire, sockets),
    }


class _Cpus(NamedTuple):
    sender: int | None
    second: int | None
    receivers: tuple[int | None, int | None]


def _cpus() -> _Cpus:
    """Of more than two, each has its own; None where there is but one for all."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) == 1:
        return _Cpus(None, None, (None, None))
    spare = usable[-2 if len(usable) > 2 else 0]
    return _Cpus(usable[-1], spare, (usable[0], spare))


def _allow_descriptors() -> int:
    """As many as we may have, which everybody inherits; how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 30


class _Way(NamedTuple):
    """Who publishes to sockets, and who receives."""

    publisher: Helper
    pid: int
    """Whose processor time it costs."""
    receivers: tuple[Helper, ...]
    before: bytes
    behind: bytes
    """What stands around the record that a subscriber gets; of our stream's `before`, only the length counts."""


class _Bench:
    """All processes, and the rounds that they are told to do."""

    def __init__(self, stack: ExitStack, cpus: _Cpus, most: int, sockets_most: int) -> None:
        self._stack, self._cpus = stack, cpus
        self._sockets_most = sockets_most
        self.left_out: dict[str, str] = {}
        self.join_us = 0.0
        self._number = self._connected = 0
        self._sink = stack.enter_context(Sink(CLOCK_EACH))
        self._far = self._helper(be_far_end, cpus.receivers[0])
        wire = lay(self._far)
        self._far_pid = self._far.ask("pid")
        self._datagrams = self._datagram_sender(wire, most)
        self._udp = self._receiver_pair()
        self._ways = {way: _Way(self._datagrams, 0, self._udp, b"", b"") for way in _UDP_WAYS}
        self._servers: dict[str, Kind] = {}
        stream = Kind(STREAM, PORT, GREETING, bytes(FRAME_SIZE - SIZE), b"", threads=False)
        self._add_server(stream, lambda control: be_stream_publisher(control, sockets_most))
        for kind in kinds(SIZE):
            self._add_server(kind, partial(be_peer_publisher, kind=kind, subscribers=sockets_most))
        if cpus.receivers[0] is not None:
            os.sched_setaffinity(0, {cpus.receivers[0]})

    def _helper(self, main: Callable[[Connection], None], cpu: int | None) -> Helper:
        helper = Helper(main, cpu)
        self._stack.callback(helper.close)
        return helper

    def _datagram_sender(self, wire: Wire, most: int) -> Helper:
        second = self._cpus.second
        helper = self._helper(lambda control: be_datagram_sender(control, wire, most, second), self._cpus.sender)
        answer = helper.answer()
        if isinstance(answer, HostError):
            raise answer
        self._wire_ways = [way for way in _WIRE_WAYS if way in answer]
        return helper

    def _receiver_pair(self) -> tuple[Helper, Helper]:
        one, other = (self._helper(lambda control: Receivers(control).serve(), cpu) for cpu in self._cpus.receivers)
        for receiver in (one, other):
            receiver.ask("namespace", self._far_pid)
        return one, other

    def _add_server(self, kind: Kind, main: Callable[[Connection], None]) -> None:
        publisher = self._helper(main, None if kind.threads else self._cpus.sender)
        answer = publisher.answer()
        if isinstance(answer, HostError):
            self.left_out[kind.name] = str(answer)
            return
        self._servers[kind.name] = kind
        self._ways[kind.name] = _Way(publisher, answer, self._receiver_pair(), kind.before, kind.behind)

    # ── one number of subscribers ──

    def measure_size(self, size: int, rounds: int | None, progress: Progress, *, both: bool) -> dict[str, Any]:
        """On the wire awake, and if `both` asleep; to sockets where so many can be had. Else None."""
        join_ns = self._datagrams.ask("place", size, True)
        self.join_us = round(join_ns / 1_000, 2)
        wire_rounds = rounds or (WIRE_ROUNDS if size <= SUBSCRIBERS else WIRE_ROUNDS_OF_MANY)
        wire = self._measure_wire(size, wire_rounds, progress, awake=True)
        asleep = self._measure_wire(size, wire_rounds, progress, awake=False) if both else None
        sockets = None
        if size <= self._sockets_most:
            self._datagrams.ask("place", size, False)
            self._connect(size, progress)
            sockets = self._measure_sockets(size, rounds or SOCKET_ROUNDS, progress)
        return {"subscribers": size, "wire": wire, "wire_asleep": asleep, "sockets": sockets}

    def _measure_wire(self, size: int, rounds: int, progress: Progress, *, awake: bool) -> dict[str, Any]:
        step = f"{size:,} on the wire" + ("" if awake else ", the sender asleep")
        noted = {way: Rounds(size) for way in self._wire_ways}
        self._far.ask("sink", self._sink.program_fd)
        for number in range(-WARM_UP, rounds):
            progress(step, max(0, number), rounds)
            for way in _rotated(self._wire_ways, number):
                self._sink.clear(size)
                if not awake:
                    time.sleep(SETTLE_S)
                sent = self._datagrams.ask("publish", way, self._record(), SETTLE_S if awake else 0.0)
                self._sink.wait(size, PATIENCE_S)
                arrivals = self._sink.read(size)
                if arrivals.sequences - {0} != {self._number}:
                    raise RuntimeError(f"{way}: frames of {arrivals.sequences} came where {self._number} was sent")
                if number >= 0:
                    noted[way].note(sent, arrivals.at_ns, sent.cpu_ns, surplus=arrivals.surplus)
        progress(step, rounds, rounds)
        self._far.ask("sockets")
        return {way: found.figures() for way, found in noted.items()}

    def _connect(self, size: int, progress: Progress) -> None:
        """More sockets, until there are so many of each way: every other one in the other process."""
        step = f"{size:,} sockets each"
        progress(step, 0, 1 + len(self._servers))
        shares = [range(first, size, 2) for first in (self._connected, self._connected + 1)]
        self._connected = size
        for receiver, share in zip(self._udp, shares, strict=True):
            receiver.tell("udp", FAR_ADDRESS, [FIRST_PORT + number for number in share])
        for receiver in self._udp:
            receiver.answer()
        for done, (name, kind) in enumerate(list(self._servers.items()), 1):
            progress(step, done, 1 + len(self._servers))
            receivers = self._ways[name].receivers
            for receiver, share in zip(receivers, shares, strict=True):
                receiver.tell("tcp", NEAR_ADDRESS, kind.port, len(share), kind.greeting)
            refused = [answer for receiver in receivers if isinstance(answer := receiver.answer(), HostError)]
            if refused:
                self.left_out[name] = str(refused[0])
                del self._servers[name], self._ways[name]
        progress(step, 1 + len(self._servers), 1 + len(self._servers))

    def _measure_sockets(self, size: int, rounds: int, progress: Progress) -> dict[str, Any]:
        step = f"{size:,} on sockets"
        noted = {name: Rounds(size) for name in self._ways}
        for number in range(-WARM_UP, rounds):
            progress(step, max(0, number), rounds)
            for name in _rotated(list(self._ways), number):
                self._round(name, self._ways[name], noted[name] if number >= 0 else Rounds(size))
        progress(step, rounds, rounds)
        return {name: found.figures() for name, found in noted.items()}

    def _round(self, name: str, way: _Way, noted: Rounds) -> None:
        payload = self._record()
        frame_size = len(way.before) + SIZE + len(way.behind)
        for receiver in way.receivers:
            receiver.ask("expect", self._number, frame_size)
        time.sleep(SETTLE_S)
        used = cpu_ns(way.pid) if way.pid else 0
        sent = way.publisher.ask("publish", *(() if way.pid else (name,)), payload)
        told = self._collect(way.receivers)
        used = sent.cpu_ns if sent.cpu_ns is not None else cpu_ns(way.pid) - used
        stamps: array[int] = array("q")
        for one in told:
            stamps.frombytes(one.stamps)
            if one.last and one.last[len(way.before) : len(way.before) + SIZE] != sent.payload:
                raise RuntimeError(f"{name}: subscribers received {one.last!r} where {sent.payload!r} was sent")
        noted.note(sent, stamps, used, receivers_cpu_ns=sum(one.cpu_ns for one in told))

    def _collect(self, receivers: tuple[Helper, ...]) -> list[Round]:
        """What came of the round, of each that has sockets, when all has come or PATIENCE_S is over."""
        found: dict[Helper, Round] = {}
        give_up = time.monotonic() + PATIENCE_S
        given_up = False
        while len(found) < len(receivers):
            due = {receiver.control: receiver for receiver in receivers if receiver not in found}
            ready = wait(list(due), max(0.0, give_up - time.monotonic()) if not given_up else None)
            for control in ready:
                receiver = due[control]  # type: ignore[index] # only what was given comes back
                found[receiver] = receiver.answer()
            if not ready:
                given_up = True
                for receiver in due.values():
                    receiver.tell("give_up", self._number)
        return list(found.values())

    def _record(self) -> bytes:
        """The next one, 192 bytes like any other."""
        self._number += 1
        now_ns = time.monotonic_ns()
        return Record(
            network=b"bnch", session=1, sequence=self._number, event=Event.PROVEN, source=Source.CAPTURE,
            state=State.PROVEN | State.BEST, height=800_000, fork_height=0, next_bits=0, median_time_past=0,
            transactions=0, size=0, wall_ns=time.time_ns(), hash=secrets.token_bytes(32),
            header=secrets.token_bytes(80), seen_ns=now_ns, published_ns=now_ns,
        ).encode()  # fmt: skip


def _rotated(ways: list[str], number: int) -> list[str]:
    first = number % len(ways)
    return ways[first:] + ways[:first]


if __name__ == "__main__":
    be_apart(measure)
