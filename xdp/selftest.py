"""The self-test: one packet of our own through an interface's receive path, and a look at whether it comes out.

It is a live frame (BPF_PROG_TEST_RUN, Linux 5.18) with documentation addresses (RFC 5737), a multicast MAC address, TTL
1 and wrong checksums: nothing forwards it, and no TCP socket gets it. The frame itself is run through `classify`, which
stands for the driver's hook in native mode; generic XDP and tc then see it as any other packet, and capture it a second
time: on these rungs both times are waited for.

Nothing is taken from a reader that is at work meanwhile: in the ring buffer we only look, and release nothing; the
AF_XDP socket's place is taken only before it has been handed over, and later the packet is watched for on the mirror
link, whose far end has to have counted one more. What this can't show: that the driver calls its native hook. That is
the kernel's word.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING

from xdp import kernel
from xdp.capture import SELF_TEST_SOURCE, open_mirror, raw_counters
from xdp.loader import COMMON
from xdp.ringbuf import RingBuffer
from xdp.rings import RingCorruptError
from xdp.segments import Backend

if TYPE_CHECKING:
    from xdp.loader import Loaded
    from xdp.outlet import Outlet
    from xdp.xsk import Xsk

LOOK_S = 0.005
"""Between two looks into the ring buffer, whose wake-ups may be switched off."""
MAX_RECORDS = 1 << 16
"""Of one look: more than a ring buffer of the usual size holds."""
MAX_FRAMES = 1_024
"""Of one look at the mirror link."""
_MAX_INTERRUPTIONS = 10
_MAPPED = bytes(10) + b"\xff\xff"
_SOURCE, _DESTINATION = SELF_TEST_SOURCE[12:], bytes((192, 0, 2, 82))
_ETH_P_ALL = 3


def prove(outlet: Outlet, index: int, mode: str, patience_s: float) -> None:
    """Send the packet into that interface, and wait for it at each way out.

    Raises OSError (ETIMEDOUT if it doesn't come). The ring buffer is always written to meanwhile.
    """
    loaded = outlet.loaded
    port, token = _watched_port(loaded), os.urandom(32)
    packet = self_test_packet(_magic(loaded), port, token)
    context = kernel.XDP_MD.pack(0, len(packet), 0, index, 0, 0)
    missing = {Backend.RINGBUF: 1 if mode == "native" else 2}
    with contextlib.ExitStack() as stack:
        stack.callback(loaded.configure, express=int(Backend.RINGBUF in outlet.backends))
        loaded.configure(express=1)
        ring = stack.enter_context(RingBuffer.open(loaded.maps["express"]))
        witness: _Socket | _Tap | None = None
        if outlet.mirror is not None:
            witness = _Tap(outlet) if outlet.handed_over else _Socket(outlet)
            stack.callback(witness.close)
            missing[Backend.AF_XDP] = 1
        stack.callback(kernel.map_delete, loaded.maps["flows"], _flow_key(port))
        _send(loaded.programs["classify"], packet, context)
        give_up = time.monotonic() + patience_s
        while True:
            try:
                missing[Backend.RINGBUF] -= sum(token in bytes(record) for record in ring.poll(MAX_RECORDS))
            except RingCorruptError:  # its reader released what we were looking at, and it was written over
                raise OSError(errno.EAGAIN, "the ring buffer was overrun during the self-test") from None
            if Backend.RINGBUF not in outlet.backends:
                ring.release()  # nobody else reads it, and full it would swallow the next packet
            if witness is not None:
                missing[Backend.AF_XDP] -= witness.seen(token)
            if all(count <= 0 for count in missing.values()):
                return
            if time.monotonic() > give_up:
                names = ", ".join(backend.name.lower() for backend, count in missing.items() if count > 0)
                raise OSError(errno.ETIMEDOUT, f"the self-test packet did not come out of {names}")
            select.select([] if witness is None else [witness], [], [], LOOK_S)


class _Socket:
    """The AF_XDP socket, ours for the moment."""

    def __init__(self, outlet: Outlet) -> None:
        self._xsk: Xsk = open_mirror(outlet.facts())

    def fileno(self) -> int:
        return self._xsk.fileno()

    def seen(self, token: bytes) -> int:
        count = sum(token in bytes(frame) for frame in self._xsk.peek())
        self._xsk.release()
        return count

    def close(self) -> None:
        self._xsk.close()


class _Tap:
    """An ear on the mirror link's near end, where a reader has the AF_XDP socket, and the far end's own count."""

    def __init__(self, outlet: Outlet) -> None:
        assert outlet.mirror is not None
        self._counters_fd = outlet.loaded.maps["counters"]
        self._came_out = self._count()
        self._heard = 0
        # Protocol 0 receives nothing until bound, so no other interface's frames slip in.
        self._tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        try:
            self._tap.bind((outlet.mirror.near, _ETH_P_ALL))
        except OSError:
            self._tap.close()
            raise

    def _count(self) -> int:
        counted = raw_counters(self._counters_fd)
        return counted["redirected"] + counted["unredirected"]

    def fileno(self) -> int:
        return self._tap.fileno()

    def seen(self, token: bytes) -> int:
        """1 once it has crossed the link, and something has come out at the far end since."""
        for _ in range(MAX_FRAMES):
            try:
                self._heard += token in self._tap.recv(4_096)
            except BlockingIOError:  # noqa: PERF203 - beside a system call it costs nothing
                break
        if not self._heard or self._count() == self._came_out:
            return 0
        self._heard -= 1
        return 1

    def close(self) -> None:
        self._tap.close()


def _send(program_fd: int, packet: bytes, context: bytes) -> None:
    for _ in range(_MAX_INTERRUPTIONS):
        try:
            kernel.run_program(program_fd, packet, context=context, flags=kernel.LIVE_FRAMES, batch=1)
        except InterruptedError:  # by a signal, before the only frame
            continue
        except OSError as error:
            raise OSError(error.errno, f"self-test (live frames, Linux 5.18): {error.strerror}") from None
        return


def self_test_packet(magic: bytes, port: int, token: bytes) -> bytes:
    """An Ethernet frame with a `headers` message from that port, which bears the token; no socket can receive it."""
    body = b"\x01" + token.ljust(80, b"\0") + b"\0"
    payload = magic + b"headers".ljust(12, b"\0") + struct.pack("<I", len(body)) + bytes(4) + body
    tcp = struct.pack("!HHIIBBHHH", port, port, int.from_bytes(token[:4], "big"), 0, 0x50, 0x10, 0, 0, 0)
    # Checksums zero, which is wrong; TTL 1.
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp) + len(payload), 0, 0, 1, 6, 0) + _SOURCE + _DESTINATION
    # To the address of LLDP (IEEE 802.1AB), which is nobody's own, and which no bridge forwards.
    ethernet = bytes.fromhex("0180c200000e025350520001") + b"\x08\x00"
    return ethernet + ip + tcp + payload


def _flow_key(port: int) -> bytes:
    return COMMON.layouts["flow_key"].packing.pack(_MAPPED + _SOURCE, _MAPPED + _DESTINATION, port, port)


def _magic(loaded: Loaded) -> bytes:
    layout = COMMON.layouts["config"]
    config = kernel.map_lookup(loaded.maps["config"], bytes(4), layout.size)
    at = layout.offset("magic")
    return (config or bytes(layout.size))[at : at + 4]


def _watched_port(loaded: Loaded) -> int:
    """The lowest; 0 if none is watched, and then the self-test fails."""
    with contextlib.closing(mmap.mmap(loaded.maps["ports"], 8192, prot=mmap.PROT_READ)) as area:
        bits = int.from_bytes(area[:], "little")
    return max((bits & -bits).bit_length() - 1, 0)
