"""Subjects in this process: Touchline's own buffer, and the limit of a gather."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.workloads import Content
from touchline_protos import Batch
from touchline_server import Config, ReplayBuffer


def make_config(content: Content, *, device: str = "cpu", **server: Any) -> Config:
    """Returns the configuration of a buffer for a workload."""
    workload = content.workload
    return Config(
        config={"buffer_size": workload.rows, "batch_size": workload.batch_size, "min_history": 1, "horizon": workload.horizon},
        storage={"device": device},
        sampling={"law": workload.law, "seed": 1},
        server=server,
    )


class LocalSubject:
    """``touchline_server.ReplayBuffer`` and its ``sample()``, filled with the first episodes of a workload."""

    def __init__(self, content: Content, *, device: str = "cpu") -> None:
        self.content = content
        self.buffer = ReplayBuffer(make_config(content, device=device))
        tags = content.tags_to_fill(content.workload.rows)
        for tag in tags:
            self.buffer.add(content.episode(tag), policy_version=tag)
        self._next = [(tag, content.episode(tag)) for tag in tags[:8]]
        self._added = 0
        self._rng = np.random.default_rng(1)

    def take(self) -> Batch:
        """Draws a batch."""
        return self.buffer.sample()

    def add_next(self) -> None:
        """Stores one more of some episodes that are ready."""
        tag, episode = self._next[self._added % len(self._next)]
        self.buffer.add(episode, policy_version=tag)
        self._added += 1

    def draw(self) -> None:
        """Draws the rows of a batch, with its provenance, and gathers nothing."""
        with self.buffer.table.draw(self.buffer.spec(), self._rng):
            pass

    def noted(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Returns obs and reward as arrays."""
        return batch.obs.numpy(), batch.reward.numpy()

    def arrays(self, batch: Batch) -> Mapping[str, np.ndarray]:
        """Returns the batch as arrays."""
        return {name: tensor.numpy() for name, tensor in batch_columns(batch).items()}


class LocalWritingSubject:
    """A local subject that stores an episode before every batch."""

    def __init__(self, subject: LocalSubject) -> None:
        self.content = subject.content
        self._subject = subject
        self.noted = subject.noted
        self.arrays = subject.arrays

    def take(self) -> Batch:
        """Adds, then takes."""
        self._subject.add_next()
        return self._subject.take()


class GatherLimit:
    """The minimum work of any buffer: a vectorised draw from an array of episodes, and one ``numpy.take`` a column into the final layout.

    Reads the columns of a :class:`LocalSubject`, so that both see the same memory; writes into buffers that it uses again and again.

    Args:
        local: the buffer whose columns are read. It must not be written to meanwhile.
        provenance: gather the five provenance arrays of each slice too.
    """

    def __init__(self, local: LocalSubject, *, provenance: bool = False) -> None:
        self.content = local.content
        workload = self.content.workload
        columns = local.buffer.store.columns
        assert columns is not None
        self._columns = {name: np.asarray(tensor.numpy()) for name, tensor in columns.tensors.items()}
        size, horizon = workload.batch_size, workload.horizon
        self._out = {
            "obs": np.empty((horizon + 1, size, *workload.obs_shape), workload.obs_dtype),
            "action": np.empty((horizon, size, workload.action_size), np.float32),
            "reward": np.empty((horizon, size), np.float32),
            "done": np.empty((horizon, size), np.float32),
        }
        if workload.task:
            self._out["task"] = np.empty(size, np.int64)
        if provenance:
            self._provenance = np.empty((5, size), np.int64)
        self._with_provenance = provenance
        self._entries = local.buffer.store.entries()
        self._first = self._entries[:, 1].copy()
        self._starts = self._entries[:, 2] - horizon
        eligible = self._starts > 0
        self._entries, self._first, self._starts = self._entries[eligible], self._first[eligible], self._starts[eligible]
        self._before = np.cumsum(self._starts) - self._starts
        self._offsets = np.arange(horizon + 1)[:, None]
        self._rng = np.random.default_rng(1)
        self._capacity = workload.rows

    def take(self) -> dict[str, np.ndarray]:
        """Draws and gathers; the next call overwrites what this one returns."""
        workload = self.content.workload
        size = workload.batch_size
        if workload.law == "episode":
            chance = self._rng.random((2, size))
            episode = (chance[0] * len(self._first)).astype(np.int64)
            start = (chance[1] * self._starts[episode]).astype(np.int64)
        else:
            nth = (self._rng.random(size) * (self._before[-1] + self._starts[-1])).astype(np.int64)
            episode = np.searchsorted(self._before, nth, side="right") - 1
            start = nth - self._before[episode]
        rows = (self._first[episode] + start + self._offsets) % self._capacity
        np.take(self._columns["obs"], rows, axis=0, out=self._out["obs"], mode="clip")
        later = rows[1:]
        for name in ("action", "reward", "done"):
            np.take(self._columns[name], later, axis=0, out=self._out[name], mode="clip")
        if workload.task:
            np.take(self._columns["task"], rows[0], axis=0, out=self._out["task"], mode="clip")
        if self._with_provenance:
            entries = self._entries[episode]
            self._provenance[0], self._provenance[1] = entries[:, 0], start
            self._provenance[2], self._provenance[3] = entries[:, 3], entries[:, 4]
            self._provenance[4].view(np.float64)[:] = 1.0 / (len(self._first) * self._starts[episode].astype(np.float64))
        return self._out

    def noted(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Returns obs and reward."""
        return batch["obs"], batch["reward"]

    def arrays(self, batch: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Returns the batch, with its provenance if there is one."""
        if not self._with_provenance:
            return batch
        return {**batch, "policy_version": self._provenance[3], "start": self._provenance[1]}


def batch_columns(batch: Batch) -> dict[str, Any]:
    """Returns what :func:`~benchmarks.checks.check_batch` looks at."""
    columns = {name: getattr(batch, name) for name in ("obs", "action", "reward", "done", "policy_version", "start")}
    return columns if batch.task is None else {**columns, "task": batch.task}
