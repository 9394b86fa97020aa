"""The calls of CUDA by which a device gathers a learner's batches; see :mod:`~touchline._learner.cuda_gather` for what they are for."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import cache
from typing import Any

from touchline_protos.shm import sealed_memory
from touchline_protos.shm.ring_control import RingError

MAPPED, READ_ONLY = 0x02, 0x08
"""``cudaHostRegisterMapped``; ``cudaHostRegisterReadOnly``, without which this process must be able to write the memory."""

NOT_SUPPORTED = 801
"""``cudaErrorNotSupported``: of ``READ_ONLY`` where ``cudaDevAttrHostRegisterReadOnlySupported`` is 0, as for most devices on PCIe."""

RELAXED = 2
"""``CU_STREAM_CAPTURE_MODE_RELAXED``: a thread's calls do not end the capture of a graph that is in progress in another one."""

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

    def follow(self, tensor: Any) -> None:
        """Puts what the queue gets from now on behind the work of the caller's current stream, which may read or write the tensor."""
        self._stream.wait_stream(self._torch.cuda.current_stream(self.device))
        # Its memory was allocated on another stream. Without this it could be reused while a gather still writes it.
        tensor.record_stream(self._stream)

    def column(self, address: int, rows: int, row_bytes: int) -> Any:
        """Returns a column as a gather takes it: its address."""
        return address

    def register(self, address: int, size_bytes: int) -> int:
        """Makes host memory readable for the device, page-locked; returns CUDA's error, 0 for none."""
        with self._torch.cuda.device(self.device):
            with suppress(OSError, AttributeError):  # not NVIDIA's driver, or one from before graphs
                _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(RELAXED)))
            return register_to_read(self._cudart.cudaHostRegister, address, size_bytes)

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


def register_to_read(register: Callable[[int, int, int], Any], address: int, size_bytes: int) -> int:
    """Registers whole pages that are mapped to be read; returns CUDA's error, 0 for none.

    A device that does not register such memory may register it while it can be written, if the server allows that.

    Args:
        register: ``cudaHostRegister``.
        address: address of the first page.
        size_bytes: their size.
    """
    error = int(register(address, size_bytes, MAPPED | READ_ONLY))
    if error != NOT_SUPPORTED:
        return error
    writable = sealed_memory.protect(address, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
    try:
        # Also if it is not writable: a device that uses the processor's page tables needs neither that nor the flag.
        return NOT_SUPPORTED if int(register(address, size_bytes, MAPPED)) else 0
    finally:
        if writable:
            sealed_memory.protect(address, size_bytes, mmap.PROT_READ)


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), _IpcHandle, ctypes.c_uint]
    driver.cuIpcCloseMemHandle.argtypes = [ctypes.c_uint64]
    return driver
