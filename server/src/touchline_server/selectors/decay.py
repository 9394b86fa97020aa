"""Weights that halve with age, summed over episodes that come and go."""

from __future__ import annotations

import math

import numpy as np

from touchline_server.selectors.entries import ID, LENGTH, MIN_ENTRIES, Entry, EntryQueue, regrown

MAX_DOUBLINGS = 512
"""Doublings of a start's weight after which the unit of weights is set again: half of what a float64 holds."""


class DecayingStarts:
    """The episodes of more than ``reach`` rows, and running sums of the weights of their starts.

    A start at logical row r, counted over all rows that were ever added, weighs 2^(r / half_life). So rows that are added change no weight,
    only which unit is handy. The n starts of an episode, of which the newest weighs w, weigh w (1 - q^n) / (1 - q) together, with
    q = 2^(-1 / half_life): a geometric sum in closed form. Sums run from old to new, hence from small to large, and keep their relative
    precision.

    Weights grow without bound. When one has doubled :data:`MAX_DOUBLINGS` times, or half of the last sum is that of evicted episodes, the
    newest start's weight becomes the unit and the sums begin at the oldest stored episode: O(episodes), and rare. What
    then underflows to 0 is less than 2^-500 of the total.

    Args:
        reach: transitions that follow a start at least.
        half_life: rows after which a start is half as likely: at least 1.
        entries: [n, 6] int64: all stored episodes, oldest first.
    """

    def __init__(self, reach: int, half_life: float, entries: np.ndarray) -> None:
        self._reach = reach
        self._half_life = half_life
        self._decay = math.log(2) / half_life
        """-ln q, precise also if q is next to 1."""
        self._row = 0
        """Logical row of the next episode's first step, counted from the start whose weight is the unit."""
        self._sums = np.zeros(max(2 * len(entries), MIN_ENTRIES))
        """Weight of all starts before each episode, and at the tail of all starts, from one that is stored or was evicted."""
        self._head = self._tail = 0
        self._queue = EntryQueue()
        for entry in entries.tolist():
            self.append(tuple(entry))

    def append(self, entry: Entry) -> None:
        """Adds the newest episode, whose rows count even if it is too short."""
        starts = entry[LENGTH] - self._reach
        if starts > 0:
            newest = self._row + starts - 1
            if newest / self._half_life > MAX_DOUBLINGS or self._sums[self._head] > self._sums[self._tail] / 2:
                self._reset_unit(newest)
                newest = 0
            if self._tail + 1 == len(self._sums):
                self._sums, self._head, end = regrown(self._sums, self._head, self._tail + 1)
                self._tail = end - 1
            weight = math.exp2(newest / self._half_life) * math.expm1(-starts * self._decay) / math.expm1(-self._decay)
            self._sums[self._tail + 1] = self._sums[self._tail] + weight
            self._tail += 1
            self._queue.append(entry)
        self._row += entry[LENGTH]

    def evict(self, entry: Entry) -> None:
        """Removes the oldest episode if it is this one."""
        if len(self._queue) and self._queue.oldest[ID] == entry[ID]:
            self._queue.drop_oldest()
            self._head += 1

    def draw(self, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws starts in proportion to their weights, in O(slices log episodes). There must be an episode.

        Args:
            uniform: [2, slices], in [0, 1): chooses the episodes, and the starts in them.

        Returns:
            The entry of each slice's episode, its start, and the start's probability.
        """
        sums = self._sums[self._head : self._tail + 1]
        total = sums[-1] - sums[0]
        position = np.searchsorted(sums[:-1], uniform[0] * total + sums[0], side="right") - 1
        entries = self._queue.live.take(position, axis=0)
        starts = entries[:, LENGTH] - self._reach
        # Starts of the episode that are newer than the one drawn: a geometric distribution, cut off at the first step, inverted.
        cut = -np.expm1(-starts * self._decay)
        newer = np.minimum((np.log1p(-uniform[1] * cut) / -self._decay).astype(np.int64), starts - 1)
        # The start's part of its episode's weight: q^newer (1 - q) / (1 - q^starts).
        part = np.exp(-newer * self._decay) * -math.expm1(-self._decay) / cut
        return entries, starts - 1 - newer, (sums[position + 1] - sums[position]) / total * part

    def _reset_unit(self, row: int) -> None:
        """Makes the weight of a start at logical row ``row`` the unit, counts rows from there, and sums from the oldest stored episode."""
        sums = self._sums[self._head : self._tail + 1]
        sums -= float(sums[0])
        sums *= math.exp2(-row / self._half_life)
        self._row -= row
