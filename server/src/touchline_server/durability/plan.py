"""What a group of episodes will do to the ring, worked out before anything is changed: ids, schema, evictions and counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from touchline_protos.codec import Episode, EpisodeKey
from touchline_server.errors import KeyConflictError
from touchline_server.selectors.entries import ID, LENGTH
from touchline_server.store.columns import Columns
from touchline_server.store.schema import Schema

if TYPE_CHECKING:
    from touchline_server.store.episode_store import EpisodeStore


@dataclass(frozen=True, slots=True)
class PlannedInsert:
    """One episode that will be stored."""

    episode_id: int
    length: int
    evicted: tuple[int, ...]
    """Ids that make room for it, which those of its own group may be among."""
    schema: Schema | None
    """Where this episode fixes it."""


class CommitPlan:
    """Episodes that are admitted one after the other, as if those before were stored already. Under the store's write lock."""

    def __init__(self, store: EpisodeStore) -> None:
        self._store = store
        self.columns: Columns | None = store.columns
        """Where the episodes go; allocated by the first episode, and visible to nobody before it is published."""
        self.planned: list[PlannedInsert] = []
        self._figures = store.figures()
        self._next_id = store.next_id
        self._entries = store.index_view()
        self._head = 0
        self._steps = self._figures["steps_stored"]
        self._keys: dict[EpisodeKey, tuple[int, int]] = {}

    def duplicate_of(self, episode: Episode, digest: int) -> int | None:
        """Returns the id of the episode of this group that has the same key, None where there is none.

        A different payload under the key is for :meth:`admit` to refuse.
        """
        known = self._keys.get(episode.key) if episode.key is not None else None
        return known[1] if known is not None and known[0] == digest else None

    def admit(self, episode: Episode, digest: int) -> PlannedInsert:
        """Checks an episode and works out what it does.

        Raises:
            InvalidEpisodeError: it is malformed or does not fit the schema.
            KeyConflictError: another episode of the group has its key.
            TooLargeError: there is no memory for the columns that it asks for as the first.
        """
        if episode.key is not None and episode.key in self._keys:
            raise KeyConflictError(
                f"key ({episode.key.client_id}, {episode.key.incarnation}, {episode.key.sequence}): was used for another episode, "
                "expected a key of its own"
            )
        schema = self._store.check(episode, self.columns.schema if self.columns is not None else None)
        first = self.columns is None
        if self.columns is None:
            self.columns = self._store.allocate(schema)
        planned = PlannedInsert(self._next_id, episode.length, tuple(self._evict_for(episode.length)), schema if first else None)
        self._next_id += 1
        self._steps += planned.length
        self._figures["steps_added"] += planned.length
        self._figures["episodes_added"] += 1
        self._figures["episodes_too_short"] += self._store.is_too_short(planned.length)
        self.planned.append(planned)
        if episode.key is not None:
            self._keys[episode.key] = (digest, planned.episode_id)
        return planned

    def figures(self) -> dict[str, int]:
        """Returns the counts after the group."""
        figures = self._figures
        figures["steps_stored"] = figures["steps_added"] - figures["steps_evicted"]
        figures["episodes_stored"] = figures["episodes_added"] - figures["episodes_evicted"]
        return figures

    def rollback(self) -> None:
        """Leaves the store as it was: the group is not stored."""
        if self._store.columns is None and self.columns is not None:
            self.columns.release()
            self.columns = None

    def _evict_for(self, length: int) -> list[int]:
        """Returns the ids of the oldest episodes that :meth:`EpisodeIndex.evict_for` will forget for so many rows."""
        evicted = []
        while self._store.capacity - self._steps < length:
            if self._head < len(self._entries):
                episode_id, rows = int(self._entries[self._head, ID]), int(self._entries[self._head, LENGTH])
            else:
                oldest = self.planned[self._head - len(self._entries)]
                episode_id, rows = oldest.episode_id, oldest.length
            self._head += 1
            self._steps -= rows
            self._figures["steps_evicted"] += rows
            self._figures["episodes_evicted"] += 1
            evicted.append(episode_id)
        return evicted
