"""The bpf(2) calls that bcc lacks, or that a process without bcc needs: maps, links, test runs, what an object is.

Everything goes by file descriptor and bytes; nothing is kept. A call that the kernel refuses raises OSError with its
errno, the command named. Numbers and layouts are those of include/uapi/linux/bpf.h, in the machine's byte order.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import NamedTuple

SYSTEM_CALLS = {"x86_64": 321, "aarch64": 280}

MAP_LOOKUP_ELEM, MAP_UPDATE_ELEM, MAP_DELETE_ELEM, MAP_GET_NEXT_KEY = 1, 2, 3, 4
PROG_TEST_RUN = 10
PROG_GET_FD_BY_ID = 13
OBJ_GET_INFO_BY_FD = 15
LINK_CREATE, LINK_GET_FD_BY_ID, LINK_GET_NEXT_ID, LINK_DETACH = 28, 30, 31, 34
COMMAND_NAMES = {
    MAP_LOOKUP_ELEM: "BPF_MAP_LOOKUP_ELEM",
    MAP_UPDATE_ELEM: "BPF_MAP_UPDATE_ELEM",
    MAP_DELETE_ELEM: "BPF_MAP_DELETE_ELEM",
    MAP_GET_NEXT_KEY: "BPF_MAP_GET_NEXT_KEY",
    PROG_TEST_RUN: "BPF_PROG_TEST_RUN",
    PROG_GET_FD_BY_ID: "BPF_PROG_GET_FD_BY_ID",
    OBJ_GET_INFO_BY_FD: "BPF_OBJ_GET_INFO_BY_FD",
    LINK_CREATE: "BPF_LINK_CREATE",
    LINK_GET_FD_BY_ID: "BPF_LINK_GET_FD_BY_ID",
    LINK_GET_NEXT_ID: "BPF_LINK_GET_NEXT_ID",
    LINK_DETACH: "BPF_LINK_DETACH",
}

ATTACH_XDP = 37
ATTACH_TCX_INGRESS, ATTACH_TCX_EGRESS = 46, 47  # kernel 6.6
XDP_FLAGS_SKB_MODE = 2  # generic
XDP_FLAGS_DRV_MODE = 4  # native

LIVE_FRAMES = 2  # BPF_F_TEST_XDP_LIVE_FRAMES, kernel 5.18
TEST_RUN_ROOM = 1 << 16
"""Bytes for the packet that a test run gives back; one that grew past it comes back cut."""

XDP_MD = struct.Struct("=IIIIII")
"""struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex."""

_libc = ctypes.CDLL(None, use_errno=True)


def bpf(command: int, attributes: bytes) -> tuple[int, bytes]:
    """One bpf(2) call: what it returned, and its attributes as the kernel left them."""
    machine = os.uname().machine
    number = SYSTEM_CALLS.get(machine)
    if number is None:
        raise OSError(f"bpf(2) has no known number on {machine}: expected one of {', '.join(SYSTEM_CALLS)}")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result: int = _libc.syscall(number, command, buffer, len(attributes))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{COMMAND_NAMES.get(command, command)}: {os.strerror(error)}")
    return result, buffer.raw


def _address(buffer: ctypes.Array[ctypes.c_char] | None) -> int:
    return 0 if buffer is None else ctypes.addressof(buffer)


# ── maps ──


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """The value under `key`, None if there is none; a per-CPU map's is 8-byte aligned, once for each possible CPU."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value = ctypes.create_string_buffer(value_size)
    try:
        bpf(MAP_LOOKUP_ELEM, struct.pack("=I4xQQQ", fd, _address(key_buffer), _address(value), 0))
    except FileNotFoundError:
        return None
    return value.raw


def map_update(fd: int, key: bytes, value: bytes) -> None:
    """Sets, whether or not it was there."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value_buffer = ctypes.create_string_buffer(value, len(value))
    bpf(MAP_UPDATE_ELEM, struct.pack("=I4xQQQ", fd, _address(key_buffer), _address(value_buffer), 0))


def map_delete(fd: int, key: bytes) -> bool:
    """Whether there was something to delete."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    try:
        bpf(MAP_DELETE_ELEM, struct.pack("=I4xQQQ", fd, _address(key_buffer), 0, 0))
    except FileNotFoundError:
        return False
    return True


def map_keys(fd: int, key_size: int) -> list[bytes]:
    """All keys, as they were at some time each: the map may change meanwhile."""
    keys: list[bytes] = []
    buffer: ctypes.Array[ctypes.c_char] | None = None
    while True:
        following = ctypes.create_string_buffer(key_size)
        try:
            bpf(MAP_GET_NEXT_KEY, struct.pack("=I4xQQ", fd, _address(buffer), _address(following)))
        except FileNotFoundError:
            return keys
        keys.append(following.raw)
        buffer = following


def possible_cpus() -> int:
    """How many values each entry of a per-CPU map has."""
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().replace(",", "-").split("-")[-1]
    return int(last) + 1


# ── links: attachments that end with their last descriptor ──


def link_create(program_fd: int, ifindex: int, attach_type: int, flags: int = 0) -> int:
    """The descriptor of a new link; the program leaves the interface when the last copy of it is closed.

    For XDP the flags are one of XDP_FLAGS_…, for TCX 0. EBUSY or EEXIST: another program has the place.
    """
    fd, _ = bpf(LINK_CREATE, struct.pack("=IIII", program_fd, ifindex, attach_type, flags) + bytes(48))
    os.set_inheritable(fd, False)
    return fd


# ── what a descriptor stands for ──


class ProgramInfo(NamedTuple):
    """The beginning of struct bpf_prog_info."""

    type: int
    id: int
    name: str


class MapInfo(NamedTuple):
    """The beginning of struct bpf_map_info; sizes in bytes."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


class LinkInfo(NamedTuple):
    """struct bpf_link_info of an XDP or TCX link; `ifindex` is 0 when the interface has gone."""

    type: int
    id: int
    program_id: int
    ifindex: int


def _object_info(fd: int, size: int) -> bytes:
    info = ctypes.create_string_buffer(size)
    bpf(OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, size, _address(info)))
    return info.raw


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("ascii", "replace")


def program_info(fd: int) -> ProgramInfo:
    """Of a program's descriptor."""
    kind, number, name = struct.unpack("=II56x16s", _object_info(fd, 80))
    return ProgramInfo(kind, number, _text(name))


def map_info(fd: int) -> MapInfo:
    """Of a map's descriptor."""
    kind, number, key, value, entries, flags, name = struct.unpack("=IIIIII16s", _object_info(fd, 40))
    return MapInfo(kind, number, key, value, entries, flags, _text(name))


def link_info(fd: int) -> LinkInfo:
    """Of a link's descriptor."""
    return LinkInfo(*struct.unpack("=IIIxxxxI", _object_info(fd, 20)))


def program_by_id(number: int) -> ProgramInfo:
    """Of a program that is loaded, whoever loaded it."""
    fd, _ = bpf(PROG_GET_FD_BY_ID, struct.pack("=III", number, 0, 0))
    try:
        return program_info(fd)
    finally:
        os.close(fd)


# ── test runs ──


class ProgramRun(NamedTuple):
    """What BPF_PROG_TEST_RUN gave back."""

    verdict: int
    data: bytes
    """The packet, XDP metadata in front of it."""
    context: bytes
    """As long as the one handed in; for XDP, `data` in it is the metadata's length."""
    duration_ns: int
    """Mean of one repetition."""


def run_program(
    program_fd: int,
    data: bytes,
    *,
    repeat: int = 1,
    context: bytes = b"",
    flags: int = 0,
    cpu: int = 0,
    batch: int = 0,
) -> ProgramRun:
    """Runs a program on a packet, or with LIVE_FRAMES sends `repeat` copies of it on their real way.

    With live frames nothing comes back, `batch` (at most 256) is the size of a bulk, and a signal ends the call with
    EINTR partway.
    """
    live = bool(flags & LIVE_FRAMES)
    data_in = ctypes.create_string_buffer(data, len(data))
    data_out = None if live else ctypes.create_string_buffer(TEST_RUN_ROOM)
    context_in = ctypes.create_string_buffer(context, len(context)) if context else None
    context_out = ctypes.create_string_buffer(len(context)) if context and not live else None
    sizes = (len(data), 0 if data_out is None else TEST_RUN_ROOM)
    context_sizes = (len(context), 0 if context_out is None else len(context))
    _, raw = bpf(
        PROG_TEST_RUN,
        struct.pack(
            "=IIIIQQIIIIQQIII4x",
            *(program_fd, 0, *sizes, _address(data_in), _address(data_out), repeat, 0),
            *(*context_sizes, _address(context_in), _address(context_out), flags, cpu, batch),
        ),
    )
    verdict, size_out = struct.unpack_from("=I4xI", raw, 4)
    (duration_ns,) = struct.unpack_from("=I", raw, 36)
    return ProgramRun(
        verdict,
        b"" if data_out is None else data_out.raw[:size_out],
        b"" if context_out is None else context_out.raw,
        duration_ns,
    )
