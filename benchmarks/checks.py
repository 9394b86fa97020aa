"""Checks that batches are right: a checksum of each batch, and every byte of some.

Needs numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from benchmarks.workloads import ROW_ID_BYTES, Content, read_row_ids


class WrongDataError(AssertionError):
    """A batch differs from the store, which makes the measurement worthless."""


class BatchLog:
    """Records the row ids and all rewards of every batch of a slice; after the clock has stopped they are recomputed.

    A reward is a 24-bit hash of its row, so a slice that is cut wrongly, of another episode, torn by a write, or out of order does not
    pass. Noting costs some microseconds a batch, the same for every subject.

    Args:
        content: what is stored.
        capacity: batches that can be noted; later ones take the places of the first.
    """

    def __init__(self, content: Content, capacity: int = 4096) -> None:
        self._content = content
        workload = content.workload
        dtype = np.dtype(workload.obs_dtype)
        self._values = ROW_ID_BYTES // dtype.itemsize
        self._ids = np.empty((capacity, workload.batch_size, self._values), dtype)
        self._rewards = np.empty((capacity, workload.horizon, workload.batch_size), np.float32)
        self._noted = 0

    def note(self, obs: np.ndarray, reward: np.ndarray) -> None:
        """Records a batch: obs [H+1, B, *obs_shape] and reward [H, B, 1] or [H, B]."""
        place = self._noted % len(self._ids)
        row = obs[0]
        while row.ndim > 2:
            row = row[:, 0]
        self._ids[place] = row[:, : self._values]
        self._rewards[place] = reward.reshape(self._rewards.shape[1:])
        self._noted += 1

    def verify(self) -> int:
        """Checks all that was noted and starts afresh.

        Returns:
            How many batches were checked.

        Raises:
            WrongDataError: a reward is not the one that belongs there.
        """
        batches = min(self._noted, len(self._ids))
        self._noted = 0
        for first in range(0, batches, 256):
            some = slice(first, min(first + 256, batches))
            tags, starts = read_row_ids(self._ids[some])
            horizon = self._rewards.shape[1]
            steps = starts[:, None] + np.arange(1, horizon + 1)[:, None]
            tags = np.broadcast_to(tags[:, None], steps.shape)
            if not np.array_equal(self._rewards[some], self._content.reward(tags, steps)):
                raise WrongDataError(f"{self._content.workload.name}: rewards of a batch are not those of the rows it names")
        return batches


def check_batch(content: Content, batch: Mapping[str, np.ndarray]) -> None:
    """Checks every value of a batch.

    Args:
        content: what is stored.
        batch: ``obs`` [H+1, B, *obs_shape], ``action`` [H, B, size], ``reward`` and ``done`` [H, B, 1] or [H, B]; ``task`` [B],
            ``policy_version`` (the episode's tag) and ``start`` [B] where the subject gives them.

    Raises:
        WrongDataError: something differs from what the store was given.
    """
    workload = content.workload
    steps_in_slice, size = workload.horizon + 1, workload.batch_size
    obs = batch["obs"]
    expected_shape = (steps_in_slice, size, *workload.obs_shape)
    _require(obs.shape == expected_shape and obs.dtype == np.dtype(workload.obs_dtype), f"obs: {obs.shape} {obs.dtype}")
    values = ROW_ID_BYTES // obs.dtype.itemsize
    tags, steps = read_row_ids(obs.reshape(steps_in_slice, size, -1)[:, :, :values])
    _require(bool((tags == tags[0]).all()), "a slice has rows of several episodes")
    _require(bool((np.diff(steps, axis=0) == 1).all()), "a slice's steps do not follow each other")
    _require(bool((steps >= 0).all() and (steps < content.length(tags)).all()), "a step is outside its episode")
    _require(_same(obs, content.obs(tags.reshape(-1), steps.reshape(-1))), "obs differs")
    later_tags, later_steps = tags[1:].reshape(-1), steps[1:].reshape(-1)
    for name in ("action", "reward", "done"):
        _require(_same(batch[name], getattr(content, name)(later_tags, later_steps)), f"{name} differs")
    if "task" in batch:
        _require(_same(batch["task"], content.task(tags[0])), "task differs")
    if "policy_version" in batch:
        _require(_same(batch["policy_version"], tags[0]), "provenance names other episodes")
        _require(_same(batch["start"], steps[0]), "provenance names other starts")


def _same(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.dtype == expected.dtype and np.array_equal(found.reshape(-1), expected.reshape(-1))


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise WrongDataError(fault)
