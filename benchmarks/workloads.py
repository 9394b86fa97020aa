"""What is stored and drawn: the workloads, and episodes in which every row identifies itself.

Needs numpy only, and any numpy from 1.26 on: the peers' environment imports it too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

ROW_ID_BYTES = 8
"""Size of the beginning of an observation: the episode's tag and the step, as two float32 or two uint32."""

_NOISE_VALUES = 1 << 16
_TASKS = 8


@dataclass(frozen=True)
class Workload:
    """A shape of data and of batches."""

    name: str
    title: str
    obs_dtype: str
    obs_shape: tuple[int, ...]
    action_size: int
    rows: int
    """Capacity of the store, which is full."""
    min_length: int
    max_length: int
    """Bounds of an episode's rows, which are uniform between them."""
    task: bool = False
    law: str = "episode"
    batch_size: int = 256
    horizon: int = 3

    @property
    def obs_bytes(self) -> int:
        """Size of one row's observation."""
        return int(np.prod(self.obs_shape)) * np.dtype(self.obs_dtype).itemsize

    @property
    def row_bytes(self) -> int:
        """Size of one row: observation, action, reward, done and, if there is one, the task."""
        return self.obs_bytes + 4 * (self.action_size + 2) + (8 if self.task else 0)

    @property
    def batch_bytes(self) -> int:
        """Size of one batch without provenance: H + 1 rows of the observation, H of action, reward and done."""
        transition = self.horizon * 4 * (self.action_size + 2)
        return self.batch_size * ((self.horizon + 1) * self.obs_bytes + transition + (8 if self.task else 0))

    def resized(self, rows: int) -> Workload:
        """Returns the same workload with a store of another size."""
        return replace(self, rows=rows)


W1 = Workload("W1", "state", "<f4", (64,), 8, rows=1_000_000, min_length=500, max_length=500)
W2 = Workload("W2", "pixels", "|u1", (9, 64, 64), 6, rows=100_000, min_length=500, max_length=500)
W3 = Workload("W3", "multi-task, unequal episodes", "<f4", (64,), 8, rows=200_000, min_length=20, max_length=1000, task=True)
W3_STEP = replace(W3, law="step")
WORKLOADS = {"W1": W1, "W2": W2, "W3": W3, "W3-step": W3_STEP}


class Content:
    """The rows of a workload's episodes, each a function of only the episode's tag and the step.

    Rewards are 24-bit hashes of (tag, step), so that rewards identify rows; observations and actions are windows, chosen by other
    hashes, of a fixed table of noise, so that they are made and checked at the speed of a copy. An observation begins with its tag and
    its step. Row 0 has NaN for action, reward and done, as in TD-MPC2: a batch with a NaN was drawn by the wrong convention.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        rng = np.random.default_rng(20_240_317)
        self._lengths = np.random.default_rng(7).integers(workload.min_length, workload.max_length, 1 << 14, endpoint=True)
        self._action_noise = rng.random(_NOISE_VALUES + workload.action_size, dtype=np.float32)
        values = int(np.prod(workload.obs_shape))
        if workload.obs_dtype == "|u1":
            self._obs_noise: np.ndarray = rng.integers(0, 256, _NOISE_VALUES + values, dtype=np.uint8)
        else:
            self._obs_noise = rng.random(_NOISE_VALUES + values, dtype=np.float32)

    @cached_property
    def _obs_windows(self) -> np.ndarray:
        return np.lib.stride_tricks.sliding_window_view(self._obs_noise, int(np.prod(self.workload.obs_shape)))

    @cached_property
    def _action_windows(self) -> np.ndarray:
        return np.lib.stride_tricks.sliding_window_view(self._action_noise, self.workload.action_size)

    def length(self, tag: int | np.ndarray) -> np.ndarray:
        """Returns how many rows the episode of each tag has, int64."""
        return np.asarray(self._lengths[np.asarray(tag) % len(self._lengths)])

    def episode(self, tag: int) -> dict[str, np.ndarray]:
        """Returns an episode's columns, [rows, ...], fresh."""
        length = int(self.length(tag))
        steps = np.arange(length)
        tags = np.full(length, tag)
        columns = {
            "obs": self.obs(tags, steps),
            "action": self.action(tags, steps),
            "reward": self.reward(tags, steps),
            "done": self.done(tags, steps),
        }
        for name in ("action", "reward", "done"):
            columns[name][0] = np.nan
        if self.workload.task:
            columns["task"] = self.task(tags)
        return columns

    def obs(self, tags: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Returns the observations of these rows, [n, *obs_shape]."""
        rows = self._obs_windows[_hash(tags, steps, 1) % np.uint64(_NOISE_VALUES)]
        row_id = np.stack([tags, steps], axis=1)
        if self.workload.obs_dtype == "|u1":
            rows[:, :ROW_ID_BYTES] = row_id.astype("<u4").view(np.uint8)
        else:
            rows[:, :2] = row_id
        return rows.reshape(len(rows), *self.workload.obs_shape)

    def action(self, tags: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Returns the actions of these rows, [n, action_size] float32."""
        return self._action_windows[_hash(tags, steps, 2) % np.uint64(_NOISE_VALUES)]

    def reward(self, tags: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Returns the rewards of rows of any shape, float32: exact integers below 2**24."""
        return (_hash(tags, steps, 3) >> np.uint64(40)).astype(np.float32)

    def done(self, tags: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Returns 1 for the last row of an episode, else 0, float32."""
        last: np.ndarray = np.equal(steps, self.length(tags) - 1)
        return last.astype(np.float32)

    def task(self, tags: np.ndarray) -> np.ndarray:
        """Returns the episodes' tasks, int64."""
        return (tags % _TASKS).astype(np.int64)

    def tags_to_fill(self, rows: int) -> list[int]:
        """Returns the tags, from 0 on, of as many episodes as a store of ``rows`` holds."""
        ends = np.cumsum(self.length(np.arange(rows // max(self.workload.min_length, 1) + 1)))
        return list(range(int(np.searchsorted(ends, rows, side="right"))))


def read_row_ids(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns tag and step of each observation, int64.

    Args:
        obs: the first :data:`ROW_ID_BYTES` bytes of observations as values, [..., 2] float32 or [..., 8] uint8.
    """
    pairs = np.ascontiguousarray(obs).view("<u4") if obs.dtype == np.uint8 else obs
    return pairs[..., 0].astype(np.int64), pairs[..., 1].astype(np.int64)


def _hash(tags: np.ndarray, steps: np.ndarray, salt: int) -> np.ndarray:
    """Mixes (tag, step, salt) into 64 bits: the finalizer of splitmix64 (Steele et al. 2014)."""
    mixed = tags.astype(np.uint64) << np.uint64(32) | steps.astype(np.uint64)
    mixed += np.uint64(salt * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(31)
