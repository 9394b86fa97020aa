"""Batches as torch tensors. Torch is loaded here and only when a batch is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from touchline_protos import Batch
from touchline_protos.types.batch import PROVENANCE
from touchline_protos.types.dtypes import BFLOAT16


def load_torch() -> Any:
    """Returns the torch module, or None where it is not installed."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return None
    return torch


def map_batch(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    """Returns a batch whose arrays are what ``change`` makes of the given one's."""
    return Batch(
        obs=_changed(batch.obs, change),
        action=change(batch.action),
        reward=change(batch.reward),
        done=change(batch.done),
        task=None if batch.task is None else change(batch.task),
        extra={name: change(value) for name, value in batch.extra.items()},
        actor_names=batch.actor_names,
        **{name: change(getattr(batch, name)) for name, _ in PROVENANCE},
    )


def _changed(level: Any, change: Callable[[Any], Any]) -> Any:
    # Not a function inside: one that calls itself is a cycle, which would hold what ``change`` holds until the next collection.
    return {name: _changed(value, change) for name, value in level.items()} if isinstance(level, dict) else change(level)


def as_tensor(torch: Any, array: np.ndarray) -> Any:
    """Returns a tensor that shares the array's memory and keeps it alive; bits of bfloat16 become ``torch.bfloat16``."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_tensors(torch: Any, batch: Batch) -> Batch:
    """Returns the batch with tensors that share the memory of its arrays."""
    return map_batch(batch, lambda array: as_tensor(torch, array))
