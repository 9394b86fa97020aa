"""One tensor of a batch: which steps of a slice it takes, and its shapes."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from touchline_protos.codec import TensorSpec
from touchline_server.store.schema import ColumnSpec

TRANSITION_COLUMNS = ("action", "reward", "done")
"""Columns of a transition: [H, B, ...] in a batch, where those of a step are [H+1, B, ...]."""


class OutputTensor(NamedTuple):
    """One tensor of a batch, whatever the number of slices."""

    name: str
    steps: slice
    """Steps of each slice that it holds."""
    step_count: int
    """T: their number."""
    inner_shape: tuple[int, ...]
    """Shape of one step, as stored."""
    dtype: np.dtype
    stored: bool
    """Whether there is such a column; without one the batch has zeros."""
    trailing_shape: tuple[int, ...] | None
    """Shape of one step in the batch; None for a tensor of one step, which has no axis of steps in the batch."""

    @classmethod
    def of(cls, name: str, column: ColumnSpec | None, transitions: slice, horizon: int, *, missing: tuple[int, ...]) -> OutputTensor:
        """Returns how one tensor of a batch is made from its column.

        Without a column (only ``done``) it is float32 zeros, of the shape ``missing`` per step: the reward's.
        """
        inner = column.shape if column is not None else missing
        steps = slice(None)
        trailing: tuple[int, ...] | None = inner
        if name == "task":
            steps, trailing = slice(0, 1), None
        elif name in TRANSITION_COLUMNS:
            # A reward or done may be stored as [] or [1], in a batch it is [1]; in lockstep it is [agents] in both.
            steps, trailing = transitions, inner if name == "action" else inner or (1,)
        dtype = column.dtype if column is not None else np.dtype("<f4")
        return cls(name, steps, len(range(horizon + 1)[steps]), inner, dtype, column is not None, trailing)

    @property
    def row_bytes(self) -> int:
        """Bytes of one step of one slice."""
        return math.prod(self.inner_shape) * self.dtype.itemsize

    def gathered_shape(self, batch_size: int) -> tuple[int, ...]:
        """Returns [T, B, *inner_shape]: the shape in which rows are gathered. The batch's own shape has the same elements in order."""
        return (self.step_count, batch_size, *self.inner_shape)

    def spec(self, batch_size: int) -> TensorSpec:
        """Returns name, dtype and shape in a batch: [T, B, *trailing_shape], or [B]."""
        if self.trailing_shape is None:
            return TensorSpec(self.name, self.dtype, (batch_size,))
        return TensorSpec(self.name, self.dtype, (self.step_count, batch_size, *self.trailing_shape))


def group_order(name: str) -> int:
    """Returns where a tensor stands among those of a batch: by the group of its name."""
    group = name.partition(".")[0]
    named = ("obs", "action", "reward", "done", "task")
    return named.index(group) if group in named else len(named)
