"""Compiles and loads the BPF programs in a short-lived child, and hands on their file descriptors.

bcc carries a compiler: importing it and compiling take seconds and some 150 MB that would stay. So `python -m
xdp.loader` does it in a process of its own and passes program and map descriptors over a socket pair (SCM_RIGHTS);
nothing here imports bcc otherwise. Closing the descriptors unloads everything that isn't attached.

The layouts of C structs come from bpf/common.h, which is read as text and is their only copy.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import mmap
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

from xdp import kernel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

BPF_FOLDER = Path(__file__).resolve().parent / "bpf"
RING_PAGES = 256  # 1 MiB: some 4,000 announcements, or what a lost 1 MB block is captured as before Python looks
TIMEOUT_S = 60.0  # of the child: it takes 2 to 4 s on a slow core
MAX_REPLY = 1 << 16

PROGRAMS = {
    "classify": "XDP",
    "mirror": "SCHED_CLS",
    "classify_tc": "SCHED_CLS",
    "shorten": "SCHED_CLS",
    "to_xsk": "XDP",
}
"""The functions of capture.c and the kind of program that each is."""
MAPS = ("config", "ports", "flows", "counters", "express", "xsks", "stamps")


class LoadError(Exception):
    """The programs could not be loaded; the message is one line that names the reason."""


# ── common.h ──

CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
DEFINE = re.compile(r"^#define (\w+) (0x[0-9a-f]+|\d+)\b", re.MULTILINE)
STRUCT = re.compile(r"^struct (\w+) \{\n(.*?)^\};", re.MULTILINE | re.DOTALL)
MEMBER = re.compile(r"^\s+(?:struct )?(\w+) (\w+)(?:\[(\w+)\])?;", re.MULTILINE)


class Member(NamedTuple):
    """A number or an array of bytes in a struct; one in a struct within has a dotted name, `flow.source`."""

    name: str
    offset: int
    code: str
    """As for module `struct`."""


@dataclass(frozen=True)
class Layout:
    """Where the members of a C struct lie, naturally aligned as every C compiler here does it."""

    name: str
    members: tuple[Member, ...]
    size: int
    alignment: int
    packing: struct.Struct = field(compare=False)
    """Gives the members in their order."""

    def unpack(self, buffer: bytes | memoryview, offset: int = 0) -> dict[str, Any]:
        """By name: int, or bytes for an array of u8."""
        return dict(zip((m.name for m in self.members), self.packing.unpack_from(buffer, offset), strict=True))

    def offset(self, name: str) -> int:
        """Of a member, in bytes."""
        return next(m.offset for m in self.members if m.name == name)


class Common(NamedTuple):
    """What common.h says."""

    constants: Mapping[str, int]
    layouts: Mapping[str, Layout]


def parse_common(text: str) -> Common:
    """Reads `#define NAME number` and structs of one member a line; LoadError for a type it doesn't know."""
    constants = {name: int(value, 0) for name, value in DEFINE.findall(text)}
    layouts: dict[str, Layout] = {}
    for name, body in STRUCT.findall(text):
        layouts[name] = _lay_out(name, MEMBER.findall(body), constants, layouts)
    return Common(constants, layouts)


def _lay_out(
    name: str, found: Sequence[tuple[str, str, str]], constants: Mapping[str, int], layouts: Mapping[str, Layout]
) -> Layout:
    members: list[Member] = []
    end, widest = 0, 1
    for kind, member, count_text in found:
        count = constants[count_text] if count_text in constants else int(count_text or 1)
        if kind in layouts:
            inner = layouts[kind]
            size, alignment, parts = inner.size, inner.alignment, inner.members
        elif kind in CODES:
            size = alignment = struct.calcsize(f"={CODES[kind]}")
            if kind == "u8" and count_text:
                size, count, parts = count, 1, (Member("", 0, f"{count}s"),)
            else:
                parts = (Member("", 0, CODES[kind]),)
        else:
            raise LoadError(f"common.h: struct {name} has {member} of unknown type {kind}")
        end += -end % alignment
        for number in range(count):
            label = f"{member}[{number}]" if count > 1 else member
            for part in parts:
                dotted = f"{label}.{part.name}" if part.name else label
                members.append(Member(dotted, end + part.offset, part.code))
            end += size
        widest = max(widest, alignment)
    total = end + -end % widest
    packing, at = "=", 0
    for entry in members:
        packing += "x" * (entry.offset - at) + entry.code
        at = entry.offset + struct.calcsize(f"={entry.code}")
    return Layout(name, tuple(members), total, widest, struct.Struct(packing + "x" * (total - at)))


COMMON = parse_common((BPF_FOLDER / "common.h").read_text())

# ── what is loaded ──


def missing() -> str | None:
    """Why nothing can be loaded here, in one line with the remedy; None if nothing is known to stand in the way."""
    if os.geteuid() != 0:
        return "loading BPF programs needs root"
    spec = importlib.util.find_spec("bcc")
    if spec is None or spec.origin is None:
        return "bcc is not importable: apt-get install python3-bpfcc"
    if not (Path(spec.origin).parent / "libbcc.py").exists():
        return f"{Path(spec.origin).parent} is not the BPF compiler: pip uninstall bcc, apt-get install python3-bpfcc"
    source = os.environ.get("BCC_KERNEL_SOURCE")
    release = os.uname().release
    if source and not Path(source, "include").is_dir():
        return f"BCC_KERNEL_SOURCE is {source}, where there are no kernel headers"
    if (
        not source
        and not Path("/lib/modules", release, "build").exists()
        and not Path("/sys/kernel/kheaders.tar.xz").exists()
    ):
        return f"no kernel headers for {release}: install linux-headers, or name a tree of them in BCC_KERNEL_SOURCE"
    return None


@final
@dataclass
class Loaded:
    """The descriptors of what was loaded, by name; closed with it."""

    programs: Mapping[str, int]
    maps: Mapping[str, int]

    def __post_init__(self) -> None:
        """Maps the config, so that setting it is a store."""
        self._config = mmap.mmap(self.maps["config"], mmap.PAGESIZE)
        self._config_words = memoryview(self._config).cast("I")
        self._per_cpu = kernel.possible_cpus()

    def configure(self, **values: int) -> None:
        """Sets members of struct config, each by one store; programs that run see it with the next packet."""
        layout = COMMON.layouts["config"]
        for name, value in values.items():
            self._config_words[layout.offset(name) // 4] = value

    def watch(self, ports: Iterable[int]) -> None:
        """Follows flows from or to these ports, and no others."""
        bits = [0] * 1024
        for port in ports:
            if not 0 < port < 1 << 16:
                raise ValueError(f"port {port}: expected 1 to 65535")
            bits[port >> 6] |= 1 << (port & 63)
        with contextlib.closing(mmap.mmap(self.maps["ports"], 8192)) as area:
            words = memoryview(area).cast("Q")
            for at, word in enumerate(bits):
                words[at] = word
            words.release()

    def counters(self) -> dict[str, int]:
        """struct counters, all CPUs together."""
        layout = COMMON.layouts["counters"]
        raw = kernel.map_lookup(self.maps["counters"], bytes(4), layout.size * self._per_cpu)
        if raw is None:
            raise LoadError("the counters' map has no entry")
        each = [layout.packing.unpack_from(raw, cpu * layout.size) for cpu in range(self._per_cpu)]
        # Opaque flows are counted down on another CPU than up: sums are modulo 2**64.
        return {
            m.name: sum(column) % (1 << 64) for m, column in zip(layout.members, zip(*each, strict=True), strict=True)
        }

    def close(self) -> None:
        """Closes all descriptors; what is attached by a link of its own stays."""
        if not self._config.closed:
            self._config_words.release()
            self._config.close()
            for fd in (*self.programs.values(), *self.maps.values()):
                os.close(fd)

    def __enter__(self) -> Loaded:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()


def load(
    magic: bytes,
    ports: Iterable[int],
    *,
    express: bool = True,
    wakeup: bool = True,
    mirror_ifindex: int = 0,
    every_magic: bool = True,
    ring_pages: int = RING_PAGES,
    timeout_s: float = TIMEOUT_S,
) -> Loaded:
    """Compiles and loads capture.c; nothing is attached yet.

    `magic` is the network's four bytes of message start; `ring_pages`, a power of two, the ring buffer's size. Raises
    LoadError.
    """
    if len(magic) != 4:
        raise ValueError(f"magic {magic.hex()}: expected 4 bytes")
    programs, maps = load_in_child("capture.c", PROGRAMS, MAPS, {"RING_PAGES": ring_pages}, timeout_s)
    loaded = Loaded(programs, maps)
    try:
        loaded.watch(ports)
        loaded.configure(
            magic=int.from_bytes(magic, sys.byteorder),
            express=express,
            wakeup=wakeup,
            mirror_ifindex=mirror_ifindex,
            every_magic=every_magic,
        )
    except BaseException:
        loaded.close()
        raise
    return loaded


# ── the child ──


def load_in_child(
    source: str,
    programs: Mapping[str, str],
    maps: Sequence[str],
    defines: Mapping[str, int],
    timeout_s: float = TIMEOUT_S,
) -> tuple[dict[str, int], dict[str, int]]:
    """Loads a file of bpf/: descriptors of its programs and maps by name, not inheritable. Raises LoadError."""
    reason = missing()
    if reason:
        raise LoadError(reason)
    order = json.dumps({"source": source, "programs": dict(programs), "maps": list(maps), "defines": dict(defines)})
    ours, theirs = socket.socketpair()
    with ours, tempfile.TemporaryFile() as errors:
        ours.settimeout(timeout_s)
        with theirs:
            child = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-I", "-m", "xdp.loader", str(theirs.fileno()), order],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=(theirs.fileno(),),
            )
        try:
            reply, fds, _, _ = socket.recv_fds(ours, MAX_REPLY, len(programs) + len(maps))
        except TimeoutError:
            raise LoadError(f"{source}: not loaded within {timeout_s:g} s") from None
        finally:
            child.kill()
            child.wait()
        for fd in fds:
            os.set_inheritable(fd, False)
        if fds and len(fds) != len(programs) + len(maps):
            for fd in fds:
                os.close(fd)
            raise LoadError(f"{source}: {len(fds)} of {len(programs) + len(maps)} descriptors came: out of open files?")
        if not fds:
            errors.seek(0)
            raise LoadError(f"{source}: {_reason(reply.decode(), errors.read().decode(errors='replace'))}")
    return dict(zip(programs, fds, strict=False)), dict(zip(maps, fds[len(programs) :], strict=True))


def _reason(said: str, output: str) -> str:
    """One line of what the child said and what the compiler or the verifier printed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line]
    if not telling:
        telling = [line for line in lines if not line.startswith(("processed ", "verification time", "stack depth"))][
            -2:
        ]
    return ": ".join((said or "the compiling process ended without a word", "; ".join(telling[:2]))).rstrip(": ")


def compile_and_send(fd: int, order: Mapping[str, Any]) -> None:
    """The child: compiles, loads, sends all descriptors with one message, or a message alone that says what failed."""
    with socket.socket(fileno=fd) as parent:
        try:
            # bcc is no dependency that the package index has, and has no types.
            from bcc import BPF, lib  # type: ignore[import-untyped, unused-ignore]  # noqa: PLC0415
        except Exception as error:  # whatever keeps it from being imported is the reason
            parent.sendall(f"bcc can't be imported: {error}".encode())
            return
        try:
            flags = [f"-I{BPF_FOLDER}", *(f"-D{name}={value}" for name, value in order["defines"].items())]
            module = BPF(text=(BPF_FOLDER / order["source"]).read_text(), cflags=flags)
            fds = [module.load_func(name, getattr(BPF, kind)).fd for name, kind in order["programs"].items()]
            fds += [lib.bpf_table_fd(module.module, name.encode()) for name in order["maps"]]
        except Exception as error:  # bcc raises nothing narrower
            parent.sendall(str(error).replace("\n", " ").encode())
            return
        socket.send_fds(parent, [b"loaded"], fds)


if __name__ == "__main__":
    compile_and_send(int(sys.argv[1]), json.loads(sys.argv[2]))
