"""Shares CUDA memory with other processes, by handles of CUDA IPC.

The driver is called directly. Torch's own way (``UntypedStorage._share_cuda_``) counts the receivers in a shared file, so memory that was
offered to a learner which was then killed would never be freed.
"""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Mapping
from functools import cache

import torch

from touchline_protos.log_lines import get_logger
from touchline_server.store.schema import Schema
from touchline_server.store.shared_columns import SharedColumn, SharedColumns, place_columns
from touchline_server.store.tensors import torch_dtype

logger = get_logger(__name__)

HANDLE_BYTES = 64
"""Size of an IPC handle (``CU_IPC_HANDLE_SIZE``)."""


def tensors_in(block: torch.Tensor, schema: Schema, rows: int) -> dict[str, torch.Tensor]:
    """Returns the columns, [rows, *shape] each, over one block of bytes that has the size that :func:`place_columns` says."""
    places, _ = place_columns(schema, rows)
    tensors = {}
    for spec in schema.columns:
        shape, dtype, place = (rows, *spec.shape), torch_dtype(spec.dtype), places.get(spec.name)
        if place is None:
            tensors[spec.name] = torch.empty(shape, dtype=dtype, device=block.device)
        else:
            tensors[spec.name] = block[place.offset_bytes : place.offset_bytes + place.size_bytes].view(dtype).view(shape)
    return tensors


def export(block: torch.Tensor, places: Mapping[str, SharedColumn]) -> SharedColumns | None:
    """Returns what a learner needs to read a block of memory on a CUDA device; None, with a line in the log, if it cannot be shared.

    Memory of torch's expandable segments cannot.
    """
    try:
        # The driver's calls need a current context: the device guard selects the device, and waiting for it makes its context current.
        with torch.cuda.device(block.device):
            torch.cuda.synchronize()
            handle, offset, size_bytes = _handle_of(block.data_ptr())
            device_uuid = _uuid_of(block.device.index)
    except OSError as error:
        logger.warning("columns on %s cannot be shared with learners: %s", block.device, error)
        return None
    moved = {name: place._replace(offset_bytes=place.offset_bytes + offset) for name, place in places.items()}
    # The allocation must not be freed while another process has it open, so it lives as long as what was offered.
    return SharedColumns(moved, size_bytes, handle=handle, device_uuid=device_uuid, owner=block)


def _handle_of(address: int) -> tuple[bytes, int, int]:
    """Returns the handle of the allocation that an address lies in, the address's offset there, and the allocation's size.

    Torch's allocator hands out parts of allocations, and a handle is always that of a whole one.
    """
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
    handle = ctypes.create_string_buffer(HANDLE_BYTES)
    _call("cuIpcGetMemHandle", handle, base)
    return handle.raw, address - base.value, size.value


def _uuid_of(device: int) -> str:
    """Returns the UUID of a device by torch's number of it; both count the devices that ``CUDA_VISIBLE_DEVICES`` leaves."""
    number, raw = ctypes.c_int(), ctypes.create_string_buffer(16)
    _call("cuDeviceGet", ctypes.byref(number), ctypes.c_int(device))
    _call("cuDeviceGetUuid_v2", raw, number)
    return f"GPU-{uuid.UUID(bytes=raw.raw)}"


def _call(name: str, *arguments: object) -> None:
    """Calls a function of the CUDA driver. Raises OSError if there is no such function, or if it fails."""
    try:
        status = getattr(_driver(), name)(*arguments)
    except AttributeError:
        raise OSError(0, f"the driver has no {name}") from None
    if status:
        raise OSError(0, f"{name} returned CUDA error {status}")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
