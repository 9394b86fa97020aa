"""The laws by which slices are drawn, the result of a draw, and where its randomness comes from."""

from __future__ import annotations

import enum
import itertools
from dataclasses import dataclass

import numpy as np

from touchline_server.errors import InvalidRequestError


class Law(enum.StrEnum):
    """How slices are drawn."""

    EPISODE = "episode"
    """An eligible episode uniformly, then a start uniformly within it: the law of TorchRL's SliceSampler and so of TD-MPC2's buffer."""
    STEP = "step"
    """Every valid start equally likely."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Slices, drawn but not gathered. All arrays are [slices], int64 but for ``probability`` (float64)."""

    first_row: np.ndarray
    """Row of each slice's first step, counted from the ring's begin and not yet wrapped."""
    episode_id: np.ndarray
    start: np.ndarray
    """Step of the episode that is the slice's row 0."""
    actor: np.ndarray
    policy_version: np.ndarray
    probability: np.ndarray
    """Probability with which the law draws this slice."""

    def rows(self, horizon: int, capacity: int) -> np.ndarray:
        """Returns the physical rows of the slices, [H+1, slices] int64, wrapped at the end of the ring."""
        return self.rows_of_batches(1, horizon, capacity)[0]

    def rows_of_batches(self, batches: int, horizon: int, capacity: int) -> np.ndarray:
        """Returns the same for each of ``batches`` equal parts of the slices: [batches, H+1, B] int64."""
        rows = self.first_row.reshape(batches, 1, -1) + np.arange(horizon + 1, dtype=np.int64)[:, None]
        # No episode is longer than the ring, so at most one turn is too many; a division would take three times as long.
        return np.subtract(rows, capacity, out=rows, where=rows >= capacity)

    def part(self, first: int, last: int) -> Draw:
        """Returns slices ``first`` to ``last`` - 1: views."""
        return Draw(
            self.first_row[first:last],
            self.episode_id[first:last],
            self.start[first:last],
            self.actor[first:last],
            self.policy_version[first:last],
            self.probability[first:last],
        )


class SeedSource:
    """Gives each stream of batches a random generator of its own.

    No seed: fresh entropy for each. A seed: combined with the stream's number, so that several learners never get the same batches
    by accident, yet the same order of streams gives the same batches again.
    """

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self._streams = itertools.count()

    def stream(self, seed: int | None = None) -> np.random.Generator:
        """Returns a generator; a given ``seed`` alone decides it.

        Raises:
            InvalidRequestError: the seed is negative.
        """
        if seed is not None:
            if seed < 0:
                raise InvalidRequestError(f"seed: {seed}, expected 0 or more")
            return np.random.default_rng(seed)
        number = next(self._streams)
        return np.random.default_rng(None if self._seed is None else [self._seed, number])
