"""The plan step of the write path: what a group of inserts will do to the ring, worked out before anything is changed."""

from __future__ import annotations

from touchline_protos import Counts
from touchline_protos.codec import EpisodeKey
from touchline_server.selectors.entries import ID, LENGTH
from touchline_server.store.columns import Columns
from touchline_server.store.dedup import key_conflict
from touchline_server.store.episode_ring import EpisodeRing
from touchline_server.store.inserts import AddRequest, Duplicate, PlannedInsert


class InsertPlan:
    """Inserts planned in sequence, each as if those before it were stored already.

    For the thread that holds the write lock, until the plan is applied: no other thread may change the ring meanwhile.

    Args:
        ring: what is stored now.
    """

    __slots__ = ("_evicted", "_keyed", "_keys", "_ring", "_steps", "columns", "inserts")

    def __init__(self, ring: EpisodeRing) -> None:
        self._ring = ring
        self.columns: Columns | None = ring.columns
        """Columns to copy the rows into. A table's first episode allocates them; they stay invisible until it is applied."""
        self.inserts: list[PlannedInsert] = []
        """Inserts in the order in which they are written and applied."""
        self._steps = ring.index.steps
        self._evicted = 0
        """Episodes evicted by the plan, counted from the oldest stored one, then on through the plan's own inserts."""
        self._keys: dict[EpisodeKey, PlannedInsert] = {}
        self._keyed = 0
        """Number of inserts that are in ``_keys``."""

    def add(self, request: AddRequest) -> PlannedInsert | Duplicate:
        """Checks an episode and appends its insert, unless it is a duplicate. Leaves the plan as it was if it raises.

        Raises:
            InvalidEpisodeError: the episode is malformed or does not fit the schema.
            KeyConflictError: its key was used for another payload.
            OverLimitError: names of stored episodes take all the memory they may.
            TooLargeError: it is the table's first, and there is no memory for the columns.
        """
        episode, ring = request.episode, self._ring
        duplicate = self._find(request)
        if duplicate is not None:
            return duplicate
        columns = self.columns
        schema = ring.check(episode, columns.schema if columns is not None else None, values_checked=request.values_checked)
        if columns is None:
            self.columns = ring.allocate(schema)
        length = len(next(iter(episode.columns.values())))  # checked: every column has as many rows
        evicted = self._evict_for(length) if ring.capacity - self._steps < length else ()
        insert = PlannedInsert(request, ring.next_id + len(self.inserts), length, evicted, schema if columns is None else None)
        self._steps += length
        self.inserts.append(insert)
        return insert

    @property
    def next_id(self) -> int:
        """The id after those of the plan."""
        return self._ring.next_id + len(self.inserts)

    def counts(self) -> Counts:
        """Returns the table's counts after the plan."""
        totals = self._ring.totals.with_inserts([insert.length for insert in self.inserts], self._ring.horizon)
        return totals.counts(self._steps, len(self._ring.index) + len(self.inserts) - self._evicted)

    def rollback(self) -> None:
        """Releases what the plan allocated: it is not applied."""
        if self._ring.columns is None and self.columns is not None:
            self.columns.release()
            self.columns = None

    def _find(self, request: AddRequest) -> Duplicate | None:
        key = request.episode.key
        if key is None:
            return None
        known = self._ring.ledger.find(key, request.digest)
        if known is not None:
            return Duplicate(known.episode_id)
        if not self.inserts:
            return None  # so a plan of one never hashes its key, which costs as much as the rest of the plan
        for insert in self.inserts[self._keyed :]:
            if insert.request.episode.key is not None:
                self._keys[insert.request.episode.key] = insert
        self._keyed = len(self.inserts)
        original = self._keys.get(key) if self._keys else None
        if original is None:
            return None
        if original.request.digest != request.digest:
            raise key_conflict(key)
        return Duplicate(original.episode_id, original)

    def _evict_for(self, length: int) -> list[int]:
        """Returns the ids of the oldest episodes that have to go until ``length`` rows are free."""
        evicted: list[int] = []
        entries = self._ring.index.entries
        while self._ring.capacity - self._steps < length:
            if self._evicted < len(entries):
                oldest = entries[self._evicted]
                episode_id, rows = int(oldest[ID]), int(oldest[LENGTH])
            else:
                # Every stored episode is evicted: next are the group's own, oldest first.
                insert = self.inserts[self._evicted - len(entries)]
                episode_id, rows = insert.episode_id, insert.length
            self._evicted += 1
            self._steps -= rows
            evicted.append(episode_id)
        return evicted
