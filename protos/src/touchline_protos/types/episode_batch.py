"""Episodes as vector simulators give them: all in one mapping of arrays or tensors [episodes, T, ...], perhaps of unequal lengths.

Tensors stay on their device; torch is never imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from touchline_protos.types.arrays import to_array
from touchline_protos.types.flatten import ColumnError, flatten_values


def is_tensor(value: Any) -> bool:
    """Returns whether a value is a torch tensor."""
    tensor_type = getattr(sys.modules.get("torch"), "Tensor", None)
    return tensor_type is not None and isinstance(value, tensor_type)


def flatten_batch(batch: Any, lengths: Any = None) -> tuple[dict[str, Any], list[int]]:
    """Returns the columns of a batch of episodes by dotted name, and the number of rows of each episode.

    Args:
        batch: a mapping or TensorDict of arrays or tensors [episodes, T, ...]; nested mappings are flattened with dots. Not changed.
        lengths: [episodes] integers, 1 to T: rows of each episode, the others are ignored. None: all T.

    Returns:
        Columns [episodes, T, ...], tensors as they are and anything else as numpy arrays; and the lengths.

    Raises:
        ColumnError: the batch is not a mapping, a value is not an array of numbers, or shapes or lengths do not fit each other.
    """
    columns = {name: value if is_tensor(value) else to_array(name, value) for name, value in flatten_values(batch).items()}
    if not columns:
        raise ColumnError("episodes: no columns, expected at least obs, action and reward")
    first = next(iter(columns))
    for name, column in columns.items():
        if column.ndim < 2:
            raise ColumnError(f"{name}: shape {tuple(column.shape)}, expected (episodes, rows, ...)")
        if column.shape[:2] != columns[first].shape[:2]:
            expected = ", ".join(map(str, (*columns[first].shape[:2], *column.shape[2:])))
            raise ColumnError(f"{name}: shape {tuple(column.shape)}, expected ({expected}) to match {first}")
    episodes, rows = columns[first].shape[:2]
    if not episodes or not rows:
        raise ColumnError(f"{first}: shape {tuple(columns[first].shape)}, expected at least one episode of one row")
    return columns, [rows] * episodes if lengths is None else _checked_lengths(lengths, episodes, rows)


def to_host(columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns columns as numpy arrays. Those on CUDA devices go to pinned memory, all together: each device is waited for once.

    Raises:
        ColumnError: a tensor is not one of numbers.
    """
    torch = sys.modules.get("torch")
    values: dict[str, Any] = dict(columns)
    devices = set()
    for name, value in columns.items():
        if torch is not None and is_tensor(value) and value.is_cuda:
            values[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            values[name].copy_(value.detach(), non_blocking=True)
            devices.add(value.device)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()  # type: ignore[union-attr]
    return {name: to_array(name, value) for name, value in values.items()}


def split_batch(columns: Mapping[str, np.ndarray], lengths: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
    """Yields the episodes of a batch: views [rows, ...] of its columns [episodes, T, ...]."""
    for number, length in enumerate(lengths):
        yield {name: column[number, :length] for name, column in columns.items()}


def _checked_lengths(lengths: Any, episodes: int, rows: int) -> list[int]:
    array = to_array("lengths", lengths)
    if array.dtype.kind not in "iu":
        raise ColumnError(f"lengths: dtype {array.dtype}, expected integers")
    if array.shape != (episodes,):
        raise ColumnError(f"lengths: shape {array.shape}, expected ({episodes},), a number of rows for each episode")
    wrong = np.flatnonzero((array < 1) | (array > rows))
    if len(wrong):
        raise ColumnError(f"lengths[{wrong[0]}]: {array[wrong[0]]}, expected 1 to {rows}, the rows of each episode in the batch")
    found: list[int] = array.tolist()
    return found
