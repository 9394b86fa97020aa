"""The construction of TD-MPC2's replay buffer (Hansen et al. 2024) on TorchRL, in the learner's own process.

TD-MPC2 gives a TorchRL ``ReplayBuffer`` a ``SliceSampler`` that finds episodes by an ``episode`` column, asks it for
batch_size x (horizon + 1) rows, and makes the result time-major: view, permute, select, contiguous. That is built here from TorchRL's
own parts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer, SliceSampler

from benchmarks.workloads import Content

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


class Tdmpc2Subject:
    """The buffer, filled with the first episodes of a workload.

    Args:
        content: the rows to store.
        cache: keep the episodes' borders between samples (TD-MPC2 does for several tasks); a write drops them.
        device: device of the storage.
    """

    def __init__(self, content: Content, *, cache: bool, device: str = "cpu") -> None:
        self.content = content
        workload = content.workload
        self._steps = workload.horizon + 1
        self._buffer = ReplayBuffer(
            storage=LazyTensorStorage(workload.rows, device=device),
            sampler=SliceSampler(
                num_slices=workload.batch_size, traj_key="episode", end_key=None, truncated_key=None, strict_length=True, cache_values=cache
            ),
            batch_size=workload.batch_size * self._steps,
            prefetch=0,
            pin_memory=False,
        )
        self._episodes = 0
        tags = content.tags_to_fill(workload.rows)
        for tag in tags:
            self.add(tag)
        # The remaining rows stay empty for this subject too, so that no episode is stored in part.
        self._next = [self._row(tag) for tag in tags[:8]]

    def add(self, tag: int) -> None:
        """Stores the episode of this tag."""
        self._extend(self._row(tag))

    def add_next(self) -> None:
        """Stores one more of some episodes that are ready."""
        self._extend(self._next[self._episodes % len(self._next)])

    def take(self) -> Tensors:
        """Returns obs [H+1, B, ...], action, reward and done [H, B, ...], and the task [B] if there is one."""
        rows = self._buffer.sample().view(-1, self._steps).permute(1, 0)
        batch = rows.select("obs", "action", "reward", "done", "task", strict=False)
        task = batch.get("task", None)
        return (
            batch.get("obs").contiguous(),
            batch.get("action")[1:].contiguous(),
            batch.get("reward")[1:].unsqueeze(-1).contiguous(),
            batch.get("done")[1:].unsqueeze(-1).contiguous(),
            task[0].contiguous() if task is not None else None,
        )

    def noted(self, batch: Tensors) -> tuple[np.ndarray, np.ndarray]:
        """Returns obs and reward as arrays."""
        return batch[0].numpy(), batch[2].numpy()

    def arrays(self, batch: Tensors) -> Mapping[str, np.ndarray]:
        """Returns the batch as arrays."""
        names = ("obs", "action", "reward", "done", "task")
        return {name: tensor.numpy() for name, tensor in zip(names, batch, strict=True) if tensor is not None}

    def _row(self, tag: int) -> TensorDict:
        columns = {name: torch.from_numpy(array) for name, array in self.content.episode(tag).items()}
        return TensorDict(columns, batch_size=[len(columns["reward"])])

    def _extend(self, rows: TensorDict) -> None:
        rows["episode"] = torch.full((len(rows),), self._episodes, dtype=torch.int64)
        self._buffer.extend(rows)
        self._episodes += 1


class WritingSubject:
    """A subject that stores an episode before every batch it takes."""

    def __init__(self, subject: Tdmpc2Subject) -> None:
        self.content = subject.content
        self._subject = subject
        self.noted = subject.noted
        self.arrays = subject.arrays

    def take(self) -> Tensors:
        """Adds, then takes."""
        self._subject.add_next()
        return self._subject.take()
