"""The peer-to-peer connections of this host, which the capture could hear, counted in the kernel's socket tables."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from sprint.doctor.findings import Finding, Need, State, needs_of
from sprint.doctor.nodes import V1_REMEDY

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from pathlib import Path

    from sprint.config import Config
    from sprint.doctor.running import RunningBypass

MAX_LINES = 200_000
"""Of each table, which has a line a socket: more are not counted, and it is said."""
_ESTABLISHED = "01"


@dataclass(frozen=True, slots=True)
class Flows:
    """Established connections by way; those within this host are none that a network card sees."""

    inbound: int = 0
    outbound: int = 0
    within: int = 0
    cut: bool = False
    """There were more lines than were looked at."""


def flows(root: Path, config: Config, ask: Callable[[], RunningBypass | None]) -> list[Finding]:
    """Of the calling process's network namespace: a node in a container of its own has another table.

    `ask` asks a running Sprint, after the tables have been read: the doctor's own connections are to come later.
    """
    ports = {config.network.port, *(address.port for address in config.upstreams)}
    counted = Flows()
    tables = 0
    for name in ("tcp", "tcp6"):
        try:
            # Of our own thread's namespace, which /proc/net (of the main thread) need not be.
            with (root / "proc/thread-self/net" / name).open("rb") as table:
                more = count((line.decode("ascii", "replace") for line in islice(table, MAX_LINES + 1)), ports)
        except OSError:
            continue
        tables += 1
        counted = Flows(
            counted.inbound + more.inbound,
            counted.outbound + more.outbound,
            counted.within + more.within,
            counted.cut or more.cut,
        )
    if not tables:
        subject = f"port {', '.join(map(str, sorted(ports)))}"
        return [Finding("flows", subject, State.UNKNOWN, "no table of sockets can be read", "mount /proc", Need.BYPASS)]
    return [judge_flows(counted, ports, ask(), wanted=Need.BYPASS in needs_of(config))]


def count(lines: Iterable[str], ports: Collection[int]) -> Flows:
    """Of /proc/net/tcp or tcp6 (proc(5)), its heading included; lines of another shape are passed over."""
    inbound = outbound = within = 0
    cut = False
    for number, line in enumerate(lines):
        if number >= MAX_LINES:
            cut = True
            break
        fields = line.split(maxsplit=4)
        if len(fields) < 4 or fields[3] != _ESTABLISHED:
            continue
        (local, here), (remote, there) = (_endpoint(field) for field in fields[1:3])
        if here not in ports and there not in ports:
            continue
        if local == remote or _is_loopback(remote):
            within += 1
        elif here in ports:
            inbound += 1
        else:
            outbound += 1
    return Flows(inbound, outbound, within, cut)


def _endpoint(field: str) -> tuple[str, int]:
    """The address as the kernel writes it, words in the machine's byte order; port 0 if it isn't one."""
    address, _, port = field.partition(":")
    try:
        return address, int(port, 16)
    except ValueError:
        return address, 0


def _is_loopback(address: str) -> bool:
    """Little-endian machines write 127.0.0.1 as 0100007F."""
    if len(address) == 8:
        return address.endswith("7F")
    mapped = address.startswith("0000000000000000FFFF0000") and address.endswith("7F")
    return mapped or address == "00000000000000000000000001000000"


def judge_flows(counted: Flows, ports: Collection[int], running: RunningBypass | None, *, wanted: bool) -> Finding:
    """Whether the capture has anything to hear."""
    check, subject = "flows", f"port {', '.join(map(str, sorted(ports)))}"
    number = counted.inbound + counted.outbound
    found = (
        f"{'more than ' if counted.cut else ''}{number} connections over network cards "
        f"({counted.inbound} in, {counted.outbound} out), {counted.within} within this host"
    )
    if running is not None and running.active:
        found += f"; the running capture saw {running.packets} packets, and counts {running.opaque_flows} opaque flows"
        if running.opaque_flows:
            detail = f"{found}: those are ciphertext (BIP324), or speak another protocol"
            return Finding(check, subject, State.DEGRADED, detail, V1_REMEDY, Need.BYPASS)
        return Finding(check, subject, State.OK, found, need=Need.BYPASS)
    if number == 0:
        detail = f"{found}: a capture would hear nothing here"
        remedy = (
            "connect the node to peers; if it runs in a container, set INTERFACE to the host's end of its network "
            "(a bridge's veth), or run Sprint in its namespace"
        )
        if not wanted:
            return Finding(check, subject, State.OK, detail, need=Need.BYPASS)
        return Finding(check, subject, State.DEGRADED, detail, remedy, Need.BYPASS)
    detail = f"{found}; how many are encrypted only a running capture can tell (opaqueFlows in /api/turbo-status)"
    return Finding(check, subject, State.OK, detail, need=Need.BYPASS)
