"""What is done to the columns of a source before they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from touchline.errors import InvalidEpisodeError
from touchline_protos.types.casting import ColumnError, narrow
from touchline_protos.types.flatten import flatten_columns


@dataclass(frozen=True, slots=True)
class Changes:
    """What is done to the columns of a source's episodes before they are stored."""

    task: int | None = None
    """Stored as the column ``task``, int64, in the place of one that is there."""
    drop: tuple[str, ...] = ()
    """Columns that are left out; ``info`` leaves out ``info.<any>`` too."""
    float32: bool = False
    """Store float64 columns as float32, as TD-MPC2 and the recorders have them."""

    def __bool__(self) -> bool:
        return self.task is not None or bool(self.drop) or self.float32

    def of(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Returns an episode's flat columns as they are to be stored.

        Raises:
            InvalidEpisodeError: it has no columns that could be stored, or a value that float32 lacks.
        """
        dtype = np.dtype(np.float32) if self.float32 else None
        try:
            flat = flatten_columns(columns)
            changed = {name: narrow(name, column, dtype) for name, column in flat.items() if not self.drops(name)}
        except ColumnError as error:
            raise InvalidEpisodeError(str(error)) from None
        if self.task is not None and changed:
            # Where there are no rows, it is refused for that.
            rows = next((len(column) for column in changed.values() if column.ndim), 1)
            changed["task"] = np.full(rows, self.task, np.int64)
        return changed

    def drops(self, name: str) -> bool:
        """Returns whether a column is left out."""
        return any(name == gone or name.startswith(f"{gone}.") for gone in self.drop)

    def dtype_of(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Returns the dtype that a column of this one is stored with."""
        return np.dtype(np.float32) if self.float32 and dtype == np.float64 else dtype
