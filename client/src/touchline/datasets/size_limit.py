"""The maximum size of an episode, compared with the shapes and dtypes that a file announces before any of it is read.

A compressed or sparse file may announce far more than its own size, so a small file can hold an episode that does not fit into memory. What
is compared is the payload as it would be stored. Reading an episode takes a small multiple of that (float64 that becomes float32, a
contiguous copy). A file that lies about its shapes is not detected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from touchline._rpc.convert import whole_number
from touchline.datasets.errors import DatasetError
from touchline.datasets.transforms import ColumnTransforms
from touchline_protos.types.limits import DEFAULT_MAX_EPISODE_BYTES

MAX_COLUMNS = 1 << 12
"""Maximum number of columns and groups of an episode. Servers accept far fewer; this bounds the walk through the file."""
MAX_METADATA_BYTES = 1 << 16
"""Maximum size of a text that describes a file or an episode."""
ADVICE = "if this is intended, split the episode, or raise --max-episode-bytes (max_episode_bytes=) and the server's max_episode_bytes"


@dataclass(frozen=True, slots=True)
class SizeLimit:
    """The maximum size of one episode of a source."""

    max_episode_bytes: int = DEFAULT_MAX_EPISODE_BYTES
    """Maximum payload of all columns as they would be stored, in bytes."""
    transforms: ColumnTransforms = field(default_factory=ColumnTransforms)
    """Transforms of the columns; dropped ones do not count."""

    def __post_init__(self) -> None:
        whole_number("max_episode_bytes", self.max_episode_bytes, least=1, most=(1 << 63) - 1)

    def counter(self) -> SizeCounter:
        """Returns a counter for one episode."""
        return SizeCounter(self)


class SizeCounter:
    """Adds up what one episode announces, column by column. Not thread-safe.

    Args:
        limit: maximum of the sum.
    """

    def __init__(self, limit: SizeLimit) -> None:
        self._limit = limit
        self._columns = 0
        self._size_bytes = 0

    def add(self, name: str, shape: Sequence[int], dtype: np.dtype[Any]) -> bool:
        """Adds a column, and returns whether it is to be read.

        Args:
            name: name of the column.
            shape: announced shape, [rows, ...].
            dtype: announced dtype.

        Raises:
            DatasetError: the episode is too large with this column, or the column holds objects, whose size is unknown.
        """
        self.add_name(name)
        transforms, max_bytes = self._limit.transforms, self._limit.max_episode_bytes
        if transforms.drops(name):
            return False
        if dtype.hasobject:
            raise DatasetError(f"{name}: an array of objects ({dtype}), expected numbers")
        if any(length < 0 for length in shape):
            raise DatasetError(f"{name}: shape {tuple(shape)}, expected no negative lengths")
        if transforms.task is not None and not self._size_bytes and shape:
            # The column `task` that a load adds has as many rows as the first column.
            self._size_bytes += shape[0] * np.dtype(np.int64).itemsize
        self._size_bytes += math.prod(shape) * transforms.stored_dtype(dtype).itemsize
        if self._size_bytes > max_bytes:
            raise DatasetError(
                f"{name}: {dtype} {tuple(shape)}: with this column the episode would take {self._size_bytes:,} bytes, expected at most "
                f"{max_bytes:,}; {ADVICE}"
            )
        return True

    def add_name(self, name: str) -> None:
        """Adds a column or a group of columns, whatever its size.

        Raises:
            DatasetError: the episode has too many.
        """
        self._columns += 1
        if self._columns > MAX_COLUMNS:
            raise DatasetError(f"{name}: more than {MAX_COLUMNS:,} columns and groups in one episode, expected fewer")
