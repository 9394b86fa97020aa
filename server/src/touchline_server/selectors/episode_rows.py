"""Which stored episode a row of the ring belongs to, and where in the ring an episode lies."""

from __future__ import annotations

import numpy as np

from touchline_server.selectors.entries import FIRST_ROW, ID, LENGTH, Entry, EntryQueue


class EpisodeRows:
    """The stored episodes by row, O(1), and by id, O(1) if ids follow each other, as they mostly do. Vectorised; not thread-safe.

    Memory: 4 bytes a row of the ring.

    Args:
        capacity: rows of the ring.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._queue = EntryQueue()
        self._episode = np.zeros(capacity, dtype=np.uint32)
        """Number of each row's episode, counted from the first that was ever appended; wraps."""
        self._appended = self._dropped = 0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def entries(self) -> np.ndarray:
        """[n, ENTRY_WIDTH] int64, oldest first: a view, valid until the next change."""
        return self._queue.live

    @property
    def dropped(self) -> int:
        """Number of episodes that were ever removed."""
        return self._dropped

    def append(self, entry: Entry) -> None:
        """Adds the newest episode, whose rows follow those of the one before it."""
        first_row, end = entry[FIRST_ROW], entry[FIRST_ROW] + entry[LENGTH]
        number = self._appended & 0xFFFFFFFF
        self._episode[first_row:end] = number  # up to the end of the ring
        self._episode[: max(end - self._capacity, 0)] = number
        self._appended += 1
        self._queue.append(entry)

    def drop_oldest(self) -> None:
        """Removes the oldest episode."""
        self._queue.drop_oldest()
        self._dropped += 1

    def clear(self) -> None:
        """Removes all episodes."""
        self._queue.clear()
        self._dropped = self._appended

    def at_rows(self, rows: np.ndarray) -> np.ndarray:
        """Returns the positions in :attr:`entries` of the episodes that physical rows belong to.

        Args:
            rows: [n] int64, in [0, capacity); each must be in use.

        Returns:
            [n] uint32.
        """
        return np.asarray(self._episode.take(rows) - np.uint32(self._dropped & 0xFFFFFFFF))

    def of_ids(self, episode_id: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the positions of episodes in :attr:`entries`, and which of them are stored; the other positions mean nothing.

        Args:
            episode_id: [n] int64.

        Returns:
            [n] int64 and [n] bool.
        """
        count = len(self._queue)
        if not count:
            return np.zeros(len(episode_id), dtype=np.int64), np.zeros(len(episode_id), dtype=bool)
        ids = self._queue.live[:, ID]
        oldest = int(ids[0])
        if int(ids[-1]) - oldest == count - 1:
            position = episode_id - oldest
            # As unsigned numbers, those below 0 are above all others.
            return position, position.view(np.uint64) < count
        position = np.minimum(np.searchsorted(ids, episode_id), count - 1)
        return position, ids[position] == episode_id
