"""How fast frames may follow each other on an interface: link speed, ring depth and queues, by ethtool's ioctl.

A driver's TX ring takes a burst at once and then no more than the wire carries; what is sent beyond that is dropped by
the driver, uncounted by most. Virtual links have no wire, and need no pace.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import socket
import struct

from xdp.fanout_maps import BATCH, PAYLOAD_LIMIT
from xdp.fanout_table import Pacing

_SIOCETHTOOL = 0x8946
_GSET, _GDRVINFO, _GRINGPARAM, _GCHANNELS = 0x01, 0x03, 0x10, 0x3C
_UNKNOWN_SPEEDS = {0, 0xFFFF, 0xFFFFFFFF}
ASSUMED_MBITS = 10_000
"""Where a device doesn't tell (virtual machines' don't): of the slowest that such hosts have today."""
ASSUMED_RING = 256
_FRAME_BYTES = 62 + PAYLOAD_LIMIT + 24
"""The largest of ours, with preamble, checksum and gap (IEEE 802.3)."""


def pacing(name: str) -> Pacing | None:
    """Of an interface of the calling thread's namespace; None for a virtual one. Raises OSError if there is none."""
    facts = _ethtool(name, struct.pack("=I192x", _GDRVINFO))
    # What sits on no bus has no wire: veth, tun, bridges, and what is stacked on others.
    if facts is None or not facts[100:132].strip(b"\0"):
        return None
    settings = _ethtool(name, struct.pack("=I40x", _GSET))
    low, high = struct.unpack_from("=12xH14xH", settings) if settings else (0, 0)
    speed = high << 16 | low
    rings = _ethtool(name, struct.pack("=I32x", _GRINGPARAM))
    depth = struct.unpack_from("=32xI", rings)[0] if rings else 0
    return pace(ASSUMED_MBITS if speed in _UNKNOWN_SPEEDS else speed, depth or ASSUMED_RING)


def tx_queues(name: str) -> int:
    """In use on an interface; 1 where its driver doesn't tell. Raises OSError if there is none of that name."""
    channels = _ethtool(name, struct.pack("=I32x", _GCHANNELS))
    return max(sum(struct.unpack_from("=24xI4xI", channels)), 1) if channels else 1


def pace(mbits: int, ring: int) -> Pacing:
    """For a link of that speed whose ring takes so many frames: half a ring at once, for others send there as well."""
    return Pacing(_FRAME_BYTES * 8_000 / mbits, max(ring // 2 // BATCH * BATCH, BATCH))


def slowest(paces: list[Pacing | None]) -> Pacing | None:
    """One that suits all."""
    real = [entry for entry in paces if entry is not None]
    return Pacing(max(p.gap_ns for p in real), min(p.burst for p in real)) if real else None


def _ethtool(name: str, command: bytes) -> bytes | None:
    """One ethtool ioctl (linux/ethtool.h), None where the driver has no answer."""
    buffer = ctypes.create_string_buffer(command, len(command))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            fcntl.ioctl(control, _SIOCETHTOOL, struct.pack("=16sQ16x", name.encode(), ctypes.addressof(buffer)))
        except OSError as error:
            if error.errno in {errno.EOPNOTSUPP, errno.EINVAL}:
                return None
            raise
    return buffer.raw
