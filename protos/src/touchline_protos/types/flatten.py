"""Flatten an episode as callers hold it into numpy columns. Torch objects are recognised by their attributes; torch is never imported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from touchline_protos.types.arrays import to_array
from touchline_protos.types.casting import ColumnError
from touchline_protos.types.episode import CodecLimits

__all__ = ["MAX_NESTING", "ColumnError", "flatten_columns", "split_episodes", "to_array"]

MAX_NESTING = CodecLimits().max_nesting
"""Maximum number of levels of nested mappings in an episode."""


def flatten_columns(episode: Any) -> dict[str, np.ndarray]:
    """Returns an episode's columns as C-contiguous, little-endian numpy arrays by dotted name, in the caller's order.

    Args:
        episode: a mapping, a TensorDict or a tensorclass, of numpy arrays, torch tensors on any device, or what ``numpy.asarray`` takes;
            nested mappings are flattened with dots (``obs.rgb``). Not changed.

    Returns:
        Arrays that share the caller's memory if it is contiguous and in host memory; do not write to them.

    Raises:
        ColumnError: the episode is not a mapping, a name is not a string, ambiguous or given twice, mappings are nested too deeply, or a
            value is not an array of numbers.
    """
    return {name: to_array(name, value) for name, value in flatten_values(episode).items()}


def flatten_values(episode: Any) -> dict[str, Any]:
    """Returns an episode's columns by dotted name, as :func:`flatten_columns` does, but with the values as they are.

    Raises:
        ColumnError: as :func:`flatten_columns`, except for values.
    """
    if not hasattr(episode, "keys"):
        raise ColumnError(f"episode: {type(episode).__name__}, expected a mapping of arrays")
    columns: dict[str, Any] = {}
    for name, value in _leaves(episode, "", 0):
        if name in columns:
            raise ColumnError(f"{name}: given twice, expected every column once")
        columns[name] = value
    return columns


def split_episodes(episodes: Any) -> Iterator[Any]:
    """Yields the episodes of a load.

    Args:
        episodes: one mapping or TensorDict of arrays ``[num_episodes, episode_length, ...]``, or an iterable of episodes. The elements of a
            lazy stack of TensorDicts are episodes, which may differ in length.

    Raises:
        ColumnError: the arrays of a mapping differ in their numbers of episodes, or have fewer than two dimensions.
    """
    if getattr(episodes, "stack_dim", None) == 0 and hasattr(episodes, "tensordicts"):
        episodes = episodes.tensordicts
    if not hasattr(episodes, "keys"):
        if not isinstance(episodes, Iterable) or isinstance(episodes, str | bytes):
            raise ColumnError(f"episodes: {type(episodes).__name__}, expected a mapping of arrays or an iterable of episodes")
        yield from episodes
        return
    columns = flatten_columns(episodes)
    if not columns:
        raise ColumnError("episodes: no columns, expected at least obs, action and reward")
    first = next(iter(columns))
    for name, column in columns.items():
        if column.ndim < 2:
            raise ColumnError(f"{name}: shape {column.shape}, expected (num_episodes, episode_length, ...)")
        if len(column) != len(columns[first]):
            raise ColumnError(f"{name}: {len(column)} episodes, expected {len(columns[first])} to match {first}")
    for number in range(len(columns[first])):
        yield {name: column[number] for name, column in columns.items()}


def _leaves(level: Any, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Yields the values of nested mappings by dotted name."""
    if depth > MAX_NESTING:
        raise ColumnError(f"{prefix}: nested more than {MAX_NESTING} levels deep")
    for key in level.keys():  # noqa: SIM118  a TensorDict iterates over its rows, not its keys
        if not isinstance(key, str):
            raise ColumnError(f"{prefix}{key!r}: a name of type {type(key).__name__}, expected str")
        if "." in key and prefix.startswith("obs."):
            raise ColumnError(
                f"{prefix}{key}: a dot in the key {key!r}, which batches would return as nested mappings; "
                f"expected a name without one, such as {key.replace('.', '_')!r}, or {_nested(key)}"
            )
        value = _value_of(level, prefix, key)
        if isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "batch_size")):
            yield from _leaves(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _value_of(level: Any, prefix: str, key: str) -> Any:
    if getattr(type(level), "_is_tensorclass", False):
        return getattr(level, key)
    try:
        return level[key]
    except RuntimeError as error:
        if hasattr(level, "tensordicts"):
            raise ColumnError(
                f"{prefix}{key}: a lazy stack whose elements differ in shape, expected one shape; add each by itself, or all with load()"
            ) from None
        raise ColumnError(f"{prefix}{key}: cannot be read ({error})") from None


def _nested(key: str) -> str:
    """Returns a key with dots written as nested mappings."""
    *groups, leaf = key.split(".")
    return "".join(f"{{{group!r}: " for group in groups) + f"{{{leaf!r}: ...}}" + "}" * len(groups)
