"""The episode index: which episodes are stored, where, and which can be sampled. Never looks at the columns.

Episodes are kept in order of age. Adding and evicting are O(1) amortised.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from touchline_server.selectors.eligible import EligibleEpisodes
from touchline_server.selectors.entries import ACTOR, ID, LENGTH, Entry, EntryQueue
from touchline_server.selectors.registry import Selectors

SCAN = 4096
"""Entries that are looked at together for one actor's."""


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
        self.selectors = Selectors(self._episodes)
        """The sampling laws over these episodes."""
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
            entry: Entry = tuple(self._episodes.oldest.tolist())
            self._episodes.drop_oldest()
            if self._longest[0][0] == entry[ID]:
                self._longest.popleft()
            self.selectors.evict(entry)
            self.steps -= entry[LENGTH]
            episodes += 1
            steps += entry[LENGTH]
        return Evicted(episodes, steps)

    def append(self, *, episode_id: int, length: int, actor: int, policy_version: int) -> None:
        """Makes an episode visible that was written at the cursor; :meth:`evict_for` made room for it before."""
        entry = (episode_id, self.cursor, length, actor, policy_version)
        self._episodes.append(entry)
        while self._longest and self._longest[-1][1] <= length:
            self._longest.pop()
        self._longest.append((episode_id, length))
        self.selectors.append(entry)
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
        return self.selectors.eligible.at(horizon)
