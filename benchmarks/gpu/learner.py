"""The process of a learner on the device that takes its batches from a server in another process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benchmarks.gpu.place import Place
from benchmarks.gpu.timing import DeviceSliceTimer
from benchmarks.gpu.world_model import Trainer
from benchmarks.learner import MAX_PREFETCH_BYTES, PREFETCH, open_stream
from benchmarks.local import batch_columns
from benchmarks.protocol import serve
from benchmarks.workloads import WORKLOADS, Content
from touchline import ReplayClient
from touchline_protos import Batch

STEP_PRODUCTS = 10
"""Products of two matrices in a training step."""

STEP_SIZE, DRY_STEP_SIZE = 4096, 64
"""Rows and columns of those matrices, bf16; in a dry run."""

UPDATE_S = 7e-3
"""Time of one compiled update: that of the official TD-MPC2 on an H200. Smaller ones are repeated on the batch until they take about it."""

WARM_UPDATES = 12
"""Updates before the clock: they compile, and record the graphs."""

Work = Callable[[Batch], None]
"""Work of a learner on a batch, queued without a wait by the host."""


class TrainingStep:
    """Stands for a training step: reads the batch and keeps the device busy."""

    def __init__(self, place: Place) -> None:
        size = STEP_SIZE if place.is_cuda else DRY_STEP_SIZE
        self._weights = torch.randn(size, size, dtype=torch.bfloat16, device=place.device)
        self._result = torch.empty_like(self._weights)
        self._total = torch.zeros((), device=place.device)

    def __call__(self, batch: Batch) -> None:
        """Queues the step."""
        self._total += batch.obs.sum()
        for _ in range(STEP_PRODUCTS):
            torch.mm(self._weights, self._weights, out=self._result)


class CompiledUpdate:
    """A compiled update of a learner of TD-MPC2's shape, repeated so that it takes about :data:`UPDATE_S`.

    Args:
        place: device that the learner trains on.
        batch: a batch of the workload.
    """

    def __init__(self, place: Place, batch: Batch) -> None:
        self._trainer = Trainer(math.prod(batch.obs.shape[2:]), batch.action.shape[-1], device=place.device)
        self.repeats = 1
        for _ in range(WARM_UPDATES if place.is_cuda else 1):
            self(batch)
        self.seconds = place.seconds_of(lambda: self(batch), 0.0) if place.is_cuda else UPDATE_S
        self.repeats = max(1, round(UPDATE_S / self.seconds))

    def __call__(self, batch: Batch) -> None:
        """Queues the update."""
        obs = batch.obs.flatten(2)
        for _ in range(self.repeats):
            self._trainer.update(obs, batch.action, batch.reward, batch.done)

    def check(self) -> None:
        """Raises RuntimeError if the last loss is not a number, as it is not if a row of a reset was trained on."""
        if not math.isfinite(loss := float(self._trainer.loss)):
            raise RuntimeError(f"the loss is {loss}, expected a number")


class DeviceRemoteSubject:
    """Batches of a server, on the device.

    Args:
        address: the server's address.
        content: the rows that the server stores.
        place: device of the batches.
        path: ``stream``, ``ring`` or ``device``.
    """

    def __init__(self, address: str, content: Content, *, place: Place, path: str) -> None:
        self.content = content
        self.place = place
        self.work: Work | None = None
        """Work on each batch; None to only take it."""
        self._path = path
        self._client = ReplayClient(address, timeout_s=60.0)
        self._batches: Iterator[Batch] | None = None
        self._prefetch = min(PREFETCH, max(MAX_PREFETCH_BYTES // content.workload.batch_bytes, 2))

    def take(self) -> Batch:
        """Returns the next batch, after the learner's work on it is queued."""
        if self._batches is None:
            device = "cuda" if self.place.is_cuda else None
            self._batches = open_stream(self._client, path=self._path, prefetch=self._prefetch, device=device)
            if self._path == "device" and self.place.is_cuda:
                wait_until_gathered(self._batches)
        batch = next(self._batches)
        if self.work is not None:
            self.work(batch)
        return batch

    def columns(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Returns the batch's tensors."""
        return batch_columns(batch)

    def close(self) -> None:
        """Ends the stream. Batches that were taken stay."""
        self._client.close()


def wait_until_gathered(batches: Any) -> None:
    """Waits until the device gathers: until the server's host memory is registered with CUDA, the processor does.

    Raises:
        RuntimeError: it cannot be registered.
    """
    columns = batches._source._source._session.ring._gatherer._columns
    columns.wait()
    if columns.failed:
        raise RuntimeError("the server's columns cannot be registered with CUDA")
    for _ in range(8):  # what was gathered before
        next(batches)


class FixedSubject:
    """The learner's work on one batch that stays on the device: the minimum time a batch."""

    def __init__(self, subject: DeviceRemoteSubject, batch: Batch, work: Work) -> None:
        self.content, self.place, self.columns = subject.content, subject.place, subject.columns
        self._batch = batch
        self._work = work

    def take(self) -> Batch:
        """Queues the work."""
        self._work(self._batch)
        return self._batch


class Learner:
    """Holds subjects by name; makes and runs those that the driver asks for."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._timers: dict[str, DeviceSliceTimer] = {}
        self._work: Work | None = None

    def make(self, name: str, *, address: str, workload: str, rows: int, device: str, path: str, work: bool = False) -> None:
        """Makes a subject as ``name``; with ``work`` it does what ``make_fixed`` prepared."""
        subject = DeviceRemoteSubject(address, Content(WORKLOADS[workload].resized(rows)), place=Place(device), path=path)
        subject.take()  # a path that does not work is found out before the rounds
        subject.work = self._work if work else None
        self._timers[name] = DeviceSliceTimer(subject)

    def make_fixed(self, name: str, *, address: str, workload: str, rows: int, device: str, compiled: bool) -> dict[str, float]:
        """Makes the work on a batch that stays, as ``name``: a training step, or a compiled update.

        Returns:
            For an update ``repeats``, how often it is repeated, and ``update_s``, how long a single one takes.
        """
        place = Place(device)
        subject = DeviceRemoteSubject(address, Content(WORKLOADS[workload].resized(rows)), place=place, path="stream")
        batch = subject.take()
        subject.close()
        work = CompiledUpdate(place, batch) if compiled else TrainingStep(place)
        self._work = work
        self._timers[name] = DeviceSliceTimer(FixedSubject(subject, batch, work))
        return {"repeats": work.repeats, "update_s": work.seconds} if isinstance(work, CompiledUpdate) else {}

    def run(self, name: str, *, seconds: float, server_pid: int) -> dict[str, float]:
        """Runs a slice; see :meth:`DeviceSliceTimer.run`."""
        result = self._timers[name].run(seconds, server_pid=server_pid)
        if isinstance(self._work, CompiledUpdate):
            self._work.check()
        return result

    def methods(self) -> dict[str, Any]:
        """Returns the methods that the driver may call."""
        return {"make": self.make, "make_fixed": self.make_fixed, "run": self.run}


if __name__ == "__main__":
    serve(Learner().methods())
