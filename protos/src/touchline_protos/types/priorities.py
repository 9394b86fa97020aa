"""New priorities of slices, checked: what a learner sends back, and what a table takes."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np

from touchline_protos.types.arrays import to_array
from touchline_protos.types.batch import Batch
from touchline_protos.types.casting import ColumnError
from touchline_protos.types.dtypes import BFLOAT16


class PriorityUpdate(NamedTuple):
    """Priorities of B slices of H transitions. The arrays are copies."""

    episode_id: np.ndarray
    """[B] int64: id of each slice's episode."""
    start: np.ndarray
    """[B] int64: step of the episode that is the slice's row 0."""
    priorities: np.ndarray
    """[H, B] float32: finite, at least 0."""
    store_generation: int = 0
    """Generation of the store that the slices are from, see :attr:`Batch.store_generations`; 0: unknown."""


def priority_update(slices: Batch | tuple[Any, ...], priorities: Any) -> PriorityUpdate:
    """Returns a checked copy of new priorities.

    Args:
        slices: a batch, or its ``episode_id`` and ``start``: [B] each, of integers, arrays or tensors on any device; and maybe, as a third
            item, the store generation that they are from, of :attr:`Batch.store_generations`, so that they are taken for no other episodes.
        priorities: [H, B], of floats, array or tensor on any device. Not changed.

    Raises:
        ColumnError: the batch has no priorities, a shape or dtype is wrong, or a number is negative, NaN or infinite as float32.
    """
    if isinstance(slices, Batch):
        if slices.weight is None:
            raise ColumnError("batch: drawn by a law without priorities, expected one drawn by the law 'prioritized'")
        transitions, batch_size = slices.action.shape[:2]
        given = float_priorities(priorities)
        if given.shape != (transitions, batch_size):
            raise ColumnError(f"priorities: shape {given.shape}, expected ({transitions}, {batch_size}), one for each transition")
        return check_priorities(to_array("episode_id", slices.episode_id), to_array("start", slices.start), given)
    try:
        episode_id, start, *generation = slices
        (store_generation,) = generation or [0]
    except (TypeError, ValueError):
        raise ColumnError(
            f"slices: {type(slices).__name__}, expected a batch or the pair (episode_id, start), maybe with a store generation behind them"
        ) from None
    update = check_priorities(to_array("episode_id", episode_id), to_array("start", start), float_priorities(priorities))
    return update._replace(store_generation=_checked_generation(store_generation))


def _checked_generation(value: Any) -> int:
    try:
        generation = operator.index(value)
    except TypeError:
        raise ColumnError(f"store_generation: {type(value).__name__}, expected an integer, of batch.store_generations") from None
    if not 0 <= generation < 1 << 63:
        raise ColumnError(f"store_generation: {generation}, expected 0 to 2**63 - 1, of batch.store_generations")
    return generation


def updates_by_table(slices: Batch | tuple[Any, ...], priorities: Any, table: str) -> list[tuple[str, PriorityUpdate]]:
    """Returns a checked copy of new priorities for each table that the slices are from, with its name.

    Args:
        slices: a batch, which if mixed names its tables itself, or ``episode_id`` and ``start``; see :func:`priority_update`.
        priorities: [H, B] floats; see :func:`priority_update`.
        table: table of all slices, unless the batch is mixed.

    Raises:
        ColumnError: as :func:`priority_update`.
    """
    update = priority_update(slices, priorities)
    if not isinstance(slices, Batch):
        return [(table, update)]
    generations = slices.store_generations
    if slices.table is None:
        return [(table, update._replace(store_generation=generations[0] if generations else 0))]
    position = to_array("table", slices.table)
    parts = []
    for number, name in enumerate(slices.table_names):
        mask = position == number
        if mask.any():
            generation = generations[number] if number < len(generations) else 0
            parts.append((name, PriorityUpdate(update.episode_id[mask], update.start[mask], update.priorities[:, mask], generation)))
    return parts


def float_priorities(priorities: Any) -> np.ndarray:
    """Returns priorities as an array, unchecked; those of bfloat16, which numpy cannot compare, as float32."""
    if type(priorities) is np.ndarray and priorities.dtype == np.float32:
        return priorities  # nothing to find out
    array = to_array("priorities", priorities)
    if array.dtype != BFLOAT16:
        return array
    # bfloat16 is the upper half of a float32.
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def check_priorities(episode_id: np.ndarray, start: np.ndarray, priorities: np.ndarray) -> PriorityUpdate:
    """Returns a checked copy of new priorities, see :class:`PriorityUpdate`.

    Raises:
        ColumnError: a shape or dtype is wrong, or a number is negative, NaN or infinite as float32.
    """
    for name, array in (("episode_id", episode_id), ("start", start)):
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise ColumnError(f"{name}: {array.dtype.name} of shape {array.shape}, expected integers of shape (B,)")
        if len(array) and int(array.min()) < 0:
            raise ColumnError(f"{name}: {int(array.min())}, expected 0 or more")
    if len(start) != len(episode_id):
        raise ColumnError(f"start: shape {start.shape}, expected {episode_id.shape} to match episode_id")
    if priorities.dtype.kind != "f":
        raise ColumnError(f"priorities: {priorities.dtype.name}, expected floats of shape (H, {len(start)})")
    if priorities.ndim != 2 or priorities.shape[1] != len(start) or not len(priorities):
        raise ColumnError(f"priorities: shape {priorities.shape}, expected (H, {len(start)}), one for each transition")
    with np.errstate(over="ignore"):
        values = np.array(priorities, dtype=np.float32)
    # One pass finds them all: a comparison with NaN is false.
    bad = ~((values >= 0) & (values <= np.finfo(np.float32).max))
    if bad.any():
        row, column = np.argwhere(bad)[0].tolist()
        raise ColumnError(f"priorities: {priorities[row, column]} in row {row} of slice {column}, expected finite numbers of at least 0")
    return PriorityUpdate(np.array(episode_id, dtype=np.int64), np.array(start, dtype=np.int64), values)
