"""How a workload's rows become Reverb's items: one item for each slice of H + 1 steps.

Runs in the peers' environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf  # type: ignore[import-untyped]

from benchmarks.workloads import Workload

COLUMNS = ("obs", "action", "reward", "done")
PACKED = "row"
"""The one column of a packed step: all of its values behind each other."""


def step_signature(workload: Workload, *, packed: bool) -> dict[str, tf.TensorSpec]:
    """Returns the columns of a step."""
    dtype = np.dtype(workload.obs_dtype)
    if packed:
        return {PACKED: tf.TensorSpec((workload.row_bytes // dtype.itemsize,), dtype)}
    return {
        "obs": tf.TensorSpec(workload.obs_shape, dtype),
        "action": tf.TensorSpec((workload.action_size,), tf.float32),
        "reward": tf.TensorSpec((), tf.float32),
        "done": tf.TensorSpec((), tf.float32),
    }


def item_signature(workload: Workload, *, packed: bool) -> dict[str, tf.TensorSpec]:
    """Returns the columns of an item."""
    length = workload.horizon + 1
    return {name: tf.TensorSpec((length, *spec.shape), spec.dtype) for name, spec in step_signature(workload, packed=packed).items()}


def pack(workload: Workload, episode: Mapping[str, np.ndarray], *, packed: bool) -> dict[str, np.ndarray]:
    """Returns an episode's columns as the table has them."""
    if not packed:
        return {name: episode[name] for name in COLUMNS}
    rows = len(episode["reward"])
    parts = [np.ascontiguousarray(episode[name]).reshape(rows, -1).view(np.uint8) for name in COLUMNS]
    return {PACKED: np.concatenate(parts, axis=1).view(workload.obs_dtype)}


def unpack(workload: Workload, batch: Mapping[str, Any], *, packed: bool) -> dict[str, np.ndarray]:
    """Returns a batch's columns, [B, H+1, ...], as views."""
    if not packed:
        return {name: np.asarray(batch[name]) for name in COLUMNS}
    rows = np.asarray(batch[PACKED])
    values = workload.obs_bytes // np.dtype(workload.obs_dtype).itemsize
    obs = rows[..., :values].reshape(*rows.shape[:2], *workload.obs_shape)
    tail = rows[..., values:]
    if tail.dtype != np.float32:
        tail = np.ascontiguousarray(tail).view(np.float32)
    size = workload.action_size
    return {"obs": obs, "action": tail[..., :size], "reward": tail[..., size], "done": tail[..., size + 1]}
