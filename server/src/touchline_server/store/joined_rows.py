"""The rows of mixed batches, in the space that the tables share: see :mod:`.row_space`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from touchline_server.store.columns import Take
from touchline_server.store.pinned_draw import DrawnPart

_UNSIGNED = np.dtype(np.uint64)
"""Row numbers read as unsigned: one comparison finds those below 0 as well."""


class JoinedTables:
    """The tables of a mix whose columns lie in one space, for batches of one split. Keeps none of their memory.

    Args:
        parts: what each table provides of a batch, in the order of the slices: together all of it. Of these, :meth:`key` is not None.
    """

    def __init__(self, parts: Sequence[DrawnPart]) -> None:
        self.key = self.key_of(parts)
        """Identity of the tables and of the split: see :meth:`key_of`."""
        slices = [part.end - part.begin for part in parts]
        self._capacities = np.repeat([part.columns.capacity for part in parts], slices)
        ranges = [part.columns.range for part in parts]
        self._columns = next(rows.space.columns for rows in ranges if rows is not None)
        begins = np.repeat([rows.begin for rows in ranges if rows is not None], slices)
        # [H+1, B]: what is added to the first row of each slice for each of its steps.
        self._offsets = np.arange(parts[0].steps, dtype=np.int64)[:, None] + begins

    @staticmethod
    def key_of(parts: Sequence[DrawnPart]) -> tuple[object, ...] | None:
        """Returns the identity of these tables and this split; None if their columns do not lie in one space."""
        first = parts[0].columns.range
        key: list[object] = [parts[0].steps]
        for part in parts:
            rows = part.columns.range
            if rows is None or first is None or rows.space is not first.space:
                return None
            key += (id(rows.space), rows.begin, part.columns.capacity, part.end)
        return tuple(key)

    def take(self, name: str) -> Take:
        """Returns the ``take`` of a column of the whole space."""
        return self._columns[name].take

    def rows(self, parts: Sequence[DrawnPart]) -> np.ndarray:
        """Returns the rows of drawn batches in the space, [batches, H+1, B] int64. The parts keep the memory: use it while they live.

        Raises:
            IndexError: a slice lies outside its table.
        """
        capacities, steps = self._capacities, len(self._offsets)
        first = np.concatenate([part.first for part in parts], axis=1)
        np.subtract(first, capacities, out=first, where=first >= capacities)
        outside = first.view(_UNSIGNED) >= capacities.view(_UNSIGNED)
        if outside.any():
            raise IndexError(f"row {first[outside][0]} of a table of {np.broadcast_to(capacities, first.shape)[outside][0]} rows")
        rows = first[:, None, :] + self._offsets
        # The rows of nearly all slices follow each other. Those of the others are corrected: they wrap, or repeat the last one.
        bent = first > capacities - steps
        last = _last_steps(parts, first.shape)
        if last is not None:
            bent |= last < steps - 1
        if bent.any():
            batch, number = np.nonzero(bent)
            excess = _excess(first[bent], capacities[number], steps, None if last is None else last[bent])
            rows[batch, :, number] -= excess
        return rows


def _last_steps(parts: Sequence[DrawnPart], shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns the step that all later ones of a slice repeat, [batches, B]; None if no part is padded."""
    if all(part.last is None for part in parts):
        return None
    last = np.full(shape, parts[0].steps - 1)
    for part in parts:
        if part.last is not None:
            last[:, part.begin : part.end] = part.last
    return last


def _excess(first: np.ndarray, capacity: np.ndarray, steps: int, last: np.ndarray | None) -> np.ndarray:
    """Returns by how much each row of some slices is less than if all rows of a slice followed each other, [slices, H+1]."""
    first, capacity, step = first[:, None], capacity[:, None], np.arange(steps, dtype=np.int64)
    rows = first + (step if last is None else np.minimum(step, last[:, None]))
    np.subtract(rows, capacity, out=rows, where=rows >= capacity)
    if (rows.view(_UNSIGNED) >= capacity.view(_UNSIGNED)).any():
        raise IndexError(f"rows {rows.min()} to {rows.max()} of tables of {capacity.min()} rows and more")
    return np.asarray(first + step - rows)
