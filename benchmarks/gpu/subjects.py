"""Subjects that take batches on the device in the learner's own process: Touchline's buffer, the gather limit and plain copies."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from benchmarks.local import LocalSubject, batch_columns
from benchmarks.tdmpc2 import Tdmpc2Subject, Tensors
from benchmarks.workloads import Content
from touchline_protos import Batch

COPY_BYTES = 2 << 30
"""Size of the copy that measures the card's bandwidth: many times its cache."""

GRAPH_BATCHES = 16


class DeviceLocalSubject:
    """``touchline_server.ReplayBuffer`` with its columns on the device."""

    def __init__(self, content: Content, *, writing: bool = False) -> None:
        self.content = content
        self.local = LocalSubject(content, device="cuda")
        self._writing = writing

    def take(self) -> Batch:
        """Draws a batch; a writing subject stores an episode first."""
        if self._writing:
            self.local.add_next()
        return self.local.take()

    def columns(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Returns the batch's tensors."""
        return batch_columns(batch)


class DeviceTdmpc2Subject:
    """TD-MPC2's construction with TorchRL's storage on the device."""

    def __init__(self, content: Content, *, cache: bool) -> None:
        self.content = content
        self._inner = Tdmpc2Subject(content, cache=cache, device="cuda")

    def take(self) -> Tensors:
        """Returns a batch."""
        return self._inner.take()

    def columns(self, batch: Tensors) -> Mapping[str, torch.Tensor]:
        """Returns the batch's tensors."""
        names = ("obs", "action", "reward", "done", "task")
        return {name: tensor for name, tensor in zip(names, batch, strict=True) if tensor is not None}


class DeviceGatherLimit:
    """The minimum work of a buffer on the device: a vectorised draw on the host, one copy of the rows, ``index_select`` into a fixed place.

    Args:
        over: the buffer whose columns are read. It must not be written to meanwhile.
    """

    def __init__(self, over: DeviceLocalSubject) -> None:
        self.content = over.content
        workload = self.content.workload
        columns = over.local.buffer.store.columns
        assert columns is not None
        entries = over.local.buffer.store.entries()
        self._first, self._starts = entries[:, 1].copy(), entries[:, 2] - workload.horizon
        self._columns = columns.tensors
        self._capacity = workload.rows
        self._offsets = np.arange(workload.horizon + 1)[:, None]
        self._rng = np.random.default_rng(1)
        size, horizon = workload.batch_size, workload.horizon
        self._out = {
            name: torch.empty((steps * size, *self._columns[name].shape[1:]), dtype=self._columns[name].dtype, device="cuda")
            for name, steps in (("obs", horizon + 1), ("action", horizon), ("reward", horizon), ("done", horizon))
        }
        self._rows = torch.empty((horizon + 1) * size, dtype=torch.int64, device="cuda")

    def take(self) -> Mapping[str, torch.Tensor]:
        """Draws and gathers; the next call overwrites what this one returns."""
        self._rows.copy_(torch.from_numpy(self.draw()).pin_memory(), non_blocking=True)
        self._gather(self._rows)
        return self._out

    def columns(self, batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Returns the batch in its shape."""
        workload = self.content.workload
        return {name: tensor.view(-1, workload.batch_size, *tensor.shape[1:]) for name, tensor in batch.items()}

    def draw(self) -> np.ndarray:
        """Returns the rows of a batch, [(H+1) * B] int64."""
        chance = self._rng.random((2, self.content.workload.batch_size))
        episode = (chance[0] * len(self._first)).astype(np.int64)
        start = (chance[1] * self._starts[episode]).astype(np.int64)
        return ((self._first[episode] + start + self._offsets) % self._capacity).reshape(-1)

    def kernels(self) -> Callable[[float], dict[str, float]]:
        """Returns what measures the gather's kernels with nothing of the host between them: a graph of some batches, replayed.

        Its slices have ``gb_per_s``, bytes read and bytes written, and ``device_s`` a batch.
        """
        # A graph has the addresses only: the rows have to stay.
        self._graph_rows = [torch.from_numpy(self.draw()).cuda() for _ in range(GRAPH_BATCHES)]
        self._gather(self._graph_rows[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for rows in self._graph_rows:
                self._gather(rows)
        moved = 2 * self.content.workload.batch_bytes

        def run(seconds: float) -> dict[str, float]:
            device_s = _device_seconds(graph.replay, seconds) / GRAPH_BATCHES
            return {"gb_per_s": moved / device_s / 1e9, "device_s": device_s}

        return run

    def _gather(self, rows: torch.Tensor) -> None:
        torch.index_select(self._columns["obs"], 0, rows, out=self._out["obs"])
        later = rows[self.content.workload.batch_size :]
        for name in ("action", "reward", "done"):
            torch.index_select(self._columns[name], 0, later, out=self._out[name])


class Copies:
    """Copies on the device and between it and the host.

    Each method returns a slice with ``gb_per_s``: for a copy on the device bytes read and bytes written, over the bus bytes moved.
    """

    def on_device(self, seconds: float) -> dict[str, float]:
        """Copies a block of :data:`COPY_BYTES`."""
        source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return {"gb_per_s": 2 * COPY_BYTES / _device_seconds(lambda: target.copy_(source), seconds) / 1e9}

    def to_host(self, seconds: float) -> dict[str, float]:
        """Copies 64 MiB into pinned memory."""
        source, target = torch.ones(1 << 26, dtype=torch.uint8, device="cuda"), torch.empty(1 << 26, dtype=torch.uint8, pin_memory=True)
        return {"gb_per_s": (1 << 26) / _device_seconds(lambda: target.copy_(source, non_blocking=True), seconds) / 1e9}

    def to_device(self, seconds: float) -> dict[str, float]:
        """Copies 64 MiB from pinned memory."""
        source, target = torch.ones(1 << 26, dtype=torch.uint8).pin_memory(), torch.empty(1 << 26, dtype=torch.uint8, device="cuda")
        return {"gb_per_s": (1 << 26) / _device_seconds(lambda: target.copy_(source, non_blocking=True), seconds) / 1e9}


def _device_seconds(work: Callable[[], object], seconds: float) -> float:
    """Returns how long the device takes for some work: by its own clock, over ``seconds`` after a warm-up."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    ends = time.perf_counter() + seconds
    total_s, count = 0.0, 0
    while time.perf_counter() < ends:
        begin.record()
        for _ in range(10):
            work()
        end.record()
        end.synchronize()
        total_s += begin.elapsed_time(end) / 1e3
        count += 10
    return total_s / count
