"""The process of TorchRL's prioritised sampler, which may run in an environment of its own: it needs no product code."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensordict
import torch
import torchrl
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, PrioritizedSliceSampler
from torchrl.data import ReplayBuffer as TorchRLBuffer

from benchmarks.priorities import ALPHA, BETA, Priorities
from benchmarks.protocol import serve
from benchmarks.timing import seconds_per_call, take_for
from benchmarks.workloads import W1, Content


class TorchRLPrioritized:
    """TorchRL's PrioritizedSliceSampler in process, with an update for every batch.

    Args:
        content: the rows to store.
        cache: whether it keeps the trajectories that it found, which holds until the next write. Nothing is written here.
    """

    def __init__(self, content: Content, *, cache: bool) -> None:
        workload = content.workload
        steps = workload.horizon + 1
        self._buffer = TorchRLBuffer(
            storage=LazyTensorStorage(workload.rows),
            sampler=PrioritizedSliceSampler(
                workload.rows, ALPHA, BETA, slice_len=steps, traj_key="episode", strict_length=True, cache_values=cache
            ),
            batch_size=workload.batch_size * steps,
        )
        for tag in content.tags_to_fill(workload.rows):
            columns = {name: torch.from_numpy(np.nan_to_num(array)) for name, array in content.episode(tag).items()}
            length = len(columns["reward"])
            columns["episode"] = torch.full((length,), tag)
            self._buffer.extend(TensorDict(columns, [length]))
        self._priorities = Priorities((workload.batch_size * steps,))

    def take(self) -> Any:
        """Draws a batch and updates its priorities."""
        batch, info = self._buffer.sample(return_info=True)
        index = info["index"]
        self._buffer.update_priority(index[0] if isinstance(index, tuple) else index, torch.from_numpy(self._priorities.take()))
        return batch


class TorchRLSubjects:
    """Subjects by name, made on request."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._subjects: dict[str, TorchRLPrioritized] = {}

    def make(self, name: str, *, rows: int, cache: bool) -> dict[str, str]:
        """Makes a sampler, and returns the versions of what it runs on."""
        self._subjects[name] = TorchRLPrioritized(Content(W1.resized(rows)), cache=cache)
        return {package.__name__: str(package.__version__) for package in (torch, torchrl, tensordict)}

    def run(self, name: str, *, seconds: float) -> dict[str, float]:
        """Returns batches a second of one slice, after a short warm-up."""
        take = self._subjects[name].take
        take_for(take, 0.1)
        return {"batches_per_s": 1 / seconds_per_call(take, seconds)}

    def methods(self) -> dict[str, Any]:
        """Returns the methods that the driver may call."""
        return {"make": self.make, "run": self.run}


if __name__ == "__main__":
    serve(TorchRLSubjects().methods())
