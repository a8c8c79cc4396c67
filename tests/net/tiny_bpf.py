"""BPF programs of a dozen instructions, assembled by hand, and the few bpf(2) calls to run them, for tests of rings.

They need no compiler, so these tests run wherever the kernel allows, and stand on nothing of the product's own loader.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_libc = ctypes.CDLL(None, use_errno=True)
SYS_BPF = 321  # x86-64
MAP_CREATE, MAP_LOOKUP, MAP_UPDATE, PROG_LOAD, TEST_RUN, LINK_CREATE = 0, 1, 2, 5, 10, 28
ARRAY, XSKMAP, RINGBUF = 2, 17, 27
SCHED_CLS, XDP = 3, 6
XDP_DROP, XDP_PASS = 1, 2
ATTACH_XDP, NATIVE = 37, 4

# Helpers, by their numbers in linux/bpf.h
LOOKUP, KTIME, REDIRECT_MAP, ADJUST_META = 1, 5, 51, 54
RB_OUTPUT, RB_RESERVE, RB_SUBMIT, RB_DISCARD = 130, 131, 132, 133
CSUM_DIFF = 28
RB_NO_WAKEUP, RB_FORCE_WAKEUP = 1, 2


class Insn(NamedTuple):
    """One instruction; `ld_map` below is the only one that takes two."""

    opcode: int
    dst: int = 0
    src: int = 0
    offset: int = 0
    imm: int = 0

    def encode(self) -> bytes:
        return struct.pack("<BBhi", self.opcode, self.src << 4 | self.dst, self.offset, self.imm)


def mov(dst: int, imm: int) -> Insn:
    return Insn(0xB7, dst, 0, 0, imm)


def mov_reg(dst: int, src: int) -> Insn:
    return Insn(0xBF, dst, src)


def add(dst: int, imm: int) -> Insn:
    return Insn(0x07, dst, 0, 0, imm)


def mul(dst: int, imm: int) -> Insn:
    return Insn(0x27, dst, 0, 0, imm)


def and_(dst: int, imm: int) -> Insn:
    return Insn(0x57, dst, 0, 0, imm)


def load(size: int, dst: int, src: int, offset: int) -> Insn:
    """dst = *(uN *)(src + offset), N in bytes."""
    return Insn({1: 0x71, 2: 0x69, 4: 0x61, 8: 0x79}[size], dst, src, offset)


def store(size: int, dst: int, offset: int, src: int) -> Insn:
    """*(uN *)(dst + offset) = src."""
    return Insn({1: 0x73, 2: 0x6B, 4: 0x63, 8: 0x7B}[size], dst, src, offset)


def jump_if_zero(dst: int, skip: int) -> Insn:
    return Insn(0x15, dst, 0, skip, 0)


def jump_if_set(dst: int, mask: int, skip: int) -> Insn:
    return Insn(0x45, dst, 0, skip, mask)


def jump_if_not(dst: int, imm: int, skip: int) -> Insn:
    return Insn(0x55, dst, 0, skip, imm)


def jump_if_above(dst: int, src: int, skip: int) -> Insn:
    return Insn(0x2D, dst, src, skip)


def call(helper: int) -> Insn:
    return Insn(0x85, imm=helper)


EXIT = Insn(0x95)


def load_map(dst: int, fd: int) -> tuple[Insn, Insn]:
    return Insn(0x18, dst, 1, 0, fd), Insn(0)


def bpf(command: int, attributes: bytes) -> tuple[int, bytes]:
    """bpf(2): its result, and the attributes as the kernel left them. Raises OSError."""
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = _libc.syscall(SYS_BPF, command, buffer, len(attributes))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"bpf({command}): {os.strerror(number)}")
    return result, buffer.raw


@contextlib.contextmanager
def create_map(kind: int, key: int, value: int, entries: int) -> Iterator[int]:
    fd, _ = bpf(MAP_CREATE, struct.pack("=5I", kind, key, value, entries, 0).ljust(72, b"\0"))
    try:
        yield fd
    finally:
        os.close(fd)


def set_entry(map_fd: int, key: int, value: int, width: int = 4) -> None:
    at = ctypes.create_string_buffer(struct.pack("=I", key), 4)
    what = ctypes.create_string_buffer(value.to_bytes(width, "little"), width)
    bpf(MAP_UPDATE, struct.pack("=I4xQQQ", map_fd, ctypes.addressof(at), ctypes.addressof(what), 0))


def entry(map_fd: int, key: int, width: int = 4) -> int:
    at = ctypes.create_string_buffer(struct.pack("=I", key), 4)
    what = ctypes.create_string_buffer(width)
    bpf(MAP_LOOKUP, struct.pack("=I4xQQQ", map_fd, ctypes.addressof(at), ctypes.addressof(what), 0))
    return int.from_bytes(what.raw, "little")


@contextlib.contextmanager
def load_program(kind: int, *instructions: Insn | Iterable[Insn]) -> Iterator[int]:
    """Load a program; the verifier's complaint is in the error."""
    flat = [i for part in instructions for i in ((part,) if isinstance(part, Insn) else part)]
    code = b"".join(i.encode() for i in flat)
    insns, license_ = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack("=IIQQ", kind, len(flat), ctypes.addressof(insns), ctypes.addressof(license_))
    try:
        fd, _ = bpf(PROG_LOAD, (attributes + struct.pack("=IIQII16s", 0, 0, 0, 0, 0, b"tiny")).ljust(120, b"\0"))
    except OSError as error:
        log = ctypes.create_string_buffer(1 << 20)
        logged = attributes + struct.pack("=IIQII16s", 1, len(log), ctypes.addressof(log), 0, 0, b"tiny")
        with contextlib.suppress(OSError):
            os.close(bpf(PROG_LOAD, logged.ljust(120, b"\0"))[0])
        raise OSError(error.errno, f"{error.strerror}; {log.value[-2000:].decode()}") from None
    try:
        yield fd
    finally:
        os.close(fd)


def run(program: int, repeat: int = 1, data: bytes = bytes(64)) -> int:
    """BPF_PROG_TEST_RUN on a packet; the program's return value of the last time. A signal doesn't cut it short."""
    packet = ctypes.create_string_buffer(data, len(data))
    attributes = struct.pack("=IIIIQQII", program, 0, len(data), 0, ctypes.addressof(packet), 0, repeat, 0)
    _, after = bpf(TEST_RUN, attributes.ljust(80, b"\0"))
    return int(struct.unpack_from("=I", after, 4)[0])


@contextlib.contextmanager
def attach_xdp(program: int, index: int, mode: int = NATIVE) -> Iterator[int]:
    """A bpf_link on an interface of the calling thread's namespace; detaches at the end."""
    fd, _ = bpf(LINK_CREATE, struct.pack("=IIII", program, index, ATTACH_XDP, mode).ljust(64, b"\0"))
    try:
        yield fd
    finally:
        os.close(fd)


def redirect_to_xsk(xskmap: int, otherwise: int = XDP_DROP) -> list[Insn]:
    """XDP: every packet to the socket of its queue."""
    return [load(4, 2, 1, 16), *load_map(1, xskmap), mov(3, otherwise), call(REDIRECT_MAP), EXIT]


def redirect_with_metadata(xskmap: int) -> list[Insn]:
    """The same, after putting the time of arrival (u64, CLOCK_MONOTONIC ns) in front of the packet."""
    return [
        mov_reg(6, 1),
        mov(2, -8),
        call(ADJUST_META),
        jump_if_not(0, 0, 9),
        call(KTIME),
        load(4, 2, 6, 8),  # data_meta
        load(4, 3, 6, 0),  # data
        mov_reg(4, 2),
        add(4, 8),
        jump_if_above(4, 3, 3),
        store(8, 2, 0, 0),
        mov(0, 0),
        Insn(0x05, offset=2),  # past the failure's exit
        mov(0, XDP_DROP),
        EXIT,
        mov_reg(1, 6),
        *redirect_to_xsk(xskmap),
    ]


def monotonic_ns() -> int:
    """The clock of bpf_ktime_get_ns."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)
