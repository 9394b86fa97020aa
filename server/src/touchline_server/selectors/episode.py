"""The law ``episode``."""

from __future__ import annotations

import numpy as np

from touchline_server.selectors.draw import Draw
from touchline_server.selectors.entries import LENGTH
from touchline_server.selectors.options import NO_OPTIONS, LawOptions
from touchline_server.selectors.selector import Selector


class EpisodeSelector(Selector):
    """An eligible episode uniformly, then a start within it uniformly. O(B), whatever the number of episodes.

    The law of TorchRL's ``SliceSampler``, and so of TD-MPC2's buffer (Hansen et al. 2024).
    """

    law = "episode"

    def numbers(self, options: LawOptions) -> int:
        """See :meth:`Selector.numbers`."""
        return 2

    def draw(self, batch_size: int, horizon: int, rng: np.random.Generator, *, batches: int = 1, options: LawOptions = NO_OPTIONS) -> Draw:
        """See :meth:`Selector.draw`."""
        eligible = self._eligible.at(horizon)
        # [batches, 2, B]: so a batch takes the same numbers from the generator whether it is drawn by itself or with others.
        uniform = rng.random((batches, 2, batch_size))
        chosen = (uniform[:, 0] * len(eligible)).astype(np.int64)
        entries = eligible.entries.take(chosen.reshape(-1), axis=0)
        starts = entries[:, LENGTH] - horizon
        start = (uniform[:, 1].reshape(-1) * starts).astype(np.int64)
        return Draw.of(entries, start, 1.0 / (len(eligible) * starts.astype(np.float64)))
