"""Between transitions, which data sets and environments speak of, and rows, which are stored."""

from __future__ import annotations

import numpy as np

from touchline._actor.rows import undefined


def rows_of(values: np.ndarray, *, incoming: bool) -> np.ndarray:
    """Returns a column of T + 1 rows for what T transitions have; the one row without a transition is undefined.

    Args:
        values: [T, ...].
        incoming: the row without is the first, else the last.

    Returns:
        [T + 1, ...], of the same dtype: NaN in the undefined row, or zero where there is no NaN. A copy.
    """
    column = np.empty((len(values) + 1, *values.shape[1:]), values.dtype)
    column[0 if incoming else -1] = undefined(values.dtype)
    defined(column, incoming=incoming)[...] = values
    return column


def defined(column: np.ndarray, *, incoming: bool) -> np.ndarray:
    """Returns the part of a column [T + 1, ...] that belongs to the T transitions, as a view."""
    return column[1:] if incoming else column[:-1]


def undefined_row(column: np.ndarray, *, incoming: bool) -> np.ndarray | None:
    """Returns the row of a column without a transition, None where it holds just what :func:`rows_of` puts there."""
    row = column[:1] if incoming else column[-1:]
    usual = np.empty_like(row)
    usual[...] = undefined(row.dtype)
    return None if row.tobytes() == usual.tobytes() else row
