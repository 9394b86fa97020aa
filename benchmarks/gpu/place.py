"""Where the batches of a subject lie: on a CUDA device or, in a dry run, in host memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Place:
    """A device of torch and what a measurement needs of it."""

    device: str = "cuda"
    """``cuda``, or ``cpu`` for a dry run."""

    @property
    def is_cuda(self) -> bool:
        """Whether there is a device whose work runs beside the host's."""
        return self.device == "cuda"

    def synchronize(self) -> None:
        """Waits until the device has done all that was queued."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a host tensor in pinned memory; in a dry run the tensor itself."""
        return tensor.pin_memory() if self.is_cuda else tensor

    def seconds_of(self, work: Callable[[], object], seconds: float) -> float:
        """Returns how long the device takes for some work, by its own clock, averaged over ``seconds`` after a warm-up."""
        for _ in range(3):
            work()
        self.synchronize()
        ends = time.perf_counter() + seconds
        total_s, count = 0.0, 0
        while not count or time.perf_counter() < ends:
            total_s += self._seconds_of_ten(work)
            count += 10
        return total_s / count

    def _seconds_of_ten(self, work: Callable[[], object]) -> float:
        if not self.is_cuda:
            began = time.perf_counter()
            for _ in range(10):
                work()
            return time.perf_counter() - began
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(10):
            work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
