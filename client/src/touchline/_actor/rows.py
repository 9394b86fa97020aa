"""Rows that become an episode."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from touchline.errors import InvalidEpisodeError
from touchline_protos.types.casting import ROUNDING_HINT, ColumnError, cast, narrow
from touchline_protos.types.dtypes import BFLOAT16, dtype_name, to_wire
from touchline_protos.types.flatten import flatten_columns

_FIRST_ROWS = 128
_BFLOAT16_NAN_BITS = 0x7FC0


def row_columns(step: Mapping[str, Any], *, known: Container[str] = (), dtype: np.dtype[Any] | None = None) -> dict[str, np.ndarray]:
    """Returns one row's values by dotted name.

    A plain Python float becomes float32, a bool bool and an int int64; numpy values and tensors keep their dtype.

    Args:
        step: the row; not changed.
        known: names of columns that have a dtype: a plain float is not rounded before that is applied to it.
        dtype: that float64 values are rounded to; None leaves them.

    Raises:
        InvalidEpisodeError: a value is not an array of numbers, or of a dtype that is not supported.
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
    """Columns that grow by a row at a time. Values are copied in. For one thread at a time."""

    def __init__(self) -> None:
        self._columns: dict[str, np.ndarray] = {}
        self._length = 0
        self._settled = False
        self._capacity = _FIRST_ROWS

    def __len__(self) -> int:
        return self._length

    @property
    def names(self) -> Container[str]:
        """Of the columns."""
        return self._columns.keys()

    def append(self, row: Mapping[str, np.ndarray]) -> None:
        """Adds a row; the second may bring columns that the first left out, whose value there is NaN, or zero where there is no NaN.

        Arrays have the dtype of the rows before. A scalar may be of another one if that loses nothing but digits of a float.

        Raises:
            InvalidEpisodeError: a column is missing or unknown, or of another dtype or shape than in the rows before, or a scalar does not
                fit its column. Nothing is added.
        """
        if self._length:
            row = self._fitted(row)
        else:
            self._columns = {}
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
        self._settled = self._length > 0
        self._length += 1
        self._capacity = max(self._capacity, *(len(column) for column in self._columns.values()))

    def take(self, *, overlap: bool = False) -> dict[str, np.ndarray]:
        """Returns the columns, which are the caller's, and starts afresh.

        Args:
            overlap: begin the next episode with the last row of this one.
        """
        columns = {name: column[: self._length] for name, column in self._columns.items()}
        self.clear()
        if overlap:
            self.append({name: column[-1, ...] for name, column in columns.items()})
            self._settled = True
        return columns

    def clear(self) -> None:
        """Forgets the rows."""
        self._columns = {}
        self._length = 0
        self._settled = False

    def _fitted(self, row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns a row with the dtypes of the columns."""
        for name in self._columns:
            if name not in row:
                raise InvalidEpisodeError(f"{name}: missing in row {self._length}, expected as in the rows before")
        fitted = {}
        for name, value in row.items():
            column = self._columns.get(name)
            if column is None:
                if self._settled:
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
        return cast(name, np.asarray(level), np.dtype(np.float32), rounding=True, why="which stands for a Python float")
    if isinstance(level, Mapping):
        return {key: _typed(value, f"{name}.{key}" if name else str(key), known) for key, value in level.items()}
    return level


def undefined(dtype: np.dtype) -> Any:
    """Returns what stands in a row for a value that it does not have: NaN (of one bit pattern a dtype), or zero where there is no NaN."""
    if dtype == BFLOAT16:
        return np.array((_BFLOAT16_NAN_BITS,), BFLOAT16)
    return np.nan if dtype.kind == "f" else 0
