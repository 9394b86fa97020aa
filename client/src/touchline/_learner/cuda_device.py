"""The calls of CUDA by which a device gathers a learner's batches; see :mod:`~touchline._learner.cuda_gather` for what they are for."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from touchline_protos.shm.ring_control import RingError

REGISTER_FLAGS = 0x02 | 0x08
"""``cudaHostRegisterMapped | cudaHostRegisterReadOnly``: the device reads the memory, which this process cannot write either."""

LAZY_PEER_ACCESS = 1
"""``CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS``: memory of another device of this host can be opened too."""


class _IpcHandle(ctypes.Structure):
    """``CUipcMemHandle``, which the driver takes by value."""

    _fields_ = [("reserved", ctypes.c_char * 64)]


class CudaDevice:
    """One CUDA device of torch: a queue of its own for gathers, and memory that the device can read. One thread at a time.

    Args:
        torch: the torch module.
        device: ``torch.device`` of type ``cuda``; without an index the calling thread's current device is meant.
    """

    kernel: bool | None = None
    """See :class:`~touchline_protos.gather.row_gather.RowGather`."""

    def __init__(self, torch: Any, device: Any) -> None:
        self._torch = torch
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._stream = torch.cuda.Stream(self.device)
        self._cudart = torch.cuda.cudart()

    def readable(self) -> list[str]:
        """Returns the UUIDs of the devices whose memory this one reads: its own first, then those that it has peer access to."""
        cuda, own = self._torch.cuda, self.device.index
        others = (index for index in range(cuda.device_count()) if index != own and cuda.can_device_access_peer(own, index))
        return [f"GPU-{cuda.get_device_properties(index).uuid}" for index in (own, *others)]

    def queue(self) -> AbstractContextManager[Any]:
        """Returns a context manager in which work goes to the queue of gathers."""
        context: AbstractContextManager[Any] = self._torch.cuda.stream(self._stream)
        return context

    def record(self) -> Any:
        """Returns an event that completes with all work in the queue."""
        event = self._torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait_for_all(self) -> None:
        """Waits for all work in the queue."""
        self._stream.synchronize()

    def pinned(self, size_bytes: int) -> Any:
        """Returns a tensor in pinned memory, [size_bytes] uint8."""
        return self._torch.empty(size_bytes, dtype=self._torch.uint8, pin_memory=True)

    def hand_over(self, tensor: Any) -> None:
        """Keeps the memory of a tensor that was made in the queue from being reused while the caller's current stream may still read it."""
        tensor.record_stream(self._torch.cuda.current_stream(self.device))

    def column(self, address: int, rows: int, row_bytes: int) -> Any:
        """Returns a column as a gather takes it: its address."""
        return address

    def register(self, address: int, size_bytes: int) -> int:
        """Makes host memory readable for the device, page-locked; returns CUDA's error, 0 for none."""
        with self._torch.cuda.device(self.device):
            return int(self._cudart.cudaHostRegister(address, size_bytes, REGISTER_FLAGS))

    def unregister(self, address: int) -> None:
        """Undoes :meth:`register`. No gather may be in progress."""
        with self._torch.cuda.device(self.device):
            self._cudart.cudaHostUnregister(address)

    def open(self, handle: bytes) -> int:
        """Opens another process's memory by its IPC handle; returns its address here.

        Raises:
            RingError: it cannot be opened.
        """
        address = ctypes.c_uint64()
        with self._torch.cuda.device(self.device):
            self._stream.synchronize()  # makes the device's context current, which the driver needs
            status = _driver().cuIpcOpenMemHandle_v2(ctypes.byref(address), _IpcHandle.from_buffer_copy(handle), LAZY_PEER_ACCESS)
        if status:
            raise RingError(f"CUDA error {status} for the server's columns on the device")
        return address.value

    def close(self, address: int) -> None:
        """Closes memory that was opened. No gather may be in progress."""
        with self._torch.cuda.device(self.device):
            self._stream.synchronize()
            _driver().cuIpcCloseMemHandle(ctypes.c_uint64(address))


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), _IpcHandle, ctypes.c_uint]
    driver.cuIpcCloseMemHandle.argtypes = [ctypes.c_uint64]
    return driver
