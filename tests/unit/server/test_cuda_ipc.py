"""What is offered of CUDA memory, with a driver of the test's own: only the driver's calls themselves need a card."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import uuid
from typing import Any

import numpy as np
import pytest
import torch

from support.store_cases import many_dtypes
from touchline_server.store import cuda_ipc
from touchline_server.store.cuda_ipc import export, tensors_in
from touchline_server.store.schema import Schema
from touchline_server.store.shared_columns import place_columns
from touchline_server.store.tensors import as_array, as_tensor

UUID = uuid.UUID("12345678-9abc-def0-1122-334455667788")
BEFORE, ALLOCATED = 4096, 1 << 30


class Driver:
    """Knows one allocation, which begins ``BEFORE`` bytes ahead of the block."""

    def __init__(self, block: torch.Tensor, status: int = 0) -> None:
        self.base = block.data_ptr() - BEFORE
        self.status = status

    def cuMemGetAddressRange_v2(self, base: Any, size: Any, address: ctypes.c_uint64) -> int:
        assert address.value == self.base + BEFORE
        base._obj.value, size._obj.value = self.base, ALLOCATED
        return 0

    def cuIpcGetMemHandle(self, handle: Any, base: ctypes.c_uint64) -> int:
        assert base.value == self.base  # a handle is always that of a whole allocation
        handle.raw = bytes(range(64))
        return self.status

    def cuDeviceGet(self, number: Any, ordinal: ctypes.c_int) -> int:
        number._obj.value = ordinal.value + 3
        return 0

    def cuDeviceGetUuid_v2(self, raw: Any, number: ctypes.c_int) -> int:
        assert number.value == 5
        raw.raw = UUID.bytes
        return 0


class Block:
    """A block of CUDA memory as far as it is looked at."""

    device = torch.device("cuda", 2)

    def data_ptr(self) -> int:
        return 1 << 40


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_exported_columns_lie_behind_the_handle_of_the_allocation_that_the_block_is_part_of(monkeypatch: pytest.MonkeyPatch) -> None:
    block: Any = Block()
    monkeypatch.setattr(cuda_ipc, "_driver", lambda: Driver(block))
    places, _ = place_columns(Schema.of(many_dtypes(3, seed=0)), 10)

    offer = export(block, places)

    assert offer is not None
    assert (offer.kind, offer.handle, offer.size_bytes, offer.descriptor) == ("cuda", bytes(range(64)), ALLOCATED, -1)
    assert offer.device_uuid == "GPU-12345678-9abc-def0-1122-334455667788"
    assert {name: place.offset_bytes - BEFORE for name, place in offer.columns.items()} == {
        name: place.offset_bytes for name, place in places.items()
    }
    assert offer._owner is block


@pytest.mark.parametrize("fault", ["status", "function", "library"])
def test_cuda_columns_that_cannot_be_exported_are_not_offered_and_a_line_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    def driver() -> Any:
        if fault == "library":
            raise OSError("libcuda.so.1: cannot open shared object file")
        return Driver(Block(), status=1) if fault == "status" else object()  # type: ignore[arg-type]

    monkeypatch.setattr(cuda_ipc, "_driver", driver)
    with caplog.at_level(logging.WARNING, "touchline_server"):
        offer = export(Block(), {})  # type: ignore[arg-type]

    assert offer is None
    expected = {
        "status": "cuIpcGetMemHandle returned CUDA error 1",
        "function": "the driver has no cuMemGet",
        "library": "libcuda.so.1",
    }
    assert expected[fault] in caplog.text


def test_tensors_in_one_block_are_columns_of_every_dtype_at_their_places() -> None:
    episode = many_dtypes(10, seed=1)
    schema = Schema.of(episode)
    places, size_bytes = place_columns(schema, 10)
    block = torch.zeros(size_bytes, dtype=torch.uint8)

    tensors = tensors_in(block, schema, 10)
    for name, array in episode.items():
        tensors[name].copy_(as_tensor(array))

    memory = block.numpy()
    for name, array in episode.items():
        assert tensors[name].shape == array.shape
        assert as_array(tensors[name]).tobytes() == array.tobytes()
        if name in places:
            place = places[name]
            assert np.array_equal(memory[place.offset_bytes :][: place.size_bytes], array.reshape(-1).view(np.uint8))
