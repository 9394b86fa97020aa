"""How large an episode may be: asked of what a file announces, before memory is taken for any of it.

A compressed or sparse file may announce far more than it holds itself, so its own size says nothing. What is compared is what would be
stored; reading it takes that much memory a few times over (float64 that becomes float32, a copy that is contiguous).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from touchline._rpc.convert import whole_number
from touchline.datasets.errors import DatasetError
from touchline.datasets.transforms import Changes
from touchline_protos.types.episode import CodecLimits

DEFAULT_MAX_EPISODE_BYTES = CodecLimits().max_episode_bytes
"""Where no server says what its own limit is: that of a server which is not told otherwise, 1 GiB."""
MAX_COLUMNS = 1 << 12
"""Columns of an episode that are looked at; no server takes nearly as many."""
MAX_ABOUT_BYTES = 1 << 16
"""Of a text that says where an episode comes from."""
ADVICE = "if it is meant, cut it up, or raise --max-episode-bytes (max_episode_bytes=) and limits.max_episode_bytes"


@dataclass(frozen=True, slots=True)
class SizeLimit:
    """What one episode of a source may take."""

    max_episode_bytes: int = DEFAULT_MAX_EPISODE_BYTES
    """As it would be stored, summed over its columns."""
    changes: Changes = field(default_factory=Changes)
    """To its columns: those that are left out count nothing."""

    def __post_init__(self) -> None:
        whole_number("max_episode_bytes", self.max_episode_bytes, least=1, most=(1 << 63) - 1)

    def tally(self) -> SizeCounter:
        """Returns what one episode's columns are counted with."""
        return SizeCounter(self)


class SizeCounter:
    """Counts what one episode announces, column by column."""

    def __init__(self, limit: SizeLimit) -> None:
        self._limit = limit
        self._columns = 0
        self._size_bytes = 0

    @property
    def max_bytes(self) -> int:
        """That the episode may have."""
        return self._limit.max_episode_bytes

    def take(self, name: str, shape: Sequence[int], dtype: np.dtype[Any]) -> bool:
        """Counts a column, and returns whether it is wanted.

        Args:
            name: of the column.
            shape: [rows, ...] that it announces.
            dtype: that it announces.

        Raises:
            DatasetError: with it the episode is too large; or its values are objects, whose size cannot be known.
        """
        self.visit(name)
        changes = self._limit.changes
        if changes.drops(name):
            return False
        if dtype.hasobject:
            raise DatasetError(f"{name}: Object arrays cannot be loaded: values of any length (found {dtype}), expected numbers")
        if any(length < 0 for length in shape):
            raise DatasetError(f"{name}: shape {tuple(shape)}, expected no negative lengths")
        if changes.task is not None and not self._size_bytes and shape:
            self._size_bytes += shape[0] * np.dtype(np.int64).itemsize
        self._size_bytes += math.prod(shape) * changes.dtype_of(dtype).itemsize
        if self._size_bytes > self.max_bytes:
            raise DatasetError(
                f"{name}: {dtype} {tuple(shape)}: with this column the episode would take {self._size_bytes:,} bytes, expected at most "
                f"{self.max_bytes:,}; {ADVICE}"
            )
        return True

    def visit(self, name: str) -> None:
        """Counts a column, or a group of columns, whatever its size.

        Raises:
            DatasetError: there are too many.
        """
        self._columns += 1
        if self._columns > MAX_COLUMNS:
            raise DatasetError(f"{name}: more than {MAX_COLUMNS:,} columns and groups in one episode, expected fewer")
