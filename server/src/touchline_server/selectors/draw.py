"""The result of a draw: which slices, and how probable each was."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Draw:
    """Slices, drawn but not gathered. All arrays are [slices], int64 except for ``probability`` (float64)."""

    first_row: np.ndarray
    """Row of each slice's first step, counted from the begin of the ring and not yet wrapped: below 2 x capacity."""
    episode_id: np.ndarray
    start: np.ndarray
    """Step of the episode that is the slice's row 0."""
    actor: np.ndarray
    policy_version: np.ndarray
    probability: np.ndarray
    """Probability with which the law draws this slice."""

    def between(self, begin: int, end: int) -> Draw:
        """Returns slices ``begin`` to ``end`` - 1: views."""
        return Draw(
            self.first_row[begin:end],
            self.episode_id[begin:end],
            self.start[begin:end],
            self.actor[begin:end],
            self.policy_version[begin:end],
            self.probability[begin:end],
        )
