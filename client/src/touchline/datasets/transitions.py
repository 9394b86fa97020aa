"""Convert between transitions, which data sets and environments hold, and rows, which are stored.

An episode of T transitions has T + 1 rows. Under the row convention ``incoming`` row t + 1 holds transition t and row 0 holds none; under
``outgoing`` row t holds transition t and row T holds none::

    transition        0    1    2          T = 3
    row (incoming)  -  0    1    2
    row (outgoing)     0    1    2  -
"""

from __future__ import annotations

import numpy as np

from touchline._actor.rows import undefined


def rows_of(values: np.ndarray, *, incoming: bool) -> np.ndarray:
    """Returns the rows of a column, given its transitions.

    Args:
        values: [T, ...], one value per transition.
        incoming: whether the first row is the one without a transition; otherwise it is the last.

    Returns:
        [T + 1, ...], same dtype, a copy. The row without a transition is NaN, or zero if the dtype has no NaN.
    """
    column = np.empty((len(values) + 1, *values.shape[1:]), values.dtype)
    column[0 if incoming else -1] = undefined(values.dtype)
    transitions_of(column, incoming=incoming)[...] = values
    return column


def transitions_of(column: np.ndarray, *, incoming: bool) -> np.ndarray:
    """Returns the T rows of a column [T + 1, ...] that hold a transition, as a view."""
    return column[1:] if incoming else column[:-1]


def unusual_undefined_row(column: np.ndarray, *, incoming: bool) -> np.ndarray | None:
    """Returns the row [1, ...] of a column that holds no transition, or None if :func:`rows_of` would produce the same bits."""
    row = column[:1] if incoming else column[-1:]
    usual = np.empty_like(row)
    usual[...] = undefined(row.dtype)
    return None if row.tobytes() == usual.tobytes() else row
