"""What a capture yields: TCP segments of peer-to-peer flows, as they passed the interface, unverified.

A segment is a claim by whoever can put packets on the wire. Checksums are not looked at (partial checksums are normal
on virtual links), and the payload may be cut short: `length` says how long it was on the wire.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import NamedTuple


class Backend(IntEnum):
    """Which way a segment came out of the kernel."""

    RINGBUF = 1
    """The BPF ring buffer, mapped by Python."""
    AF_XDP = 2
    """The mirror: a clone, redirected into an AF_XDP socket."""


class TcpFlags(IntFlag):
    """The flags of RFC 9293 that reassembly looks at."""

    FIN = 0x01
    SYN = 0x02
    RST = 0x04


class Flow(NamedTuple):
    """One direction of a TCP connection; addresses are 16 bytes, IPv4 mapped into IPv6 (RFC 4291)."""

    source: bytes
    destination: bytes
    source_port: int
    destination_port: int


class Segment(NamedTuple):
    """One TCP segment that came in on a captured interface."""

    backend: Backend
    arrival_ns: int
    """CLOCK_MONOTONIC (bpf_ktime_get_ns) in the XDP program on the interface; 0 where the way out doesn't carry it."""
    flow: Flow
    sequence: int
    """Of the payload's first byte, modulo 2**32."""
    flags: TcpFlags
    length: int
    """Bytes of payload on the wire."""
    payload: memoryview | bytes
    """Its first bytes, at most `length`; valid only until the next poll of the capture."""
