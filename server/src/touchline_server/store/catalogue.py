"""What is stored, by episode: where its rows are, who played it, and under which key it was added."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from touchline_protos.codec import Episode, EpisodeKey
from touchline_protos.types.names import name_fault
from touchline_server.errors import InvalidEpisodeError
from touchline_server.selectors.entries import ACTOR
from touchline_server.store.actors import NameTable
from touchline_server.store.index import EpisodeIndex, Evicted


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored episode without its rows."""

    episode_id: int
    first_row: int
    """Where it begins in the ring, for as long as it is stored."""
    length: int
    """Rows."""
    origin: Episode
    """Key, actor and policy version; no columns."""


class Catalogue:
    """The index, and beside it the names of actors and the keys. Not thread-safe, but for the names: the store holds its lock."""

    def __init__(self, capacity: int) -> None:
        self.index = EpisodeIndex(capacity)
        self.actors = NameTable("actor names")
        self._clients = NameTable("client ids")
        self._keys: deque[EpisodeKey | None] = deque()
        """Of the episodes in the index, in its order; those of one client share its id."""
        self._leaving: list[int] = []
        """Actors of evicted episodes, whose names readers from before may still ask for."""

    def check_names(self, episode: Episode) -> None:
        """Returns if an episode's names are good and there is room for them.

        Raises:
            InvalidEpisodeError: they cannot be names.
            OverLimitError: those of the stored episodes take all the room.
        """
        fault = name_fault(episode.actor)
        if fault is not None:
            raise InvalidEpisodeError(f"actor: {fault}")
        self.actors.check_room(episode.actor)
        if episode.key is not None:
            self._clients.check_room(episode.key.client_id)

    def append(self, episode: Episode, *, episode_id: int) -> None:
        """Makes an episode visible whose rows were written at the index's cursor."""
        number = self.actors.hold(episode.actor)
        self.index.append(episode_id=episode_id, length=episode.length, actor=number, policy_version=episode.policy_version)
        self._keys.append(episode.key and self._shared(episode.key))

    def evict_for(self, length: int) -> Evicted:
        """Forgets the oldest episodes, whole, until so many rows are free; their actors' names only with :meth:`forget_names`."""
        entries = self.index.entries
        evicted = self.index.evict_for(length)
        if evicted.episodes:
            self._leaving += entries[: evicted.episodes, ACTOR].tolist()
        for _ in range(evicted.episodes):
            key = self._keys.popleft()
            if key is not None:
                self._clients.release(self._clients.number(key.client_id))
        return evicted

    def forget_names(self) -> None:
        """Forgets the actors' names that were of evicted episodes alone, once nobody reads any more what was drawn before."""
        for number in self._leaving:
            self.actors.release(number)
        self._leaving.clear()

    def start_over(self) -> None:
        """Begins again at the ring's first row, once every episode is evicted and nobody reads. Actors' numbers are not given out again."""
        self.forget_names()
        self.index = EpisodeIndex(self.index.capacity)

    def find(self, episode_ids: Iterable[int]) -> list[Entry]:
        """Returns those of these episodes that are stored."""
        return [self._entry(position) for position in map(self.index.position, episode_ids) if position is not None]

    def between(self, first_id: int, last_id: int, *, actor: str | None, limit: int) -> list[Entry]:
        """Returns the first ``limit`` episodes of a range of ids, of one actor where one is named; oldest first."""
        number = None if actor is None else self.actors.find(actor)
        if actor is not None and number is None:
            return []
        return [self._entry(position) for position in self.index.positions(first_id, last_id, actor=number, limit=limit)]

    def still_stored(self, entries: Sequence[Entry]) -> list[Entry]:
        """Returns those entries that were not evicted since they were taken from here."""
        if not len(self.index):
            return []
        # Episodes leave in the order of their ids.
        oldest_id = self.index.oldest_id
        return [entry for entry in entries if entry.episode_id >= oldest_id]

    def _entry(self, position: int) -> Entry:
        episode_id, first_row, length, actor, policy_version = self.index.entries[position].tolist()
        return Entry(episode_id, first_row, length, Episode({}, self._keys[position], self.actors.name(actor), policy_version))

    def _shared(self, key: EpisodeKey) -> EpisodeKey:
        client_id = self._clients.name(self._clients.hold(key.client_id))
        return key if key.client_id is client_id else replace(key, client_id=client_id)
