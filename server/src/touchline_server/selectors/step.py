"""The law ``step``."""

from __future__ import annotations

import numpy as np

from touchline_server.selectors.draw import Draw
from touchline_server.selectors.options import NO_OPTIONS, LawOptions
from touchline_server.selectors.selector import Selector


class StepSelector(Selector):
    """Every valid start equally likely. O(B log episodes)."""

    law = "step"

    def draw(self, batch_size: int, horizon: int, rng: np.random.Generator, *, batches: int = 1, options: LawOptions = NO_OPTIONS) -> Draw:
        """See :meth:`Selector.draw`."""
        eligible = self._eligible.at(horizon)
        before, starts = eligible.starts_before, eligible.starts
        # One number picks among all starts of all episodes; the running sums say in which episode it lies.
        nth = (rng.random(batches * batch_size) * starts).astype(np.int64) + before[0]
        position = np.searchsorted(before, nth, side="right") - 1
        entries = eligible.entries.take(position, axis=0)
        start = nth - before[position]
        return Draw.of(entries, start, np.full(len(nth), 1.0 / starts))
