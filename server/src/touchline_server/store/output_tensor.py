"""One tensor of a batch: which rows of a slice it takes, and its shapes."""

from __future__ import annotations

from typing import NamedTuple


class OutputTensor(NamedTuple):
    """One tensor of a batch and the rows of the slice that it takes."""

    name: str
    rows: slice
    inner_shape: tuple[int, ...]
    """Of one row as stored."""
    gathered_shape: tuple[int, ...]
    """Of those rows of all slices."""
    out_shape: tuple[int, ...]
    """In the batch."""
    stored: bool
    """False: no such column, the batch has zeros."""
