"""Rows on their way to becoming an episode."""

from __future__ import annotations

import time
from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from touchline.errors import InvalidEpisodeError
from touchline_protos.types.casting import ROUNDING_HINT, ColumnError, cast, narrow
from touchline_protos.types.dtypes import BFLOAT16, dtype_name, to_wire
from touchline_protos.types.flatten import flatten_columns

_INITIAL_CAPACITY = 128
_BFLOAT16_NAN_BITS = 0x7FC0


def row_columns(step: Mapping[str, Any], *, known: Container[str] = (), dtype: np.dtype[Any] | None = None) -> dict[str, np.ndarray]:
    """Returns the values of one row by dotted column name.

    A Python float becomes float32, a bool bool and an int int64; numpy values and tensors keep their dtypes.

    Args:
        step: row by column name, nested or dotted; not modified.
        known: names of the columns whose dtype is already fixed. A Python float for one of them is not rounded to float32 first.
        dtype: dtype that float64 values are rounded to; None keeps float64.

    Raises:
        InvalidEpisodeError: a value is not an array of numbers, or its dtype is not supported.
    """
    if not hasattr(step, "keys"):
        raise InvalidEpisodeError(f"step: {type(step).__name__}, expected a mapping of values by column name")
    try:
        columns = {name: narrow(name, value, dtype) for name, value in flatten_columns(_typed(step, "", known)).items()}
    except ColumnError as error:
        raise InvalidEpisodeError(str(error)) from None
    for name, value in columns.items():
        try:
            to_wire(value.dtype)
        except ValueError as error:
            raise InvalidEpisodeError(f"{name}: {error}") from None
    return columns


class EpisodeRows:
    """Columns that grow by one row at a time. Values are copied in. Not thread-safe."""

    def __init__(self) -> None:
        self._columns: dict[str, np.ndarray] = {}
        self._length = 0
        self._columns_fixed = False
        self._capacity = _INITIAL_CAPACITY
        self.begun_ns = 0
        """Time of the first row, in nanoseconds since 1970; of no meaning if there are no rows."""

    def __len__(self) -> int:
        return self._length

    @property
    def names(self) -> Container[str]:
        """Names of the columns."""
        return self._columns.keys()

    def append(self, row: Mapping[str, np.ndarray]) -> None:
        """Adds a row. The second row may have columns that the first one lacks; they are NaN there, or zero if the dtype has no NaN.

        An array must have the dtype of the rows before. A scalar is converted if that loses nothing but digits of a float.

        Raises:
            InvalidEpisodeError: a column is missing or unknown, an array differs in dtype or shape from the rows before, or a scalar does
                not fit its column. Nothing is added.
        """
        if self._length:
            row = self._fitted(row)
        else:
            self._columns = {}
            self.begun_ns = time.time_ns()
        for name, value in row.items():
            column = self._columns.get(name)
            if column is None:
                column = np.empty((self._capacity, *value.shape), value.dtype)
                column[: self._length] = undefined(value.dtype)
                self._columns[name] = column
            elif self._length == len(column):
                column = np.concatenate([column, np.empty_like(column)])
                self._columns[name] = column
            column[self._length] = value
        self._columns_fixed = self._length > 0
        self._length += 1
        self._capacity = max(self._capacity, *(len(column) for column in self._columns.values()))

    def take(self, *, overlap: bool = False) -> dict[str, np.ndarray]:
        """Returns the columns [rows, ...], which the caller then owns, and starts over.

        Args:
            overlap: whether the next episode begins with the last row of this one.
        """
        columns = {name: column[: self._length] for name, column in self._columns.items()}
        self.clear()
        if overlap:
            self.append({name: column[-1, ...] for name, column in columns.items()})
            self._columns_fixed = True
        return columns

    def clear(self) -> None:
        """Removes all rows."""
        self._columns = {}
        self._length = 0
        self._columns_fixed = False

    def _fitted(self, row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns a row in the dtypes of the columns."""
        for name in self._columns:
            if name not in row:
                raise InvalidEpisodeError(f"{name}: missing in row {self._length}, expected as in the rows before")
        fitted = {}
        for name, value in row.items():
            column = self._columns.get(name)
            if column is None:
                if self._columns_fixed:
                    raise InvalidEpisodeError(f"{name}: unknown column in row {self._length}, expected {', '.join(self._columns)}")
            elif value.shape != column.shape[1:]:
                raise InvalidEpisodeError(
                    f"{name}: shape {value.shape} in row {self._length}, expected {column.shape[1:]} as in the rows before"
                )
            elif value.dtype != column.dtype:
                value = self._scalar(name, value, column.dtype)
            fitted[name] = value
        return fitted

    def _scalar(self, name: str, value: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
        if value.ndim:
            found, expected = dtype_name(value.dtype), dtype_name(dtype)
            hint = f"; {ROUNDING_HINT}" if (found, expected) == ("float64", "float32") else ""
            raise InvalidEpisodeError(f"{name}: dtype {found} in row {self._length}, expected {expected} as in the rows before{hint}")
        try:
            return cast(name, value, dtype, rounding=True, why=f"in row {self._length}, as in the rows before")
        except ColumnError as error:
            raise InvalidEpisodeError(str(error)) from None


def _typed(level: Any, name: str, known: Container[str]) -> Any:
    if type(level) is float and name not in known:
        return cast(name, np.asarray(level), np.dtype(np.float32), rounding=True, why="which stores Python floats")
    if isinstance(level, Mapping):
        return {key: _typed(value, f"{name}.{key}" if name else str(key), known) for key, value in level.items()}
    return level


def undefined(dtype: np.dtype) -> Any:
    """Returns the placeholder of a missing value: NaN (always with the same bits), or zero for a dtype without NaN."""
    if dtype == BFLOAT16:
        return np.array((_BFLOAT16_NAN_BITS,), BFLOAT16)
    return np.nan if dtype.kind == "f" else 0
