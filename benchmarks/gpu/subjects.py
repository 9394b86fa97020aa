"""Subjects that take batches on the device in the learner's own process: Touchline's buffer, the gather limit and plain copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from benchmarks.gpu.place import Place
from benchmarks.local import LocalSubject, batch_columns
from benchmarks.tdmpc2 import Tdmpc2Subject, Tensors
from benchmarks.workloads import Content
from touchline_protos import Batch

COPY_BYTES = 2 << 30
"""Size of the copy that measures the card's bandwidth: many times its cache."""

BUS_BYTES = 1 << 26
"""Size of the copies over the bus."""

DRY_BYTES = 1 << 16
"""Size of all copies in a dry run."""

GRAPH_BATCHES = 16


class DeviceLocalSubject:
    """``touchline_server.ReplayBuffer`` with its columns on the device."""

    def __init__(self, content: Content, *, place: Place, writing: bool = False) -> None:
        self.content = content
        self.place = place
        self.local = LocalSubject(content, device=place.device)
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

    def __init__(self, content: Content, *, place: Place, cache: bool) -> None:
        self.content = content
        self.place = place
        self._inner = Tdmpc2Subject(content, cache=cache, device=place.device)

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
        self.place = over.place
        workload = self.content.workload
        columns = over.local.buffer.store.columns
        assert columns is not None
        entries = over.local.buffer.store.entries()
        self._first, self._starts = entries[:, 1].copy(), entries[:, 2] - workload.horizon
        self._columns = columns.tensors
        self._capacity = len(columns.tensors["obs"])
        self._offsets = np.arange(workload.horizon + 1)[:, None]
        self._rng = np.random.default_rng(1)
        size, horizon = workload.batch_size, workload.horizon
        self._out = {
            name: torch.empty((steps * size, *self._columns[name].shape[1:]), dtype=self._columns[name].dtype, device=over.place.device)
            for name, steps in (("obs", horizon + 1), ("action", horizon), ("reward", horizon), ("done", horizon))
        }
        self._rows = torch.empty((horizon + 1) * size, dtype=torch.int64, device=over.place.device)

    def take(self) -> Mapping[str, torch.Tensor]:
        """Draws and gathers; the next call overwrites what this one returns."""
        self._rows.copy_(self.place.pin(torch.from_numpy(self.draw())), non_blocking=True)
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
        self._graph_rows = [torch.from_numpy(self.draw()).to(self.place.device) for _ in range(GRAPH_BATCHES)]
        replay = self._captured() if self.place.is_cuda else self._gather_all
        moved = 2 * self.content.workload.batch_bytes

        def run(seconds: float) -> dict[str, float]:
            device_s = self.place.seconds_of(replay, seconds) / GRAPH_BATCHES
            return {"gb_per_s": moved / device_s / 1e9, "device_s": device_s}

        return run

    def _captured(self) -> Callable[[], None]:
        """Returns the replay of a graph of all batches."""
        self._gather_all()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._gather_all()
        return graph.replay

    def _gather_all(self) -> None:
        for rows in self._graph_rows:
            self._gather(rows)

    def _gather(self, rows: torch.Tensor) -> None:
        torch.index_select(self._columns["obs"], 0, rows, out=self._out["obs"])
        later = rows[self.content.workload.batch_size :]
        for name in ("action", "reward", "done"):
            torch.index_select(self._columns[name], 0, later, out=self._out[name])


class Copies:
    """Copies on the device and between it and the host.

    Each method returns a slice with ``gb_per_s``: for a copy on the device bytes read and bytes written, over the bus bytes moved.
    """

    def __init__(self, place: Place) -> None:
        self._place = place

    def on_device(self, seconds: float) -> dict[str, float]:
        """Copies a block of :data:`COPY_BYTES`."""
        size = COPY_BYTES if self._place.is_cuda else DRY_BYTES
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=self._place.device)
        target = torch.empty_like(source)
        return {"gb_per_s": 2 * size / self._place.seconds_of(lambda: target.copy_(source), seconds) / 1e9}

    def to_host(self, seconds: float) -> dict[str, float]:
        """Copies :data:`BUS_BYTES` into pinned memory."""
        on_host, on_device = self._blocks()
        return self._over_the_bus(lambda: on_host.copy_(on_device, non_blocking=True), len(on_host), seconds)

    def to_device(self, seconds: float) -> dict[str, float]:
        """Copies :data:`BUS_BYTES` from pinned memory."""
        on_host, on_device = self._blocks()
        return self._over_the_bus(lambda: on_device.copy_(on_host, non_blocking=True), len(on_host), seconds)

    def _blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        block = torch.ones(BUS_BYTES if self._place.is_cuda else DRY_BYTES, dtype=torch.uint8)
        return self._place.pin(block), block.to(self._place.device, copy=True)

    def _over_the_bus(self, copy: Callable[[], object], size: int, seconds: float) -> dict[str, float]:
        return {"gb_per_s": size / self._place.seconds_of(copy, seconds) / 1e9}
