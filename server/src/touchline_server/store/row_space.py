"""One address space for the columns of all tables of one schema, so that one call gathers the rows of a mixed batch.

A body is time-major, so the slices of two tables stand side by side in each of its steps. Gathered table by table, each column takes a call
for each table and step, and a call costs as much as copying some kilobytes. So the private host columns of one schema lie in one space of
far more rows than there is memory: a table is a range of its rows, in each column the same. A batch of several tables is then gathered like
one of a single table, from the whole space.

The space is reserved, not allocated: a page uses memory once it is written. A row that no table has would read as zeros, never fail.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np

from touchline_server.store.schema import ColumnSpec, Schema

GRAIN_ROWS = 1 << 12
"""Ranges begin at multiples of this number of rows: at whole pages, whatever a row's size."""

SPACE_PER_MEMORY = 2
"""Size of a space as a multiple of the machine's memory: with gaps between tables that come and go, all that fits there fits here."""

HUGE_PAGE_BYTES = 1 << 21

_RESERVED = 0x4000
"""``MAP_NORESERVE`` of Linux, which Python's module has from 3.13 on."""

_Key: TypeAlias = tuple[ColumnSpec, ...]

_SPACES: weakref.WeakValueDictionary[_Key, RowSpace] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


class RowRange:
    """A range of the rows of a space: a table's columns. Released once neither this object nor an array of it is left."""

    def __init__(self, space: RowSpace, begin: int, rows: int) -> None:
        """Use :func:`claim_rows`."""
        self.space = space
        self.begin = begin
        """First row."""
        self.rows = rows

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the columns, [rows, *shape] each, by dotted name: fresh memory, zero-filled. Each array keeps the range."""
        return {name: np.asarray(_Window(self, column)) for name, column in self.space.columns.items()}


class RowSpace:
    """The columns of all tables of one schema.

    Args:
        specs: the columns.
        rows: number of rows, a multiple of :data:`GRAIN_ROWS`.

    Raises:
        OSError: the system does not provide the address space.
    """

    def __init__(self, specs: Sequence[ColumnSpec], rows: int) -> None:
        self.rows = rows
        begins, end = [], 0
        for spec in specs:
            begins.append(end)
            end += -(-rows * spec.row_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        self._memory = mmap.mmap(-1, end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _RESERVED)
        self._places = [(begin, spec.row_bytes) for begin, spec in zip(begins, specs, strict=True) if spec.row_bytes]
        self.columns = {
            spec.name: np.frombuffer(self._memory, spec.dtype, rows * math.prod(spec.shape), begin).reshape(rows, *spec.shape)
            if spec.row_bytes
            else np.empty((rows, *spec.shape), spec.dtype)
            for spec, begin in zip(specs, begins, strict=True)
        }
        """Each column of the whole space, [rows, *shape]. Does not keep a table's range."""
        self._free = [(0, rows)]
        self._returned: deque[tuple[int, int]] = deque()

    def claim(self, rows: int) -> RowRange | None:
        """Returns the first free range of this many rows; None if there is none. The caller holds the lock of all spaces."""
        self._take_back()
        length = -(-rows // GRAIN_ROWS) * GRAIN_ROWS
        for position, (begin, end) in enumerate(self._free):
            if end - begin >= length:
                self._free[position : position + 1] = [(begin + length, end)] if begin + length < end else []
                break
        else:
            return None
        for start, row_bytes in self._places:
            with suppress(OSError, AttributeError):  # a kernel, or a system, without huge pages
                self._memory.madvise(mmap.MADV_HUGEPAGE, start + begin * row_bytes, length * row_bytes)
        claimed = RowRange(self, begin, rows)
        weakref.finalize(claimed, self._release, begin, begin + length).atexit = False
        return claimed

    def _release(self, begin: int, end: int) -> None:
        """Frees the memory of a range. Called wherever the last reference to it happens to go, so without a lock."""
        for start, row_bytes in self._places:
            self._memory.madvise(mmap.MADV_DONTNEED, start + begin * row_bytes, (end - begin) * row_bytes)
        self._returned.append((begin, end))

    def _take_back(self) -> None:
        """Merges the ranges that were released with the free ones beside them."""
        while self._returned:
            self._free.append(self._returned.popleft())
        merged: list[tuple[int, int]] = []
        for begin, end in sorted(self._free):
            if merged and merged[-1][1] == begin:
                begin, _ = merged.pop()
            merged.append((begin, end))
        self._free = merged


def claim_rows(schema: Schema, rows: int) -> RowRange | None:
    """Returns a range of rows in the space of a schema's columns, whatever their order.

    Returns:
        None if there is none: the rows are more than a space has, or the system reserves no address space without memory (its limit, see
        ``ulimit -v``, or ``vm.overcommit_memory`` = 2).
    """
    if not schema.row_bytes or sys.platform != "linux":
        return None
    specs = tuple(sorted(schema.columns, key=lambda spec: spec.name))
    with _LOCK:
        space = _SPACES.get(specs)
        if space is None:
            memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            size = SPACE_PER_MEMORY * memory_bytes // schema.row_bytes // GRAIN_ROWS * GRAIN_ROWS
            if size < rows:
                return None
            try:
                space = _SPACES[specs] = RowSpace(specs, size)
            except (OSError, OverflowError, ValueError):
                return None
        return space.claim(rows)


class _Window:
    """Makes an array of a range of a column that keeps the range; see numpy's array interface protocol."""

    def __init__(self, rows: RowRange, column: np.ndarray) -> None:
        window = column[rows.begin : rows.begin + rows.rows]
        self.__array_interface__: dict[str, Any] = window.__array_interface__
        self._rows = rows
