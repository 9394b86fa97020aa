"""What a load does to the columns of a source's episodes before it stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from touchline.errors import InvalidEpisodeError
from touchline_protos.types.casting import ColumnError, narrow
from touchline_protos.types.flatten import flatten_columns


@dataclass(frozen=True, slots=True)
class ColumnTransforms:
    """What a load does to the columns of a source's episodes before it stores them. The default does nothing."""

    task: int | None = None
    """Value of an added column ``task`` (int64), which replaces an existing one; None adds none."""
    drop: tuple[str, ...] = ()
    """Names of columns to leave out; ``info`` also leaves out every ``info.<name>``."""
    float32: bool = False
    """Whether float64 columns are stored as float32, the dtype that TD-MPC2 and the recorders use."""

    def __bool__(self) -> bool:
        return self.task is not None or bool(self.drop) or self.float32

    @property
    def identity(self) -> str:
        """Text that stands for the transforms in the keys of episodes. It must never change, or repeated loads store episodes twice."""
        return f"Changes(task={self.task!r}, drop={self.drop!r}, float32={self.float32!r})"

    def apply(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Returns an episode's columns, flattened and transformed, as they will be stored.

        Args:
            columns: [rows, ...] by name, possibly nested. Not changed; the result may share their memory.

        Raises:
            InvalidEpisodeError: a column cannot be stored, or has a value that float32 cannot represent.
        """
        dtype = np.dtype(np.float32) if self.float32 else None
        try:
            flat = flatten_columns(columns)
            stored = {name: narrow(name, column, dtype) for name, column in flat.items() if not self.drops(name)}
        except ColumnError as error:
            raise InvalidEpisodeError(str(error)) from None
        if self.task is not None and stored:
            # An episode of scalars has no rows to count; the validator refuses it later, whatever length the task has.
            rows = next((len(column) for column in stored.values() if column.ndim), 1)
            stored["task"] = np.full(rows, self.task, np.int64)
        return stored

    def drops(self, name: str) -> bool:
        """Returns whether a column is left out."""
        return any(name == dropped or name.startswith(f"{dropped}.") for dropped in self.drop)

    def stored_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Returns the dtype with which a column of dtype ``dtype`` is stored."""
        return np.dtype(np.float32) if self.float32 and dtype == np.float64 else dtype
