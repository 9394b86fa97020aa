"""Memory that only its maker can write."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from support.protection import is_writable
from touchline_protos.shm import sealed_memory

SIZE = 3 * mmap.PAGESIZE + 17


@pytest.fixture
def made() -> Iterator[tuple[memoryview, int]]:
    memory, file = sealed_memory.make_read_only("test", SIZE)
    yield memory, file
    os.close(file)


def test_read_only_memory_shows_a_reader_what_its_maker_writes(made: tuple[memoryview, int]) -> None:
    memory, file = made

    reader = mmap.mmap(file, SIZE, prot=mmap.PROT_READ)
    memory[SIZE - 1] = 7

    assert len(memory) == SIZE
    assert reader[SIZE - 1] == 7
    assert not any(reader[: SIZE - 1])


def test_read_only_memory_cannot_be_mapped_writable_by_whoever_has_its_descriptor(made: tuple[memoryview, int]) -> None:
    _, file = made
    again = os.open(f"/proc/self/fd/{file}", os.O_RDWR)  # its owner may: only the seal is in the way

    try:
        for descriptor in (file, again):
            with pytest.raises(PermissionError):
                mmap.mmap(descriptor, SIZE)
            with pytest.raises(OSError, match=r"not permitted|Bad file descriptor"):
                os.pwrite(descriptor, b"x", 0)
    finally:
        os.close(again)


def test_read_only_memory_can_neither_shrink_nor_grow_nor_lose_its_seals(made: tuple[memoryview, int]) -> None:
    _, file = made
    again = os.open(f"/proc/self/fd/{file}", os.O_RDWR)

    try:
        for size in (0, SIZE - 1, SIZE + mmap.PAGESIZE):
            with pytest.raises(PermissionError):
                os.ftruncate(again, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(again, sealed_memory._F_ADD_SEALS, sealed_memory._F_SEAL_SEAL)
    finally:
        os.close(again)


@pytest.mark.parametrize(("make", "may_write"), [(sealed_memory.make_read_only, False), (sealed_memory.make_writable, True)])
def test_mapping_to_read_becomes_writable_and_read_only_again_if_the_memory_is_writable(make: Any, may_write: bool) -> None:
    memory, file = make("test", SIZE)
    reader = mmap.mmap(file, SIZE, prot=mmap.PROT_READ)
    address = np.frombuffer(reader, np.uint8).ctypes.data

    assert sealed_memory.protect(address, SIZE, mmap.PROT_READ | mmap.PROT_WRITE) is may_write
    assert is_writable(address) is may_write
    if may_write:
        ctypes.memset(address + 5, 7, 1)
        assert memory[5] == 7
    assert sealed_memory.protect(address, SIZE, mmap.PROT_READ)
    assert not is_writable(address)
    again = os.open(f"/proc/self/fd/{file}", os.O_RDWR)
    for size in (0, SIZE - 1, SIZE + mmap.PAGESIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(again, size)
    for descriptor in (file, again):
        os.close(descriptor)


@pytest.mark.parametrize("size", [1, SIZE, 5 << 20, (4 << 20) + 1])
def test_read_only_memory_has_all_its_pages_from_the_begin_and_they_are_zero(size: int) -> None:
    memory, file = sealed_memory.make_read_only("test", size)
    try:
        assert os.fstat(file).st_size == len(memory) == size
        assert os.fstat(file).st_blocks * 512 >= size
        assert memory[:] == bytes(size)
        address = np.frombuffer(memory, np.uint8).ctypes.data
        assert address % (1 << 21) == 0  # otherwise no page of it can be huge
    finally:
        os.close(file)


def test_read_only_memory_of_a_kernel_without_the_seal_has_a_descriptor_that_cannot_be_mapped_writable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seal = fcntl.fcntl

    def old_kernel(file: int, command: int, seals: int = 0) -> int:
        if seals & sealed_memory._F_SEAL_FUTURE_WRITE:
            raise OSError(22, "Invalid argument")
        return seal(file, command, seals)

    monkeypatch.setattr(sealed_memory.fcntl, "fcntl", old_kernel)
    _, file = sealed_memory.make_read_only("test", SIZE)

    try:
        with pytest.raises(PermissionError):
            mmap.mmap(file, SIZE)
        assert seal(file, sealed_memory._F_GET_SEALS) & sealed_memory._SEALS == sealed_memory._SEALS
    finally:
        os.close(file)


def test_read_only_memory_that_the_system_does_not_have_is_an_error_and_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))

    with pytest.raises(OSError, match=r"."):
        sealed_memory.make_read_only("test", 1 << 62)

    assert len(os.listdir("/proc/self/fd")) == before
