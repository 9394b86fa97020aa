"""The episode index: which episodes are stored, where, and which can be sampled. Never looks at the columns.

Episodes are kept in order of age. Adding and evicting are O(1) amortised, a draw is O(batch) for the ``episode`` law and
O(batch x log episodes) for the ``step`` law, whatever the number of rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict, deque
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from touchline_server.selectors.sampling import Draw, Law

ID, FIRST_ROW, LENGTH, ACTOR, POLICY_VERSION = range(5)
"""Columns of an index entry."""
ENTRY_WIDTH = 5

SCAN = 4096
"""Entries that are looked at together for one actor's."""

MAX_HORIZONS = 16
"""Horizons for which eligibility is kept up to date at a time; the one used longest ago makes room."""


@dataclass(frozen=True, slots=True)
class Evicted:
    """What made room."""

    episodes: int
    steps: int


@dataclass(frozen=True, slots=True)
class Fill:
    """How much can be sampled at one horizon, at one moment."""

    horizon: int
    episodes: int
    """Stored."""
    steps: int
    """Rows in them."""
    eligible: int
    """Episodes with at least horizon + 1 rows."""
    longest: int
    """Rows of the longest episode; 0 if there is none."""
    capacity: int
    """Rows that fit."""

    @property
    def full(self) -> bool:
        """Whether another episode as long as the longest one would evict.

        Eviction is by whole episodes, so the rows that are stored may never come closer to the capacity than this.
        """
        return self.episodes > 0 and self.steps + self.longest > self.capacity

    def has(self, steps: int) -> bool:
        """Returns whether this many rows are stored, or as many as fit."""
        return self.steps >= steps or self.full

    def explain_not_ready(self) -> str:
        """Returns why nothing can be sampled, for an error."""
        return (
            f"{self.steps} steps in {self.episodes} episodes are stored, none of the episodes has the {self.horizon + 1} steps that "
            f"horizon {self.horizon} needs, the longest has {self.longest}; add longer episodes, wait for them, or take a smaller horizon"
        )


class EntryQueue:
    """Index entries in order of age: [n, 5] int64 in one growing array, appended at the end, dropped at the front."""

    def __init__(self, entries: np.ndarray | None = None) -> None:
        """``entries``: [n, 5] int64, oldest first, copied; none where left out."""
        self._tail = 0 if entries is None else len(entries)
        self._head = 0
        self._entries = np.empty((max(2 * self._tail, 64), ENTRY_WIDTH), dtype=np.int64)
        if entries is not None:
            self._entries[: self._tail] = entries

    def __len__(self) -> int:
        return self._tail - self._head

    @property
    def live(self) -> np.ndarray:
        """[n, 5] int64: a view, oldest first, valid until the next change."""
        return self._entries[self._head : self._tail]

    @property
    def oldest(self) -> np.ndarray:
        """[5] int64: a view of the oldest entry."""
        return self._entries[self._head]

    def append(self, entry: np.ndarray | tuple[int, ...]) -> None:
        """Adds the newest entry, [5] int64."""
        if self._tail == len(self._entries):
            self._entries, self._head, self._tail = _with_room(self._entries, self._head, self._tail)
        self._entries[self._tail] = entry
        self._tail += 1

    def drop_oldest(self) -> None:
        """Forgets the oldest entry."""
        self._head += 1


class EligibleEpisodes:
    """The episodes with at least horizon + 1 rows, oldest first, and how many slices may start before each."""

    def __init__(self, horizon: int, entries: np.ndarray) -> None:
        """Takes from ``entries``, [n, 5] int64, those that are long enough."""
        self.horizon = horizon
        self._queue = EntryQueue(entries[entries[:, LENGTH] > horizon])
        starts_until = np.cumsum(self._queue.live[:, LENGTH] - horizon)
        self._head = 0
        self._tail = len(starts_until)
        self._starts_ever = int(starts_until[-1]) if self._tail else 0
        self._starts_before = np.empty(max(2 * self._tail, 64), dtype=np.int64)
        self._starts_before[0] = 0
        self._starts_before[1 : self._tail] = starts_until[:-1]

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def entries(self) -> np.ndarray:
        """[n, 5] int64, oldest first: a view, valid until the next change."""
        return self._queue.live

    @property
    def starts(self) -> int:
        """How many slices there are in all."""
        return self._starts_ever - int(self._starts_before[self._head]) if len(self._queue) else 0

    def append(self, entry: np.ndarray | tuple[int, ...]) -> None:
        """Adds the newest episode if it is long enough."""
        if entry[LENGTH] <= self.horizon:
            return
        if self._tail == len(self._starts_before):
            self._starts_before, self._head, self._tail = _with_room(self._starts_before, self._head, self._tail)
        self._starts_before[self._tail] = self._starts_ever
        self._tail += 1
        self._starts_ever += int(entry[LENGTH]) - self.horizon
        self._queue.append(entry)

    def drop(self, episode_id: int) -> None:
        """Forgets the oldest episode if it is this one."""
        if len(self._queue) and self._queue.oldest[ID] == episode_id:
            self._queue.drop_oldest()
            self._head += 1

    def draw(self, batch_size: int, law: Law, rng: np.random.Generator, *, batches: int = 1) -> Draw:
        """Draws ``batches`` times ``batch_size`` slices, with replacement, at once; the result is that of so many draws in a row.

        There must be at least one eligible episode.
        """
        if law is Law.EPISODE:
            chance = rng.random((batches, 2, batch_size))
            entries = self._queue.live.take((chance[:, 0].reshape(-1) * len(self._queue)).astype(np.int64), axis=0)
            starts = entries[:, LENGTH] - self.horizon
            start = (chance[:, 1].reshape(-1) * starts).astype(np.int64)
            probability = 1.0 / (len(self._queue) * starts.astype(np.float64))
        else:
            before = self._starts_before[self._head : self._tail]
            nth = (rng.random(batches * batch_size) * self.starts).astype(np.int64) + before[0]
            position = np.searchsorted(before, nth, side="right") - 1
            entries = self._queue.live.take(position, axis=0)
            start = nth - before[position]
            probability = np.full(len(nth), 1.0 / self.starts)
        return Draw(
            first_row=entries[:, FIRST_ROW] + start,
            episode_id=entries[:, ID],
            start=start,
            actor=entries[:, ACTOR],
            policy_version=entries[:, POLICY_VERSION],
            probability=probability,
        )


class EpisodeIndex:
    """Where every stored episode lies in a ring of ``capacity`` rows. Not thread-safe: the store holds its lock around every call.

    An episode occupies ``length`` consecutive rows modulo the capacity, directly after the one before it, so the free rows are always
    one run that begins at the write cursor.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.cursor = 0
        """Physical row at which the next episode begins."""
        self.steps = 0
        """Rows in use."""
        self._episodes = EntryQueue()
        self._eligible: OrderedDict[int, EligibleEpisodes] = OrderedDict()
        self._longest: deque[tuple[int, int]] = deque()
        """Id and rows of each episode that is longer than all after it: the first is the longest of all (a monotonic queue)."""

    def __len__(self) -> int:
        return len(self._episodes)

    @property
    def entries(self) -> np.ndarray:
        """[n, 5] int64, oldest first, columns ID to POLICY_VERSION: a view, valid until the next change."""
        return self._episodes.live

    @property
    def oldest_id(self) -> int:
        """Id of the oldest episode; there must be one."""
        return int(self._episodes.oldest[ID])

    def position(self, episode_id: int) -> int | None:
        """Returns where in :attr:`entries` an episode is, None where it is not stored."""
        position = self._following(episode_id)
        return position if position < len(self) and self.entries[position, ID] == episode_id else None

    def positions(self, first_id: int, last_id: int, *, actor: int | None, limit: int) -> list[int]:
        """Returns where in :attr:`entries` the first ``limit`` episodes of a range of ids are, of one actor where one is given."""
        begin, end = self._following(first_id), self._following(last_id + 1)
        if actor is None:
            return list(range(begin, min(end, begin + limit)))
        found: list[int] = []
        while begin < end and len(found) < limit:
            block = self.entries[begin : min(end, begin + SCAN), ACTOR]
            found += (begin + np.flatnonzero(block == actor)).tolist()
            begin += SCAN
        return found[:limit]

    def evict_for(self, length: int) -> Evicted:
        """Forgets the oldest episodes, whole, until ``length`` rows are free."""
        episodes = steps = 0
        while self.capacity - self.steps < length:
            oldest = self._episodes.oldest
            episode_id, rows = int(oldest[ID]), int(oldest[LENGTH])
            self._episodes.drop_oldest()
            if self._longest[0][0] == episode_id:
                self._longest.popleft()
            for eligible in self._eligible.values():
                eligible.drop(episode_id)
            self.steps -= rows
            episodes += 1
            steps += rows
        return Evicted(episodes, steps)

    def append(self, *, episode_id: int, length: int, actor: int, policy_version: int) -> None:
        """Makes an episode visible that was written at the cursor; :meth:`evict_for` made room for it before."""
        entry = (episode_id, self.cursor, length, actor, policy_version)
        self._episodes.append(entry)
        while self._longest and self._longest[-1][1] <= length:
            self._longest.pop()
        self._longest.append((episode_id, length))
        for eligible in self._eligible.values():
            eligible.append(entry)
        self.steps += length
        self.cursor = (self.cursor + length) % self.capacity

    def fill(self, horizon: int) -> Fill:
        """Returns how much can be sampled at this horizon."""
        longest = self._longest[0][1] if self._longest else 0
        return Fill(horizon, len(self), self.steps, len(self.eligible(horizon)), longest, self.capacity)

    def _following(self, episode_id: int) -> int:
        """Returns how many stored episodes have a smaller id: ids grow with age."""
        return bisect_left(self.entries, episode_id, key=itemgetter(ID))

    def eligible(self, horizon: int) -> EligibleEpisodes:
        """Returns the episodes that can be sampled with this horizon: a live view. The first use of a horizon is O(episodes)."""
        eligible = self._eligible.get(horizon)
        if eligible is None:
            if len(self._eligible) == MAX_HORIZONS:
                self._eligible.popitem(last=False)
            eligible = self._eligible[horizon] = EligibleEpisodes(horizon, self._episodes.live)
        self._eligible.move_to_end(horizon)
        return eligible


def _with_room(array: np.ndarray, head: int, tail: int) -> tuple[np.ndarray, int, int]:
    """Moves the live part to the front, of a larger array where it fills more than half of this one."""
    live = tail - head
    roomy = np.empty((max(2 * live, 64), *array.shape[1:]), dtype=array.dtype)
    roomy[:live] = array[head:tail]
    return roomy, 0, live
