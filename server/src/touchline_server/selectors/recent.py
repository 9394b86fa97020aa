"""The law ``recent``."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict

import numpy as np

from touchline_server.selectors.decay import DecayingStarts
from touchline_server.selectors.draw import Draw
from touchline_server.selectors.eligible import EligibilityIndex, EligibleEpisodes
from touchline_server.selectors.entries import FIRST_ROW, LENGTH, Entry
from touchline_server.selectors.options import NO_OPTIONS, LawOptions, LawSettings, recent_window
from touchline_server.selectors.selector import Selector

MAX_DECAYS = 16
"""Pairs of horizon and half-life that are kept up to date at a time; the one used longest ago gives way to a new one."""


class RecentSelector(Selector):
    """Starts in the newest rows only, all alike; or every start, half as likely for each half-life of rows behind the newest one.

    A start's age is the number of rows that were added after it, whatever they belong to. If no start is in the newest ``recent_steps``
    rows, because all newer episodes are too short, those of the newest episode that can be sampled are drawn. O(B log episodes).
    """

    law = "recent"
    stateful = True

    def __init__(self, eligible: EligibilityIndex, settings: LawSettings) -> None:
        super().__init__(eligible, settings)
        self._decays: OrderedDict[tuple[int, float], DecayingStarts] = OrderedDict()

    def append(self, entry: Entry) -> None:
        """See :meth:`Selector.append`."""
        for decay in self._decays.values():
            decay.append(entry)

    def evict(self, entry: Entry) -> None:
        """See :meth:`Selector.evict`."""
        for decay in self._decays.values():
            decay.evict(entry)

    def clear(self) -> None:
        """See :meth:`Selector.clear`."""
        self._decays.clear()

    def numbers(self, options: LawOptions) -> int:
        """See :meth:`Selector.numbers`."""
        return 1 if recent_window(options, self._settings)[1] is None else 2

    def draw(self, batch_size: int, horizon: int, rng: np.random.Generator, *, batches: int = 1, options: LawOptions = NO_OPTIONS) -> Draw:
        """See :meth:`Selector.draw`."""
        steps, half_life = recent_window(options, self._settings)
        if half_life is not None:
            # [batches, 2, B]: so a batch takes the same numbers from the generator whether it is drawn by itself or with others.
            uniform = rng.random((batches, 2, batch_size)).transpose(1, 0, 2).reshape(2, -1)
            return Draw.of(*self._decay(horizon, half_life).draw(uniform))
        assert steps is not None
        return self._draw_window(self._eligible.at(horizon), steps, rng.random(batches * batch_size))

    def _draw_window(self, eligible: EligibleEpisodes, steps: int, uniform: np.ndarray) -> Draw:
        before = eligible.starts_before
        first = self._first_start(eligible, steps)
        # As the law "step", except that starts before ``first`` do not count.
        starts = int(before[0]) + eligible.starts - first
        nth = (uniform * starts).astype(np.int64) + first
        position = np.searchsorted(before, nth, side="right") - 1
        return Draw.of(eligible.entries.take(position, axis=0), nth - before[position], np.full(len(nth), 1.0 / starts))

    def _first_start(self, eligible: EligibleEpisodes, steps: int) -> int:
        """Returns the number, as in ``starts_before``, of the oldest start in the newest ``steps`` rows."""
        newest = self._eligible.stored.live[-1]
        # Logical row after the newest one: rows of an episode are numbered from its first physical row, and so not wrapped.
        end, capacity = int(newest[FIRST_ROW] + newest[LENGTH]), self._settings.capacity
        entries = eligible.entries

        def rows_since(position: int) -> int:
            """Rows from the episode's first to the newest one, both included: 1 to the capacity."""
            return (end - int(entries[position, FIRST_ROW]) - 1) % capacity + 1

        def rows_since_last_start(position: int) -> int:
            return rows_since(position) - int(entries[position, LENGTH]) + eligible.horizon + 1

        # Each episode's last start is newer than that of the one before, so those in the window are the last ones.
        oldest = bisect_left(range(len(entries)), -steps, key=lambda position: -rows_since_last_start(position))
        if oldest == len(entries):
            return int(eligible.starts_before[-1])
        return int(eligible.starts_before[oldest]) + max(rows_since(oldest) - steps, 0)

    def _decay(self, horizon: int, half_life: float) -> DecayingStarts:
        decay = self._decays.get((horizon, half_life))
        if decay is None:
            if len(self._decays) == MAX_DECAYS:
                self._decays.popitem(last=False)
            decay = self._decays[horizon, half_life] = DecayingStarts(horizon, half_life, self._eligible.stored.live)
        self._decays.move_to_end((horizon, half_life))
        return decay
