"""The law ``fresh_first``."""

from __future__ import annotations

from collections import OrderedDict, deque

import numpy as np

from touchline_server.selectors.draw import Draw
from touchline_server.selectors.eligible import MAX_HORIZONS, EligibilityIndex
from touchline_server.selectors.entries import ENTRY_WIDTH, ID, LENGTH, Entry
from touchline_server.selectors.episode import EpisodeSelector
from touchline_server.selectors.options import NO_OPTIONS, LawOptions, LawSettings
from touchline_server.selectors.selector import Selector

_FIELDS = ("first_row", "episode_id", "start", "actor", "policy_version", "probability", "length")
"""Fields of a draw of this law, [slices] each."""


class FreshFirstSelector(Selector):
    """Each start once, newest first, before anything is drawn again; then the law ``episode``.

    The online queue of Dreamer (Hafner et al. 2023). What was drawn is kept for each horizon, and is the table's: learners share it, and a
    batch that is drawn but never delivered counts. The probability of a start that comes from the queue is 1: nothing else can be drawn
    in its place. O(B), and O(1) amortised for each episode.
    """

    law = "fresh_first"
    stateful = True

    def __init__(self, eligible: EligibilityIndex, settings: LawSettings) -> None:
        super().__init__(eligible, settings)
        self._episode = EpisodeSelector(eligible, settings)
        self._fresh: OrderedDict[int, FreshStarts] = OrderedDict()

    def append(self, entry: Entry) -> None:
        """See :meth:`Selector.append`."""
        for fresh in self._fresh.values():
            fresh.append(entry)

    def evict(self, entry: Entry) -> None:
        """See :meth:`Selector.evict`."""
        for fresh in self._fresh.values():
            fresh.evict(entry)

    def clear(self) -> None:
        """See :meth:`Selector.clear`."""
        self._fresh.clear()

    def numbers(self, options: LawOptions) -> int:
        """See :meth:`Selector.numbers`."""
        return 2

    def draw(self, batch_size: int, horizon: int, rng: np.random.Generator, *, batches: int = 1, options: LawOptions = NO_OPTIONS) -> Draw:
        """See :meth:`Selector.draw`."""
        # Numbers for all slices are drawn, also for those from the queue: so a draw takes as many from the generator whatever is fresh.
        drawn = self._episode.draw(batch_size, horizon, rng, batches=batches, options=options)
        entries, start = self._at(horizon).take(batches * batch_size)
        fresh = len(start)
        if fresh:
            queued = Draw.of(entries, start, np.ones(fresh))
            for name in _FIELDS:
                getattr(drawn, name)[:fresh] = getattr(queued, name)
        return drawn

    def _at(self, horizon: int) -> FreshStarts:
        fresh = self._fresh.get(horizon)
        if fresh is None:
            if len(self._fresh) == MAX_HORIZONS:
                self._fresh.popitem(last=False)
            fresh = self._fresh[horizon] = FreshStarts(horizon, self._eligible.stored.live)
        self._fresh.move_to_end(horizon)
        return fresh


class FreshStarts:
    """The starts that were not drawn yet, as a stack: of each episode those before some step.

    Args:
        reach: transitions that follow a start at least.
        entries: [n, 6] int64: all stored episodes, oldest first, none of which was drawn.
    """

    def __init__(self, reach: int, entries: np.ndarray) -> None:
        self._reach = reach
        self._stack: deque[tuple[Entry, int]] = deque()
        """Each episode with fresh starts, oldest first, and their number: they are steps 0, 1, ... of it."""
        for entry in entries.tolist():
            self.append(tuple(entry))

    def append(self, entry: Entry) -> None:
        """Adds the newest episode if it is long enough."""
        if entry[LENGTH] > self._reach:
            self._stack.append((entry, entry[LENGTH] - self._reach))

    def evict(self, entry: Entry) -> None:
        """Removes the oldest episode if it is this one."""
        if self._stack and self._stack[0][0][ID] == entry[ID]:
            self._stack.popleft()

    def take(self, slices: int) -> tuple[np.ndarray, np.ndarray]:
        """Removes the newest fresh starts, as many as there are but at most ``slices``, newest first.

        Returns:
            The entry of each start's episode, [n, 6] int64, and the start.
        """
        entries: list[Entry] = []
        runs: list[np.ndarray] = []
        missing = slices
        while missing and self._stack:
            entry, left = self._stack.pop()
            taken = min(left, missing)
            if taken < left:
                self._stack.append((entry, left - taken))
            entries.append(entry)
            runs.append(np.arange(left - 1, left - 1 - taken, -1))
            missing -= taken
        if not runs:
            return np.empty((0, ENTRY_WIDTH), np.int64), np.empty(0, np.int64)
        return np.repeat(np.array(entries, np.int64), [len(run) for run in runs], axis=0), np.concatenate(runs)
