"""Sealed memory: whoever mapped it before writes on, and whoever comes after can only read, whatever they try."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

import pytest

from sprint.errors import HostError
from sprint.shared_memory import SEALS, SharedMemory, map_read_only
from tests.descriptors import open_descriptors
from tests.unit.shm_host import ended, fork

PROT_READ, PROT_WRITE = 1, 2
F_ADD_SEALS = 1033


def test_a_child_writes_by_the_mapping_it_inherits_and_its_parent_sees_it() -> None:
    memory = SharedMemory("test", 8192)

    def write() -> None:
        memory.memory[5000:5005] = b"hello"

    assert ended(fork(write)) == 0
    assert bytes(memory.memory[5000:5005]) == b"hello"
    os.close(memory.descriptor)


def test_new_memory_is_zero_of_the_size_asked_for_and_sealed() -> None:
    memory = SharedMemory("test", 5000)
    assert bytes(memory.memory) == bytes(5000)
    assert (memory.size, os.fstat(memory.descriptor).st_size) == (5000, 5000)
    assert memory.seals() == SEALS
    assert not os.get_inheritable(memory.descriptor)
    os.close(memory.descriptor)


def test_what_is_written_shows_in_a_read_only_mapping_which_takes_nothing() -> None:
    memory = SharedMemory("test", 4096)
    seen = map_read_only(memory.descriptor)
    memory.memory[100] = 7
    assert seen[100] == 7
    assert seen.readonly
    with pytest.raises(TypeError):
        seen[100] = 8
    os.close(memory.descriptor)


def test_seals_can_be_neither_taken_off_nor_added_to() -> None:
    memory = SharedMemory("test", 4096)
    for seals in (0, 0x8, 0x20):
        with pytest.raises(PermissionError):
            fcntl.fcntl(memory.descriptor, F_ADD_SEALS, seals)
    assert memory.seals() == SEALS
    os.close(memory.descriptor)


def test_memory_that_is_not_sealed_is_not_mapped() -> None:
    descriptor = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 4096)
    with pytest.raises(HostError, match="seals 0x0: 0x17 expected"):
        map_read_only(descriptor)
    fcntl.fcntl(descriptor, F_ADD_SEALS, SEALS & ~0x2)  # it could still shrink under its reader
    with pytest.raises(HostError, match="seals 0x"):
        map_read_only(descriptor)
    os.close(descriptor)


def test_what_is_no_memory_at_all_is_an_error_of_the_host() -> None:
    reading, writing = os.pipe()
    for descriptor in (reading, writing):
        with pytest.raises(HostError, match="can't be mapped"):
            map_read_only(descriptor)
        os.close(descriptor)
    with pytest.raises(HostError, match="can't be mapped"):
        map_read_only(reading)


def test_empty_memory_is_an_error_of_the_host() -> None:
    descriptor = os.memfd_create("empty", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(descriptor, F_ADD_SEALS, SEALS)
    with pytest.raises(HostError, match="can't be mapped"):
        map_read_only(descriptor)
    os.close(descriptor)


@pytest.mark.parametrize("size", [-1, 1 << 62])
def test_memory_that_the_kernel_refuses_is_an_error_of_the_host_and_leaves_nothing(size: int) -> None:
    before = open_descriptors()
    with pytest.raises(HostError, match=f"shared memory test of {size} bytes"):
        SharedMemory("test", size)
    assert open_descriptors() == before


def test_a_kernel_without_memfd_is_an_error_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_name: str, _flags: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuses)
    with pytest.raises(HostError, match="memfd_create refused"):
        SharedMemory("test", 4096)


def test_a_private_mapping_of_a_stranger_changes_nothing_that_others_see() -> None:
    memory = SharedMemory("test", 4096)
    private = mmap.mmap(memory.descriptor, 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    private[0] = 1
    assert memory.memory[0] == 0
    os.close(memory.descriptor)


def test_a_read_only_mapping_cannot_be_made_writable() -> None:
    memory = SharedMemory("test", 4096)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    at = libc.mmap(None, 4096, PROT_READ, mmap.MAP_SHARED, memory.descriptor, 0)
    assert at not in (None, ctypes.c_void_p(-1).value)
    assert libc.mprotect(at, 4096, PROT_READ | PROT_WRITE) == -1
    libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(4096))
    os.close(memory.descriptor)
