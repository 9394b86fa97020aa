"""Registering memory that is mapped to be read, with devices that do and that do not take it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest

from support.protection import is_writable
from touchline._learner.cuda_device import MAPPED, NOT_SUPPORTED, READ_ONLY, register_to_read
from touchline_protos.shm import sealed_memory

SIZE = 2 * mmap.PAGESIZE
INVALID = 1


@pytest.fixture(params=[sealed_memory.make_read_only, sealed_memory.make_writable], ids=["sealed", "writable"])
def reader(request: pytest.FixtureRequest) -> Iterator[tuple[mmap.mmap, int]]:
    _, file = request.param("test", SIZE)
    reader = mmap.mmap(file, SIZE, prot=mmap.PROT_READ)
    os.close(file)
    yield reader, np.frombuffer(reader, np.uint8).ctypes.data


@pytest.mark.parametrize("device", ["reads", "writes", "tables", "nothing"])
def test_memory_is_registered_if_the_device_takes_it_and_stays_read_only(
    request: pytest.FixtureRequest, reader: tuple[mmap.mmap, int], device: str
) -> None:
    _, begin = reader
    calls: list[int] = []

    def register(address: int, size_bytes: int, flags: int) -> int:
        """``cudaHostRegister`` of a device that has read-only memory, pins pages that can be written, has the processor's tables, ..."""
        assert (address, size_bytes) == (begin, SIZE)
        calls.append(flags)
        if device == "reads":
            return 0
        if flags & READ_ONLY or device == "nothing":
            return NOT_SUPPORTED
        return 0 if device == "tables" or is_writable(begin) else INVALID

    error = register_to_read(register, begin, SIZE)

    taken = device in ("reads", "tables") or (device == "writes" and "writable" in request.node.callspec.id)
    assert error == (0 if taken else NOT_SUPPORTED)
    assert calls == [MAPPED | READ_ONLY, MAPPED][: 1 if device == "reads" else 2]
    assert not is_writable(begin)


def test_other_errors_are_not_tried_again(reader: tuple[mmap.mmap, int]) -> None:
    calls: list[int] = []

    def full(address: int, size_bytes: int, flags: int) -> int:
        calls.append(flags)
        return 2

    assert register_to_read(full, reader[1], SIZE) == 2
    assert len(calls) == 1
