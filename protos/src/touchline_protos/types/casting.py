"""Casts that keep every value, and the error raised if one would not."""

from __future__ import annotations

from typing import Any

import numpy as np

from touchline_protos.types.dtypes import BFLOAT16, dtype_name

ROUNDING_HINT = 'dtype="float32" on the client, writer or recorder rounds it'
"""Advice for a float64 value that float32 cannot represent exactly."""


class ColumnError(ValueError):
    """A value that cannot be a column. The message names the column, the value found and the one expected."""


def cast(name: str, array: np.ndarray, dtype: np.dtype[Any], *, rounding: bool, why: str) -> np.ndarray:
    """Returns an array of dtype ``dtype`` with the same values.

    Args:
        name: name of the column, for messages.
        array: array to cast. Not changed; returned itself if it already has the dtype.
        dtype: dtype of the result.
        rounding: whether floats may be rounded to a smaller float. A finite value that would become infinite is refused even then.
        why: origin of the dtype, which completes "expected <dtype>" in messages: ``of the space``.

    Raises:
        ColumnError: a value would change: a fraction or NaN as an integer, a value out of range, an integer that a float cannot represent.
    """
    if array.dtype == dtype:
        return array
    if array.dtype == BFLOAT16:
        array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)  # a bfloat16 is the upper half of a float32
        if array.dtype == dtype:
            return array
    if dtype == BFLOAT16 or array.dtype.kind not in "biuf" or dtype.kind not in "biuf":
        raise ColumnError(f"{name}: dtype {dtype_name(array.dtype)}, expected {dtype_name(dtype)} {why}")
    with np.errstate(all="ignore"):
        made = array.astype(dtype)
        same = _rounded(array, made) if rounding and array.dtype.kind == dtype.kind == "f" else _equal(array, made)
    if not same.all():
        first = np.argmin(same.reshape(-1))
        value, became, wanted = array.reshape(-1)[first].item(), made.reshape(-1)[first].item(), dtype_name(dtype)
        hint = "" if rounding or not array.dtype.kind == dtype.kind == "f" else f"; {ROUNDING_HINT}"
        raise ColumnError(f"{name}: {value!r}, which is {became!r} as {wanted}; expected a value of {wanted} {why}{hint}")
    return made


def narrow(name: str, array: np.ndarray, dtype: np.dtype[Any] | None) -> np.ndarray:
    """Returns a float64 array rounded to the float dtype that the caller asked for; any other array, or without one, itself.

    Raises:
        ColumnError: a finite value would become infinite.
    """
    return array if dtype is None or array.dtype != np.float64 else cast(name, array, dtype, rounding=True, why="that was asked for")


def _rounded(array: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Returns bool, of the array's shape: whether each value stayed finite, or was not finite before."""
    return np.asarray(np.isfinite(made) | ~np.isfinite(array))


def _equal(array: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Returns bool, of the array's shape: whether each value is unchanged."""
    source, target = array.dtype.kind, made.dtype.kind
    if source == "b":
        return np.ones(array.shape, np.bool_)
    if target == "b":
        return np.asarray((array == 0) | (array == 1))
    if target == "f":
        if source == "f":
            return np.asarray((made == array) | (np.isnan(made) & np.isnan(array)))
        return np.asarray(_in_range(made, array.dtype) & (made.astype(array.dtype) == array))
    if source == "f":
        return np.asarray(_in_range(array, made.dtype) & (made == array))
    limits = np.iinfo(made.dtype)
    # Clip the limits to the source's range: comparing int64 with a limit that only uint64 has would convert both to float64.
    least, most = max(limits.min, np.iinfo(array.dtype).min), min(limits.max, np.iinfo(array.dtype).max)
    return np.asarray((array >= array.dtype.type(least)) & (array <= array.dtype.type(most)))


def _in_range(floats: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Returns bool, of the array's shape: whether each float lies in an integer dtype's range.

    The maximum itself may not be a float64, but the maximum plus one, a power of two, is: hence ``<`` and not ``<=``.
    """
    limits = np.iinfo(dtype)
    wide = floats.astype(np.float64)
    return np.asarray((wide >= float(limits.min)) & (wide < float(limits.max + 1)))
