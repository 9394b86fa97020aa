"""The law ``task``."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict

import numpy as np

from touchline_server.selectors.draw import Draw
from touchline_server.selectors.eligible import MAX_HORIZONS, EligibilityIndex
from touchline_server.selectors.entries import ENTRY_WIDTH, LENGTH, MIN_ENTRIES, TASK, Entry
from touchline_server.selectors.options import NO_OPTIONS, LawOptions, LawSettings
from touchline_server.selectors.selector import Selector

MIN_TASK_ENTRIES = 4
"""Entries for which memory is taken at least for each task."""


class TaskSelector(Selector):
    """A task uniformly, then an eligible episode of it uniformly, then a start within that uniformly. O(B), whatever is stored.

    An episode's task is that of its first row. Tasks without an eligible episode do not count.
    """

    law = "task"
    stateful = True
    needs_task = True

    def __init__(self, eligible: EligibilityIndex, settings: LawSettings) -> None:
        super().__init__(eligible, settings)
        self._by_horizon: OrderedDict[int, EpisodesByTask] = OrderedDict()

    def append(self, entry: Entry) -> None:
        """See :meth:`Selector.append`."""
        for episodes in self._by_horizon.values():
            episodes.append(entry)

    def evict(self, entry: Entry) -> None:
        """See :meth:`Selector.evict`."""
        for episodes in self._by_horizon.values():
            episodes.evict(entry)

    def clear(self) -> None:
        """See :meth:`Selector.clear`."""
        self._by_horizon.clear()

    def numbers(self, options: LawOptions) -> int:
        """See :meth:`Selector.numbers`."""
        return 3

    def draw(self, batch_size: int, horizon: int, rng: np.random.Generator, *, batches: int = 1, options: LawOptions = NO_OPTIONS) -> Draw:
        """See :meth:`Selector.draw`."""
        # [batches, 3, B]: so a batch takes the same numbers from the generator whether it is drawn by itself or with others.
        uniform = rng.random((batches, 3, batch_size)).transpose(1, 0, 2).reshape(3, -1)
        entries, chance = self._at(horizon).draw(uniform[0], uniform[1])
        starts = entries[:, LENGTH] - horizon
        return Draw.of(entries, (uniform[2] * starts).astype(np.int64), chance / starts)

    def _at(self, horizon: int) -> EpisodesByTask:
        episodes = self._by_horizon.get(horizon)
        if episodes is None:
            if len(self._by_horizon) == MAX_HORIZONS:
                self._by_horizon.popitem(last=False)
            episodes = self._by_horizon[horizon] = EpisodesByTask(horizon, self._eligible.stored.live)
        self._by_horizon.move_to_end(horizon)
        return episodes


class EpisodesByTask:
    """The episodes of more than ``reach`` rows: a queue for each task, all in one array, so that one draw reads from many of them.

    Each task has a run of consecutive rows of the array, in which its queue moves on from front to back. A queue that reaches the end of
    its run moves to the run's front, or into a new run of twice its length at the end of the array. If that is full, all runs are moved
    into a new array of twice what is live. So appending and evicting are O(1) amortised, and memory is bounded by what is live.
    Tasks are in ascending order, so a draw does not depend on which came first.

    Args:
        reach: transitions that follow a start at least.
        entries: [n, 6] int64: all stored episodes, oldest first.
    """

    def __init__(self, reach: int, entries: np.ndarray) -> None:
        self._reach = reach
        self._array = np.empty((max(4 * len(entries), MIN_ENTRIES), ENTRY_WIDTH), dtype=np.int64)
        self._used = 0
        """Rows of the array that belong to a run, or to one that was given up."""
        self._tasks: list[int] = []
        """Tasks with an episode, ascending."""
        self._begin = np.empty(0, np.int64)
        self._count = np.empty(0, np.int64)
        """First row and length of each task's queue, in the order of ``_tasks``."""
        self._runs: dict[int, tuple[int, int]] = {}
        """First row of each task's run, and the row after its last one."""
        for entry in entries.tolist():
            self.append(tuple(entry))

    def append(self, entry: Entry) -> None:
        """Adds the newest episode if it is long enough."""
        if entry[LENGTH] <= self._reach:
            return
        task = entry[TASK]
        at = bisect_left(self._tasks, task)
        if at == len(self._tasks) or self._tasks[at] != task:
            begin = self._new_run(task, MIN_TASK_ENTRIES)
            insort(self._tasks, task)
            self._begin, self._count = np.insert(self._begin, at, begin), np.insert(self._count, at, 0)
        row = int(self._begin[at] + self._count[at])
        if row == self._runs[task][1]:
            row = self._move(at)
        self._array[row] = entry
        self._count[at] += 1

    def evict(self, entry: Entry) -> None:
        """Removes the oldest episode if it is long enough."""
        if entry[LENGTH] <= self._reach:
            return
        at = bisect_left(self._tasks, entry[TASK])
        self._begin[at] += 1
        self._count[at] -= 1
        if not self._count[at]:
            del self._runs[self._tasks.pop(at)]
            self._begin, self._count = np.delete(self._begin, at), np.delete(self._count, at)

    def draw(self, task: np.ndarray, episode: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draws an episode for each slice.

        Args:
            task: [slices], in [0, 1): chooses the tasks.
            episode: [slices], in [0, 1): chooses the episodes in them.

        Returns:
            The entry of each slice's episode, [slices, 6] int64, and the episode's probability.
        """
        at = (task * len(self._tasks)).astype(np.int64)
        count = self._count[at]
        row = self._begin[at] + (episode * count).astype(np.int64)
        return self._array.take(row, axis=0), 1.0 / (len(self._tasks) * count.astype(np.float64))

    def _move(self, at: int) -> int:
        """Moves the queue of the task at this position to where it can grow; returns the row after its last one."""
        task, begin, count = self._tasks[at], int(self._begin[at]), int(self._count[at])
        first, end = self._runs[task]
        # In a run that is at most half full, as many appends follow as entries are moved now.
        moved = first if 2 * count <= end - first else self._new_run(task, 2 * count)
        begin = int(self._begin[at])  # making a run may have moved all of them
        self._array[moved : moved + count] = self._array[begin : begin + count]
        self._begin[at] = moved
        return moved + count

    def _new_run(self, task: int, length: int) -> int:
        """Makes a run the task's own, and returns its first row. The task's queue stays where it is."""
        if self._used + length > len(self._array):
            self._rebuild(length)
        first = self._used
        self._used += length
        self._runs[task] = first, self._used
        return first

    def _rebuild(self, spare: int) -> None:
        """Moves all queues into a new array, each at the front of a run of twice its length, with at least ``spare`` rows left."""
        lengths = np.maximum(2 * self._count, MIN_TASK_ENTRIES)
        used = int(lengths.sum())
        array = np.empty((max(2 * (used + spare), MIN_ENTRIES), ENTRY_WIDTH), dtype=np.int64)
        first = 0
        for at, (task, length) in enumerate(zip(self._tasks, lengths.tolist(), strict=True)):
            begin, count = int(self._begin[at]), int(self._count[at])
            array[first : first + count] = self._array[begin : begin + count]
            self._begin[at], self._runs[task] = first, (first, first + length)
            first += length
        self._array, self._used = array, used
