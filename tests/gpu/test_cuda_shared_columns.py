"""CUDA columns as another process sees them by CUDA IPC."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from support.store_cases import make_config, traced, traced_columns
from touchline_server import ReplayBuffer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

READER = """
import ctypes, sys
class Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 64)]
cuda = ctypes.CDLL("libcuda.so.1")
def call(name, *arguments):
    status = getattr(cuda, name)(*arguments)
    assert status == 0, f"{name}: {status}"
handle, device, offset, size = Handle.from_buffer_copy(bytes.fromhex(sys.argv[1])), *map(int, sys.argv[2:])
context, address, out = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.create_string_buffer(size)
call("cuInit", 0)
call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
call("cuCtxSetCurrent", context)
call("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, 1)
call("cuMemcpyDtoH_v2", out, ctypes.c_uint64(address.value + offset), ctypes.c_size_t(size))
call("cuIpcCloseMemHandle", address)
sys.stdout.buffer.write(out.raw)
"""
"""Copies part of the memory of an IPC handle to its standard output."""


def shared_buffer() -> ReplayBuffer:
    buffer = ReplayBuffer(make_config(20, storage={"device": "cuda", "share_columns": "on"}))
    buffer.add_episode(traced(3, 7))
    return buffer


def test_cuda_columns_are_read_by_another_process_bit_by_bit() -> None:
    buffer = shared_buffer()
    columns = buffer.store.columns
    assert columns is not None
    offer = columns.shared
    assert offer is not None and offer.kind == "cuda"
    assert offer.device_uuid.removeprefix("GPU-") == str(torch.cuda.get_device_properties(columns.device).uuid).removeprefix("GPU-")

    for name, array in traced_columns(3, 7).items():
        place = offer.columns[name]
        numbers = (columns.device.index or 0, place.offset_bytes, 7 * place.row_bytes)
        command = [sys.executable, "-c", READER, offer.handle.hex(), *map(str, numbers)]
        seen = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
        assert seen == array.tobytes(), name


def test_released_cuda_columns_keep_their_memory_as_long_as_the_offer() -> None:
    buffer = shared_buffer()
    columns = buffer.store.columns
    assert columns is not None and columns.shared is not None
    offer, address = columns.shared, columns.tensors["stamp"].data_ptr()
    before = columns.tensors["stamp"][:7].cpu().numpy()
    del columns

    buffer.clear()
    buffer.add_episode(traced(4, 7))

    again = buffer.store.columns
    assert again is not None and again.shared is not None
    assert again.tensors["stamp"].data_ptr() != address
    block = offer._owner
    assert isinstance(block, torch.Tensor)
    at = address - block.data_ptr()
    assert np.array_equal(block[at : at + 56].cpu().numpy().view(np.int64), before)
