"""Plays the CUDA calls of a learner's gather: the device is the processor, its memory the host's. Everything else is real."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import Any

import torch


class HostEvent:
    """An event that completes when it is waited for."""

    def __init__(self, device: HostDevice) -> None:
        self._device = device
        self._reads = device.written_since_the_last_event()

    def synchronize(self) -> None:
        """Completes. What the device was still to read must not have changed; it changed if a gather's staging was reused too soon."""
        assert all(torch.equal(memory, content) for memory, content in self._reads)
        self._device.on_wait()


class HostDevice:
    """See :class:`~touchline._learner.cuda_device.CudaDevice`."""

    kernel: bool | None = None

    def __init__(self, module: Any = torch, place: Any = None, *, errors: dict[int, int] | None = None) -> None:
        self.device = torch.device("cpu")
        self.log: list[str] = []
        self.pinned_memory: list[torch.Tensor] = []
        self._before: list[torch.Tensor] = []
        self.registered: dict[int, int] = {}
        self.opened: dict[bytes, int] = {}
        """Address of memory by its handle, and what can be opened."""
        self.open_now: list[int] = []
        self.errors = errors or {}
        """Errors of registering, by the number of the call."""
        self.calls = 0
        self.gate = threading.Event()
        """Registers beyond the first wait for it."""
        self.gate.set()
        self.on_wait: Callable[[], None] = lambda: None
        self.handed_over = 0
        self.followed = 0
        self.learners_work: Callable[[], None] = lambda: None
        """Does what the learner's stream was given so far."""

    def readable(self) -> list[str]:
        return ["GPU-of-the-test"]

    def queue(self) -> Any:
        return contextlib.nullcontext()

    def record(self) -> HostEvent:
        return HostEvent(self)

    def written_since_the_last_event(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns the pinned memory that a gather has just been given, with a copy of it."""
        written = [
            (memory, memory.clone())
            for memory, before in zip(self.pinned_memory, self._before, strict=True)
            if not torch.equal(memory, before)
        ]
        self._before = [memory.clone() for memory in self.pinned_memory]
        return written

    def wait_for_all(self) -> None:
        self.log.append("wait")

    def pinned(self, size_bytes: int) -> torch.Tensor:
        self.pinned_memory.append(torch.zeros(size_bytes, dtype=torch.uint8))
        self._before.append(self.pinned_memory[-1].clone())
        return self.pinned_memory[-1]

    def hand_over(self, tensor: torch.Tensor) -> None:
        self.handed_over += 1

    def follow(self, tensor: torch.Tensor) -> None:
        self.followed += 1
        self.learners_work()

    def column(self, address: int, rows: int, row_bytes: int) -> Any:
        if self.kernel:
            return address
        return torch.frombuffer((ctypes.c_ubyte * (rows * row_bytes)).from_address(address), dtype=torch.uint8).view(rows, row_bytes)

    def register(self, address: int, size_bytes: int) -> int:
        self.calls += 1
        if self.calls > 1:
            assert self.gate.wait(30)
        if self.calls in self.errors:
            return self.errors[self.calls]
        self.registered[address] = size_bytes
        self.log.append("register")
        return 0

    def unregister(self, address: int) -> None:
        ctypes.string_at(address, self.registered.pop(address))  # a fault if the memory is not mapped any more
        self.log.append("unregister")

    def open(self, handle: bytes) -> int:
        self.log.append("open")
        self.open_now.append(self.opened[handle])
        return self.opened[handle]

    def close(self, address: int) -> None:
        self.open_now.remove(address)
        self.log.append("close")


class KernelDevice(HostDevice):
    """The same with Triton's kernel, which its interpreter runs, on bare addresses as on a device."""

    kernel = True
