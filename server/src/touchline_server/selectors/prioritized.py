"""The law ``prioritized``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np

from touchline_server.errors import InvalidArgumentError
from touchline_server.selectors.draw import Draw, DrawnRows
from touchline_server.selectors.eligible import EligibilityIndex
from touchline_server.selectors.entries import FIRST_ROW, ID, LENGTH, Entry
from touchline_server.selectors.episode_rows import EpisodeRows
from touchline_server.selectors.options import NO_OPTIONS, LawOptions, LawSettings
from touchline_server.selectors.selector import Selector
from touchline_server.selectors.sum_tree import SumTree

PRIORITIZED = "prioritized"
"""Name of the law."""

FIRST_PRIORITY = 1.0
"""Priority of new transitions until a higher one is given."""

MIN_PRIORITY = 2.0**-20
"""Priority, about 1e-6 and exact in float32, that a smaller one counts as, 0 included. So every slice keeps a chance, as by the epsilon of
Schaul et al. 2016, 3.3."""

MAX_TREES = 4
"""Horizons whose trees are kept up to date at a time; the one used longest ago gives way to a new one."""

WINDOW_ELEMENTS = 1 << 18
"""Steps looked at together in an update."""

MAX_WAITING_SLICES = 1 << 14
"""Slices whose new priorities wait for the next draw; more are applied before that."""


class SavedPriorities(NamedTuple):
    """The priorities of stored transitions, to be kept and loaded again."""

    changes: int
    """Value of :attr:`PrioritizedSelector.changes` at that moment."""
    highest: float
    """Highest priority that was ever given."""
    episodes: np.ndarray
    """[episodes, 2] int64: id and number of steps, oldest first."""
    priorities: np.ndarray
    """[steps of all episodes] float32, in their order."""


class _Update(NamedTuple):
    """New priorities of slices of stored episodes."""

    first_row: np.ndarray
    """[slices] int64: physical row of each slice's first step."""
    start: np.ndarray
    """[slices] int64: step of the episode that is the slice's row 0."""
    last: np.ndarray
    """[slices] int64: number of the last transition, counted from the slice's first, that its episode has; at least 0."""
    priorities: np.ndarray
    """[slices, transitions] float32."""


class PrioritizedSelector(Selector):
    """A start in proportion to priority ** alpha of its slice. Draw and update are O(log rows) a slice, vectorised.

    Each transition has a priority, kept at the row in which it begins, whatever the row convention. That of a slice is eta x the highest +
    (1 - eta) x the mean of its transitions (R2D2, Kapturowski et al. 2019, 2.3); alpha and the weights are those of Schaul et al. 2016,
    3.3 and 3.4. A transition is new with the highest priority that was ever given, at least :data:`FIRST_PRIORITY`.

    For each horizon in use there is a :class:`SumTree` over the rows of the ring. A row's weight is priority ** alpha of the slice that
    starts there, and 0 if none does: too near to its episode's end, or not in use. So a draw is exact over the stored valid starts.

    Memory a row of the ring: 8 bytes, and 4.6 for each horizon in use, up to :data:`MAX_TREES` of them.
    """

    law = PRIORITIZED
    stateful = True
    optional = ("weight",)

    def __init__(self, eligible: EligibilityIndex, settings: LawSettings) -> None:
        super().__init__(eligible, settings)
        self._capacity = settings.capacity
        self._rows = EpisodeRows(settings.capacity)
        self._priorities = np.zeros(settings.capacity, dtype=np.float32)
        """Priority of the transition from each physical row to the next."""
        self._highest = FIRST_PRIORITY
        self._trees: OrderedDict[int, SumTree] = OrderedDict()
        self._waiting: list[_Update] = []
        self._waiting_slices = 0
        self.changes = 0
        """Number of changes of priorities so far: whether there is anything new to save."""

    # Fed with what is stored

    def append(self, entry: Entry) -> None:
        """See :meth:`Selector.append`."""
        self._rows.append(entry)
        for begin, end in self._runs(entry[FIRST_ROW], entry[LENGTH]):
            self._priorities[begin:end] = self._highest
        # All transitions have one priority, so it is the slices' as well.
        weight = float(self._weights(np.array(self._highest)))
        for horizon, tree in self._trees.items():
            self._fill(tree, entry, horizon, weight)

    def evict(self, entry: Entry) -> None:
        """See :meth:`Selector.evict`."""
        self._apply()  # before rows that an update is for are used again
        self._rows.drop_oldest()
        for horizon, tree in self._trees.items():
            self._fill(tree, entry, horizon, 0.0)

    def clear(self) -> None:
        """See :meth:`Selector.clear`. The highest priority is forgotten too."""
        self._rows.clear()
        self._trees.clear()
        self._waiting, self._waiting_slices = [], 0
        self._highest = FIRST_PRIORITY
        self.changes += 1

    # Draw

    def draw(self, batch_size: int, horizon: int, rng: np.random.Generator, *, batches: int = 1, options: LawOptions = NO_OPTIONS) -> Draw:
        """See :meth:`Selector.draw`."""
        tree = self._tree(horizon)
        rows, weights = tree.find(rng.random(batches * batch_size))
        position = self._rows.at_rows(rows)
        entries = self._rows.entries.take(position, axis=0)
        start = rows - entries[:, FIRST_ROW]
        # The row is physical. It lies behind the seam of the ring if it is less than its episode's first.
        start += self._capacity * (start < 0)
        probability = weights / tree.total
        beta = self._settings.priority_beta if options.beta is None else options.beta
        weight = importance_weights(probability.reshape(batches, -1), beta).reshape(-1)
        return Draw.of(entries, start, probability, weight, drawn=DrawnRows(self.update_drawn, rows, entries, position, self._rows.dropped))

    # Update

    def update(self, episode_id: np.ndarray, start: np.ndarray, priorities: np.ndarray) -> int:
        """See :meth:`Selector.update`. The update is applied before the next draw, together with others that have come by then.

        Raises:
            InvalidArgumentError: a slice does not lie within its stored episode. Nothing has changed.
        """
        transitions = len(priorities)
        position, stored = self._rows.of_ids(episode_id)
        if not stored.all():
            episode_id, start, position, priorities = episode_id[stored], start[stored], position[stored], priorities[:, stored]
        if not len(position):
            return 0
        entries = self._rows.entries.take(position, axis=0)
        # A slice that is padded goes on after the last transition, from step length - 2 to length - 1: what it has there is left out.
        last_start = entries[:, LENGTH] - 2
        outside = np.flatnonzero(start > last_start)
        if len(outside):
            bad = outside[0]
            raise InvalidArgumentError(
                f"start: {start[bad]} of {transitions} transitions in episode {episode_id[bad]}, which has {entries[bad, LENGTH]} steps, "
                f"expected 0 to {last_start[bad]}"
            )
        last = last_start - start
        first_row = entries[:, FIRST_ROW] + start
        first_row -= self._capacity * (first_row >= self._capacity)
        self._put(_Update(first_row, start, last, priorities.T))
        return len(position)

    def update_drawn(self, drawn: DrawnRows, begin: int, end: int, priorities: np.ndarray) -> int:
        """See :meth:`Selector.update_drawn`. Applied as :meth:`update` is."""
        rows, entries = drawn.rows[begin:end], drawn.entries[begin:end]
        if self._rows.dropped > drawn.dropped:
            # In int64, in which nothing wraps: an episode's number, counted from the first one, is its position plus those dropped then.
            stored = drawn.position[begin:end] >= np.int64(self._rows.dropped - drawn.dropped)
            rows, entries, priorities = rows[stored], entries[stored], priorities[stored]
        if len(rows):
            start = rows - entries[:, FIRST_ROW]
            start += self._capacity * (start < 0)
            self._put(_Update(rows, start, entries[:, LENGTH] - 2 - start, priorities))
        return len(rows)

    def _put(self, update: _Update) -> None:
        """Keeps an update for the next draw, which applies it."""
        transitions = update.priorities.shape[1]
        if update.last.min() < transitions - 1:
            # Padding has no priorities.
            real = np.arange(transitions) <= update.last[:, None]
            update = update._replace(priorities=np.where(real, update.priorities, np.float32(0.0)))
        self._highest = max(self._highest, float(update.priorities.max()))
        self.changes += 1
        self._waiting.append(update)
        self._waiting_slices += len(update.start)
        if self._waiting_slices > MAX_WAITING_SLICES:
            self._apply()

    def _apply(self) -> None:
        """Applies the updates that wait, in their order, those of equal length together."""
        waiting, self._waiting, self._waiting_slices = self._waiting, [], 0
        for _, alike in groupby(waiting, key=lambda update: update.priorities.shape[1]):
            group = list(alike)
            update = group[0] if len(group) == 1 else _Update(*(np.concatenate(arrays) for arrays in zip(*group, strict=True)))
            self._set_transitions(update)
            for horizon, tree in self._trees.items():
                self._set_slices(tree, horizon, update)

    def save(self) -> SavedPriorities:
        """Returns a copy of all priorities."""
        self._apply()
        entries = self._rows.entries
        priorities = np.zeros(0, dtype=np.float32)
        if len(entries):
            # Stored episodes follow each other in the ring without a gap.
            runs = self._runs(int(entries[0, FIRST_ROW]), int(entries[:, LENGTH].sum()))
            priorities = np.concatenate([self._priorities[begin:end] for begin, end in runs])
        return SavedPriorities(self.changes, self._highest, entries[:, [ID, LENGTH]], priorities)

    def load(self, saved: SavedPriorities) -> int:
        """Sets the priorities of those of the saved episodes that are stored, and returns the number of these."""
        self._apply()
        self._highest = max(self._highest, saved.highest)
        # Steps that were stored after the save are as new as they were then.
        self._priorities.fill(self._highest)
        episodes, priorities = saved.episodes, saved.priorities
        position, stored = self._rows.of_ids(episodes[:, 0])
        first = np.cumsum(episodes[:, 1]) - episodes[:, 1]
        loaded = 0
        for number in np.flatnonzero(stored).tolist():
            entry = self._rows.entries[position[number]]
            length = int(entry[LENGTH])
            if length == episodes[number, 1]:
                at = int(first[number])
                for begin, end in self._runs(int(entry[FIRST_ROW]), length):
                    self._priorities[begin:end] = priorities[at : at + end - begin]
                    at += end - begin
                loaded += 1
        self._trees.clear()
        return loaded

    def _set_transitions(self, update: _Update) -> None:
        """Sets the priorities of the transitions of slices."""
        first_row, _, last, priorities = update
        count = priorities.shape[1]
        # Slice by slice: of several that share a transition, the last one counts.
        values = np.ascontiguousarray(np.maximum(priorities, np.float32(MIN_PRIORITY)))
        if last.min() >= count - 1 and first_row.max() + count <= self._capacity:
            # The rows of a slice as one element, which is assigned in a third of the time.
            run = np.dtype((np.void, values.itemsize * count))
            runs = np.ndarray(self._capacity - count + 1, run, self._priorities, strides=self._priorities.strides)
            runs[first_row] = values.view(run).reshape(-1)
        else:
            number = np.arange(count)
            real = number <= last[:, None]
            self._priorities[np.remainder(first_row[:, None] + number, self._capacity)[real]] = values[real]

    def _set_slices(self, tree: SumTree, horizon: int, update: _Update) -> None:
        """Sets the weights of all slices of a horizon that share a transition with updated ones.

        Those of an updated slice with ``transitions`` transitions from ``start`` on begin at ``start`` - (horizon - 1) to
        ``start`` + transitions - 1; those that do not lie within the episode are left alone.
        """
        before = horizon - 1
        count = update.priorities.shape[1] + before
        steps = np.arange(-before, count)
        block = max(WINDOW_ELEMENTS // len(steps), 1)
        for begin in range(0, len(update.start), block):
            first_row, start, last = (
                update.first_row[begin : begin + block],
                update.start[begin : begin + block],
                update.last[begin : begin + block],
            )
            # Those that have such slices outside their episode: few, near its ends.
            edge = (start < before) | (last < count - 1)
            if edge.any():
                self._set_edge_slices(tree, horizon, steps, first_row[edge], start[edge], last[edge])
                first_row = first_row[~edge]
            if len(first_row):
                rows = self._physical(first_row, steps)
                weights = self._weights(self._aggregate(self._priorities.take(rows), horizon))
                tree.assign_runs(rows[:count], weights)

    def _set_edge_slices(
        self, tree: SumTree, horizon: int, steps: np.ndarray, first_row: np.ndarray, start: np.ndarray, last: np.ndarray
    ) -> None:
        """Does what :meth:`_set_slices` does, for slices near the ends of their episodes."""
        # Rows beyond the episode are read as well, and only count for slices that are left out below.
        rows = self._physical(first_row, steps)
        weights = self._weights(self._aggregate(self._priorities.take(rows), horizon))
        starts = steps[: len(weights), None]
        # The last start has ``horizon`` transitions, so it is ``last`` + 1 - horizon transitions after ``start``.
        inside = (starts >= -start) & (starts <= last + 1 - horizon)
        tree.assign(rows[: len(weights)][inside], weights[inside])

    # Trees

    def _tree(self, horizon: int) -> SumTree:
        """Returns the tree of a horizon, with all updates applied."""
        if self._waiting:
            self._apply()
        tree = self._trees.get(horizon)
        if tree is None:
            if len(self._trees) == MAX_TREES:
                self._trees.popitem(last=False)
            tree = self._trees[horizon] = self._build(horizon)
        self._trees.move_to_end(horizon)
        return tree

    def _build(self, horizon: int) -> SumTree:
        """Returns the tree of a horizon: O(rows log horizon)."""
        tree = SumTree(self._capacity)
        # Ring order, and on behind the seam, so that the slice at row r has its transitions at r and on.
        length = self._capacity + horizon - 1
        ring = np.take(self._priorities, np.arange(length) % self._capacity)
        weights = self._weights(self._aggregate(ring, horizon))
        valid = np.zeros(self._capacity, dtype=bool)
        for first_row, steps in self._rows.entries[:, [FIRST_ROW, LENGTH]].tolist():
            for begin, end in self._runs(first_row, steps - horizon):
                valid[begin:end] = True
        weights[~valid] = 0.0
        tree.load(weights)
        return tree

    def _fill(self, tree: SumTree, entry: Entry, horizon: int, weight: float) -> None:
        for begin, end in self._runs(entry[FIRST_ROW], entry[LENGTH] - horizon):
            tree.fill(begin, end, weight)

    def _aggregate(self, priorities: np.ndarray, horizon: int) -> np.ndarray:
        """Returns the priority of each slice of ``horizon`` consecutive priorities: [n, ...] float32 to [n - horizon + 1, ...] float32."""
        highest, total = window_max_and_sum(priorities, horizon, factor=(1.0 - self._settings.priority_eta) / horizon)
        highest *= np.float32(self._settings.priority_eta)
        highest += total
        return highest

    def _weights(self, priorities: np.ndarray) -> np.ndarray:
        # Priorities are above 0, except in rows that never were in use; those get no weight anyway.
        return np.asarray(np.maximum(priorities, np.float32(MIN_PRIORITY)) ** np.float32(self._settings.priority_alpha))

    # Rows

    def _physical(self, first_row: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Returns physical rows of slices: rows ``first_row`` + each of ``steps``, wrapped at both ends of the ring.

        Args:
            first_row: [slices] int64, in [0, capacity).
            steps: [n] int64, ascending; may be below 0.

        Returns:
            [n, slices] int64, in [0, capacity). Slices come last, where arrays are long: numpy is fast along the last axis.
        """
        rows = first_row + steps[:, None]
        # A remainder takes many times as long as the rest of this function, and nearly no update needs one.
        if first_row.min() + steps[0] < 0 or first_row.max() + steps[-1] >= self._capacity:
            np.remainder(rows, self._capacity, out=rows)
        return rows

    def _runs(self, first_row: int, count: int) -> Iterator[tuple[int, int]]:
        """Yields begin and end of the physical rows of ``count`` rows from ``first_row`` on: two runs if the seam lies in them."""
        if count > 0:
            end = first_row + count
            yield first_row, min(end, self._capacity)
            if end > self._capacity:
                yield 0, end - self._capacity


def window_max_and_sum(values: np.ndarray, width: int, *, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns maximum and ``factor`` x sum of each ``width`` consecutive values of the first axis, in O(log width) passes.

    Windows of 1, 2, 4, ... values are combined to one of ``width`` as the binary digits of it say.

    Args:
        values: [n, ...] float32.
        width: 1 to n.
        factor: factor of the sums, up to 1 / width, so that none is beyond the range of float32.

    Returns:
        Two new arrays [n - width + 1, ...] float32.
    """
    count = len(values) - width + 1
    highest, total = values, values * np.float32(factor)  # of windows of ``size`` values
    best = added = None
    size, done = 1, 0
    while True:
        if width & size:
            window = slice(done, done + count)
            if best is None or added is None:
                best, added = highest[window], total[window]
            else:
                best, added = np.maximum(best, highest[window]), added + total[window]
            done += size
            if done == width:
                return (best.copy(), added.copy()) if width == size else (best, added)
        highest = np.maximum(highest[:-size], highest[size:])
        total = total[:-size] + total[size:]
        size *= 2


def importance_weights(probability: np.ndarray, beta: float) -> np.ndarray:
    """Returns (N p) ** -beta of each slice over the largest of its batch, N being the number of valid starts (Schaul et al. 2016, 3.4).

    Args:
        probability: [batches, B] float64.
        beta: 0 (all weights are 1) to 1.

    Returns:
        [batches, B] float32.
    """
    # N cancels out, and the largest weight is that of the smallest probability.
    smallest = probability.min(axis=1, keepdims=True)
    # A power in float32 is exact enough for them, and cheaper.
    return np.asarray((smallest / probability).astype(np.float32) ** np.float32(beta))
