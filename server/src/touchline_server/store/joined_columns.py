"""Columns of several tables that are gathered together, as if each column were one array."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any
from weakref import ref

import numpy as np

from touchline_server.store.columns import Columns


class JoinedColumns:
    """Columns of several tables in host memory, for batches with a fixed number of slices from each.

    ``numpy.take`` reads from one array, and a call costs about as much as copying some kilobytes. So that a mixed batch takes one call a
    column, as others do, each column is seen as one array that begins at the first table's memory and ends behind the last one's. A table's
    row there is its own number plus the distance of the table's memory, in rows. The memory between the tables is never
    read, because only rows of drawn slices are, which lie within their table.

    Does not keep the tables' memory alive: the draws that it is used for do, as long as they are pinned.

    Args:
        parts: the columns of each table, of equal schemas except for their order, and the number of its slices in a batch.
    """

    on_cuda = False

    def __init__(self, parts: Sequence[tuple[Columns, int]]) -> None:
        self._sources = [ref(columns) for columns, _ in parts]
        self._arrays: dict[str, np.ndarray] = {}
        self._distances: dict[str, np.ndarray] = {}
        """[B] int64 by column: what is added to each slice's rows."""
        counts = [count for _, count in parts]
        for name in parts[0][0].arrays:
            arrays = [columns.arrays[name] for columns, _ in parts]
            row_bytes = arrays[0][:1].nbytes
            addresses = [array.ctypes.data for array in arrays]
            first = min(addresses)
            distances = [(address - first) // max(row_bytes, 1) for address in addresses]
            rows = max(distance + len(array) for distance, array in zip(distances, arrays, strict=True))
            memory: Any = (ctypes.c_char * (rows * row_bytes)).from_address(first)
            self._arrays[name] = np.ndarray((rows, *arrays[0].shape[1:]), arrays[0].dtype, memory)
            self._distances[name] = np.repeat(np.array(distances, np.int64), counts)

    @staticmethod
    def can_join(columns: Sequence[Columns]) -> bool:
        """Returns whether the tables are in host memory, at distances of whole rows; memory of columns begins on whole pages."""
        if not all(one.in_host_memory and not one.on_cuda for one in columns):
            return False
        for name, array in columns[0].arrays.items():
            row_bytes = array[:1].nbytes
            if not row_bytes or any((one.arrays[name].ctypes.data - array.ctypes.data) % row_bytes for one in columns):
                return False
        return True

    def is_of(self, columns: Sequence[Columns]) -> bool:
        """Returns whether these are the joined columns."""
        return len(columns) == len(self._sources) and all(source() is one for source, one in zip(self._sources, columns, strict=True))

    def gather(self, name: str, rows: np.ndarray, out: np.ndarray) -> None:
        """Copies rows of one column into host memory.

        Args:
            name: the column.
            rows: [T, B] int64: each slice's rows in its own table, table by table.
            out: [T, B, *column shape], contiguous, of the column's dtype: filled.
        """
        self._arrays[name].take(rows + self._distances[name], 0, out, "clip")
