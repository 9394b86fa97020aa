"""Parts of flat TensorDicts and of their samples, for TorchRL's interface. Needs torch and tensordict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from touchline._learner.trajectories import path_of
from touchline.errors import InvalidArgumentError
from touchline_protos import Batch
from touchline_protos.types.casting import ColumnError
from touchline_protos.types.priorities import PriorityUpdate, check_priorities

INDEX_COLUMNS = 4
"""Columns of an index: id of the episode, start of the slice, position of the table in the mix, store generation."""


def by_path(data: TensorDict) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns the values of the root and those of "next", by dotted path."""
    root = {path_of(key): value for key, value in data.exclude("next").items(True, True)}
    return root, {path_of(key): value for key, value in data["next"].items(True, True)}


def with_spare_row(values: torch.Tensor, incoming: bool) -> torch.Tensor:
    """Returns values [T, ...] with a spare row of NaN or zero, [T + 1, ...]: the first row if ``incoming``, else the last."""
    spare = torch.full_like(values[:1], torch.nan if values.is_floating_point() else 0)
    return torch.cat([spare, values] if incoming else [values, spare])


def set_flat(data: TensorDict, path: str, rows: torch.Tensor) -> None:
    """Sets [slice_len, slices, ...] as [slices * slice_len, ...] under a dotted path."""
    data[tuple(path.split("."))] = rows.transpose(0, 1).flatten(0, 1)


def leaves_of(level: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of a nested dict by their dotted paths."""
    leaves: dict[str, Any] = {}
    for name, value in level.items():
        leaves |= leaves_of(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def sample_info(batch: Batch, slice_len: int) -> dict[str, torch.Tensor]:
    """Returns what TorchRL's samplers say about a sample, and where its slices are from.

    Returns:
        ``episode_id``, ``start``, ``probability`` and, of a mix, ``table``, [slices]; by the law ``prioritized`` also ``index``, int64
        [slices * slice_len, 4], for :func:`updates_of`, and ``priority_weight``, float32 [slices * slice_len].
    """
    fields = {name: getattr(batch, name) for name in ("episode_id", "start", "probability", "table")}
    info = {name: torch.as_tensor(values) for name, values in fields.items() if values is not None}
    if batch.weight is not None:
        table = info.get("table", torch.zeros_like(info["start"]))
        generations = torch.tensor(batch.store_generations or [0] * max(len(batch.table_names), 1), device=table.device)
        index = torch.stack([info["episode_id"], info["start"], table, generations[table]], dim=1)
        info["index"] = index.repeat_interleave(slice_len, dim=0)
        info["priority_weight"] = torch.as_tensor(batch.weight).repeat_interleave(slice_len)
    return info


def updates_of(index: Any, priority: Any, slice_len: int, tables: Sequence[str]) -> list[tuple[str, PriorityUpdate]]:
    """Returns new priorities of whole slices, for each table that they are from.

    Args:
        index: int64 [n * slice_len, 4], from :func:`sample_info`, of whole slices.
        priority: [n * slice_len] or [n * slice_len, 1]: priority of each transition.
        slice_len: number of transitions in a slice.
        tables: names of the tables of the mix, or of the only one.

    Raises:
        InvalidArgumentError: the index is not one, a shape is another one, or a priority is not finite or below 0.
    """
    rows = np.asarray(torch.as_tensor(index).cpu())
    values = torch.as_tensor(priority).detach().float().cpu().numpy()
    if rows.ndim != 2 or rows.shape[1] != INDEX_COLUMNS or len(rows) % slice_len or rows.dtype != np.int64:
        raise InvalidArgumentError(
            f"index: {rows.dtype} of shape {rows.shape}, expected info['index'] of sample(return_info=True), of whole slices of {slice_len}"
        )
    if values.shape not in ((len(rows),), (len(rows), 1)):
        raise InvalidArgumentError(f"priority: shape {values.shape}, expected ({len(rows)},), one for each row of the index")
    slices = rows[::slice_len]
    if not np.isin(slices[:, 2], range(len(tables))).all() or not np.array_equal(rows, slices.repeat(slice_len, axis=0)):
        raise InvalidArgumentError("index: its rows are not those of whole slices, expected info['index'] of sample(return_info=True)")
    values = values.reshape(-1, slice_len).T
    parts = []
    for table, generation in np.unique(slices[:, 2:], axis=0).tolist():
        mask = (slices[:, 2] == table) & (slices[:, 3] == generation)
        try:
            update = check_priorities(slices[mask, 0], slices[mask, 1], values[:, mask])
        except ColumnError as error:
            raise InvalidArgumentError(str(error)) from None
        parts.append((tables[table], update._replace(store_generation=generation)))
    return parts
