"""Which stored episode a row of the ring belongs to, and where in the ring an episode lies."""

from __future__ import annotations

import numpy as np

from touchline_server.selectors.entries import FIRST_ROW, ID, LENGTH, MIN_ENTRIES, Entry, EntryQueue, regrown


class EpisodeRows:
    """The stored episodes by row and by id: O(log episodes) each, vectorised. Not thread-safe.

    Logical rows count on where the ring begins again, so they rise from episode to episode; a physical row is one modulo the capacity.

    Args:
        capacity: rows of the ring.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._queue = EntryQueue()
        # Contiguous copies of what is searched: bisection in a column of the entries would copy that column each time.
        self._keys = np.empty((2, MIN_ENTRIES), dtype=np.int64)
        self._head = self._tail = 0
        self._end = 0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def entries(self) -> np.ndarray:
        """[n, ENTRY_WIDTH] int64, oldest first: a view, valid until the next change."""
        return self._queue.live

    def append(self, entry: Entry) -> None:
        """Adds the newest episode, whose rows follow those of the one before it."""
        if not len(self._queue):
            self._end = entry[FIRST_ROW]
        if self._tail == self._keys.shape[1]:
            rows, head, tail = regrown(self._keys.T, self._head, self._tail)
            self._keys, self._head, self._tail = np.ascontiguousarray(rows.T), head, tail
        self._keys[:, self._tail] = entry[ID], self._end
        self._tail += 1
        self._end += entry[LENGTH]
        self._queue.append(entry)

    def drop_oldest(self) -> None:
        """Removes the oldest episode."""
        self._queue.drop_oldest()
        self._head += 1

    def clear(self) -> None:
        """Removes all episodes."""
        self._queue.clear()
        self._head = self._tail = 0

    def at_rows(self, rows: np.ndarray) -> np.ndarray:
        """Returns the positions in :attr:`entries` of the episodes that physical rows belong to.

        Args:
            rows: [n] int64, in [0, capacity); each must be in use.
        """
        first_rows = self._keys[1, self._head : self._tail]
        oldest = int(first_rows[0])
        # The logical row of physical row 0 in the oldest episode's turn of the ring; rows before that episode are of the next turn.
        logical = rows + (oldest - oldest % self._capacity)
        np.add(logical, self._capacity, out=logical, where=logical < oldest)
        return np.searchsorted(first_rows, logical, side="right") - 1

    def of_ids(self, episode_id: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the positions of episodes in :attr:`entries`, and which of them are stored; the other positions mean nothing.

        Args:
            episode_id: [n] int64.

        Returns:
            [n] int64 and [n] bool.
        """
        ids = self._keys[0, self._head : self._tail]
        if not len(ids):
            return np.zeros(len(episode_id), dtype=np.int64), np.zeros(len(episode_id), dtype=bool)
        position = np.minimum(np.searchsorted(ids, episode_id), len(ids) - 1)
        return position, ids[position] == episode_id
