"""An episode as callers hold it, turned into flat numpy columns. Torch objects are recognised by what they offer, never imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from touchline_protos.dtypes import BFLOAT16
from touchline_protos.episode import CodecLimits

MAX_NESTING = CodecLimits().max_nesting
"""Levels of nested mappings that an episode may have."""


class ColumnError(ValueError):
    """A value that cannot be a column; the message names the column."""


def flatten_columns(episode: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns an episode's columns as C-contiguous, little-endian numpy arrays by dotted name.

    Args:
        episode: a mapping, or a TensorDict, of numpy arrays, torch tensors on any device, or what ``numpy.asarray`` takes;
            nested mappings flatten with dots (``obs.rgb``). It is not changed.

    Returns:
        Arrays that share the caller's memory wherever that is contiguous and in host memory; read them, do not write.

    Raises:
        ColumnError: a name that is not a string, mappings nested too deep, the same name twice, or a value that is no array.
    """
    columns: dict[str, np.ndarray] = {}
    for name, value in _leaves(episode, "", 0):
        if name in columns:
            raise ColumnError(f"{name}: given twice, expected every column once")
        columns[name] = to_array(name, value)
    return columns


def to_array(name: str, value: Any) -> np.ndarray:
    """Returns one value as a C-contiguous, little-endian numpy array; bfloat16, torch's and JAX's, as
    :data:`~touchline_protos.dtypes.BFLOAT16`.

    Raises:
        ColumnError: the value is no array of numbers, or a tensor that numpy cannot hold (sparse, quantised, float8).
    """
    torch = sys.modules.get("torch")
    try:
        if torch is not None and isinstance(value, torch.Tensor):
            tensor = value.detach().cpu().contiguous()
            if tensor.dtype == torch.bfloat16:
                return np.asarray(tensor.view(torch.int16).numpy()).view(BFLOAT16)
            value = tensor.numpy()
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ColumnError(f"{name}: {type(value).__name__} is no array ({error})") from None
    if array.dtype.name == "bfloat16":
        array = array.view(BFLOAT16)  # the dtype that JAX's arrays have in numpy, of the package ml_dtypes
    if array.dtype.hasobject:
        raise ColumnError(f"{name}: an array of {array.dtype.name}, expected numbers")
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
        array = array.astype(array.dtype.newbyteorder("<"))
    # ascontiguousarray would turn a scalar into one dimension.
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def _leaves(level: Any, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > MAX_NESTING:
        raise ColumnError(f"{prefix}: nested more than {MAX_NESTING} levels deep")
    for key in level.keys():  # noqa: SIM118  a TensorDict iterates over its rows, not its keys
        if not isinstance(key, str):
            raise ColumnError(f"{prefix}{key!r}: a name of type {type(key).__name__}, expected str")
        value = level[key]
        if isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "batch_size")):
            yield from _leaves(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value
