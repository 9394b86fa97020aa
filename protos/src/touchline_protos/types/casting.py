"""Casts that lose nothing, and what is raised where one would."""

from __future__ import annotations

from typing import Any

import numpy as np

from touchline_protos.types.dtypes import BFLOAT16, dtype_name

ROUNDS = 'dtype="float32" on the client, writer or recorder rounds it'
"""What to do about a float64 value where float32 is expected."""


class ColumnError(ValueError):
    """A value that cannot be a column; the message names the column."""


def cast(name: str, array: np.ndarray, dtype: np.dtype[Any], *, rounding: bool, why: str) -> np.ndarray:
    """Returns an array of another dtype that holds the same values.

    Args:
        name: of the column, for messages.
        array: not changed; returned as it is if it has the dtype.
        dtype: wanted.
        rounding: floats may lose digits to a smaller float; that a finite value becomes infinite is refused all the same.
        why: completes "expected <dtype>" in messages: ``of the space``.

    Raises:
        ColumnError: a value would be another one: a fraction or NaN as an integer, what is out of range, a whole number that a float lacks.
    """
    if array.dtype == dtype:
        return array
    if array.dtype == BFLOAT16:
        array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)  # which has all of its values
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
        hint = "" if rounding or not array.dtype.kind == dtype.kind == "f" else f"; {ROUNDS}"
        raise ColumnError(f"{name}: {value!r}, which is {became!r} as {wanted}; expected a value of {wanted} {why}{hint}")
    return made


def narrow(name: str, array: np.ndarray, dtype: np.dtype[Any] | None) -> np.ndarray:
    """Returns a float64 array rounded to the float dtype that its caller asked for, anything else as it is.

    Raises:
        ColumnError: a finite value would become infinite.
    """
    return array if dtype is None or array.dtype != np.float64 else cast(name, array, dtype, rounding=True, why="that was asked for")


def _rounded(array: np.ndarray, made: np.ndarray) -> np.ndarray:
    return np.asarray(np.isfinite(made) | ~np.isfinite(array))


def _equal(array: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Returns bool, of the array's shape: whether each value is what it was."""
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
    # Comparing with what the source's dtype does not have would be a comparison of floats.
    least, most = max(limits.min, np.iinfo(array.dtype).min), min(limits.max, np.iinfo(array.dtype).max)
    return np.asarray((array >= array.dtype.type(least)) & (array <= array.dtype.type(most)))


def _in_range(floats: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Returns whether an integer dtype has room for each of these floats. Its greatest value and one is a power of two, and so exact."""
    limits = np.iinfo(dtype)
    wide = floats.astype(np.float64)
    return np.asarray((wide >= float(limits.min)) & (wide < float(limits.max + 1)))
