"""Which stored episodes are long enough for a slice, kept up to date for each horizon in use."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from touchline_server.selectors.entries import ID, LENGTH, MIN_ENTRIES, Entry, EntryQueue, regrown

MAX_HORIZONS = 16
"""Horizons that are kept up to date at a time; the one used longest ago gives way to a new one."""


class EligibleEpisodes:
    """The episodes of at least horizon + 1 steps, oldest first, and how many slices may start before each.

    Episodes leave in the order in which they came, so the running sums only ever change at their two ends: they count from the first
    episode that was ever eligible, and differences of them count what is stored.
    """

    def __init__(self, horizon: int, entries: np.ndarray) -> None:
        """Takes those of ``entries``, [n, 6] int64, that are long enough."""
        self.horizon = horizon
        self._queue = EntryQueue(entries[entries[:, LENGTH] > horizon])
        self.appended = len(self._queue)
        """Episodes that this ever held: the oldest one has the number ``appended - len(self)``."""
        starts_until = np.cumsum(self._queue.live[:, LENGTH] - horizon)
        self._head = 0
        self._tail = len(starts_until)
        self._starts_ever = int(starts_until[-1]) if self._tail else 0
        self._starts_before = np.empty(max(2 * self._tail, MIN_ENTRIES), dtype=np.int64)
        self._starts_before[0] = 0
        self._starts_before[1 : self._tail] = starts_until[:-1]

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def entries(self) -> np.ndarray:
        """[n, 6] int64, oldest first: a view, valid until the next change."""
        return self._queue.live

    @property
    def starts_before(self) -> np.ndarray:
        """[n] int64: starts in all episodes before each one, plus a constant. A view, valid until the next change."""
        return self._starts_before[self._head : self._tail]

    @property
    def starts(self) -> int:
        """Number of slices that can be drawn: the valid starts of all episodes."""
        return self._starts_ever - int(self._starts_before[self._head]) if len(self._queue) else 0

    def append(self, entry: Entry) -> None:
        """Adds the newest episode if it is long enough."""
        if entry[LENGTH] <= self.horizon:
            return
        if self._tail == len(self._starts_before):
            self._starts_before, self._head, self._tail = regrown(self._starts_before, self._head, self._tail)
        self._starts_before[self._tail] = self._starts_ever
        self._tail += 1
        self._starts_ever += entry[LENGTH] - self.horizon
        self._queue.append(entry)
        self.appended += 1

    def evict(self, entry: Entry) -> None:
        """Removes the oldest episode if it is this one."""
        if len(self._queue) and self._queue.oldest[ID] == entry[ID]:
            self._queue.drop_oldest()
            self._head += 1


class EligibilityIndex:
    """The eligible episodes for each horizon in use, shared by all laws that need them. Fed like a selector; not thread-safe.

    Args:
        stored: the queue of all stored episodes. Their owner feeds every change to this index as well.
    """

    def __init__(self, stored: EntryQueue) -> None:
        self.stored = stored
        """All stored episodes, also those that are too short."""
        self._by_horizon: OrderedDict[int, EligibleEpisodes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_horizon)

    def at(self, horizon: int) -> EligibleEpisodes:
        """Returns the episodes that can be sampled at a horizon: a live view. Its first use is O(episodes), later ones are O(1)."""
        eligible = self._by_horizon.get(horizon)
        if eligible is None:
            if len(self._by_horizon) == MAX_HORIZONS:
                self._by_horizon.popitem(last=False)
            eligible = self._by_horizon[horizon] = EligibleEpisodes(horizon, self.stored.live)
        self._by_horizon.move_to_end(horizon)
        return eligible

    def append(self, entry: Entry) -> None:
        """Adds the newest episode."""
        for eligible in self._by_horizon.values():
            eligible.append(entry)

    def evict(self, entry: Entry) -> None:
        """Removes the oldest episode."""
        for eligible in self._by_horizon.values():
            eligible.evict(entry)

    def clear(self) -> None:
        """Removes all episodes."""
        self._by_horizon.clear()
