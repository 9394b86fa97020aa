"""Batches as torch tensors. Importing this does not import torch; a batch of tensors does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from touchline.errors import InvalidArgumentError
from touchline_protos import Batch
from touchline_protos.types.batch import OPTIONAL_PROVENANCE, PROVENANCE
from touchline_protos.types.dtypes import BFLOAT16


def load_torch() -> Any:
    """Returns the torch module, or None if it is not installed."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return None
    return torch


def batch_converter(*, as_numpy: bool) -> Callable[[Batch], Batch]:
    """Returns the function that turns a batch of numpy arrays into what the caller asked for: tensors, if torch is installed, or arrays."""
    torch = None if as_numpy else load_torch()
    if torch is None:
        return same_batch
    return lambda batch: to_tensors(torch, batch)


def check_one_agent(batch: Batch, learner: str) -> None:
    """Checks that a batch has one reward per step, for learners that train one agent.

    Args:
        batch: a batch of tensors or arrays.
        learner: name of the learner's interface, for the error.

    Raises:
        InvalidArgumentError: the episodes are matches in lockstep, with a reward per agent.
    """
    agents = batch.reward.shape[-1]
    if agents != 1:
        raise InvalidArgumentError(
            f"reward: of {agents} agents in lockstep, expected one value per step: {learner} trains one agent. Record without lockstep, or "
            "sample with ReplayClient.batches()"
        )


def same_batch(batch: Batch) -> Batch:
    """Returns the batch as it is."""
    return batch


def map_batch(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    """Returns a batch of the results of ``change``, called with each array of the given batch in a fixed order."""
    columns = {
        "obs": map_nested(batch.obs, change),
        "action": change(batch.action),
        "reward": change(batch.reward),
        "done": change(batch.done),
        "task": None if batch.task is None else change(batch.task),
        "extra": {name: change(value) for name, value in batch.extra.items()},
    }
    provenance = {name: change(getattr(batch, name)) for name, _ in PROVENANCE}
    episode_id, start, origin = provenance["episode_id"], provenance["start"], batch.origin
    if origin is not None:
        origin = origin.of(episode_id, start) if origin.is_of(batch) and episode_id is not None else None
    return Batch(
        **columns,
        **provenance,
        actor_names=batch.actor_names,
        table_names=batch.table_names,
        store_generations=batch.store_generations,
        origin=origin,
        **{name: change(value) for name, _ in OPTIONAL_PROVENANCE if (value := getattr(batch, name)) is not None},
    )


def map_nested(level: Any, change: Callable[[Any], Any]) -> Any:
    """Returns a nested dict of the results of ``change``, or its result if ``level`` is an array."""
    # Not a nested function: one that calls itself is a reference cycle, which would keep alive what ``change`` holds until the next
    # collection of cycles, and with it a slot of the ring.
    return {name: map_nested(value, change) for name, value in level.items()} if isinstance(level, dict) else change(level)


def as_tensor(torch: Any, array: np.ndarray) -> Any:
    """Returns a tensor that shares the array's memory and keeps it alive; an array of bfloat16 bits becomes ``torch.bfloat16``."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_tensors(torch: Any, batch: Batch) -> Batch:
    """Returns the batch with tensors that share the memory of its arrays."""
    return map_batch(batch, lambda array: as_tensor(torch, array))
