"""Memory that several processes share, and that can be handed to strangers who must not write it.

A memfd is created and mapped by the supervisor, and sealed afterwards: F_SEAL_FUTURE_WRITE (Linux 5.1, see
memfd_create(2) and fcntl(2)) leaves the mappings that stand writable, which forked children inherit, and refuses every
later way to write: write(), a new writable mapping, mprotect of a read-only one, a descriptor opened again through
/proc. Nor can the file grow or shrink, so a reader's mapping never faults.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from sprint.errors import HostError

_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW, _F_SEAL_FUTURE_WRITE = 0x1, 0x2, 0x4, 0x10
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
SEALS = _F_SEAL_SEAL | _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_FUTURE_WRITE


class SharedMemory:
    """A sealed memfd, mapped writable in this process and in those forked from it."""

    def __init__(self, name: str, size: int) -> None:
        """Create `size` zero bytes. Raises HostError where the kernel has no memfd or no such seal."""
        try:
            self.descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except (AttributeError, OSError) as error:
            raise HostError(f"shared memory {name}: memfd_create refused: {error}") from None
        try:
            os.ftruncate(self.descriptor, size)
            self.memory = memoryview(mmap.mmap(self.descriptor, size))
            fcntl.fcntl(self.descriptor, _F_ADD_SEALS, SEALS)
        except OSError as error:
            os.close(self.descriptor)
            raise HostError(f"shared memory {name} of {size} bytes: {error.strerror}") from None
        self.size = size

    def seals(self) -> int:
        """The seals in force."""
        return fcntl.fcntl(self.descriptor, _F_GET_SEALS)


def map_read_only(descriptor: int) -> memoryview:
    """Map a descriptor that was handed over, as its reader. Raises HostError when it can't be, or isn't sealed."""
    try:
        seals = fcntl.fcntl(descriptor, _F_GET_SEALS)
        size = os.fstat(descriptor).st_size
        if seals & SEALS != SEALS:
            raise HostError(f"shared memory with seals {seals:#x}: {SEALS:#x} expected")
        return memoryview(mmap.mmap(descriptor, size, prot=mmap.PROT_READ))
    except (OSError, ValueError) as error:
        raise HostError(f"shared memory can't be mapped: {error}") from None
