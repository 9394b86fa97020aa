"""One tensor of a batch: which steps of a slice it takes, and its shapes."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from touchline_protos.codec import TensorSpec


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
