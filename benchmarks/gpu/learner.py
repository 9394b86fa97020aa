"""The process of a learner on the device that takes its batches from a server in another process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from benchmarks.gpu.timing import DeviceSliceTimer
from benchmarks.learner import MAX_PREFETCH_BYTES, PREFETCH, open_stream
from benchmarks.local import batch_columns
from benchmarks.protocol import serve
from benchmarks.workloads import WORKLOADS, Content
from touchline import ReplayClient
from touchline._learner.torch_batch import map_batch
from touchline_protos import Batch

STEP_PRODUCTS = 10
"""Products of 4096 x 4096 bf16 matrices in a training step."""


class TrainingStep:
    """Stands for a training step: reads the batch and keeps the device busy, without a wait by the host."""

    def __init__(self) -> None:
        self._weights = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
        self._result = torch.empty_like(self._weights)
        self._total = torch.zeros((), device="cuda")

    def run(self, batch: Batch) -> None:
        """Queues the step."""
        self._total += batch.obs.sum()
        for _ in range(STEP_PRODUCTS):
            torch.mm(self._weights, self._weights, out=self._result)


class DeviceRemoteSubject:
    """Batches of a server, on the device.

    Args:
        address: the server's address.
        content: the rows that the server stores.
        path: ``stream`` or ``ring``.
        ahead: copied ahead by ``batches(device="cuda")``; otherwise taken as host tensors and copied by the learner, when it needs them.
        step: what the learner does with each batch.
    """

    def __init__(self, address: str, content: Content, *, path: str, ahead: bool, step: TrainingStep | None) -> None:
        self.content = content
        self._path = path
        self._ahead = ahead
        self._step = step
        self._client = ReplayClient(address, timeout_s=60.0)
        self._batches: Iterator[Batch] | None = None
        self._prefetch = min(PREFETCH, max(MAX_PREFETCH_BYTES // content.workload.batch_bytes, 2))

    def take(self) -> Batch:
        """Returns the next batch."""
        if self._batches is None:
            device = "cuda" if self._ahead else None
            self._batches = open_stream(self._client, path=self._path, prefetch=self._prefetch, device=device)
        batch = next(self._batches)
        if not self._ahead:
            batch = map_batch(batch, lambda tensor: tensor.to("cuda"))
        if self._step is not None:
            self._step.run(batch)
        return batch

    def columns(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Returns the batch's tensors."""
        return batch_columns(batch)


class HeldSubject:
    """The training step on one batch that is already on the device: the minimum time a batch."""

    def __init__(self, subject: DeviceRemoteSubject, step: TrainingStep) -> None:
        self.content = subject.content
        self.columns = subject.columns
        self._subject = subject
        self._step = step
        self._batch: Batch | None = None

    def take(self) -> Batch:
        """Runs the step."""
        if self._batch is None:
            self._batch = self._subject.take()
        self._step.run(self._batch)
        return self._batch


class Learner:
    """Holds subjects by name; makes and runs those that the driver asks for."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._timers: dict[str, DeviceSliceTimer] = {}
        self._step = TrainingStep()

    def make(self, name: str, *, address: str, workload: str, rows: int, path: str, ahead: bool = True, step: bool = False) -> None:
        """Makes a subject as ``name``."""
        content = Content(WORKLOADS[workload].resized(rows))
        subject = DeviceRemoteSubject(address, content, path=path, ahead=ahead, step=self._step if step else None)
        self._timers[name] = DeviceSliceTimer(subject)

    def make_held(self, name: str, *, address: str, workload: str, rows: int) -> None:
        """Makes the training step on a batch that stays, as ``name``."""
        content = Content(WORKLOADS[workload].resized(rows))
        subject = DeviceRemoteSubject(address, content, path="stream", ahead=True, step=None)
        self._timers[name] = DeviceSliceTimer(HeldSubject(subject, self._step))

    def run(self, name: str, *, seconds: float, server_pid: int) -> dict[str, float]:
        """Runs a slice; see :meth:`DeviceSliceTimer.run`."""
        return self._timers[name].run(seconds, server_pid=server_pid)

    def methods(self) -> dict[str, Any]:
        """Returns the methods that the driver may call."""
        return {"make": self.make, "make_held": self.make_held, "run": self.run}


if __name__ == "__main__":
    serve(Learner().methods())
