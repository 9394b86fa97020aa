"""The episode index: which episodes are stored, where, and which can be sampled. Never looks at the columns.

Episodes are kept in order of age. Adding and evicting are O(1) amortised.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np

from touchline_protos.codec import Episode, EpisodeKey
from touchline_protos.types.names import name_fault
from touchline_server.errors import InvalidEpisodeError
from touchline_server.selectors.eligible import EligibleEpisodes
from touchline_server.selectors.entries import ACTOR, ID, LENGTH, Entry, EntryQueue
from touchline_server.selectors.options import LawSettings
from touchline_server.selectors.registry import Selectors
from touchline_server.store.actors import NameTable
from touchline_server.store.schema import is_integer

SCAN_ENTRIES = 4096
"""Entries searched at a time for those of one actor."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A stored episode without its rows."""

    episode_id: int
    first_row: int
    """Physical row of its first step, valid while the episode is stored."""
    length: int
    """Number of rows."""
    origin: Episode
    """Key, actor and policy version; no columns."""


@dataclass(frozen=True, slots=True)
class Fill:
    """How much can be sampled at one horizon, at one moment."""

    horizon: int
    """Transitions that follow a start at least: those of a slice, or 1 if slices are padded."""
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
            f"{', or pad=' + repr('end') if self.longest > 1 else ''}"
        )


class EpisodeIndex:
    """The stored episodes: place in a ring of ``capacity`` rows, actor, policy version and key of each.

    An episode occupies ``length`` consecutive rows modulo the capacity, directly after the one before it, so the free rows are always
    one run that begins at the write cursor.

    Not thread-safe: the store holds its lock around every call, except for looking up actor names.

    Args:
        settings: parameters of the laws, and the rows of the ring.
        spare_rows: rows of the ring beyond those that are stored at a time.
    """

    def __init__(self, settings: LawSettings, *, spare_rows: int = 0) -> None:
        self.capacity = settings.capacity
        self._spare_rows = spare_rows
        self.cursor = 0
        """Physical row at which the next episode begins."""
        self.steps = 0
        """Rows in use."""
        self.evicted_rows = 0
        """Rows evicted so far: the number of the oldest row, if rows are numbered in the order in which they were ever added."""
        self.actors = NameTable("actor names")
        self._clients = NameTable("client ids")
        self._episodes = EntryQueue()
        self._keys: deque[EpisodeKey | None] = deque()
        """Key of each entry, in the same order; keys of one client share the string of its id."""
        self.selectors = Selectors(self._episodes, settings)
        """The sampling laws over these episodes."""
        self._longest: deque[tuple[int, int]] = deque()
        """Id and length of each episode that is longer than all newer ones: the first is the longest of all (a monotonic queue)."""
        self._evicted_actors: deque[tuple[int, int]] = deque()
        """Number of the first row, and actor, of each evicted episode whose name an earlier reader may still look up; oldest first."""

    def __len__(self) -> int:
        return len(self._episodes)

    @property
    def entries(self) -> np.ndarray:
        """[n, 6] int64, oldest first, columns ID to TASK: a view, valid until the next change."""
        return self._episodes.live

    @property
    def oldest_id(self) -> int:
        """Id of the oldest episode; at least one must be stored."""
        return int(self._episodes.oldest[ID])

    # Changes

    def check_names(self, episode: Episode) -> None:
        """Checks an episode's actor name and client id before it is stored.

        Raises:
            InvalidEpisodeError: the actor name is malformed.
            OverLimitError: the name is new, and the names of stored episodes already take all the memory they may.
        """
        fault = name_fault(episode.actor)
        if fault is not None:
            raise InvalidEpisodeError(f"actor: {fault}")
        self.actors.check_memory(episode.actor)
        if episode.key is not None:
            self._clients.check_memory(episode.key.client_id)

    def append(self, episode: Episode, *, episode_id: int, length: int) -> None:
        """Makes an episode visible whose ``length`` rows were written at the cursor, into rows that were free."""
        entry = (episode_id, self.cursor, length, self.actors.hold(episode.actor), episode.policy_version, _task_of(episode))
        self._episodes.append(entry)
        self._keys.append(episode.key and self._with_shared_id(episode.key))
        while self._longest and self._longest[-1][1] <= length:
            self._longest.pop()
        self._longest.append((episode_id, length))
        self.selectors.append(entry)
        self.steps += length
        # The next logical row, wrapped to a physical one where the ring closes.
        self.cursor = (self.cursor + length) % self.capacity

    def evict_through(self, episode_id: int) -> int:
        """Removes the episodes with this id or a smaller one, except for their actors' names: see :meth:`release_names`.

        Returns:
            The number of episodes removed.
        """
        episodes = 0
        while len(self._episodes) and self._episodes.oldest[ID] <= episode_id:
            entry: Entry = tuple(self._episodes.oldest.tolist())
            self.steps -= entry[LENGTH]
            self._evicted_actors.append((self.evicted_rows, entry[ACTOR]))
            self.evicted_rows += entry[LENGTH]
            self._episodes.drop_oldest()
            if self._longest[0][0] == entry[ID]:
                self._longest.popleft()
            self.selectors.evict(entry)
            key = self._keys.popleft()
            if key is not None:
                self._clients.release(self._clients.number(key.client_id))
            episodes += 1
        return episodes

    def release_names(self, oldest_reader: int) -> None:
        """Releases the names of actors of evicted episodes, except those that a reader may still look up.

        Args:
            oldest_reader: smallest number of a row that any reader may still see.
        """
        while self._evicted_actors and self._evicted_actors[0][0] < oldest_reader:
            self.actors.release(self._evicted_actors.popleft()[1])

    def reset(self) -> None:
        """Starts again at physical row 0. Every episode must be evicted, and no reader active. Actor numbers are never reused."""
        self.release_names(self.evicted_rows)
        self._episodes.clear()
        self.selectors.clear()
        self.cursor = 0

    # Queries

    @property
    def end(self) -> int:
        """Number of the next row, if rows are numbered in the order in which they were ever added."""
        return self.evicted_rows + self.steps

    def fill(self, horizon: int) -> Fill:
        """Returns how much can be sampled at this horizon."""
        longest = self._longest[0][1] if self._longest else 0
        return Fill(horizon, len(self), self.steps, len(self.eligible(horizon)), longest, self.capacity - self._spare_rows)

    def eligible(self, horizon: int) -> EligibleEpisodes:
        """Returns the episodes that can be sampled with this horizon: a live view. The first use of a horizon is O(episodes)."""
        return self.selectors.eligible.at(horizon)

    def find(self, episode_ids: Iterable[int]) -> list[IndexEntry]:
        """Returns the entries of those of these episodes that are stored."""
        positions = ((self._count_before(episode_id), episode_id) for episode_id in episode_ids)
        return [self._entry(at) for at, episode_id in positions if at < len(self) and self.entries[at, ID] == episode_id]

    def between(self, first_id: int, last_id: int, *, actor: str | None, limit: int) -> list[IndexEntry]:
        """Returns the first ``limit`` episodes of a range of ids, both ends included, oldest first.

        Args:
            first_id: smallest id.
            last_id: largest id.
            actor: only episodes of this actor; None for all.
            limit: most entries to return.
        """
        if actor is None:
            start = self._count_before(first_id)
            return [self._entry(at) for at in range(start, min(self._count_before(last_id + 1), start + limit))]
        number = self.actors.find(actor)
        return [] if number is None else [self._entry(at) for at in self._positions(first_id, last_id, number, limit)]

    def newest(self, limit: int, *, below_id: int | None = None, actor: str | None = None) -> list[IndexEntry]:
        """Returns the last ``limit`` episodes, newest first.

        Args:
            limit: most entries to return.
            below_id: only episodes with smaller ids; None for all.
            actor: only episodes of this actor; None for all.
        """
        stop = len(self) if below_id is None else self._count_before(below_id)
        if actor is None:
            return [self._entry(at) for at in range(stop - 1, max(-1, stop - 1 - limit), -1)]
        number = self.actors.find(actor)
        found: list[int] = []
        while number is not None and stop > 0 and len(found) < limit:
            start = max(0, stop - SCAN_ENTRIES)
            found += (start + np.flatnonzero(self.entries[start:stop, ACTOR] == number)[::-1]).tolist()
            stop = start
        return [self._entry(at) for at in found[:limit]]

    def still_stored(self, entries: Sequence[IndexEntry]) -> list[IndexEntry]:
        """Returns those entries whose episodes were not evicted since they were looked up."""
        if not len(self):
            return []
        # Episodes are evicted in the order of their ids.
        oldest_id = self.oldest_id
        return [entry for entry in entries if entry.episode_id >= oldest_id]

    def _count_before(self, episode_id: int) -> int:
        """Returns how many stored episodes have a smaller id. Ids grow with age, so it is also the position of the id, if stored."""
        return bisect_left(self.entries, episode_id, key=itemgetter(ID))

    def _positions(self, first_id: int, last_id: int, actor: int, limit: int) -> list[int]:
        start, stop = self._count_before(first_id), self._count_before(last_id + 1)
        found: list[int] = []
        while start < stop and len(found) < limit:
            block = self.entries[start : min(stop, start + SCAN_ENTRIES), ACTOR]
            found += (start + np.flatnonzero(block == actor)).tolist()
            start += SCAN_ENTRIES
        return found[:limit]

    def _entry(self, position: int) -> IndexEntry:
        episode_id, first_row, length, actor, policy_version, _ = self.entries[position].tolist()
        return IndexEntry(episode_id, first_row, length, Episode({}, self._keys[position], self.actors.name(actor), policy_version))

    def _with_shared_id(self, key: EpisodeKey) -> EpisodeKey:
        client_id = self._clients.name(self._clients.hold(key.client_id))
        return key if key.client_id is client_id else replace(key, client_id=client_id)


def _task_of(episode: Episode) -> int:
    """Returns the task of an episode's first row; 0 if there is no column ``task`` with an integer in each row."""
    task = episode.columns.get("task")
    return int(task.item(0)) if task is not None and is_integer(task.dtype) else 0
