"""The header file: every accepted header of one network, so that a restart needn't fetch and wait.

Format, little-endian. A preamble of 80 bytes, then nothing but 80-byte headers as on the wire:

| offset | bytes | field |
|---|---|---|
| 0 | 4 | `SPRH` |
| 4 | 2 | version, 1 |
| 6 | 2 | bytes a header, 80 |
| 8 | 4 | the network's message start |
| 12 | 32 | the network's genesis hash |
| 44 | 36 | zero |
| 80 | n × 80 | headers in the order they were accepted, side branches among them, parents first, genesis left out |

The file is only ever appended to. A killed process leaves at worst a torn tail; nothing on disk is trusted, loading
verifies each header again, and the first that fails ends it: tail and damage are cut off and fetched anew. So no fsync
is needed, not even against power loss. A lock (flock) keeps a second process out; it goes with the process.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, final

from sprint.bitcoin.block import HEADER_SIZE
from sprint.errors import HeaderFileError, HostError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from sprint.bitcoin.networks import Network
    from sprint.chain import HeaderChain

VERSION = 1
_PREAMBLE = Struct("<4sHH4s32s36x")
_MAGIC = b"SPRH"
_READ_HEADERS = 4000
"""A third of a megabyte at a time: loading needs no more memory than the chain itself."""


@final
class HeaderFile:
    """An open header file, locked for this process. Also a context manager."""

    def __init__(self, path: Path, fd: int, size: int) -> None:
        """Use `open`."""
        self.path = path
        self.cut_bytes = 0
        """How much the last load cut off: a torn tail, or damage and what followed it."""
        self._fd = fd
        self._size = size
        """Up to here the file is well-formed."""

    @classmethod
    def open(cls, path: str | Path, network: Network) -> HeaderFile:
        """Opens the file of that network, creating it if need be; its folder must exist.

        Raises HeaderFileError if it is another network's, of another format, or held by another process, and HostError
        if the machine refuses it.
        """
        path = Path(path)
        preamble = _PREAMBLE.pack(_MAGIC, VERSION, HEADER_SIZE, network.magic, network.genesis_hash)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise HostError(f"header file {path}: can't be opened: {error.strerror}") from error
        try:
            _lock(fd, path)
            size = os.fstat(fd).st_size
            found = os.pread(fd, len(preamble), 0)
            file = cls(path, fd, size - size % HEADER_SIZE)
            if found != preamble:
                # Killed while creating it: less than a preamble, and only its beginning.
                if size >= len(preamble) or not preamble.startswith(found):
                    raise HeaderFileError(_mismatch(path, found, network))
                file._restart(preamble)
        except OSError as error:
            os.close(fd)
            raise HostError(f"header file {path}: {error.strerror}") from error
        except BaseException:
            os.close(fd)
            raise
        return file

    def load_into(self, chain: HeaderChain, progress: Callable[[int, int], None] | None = None) -> int:
        """Verifies and takes in all headers, cuts off what is torn or damaged, returns how many were new to `chain`.

        `progress` is told headers done and headers in all. Raises HostError if the file can't be read.
        """
        return self._load(chain, 0, progress)

    def follow(self, chain: HeaderChain) -> int:
        """As load_into, but only what a process that was forked with this open file has appended since."""
        known = (self._size - _PREAMBLE.size) // HEADER_SIZE
        try:
            size = os.fstat(self._fd).st_size
        except OSError as error:
            raise HostError(f"header file {self.path}: can't be read: {error.strerror}") from error
        total = max(0, (size - _PREAMBLE.size) // HEADER_SIZE)
        self._size = self._at(total)
        return self._load(chain, min(known, total), None)  # fewer: somebody has shortened it

    def _load(self, chain: HeaderChain, first: int, progress: Callable[[int, int], None] | None) -> int:
        total = (self._size - _PREAMBLE.size) // HEADER_SIZE
        done = useful = first
        kept = 0
        try:
            while done < total:
                data = os.pread(self._fd, min(_READ_HEADERS, total - done) * HEADER_SIZE, self._at(done))
                data = data[: len(data) // HEADER_SIZE * HEADER_SIZE]
                restored = chain.restore(data)
                kept += restored.kept
                if restored.end:
                    useful = done + restored.end
                done += len(data) // HEADER_SIZE
                if progress is not None:
                    progress(done, total)
                if restored.rejection is not None or not data:
                    break
            self.cut_bytes = os.fstat(self._fd).st_size - self._at(useful)
            if self.cut_bytes:
                self._cut(self._at(useful))
        except OSError as error:
            raise HostError(f"header file {self.path}: can't be read: {error.strerror}") from error
        return kept

    def append(self, headers: bytes) -> None:
        """Adds n × 80 bytes of accepted headers, in one write.

        Raises HostError if they can't all be written; the file then is as it was before. Raises ValueError for a
        length that is no multiple of 80.
        """
        if len(headers) % HEADER_SIZE:
            raise ValueError(f"{len(headers)} bytes are not a multiple of {HEADER_SIZE}")
        try:
            if os.fstat(self._fd).st_size != self._size:
                # A killed process left a torn tail, or one of ours couldn't be cut off when its write failed.
                self._cut(self._size)
            _write_all(self._fd, headers)
        except OSError as error:
            reason = f"header file {self.path}: {len(headers)} bytes can't be written: {error.strerror}"
            try:
                self._cut(self._size)
            except OSError as second:
                reason += f"; nor could the torn tail be cut off: {second.strerror}"
            raise HostError(reason) from error
        self._size += len(headers)

    def close(self) -> None:
        """Lets go of file and lock; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> HeaderFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def _at(header: int) -> int:
        return _PREAMBLE.size + header * HEADER_SIZE

    def _restart(self, preamble: bytes) -> None:
        self._cut(0)
        _write_all(self._fd, preamble)
        self._size = len(preamble)

    def _cut(self, size: int) -> None:
        os.ftruncate(self._fd, size)
        self._size = size


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise HeaderFileError(f"header file {path}: another process holds it") from None


def _write_all(fd: int, data: bytes) -> None:
    """One write as a rule; a short one is followed by another, which says why or does the rest."""
    left = memoryview(data)
    while left:
        written = os.write(fd, left)
        if not written:
            raise OSError(0, "nothing was written")
        left = left[written:]


def _mismatch(path: Path, found: bytes, network: Network) -> str:
    if len(found) < _PREAMBLE.size or not found.startswith(_MAGIC):
        return f"header file {path}: begins with {found[:4].hex() or 'nothing'}, {_MAGIC.hex()} was expected"
    _, version, header_size, magic, genesis = _PREAMBLE.unpack(found)
    if (version, header_size) != (VERSION, HEADER_SIZE):
        return f"header file {path}: version {version} with {header_size} bytes a header, 1 with 80 was expected"
    if (magic, genesis) != (network.magic, network.genesis_hash):
        return (
            f"header file {path}: belongs to network {magic.hex()}, {network.magic.hex()} ({network.name}) was expected"
        )
    return f"header file {path}: its preamble is not all zero at the end"
