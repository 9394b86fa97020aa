"""What the index keeps of a stored episode, and a queue of it in order of age."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

ID, FIRST_ROW, LENGTH, ACTOR, POLICY_VERSION, TASK = range(6)
"""Columns of an index entry, int64."""
ENTRY_WIDTH = 6

Entry: TypeAlias = tuple[int, int, int, int, int, int]
"""An index entry by itself: id, first row, length, actor, policy version, task."""

MIN_ENTRIES = 64
"""Entries for which memory is taken at least."""


class EntryQueue:
    """Index entries in order of age: [n, 6] int64 in one growing array, appended at its end and dropped at its front.

    Both are O(1) amortised. Not thread-safe.
    """

    def __init__(self, entries: np.ndarray | None = None) -> None:
        """Copies ``entries``, [n, 6] int64, oldest first; starts empty without them."""
        self._tail = 0 if entries is None else len(entries)
        self._head = 0
        self._entries = np.empty((max(2 * self._tail, MIN_ENTRIES), ENTRY_WIDTH), dtype=np.int64)
        if entries is not None:
            self._entries[: self._tail] = entries

    def __len__(self) -> int:
        return self._tail - self._head

    @property
    def live(self) -> np.ndarray:
        """[n, 6] int64: a view, oldest first, valid until the next change."""
        return self._entries[self._head : self._tail]

    @property
    def oldest(self) -> np.ndarray:
        """[6] int64: a view of the oldest entry."""
        return self._entries[self._head]

    def append(self, entry: np.ndarray | Entry) -> None:
        """Adds the newest entry, [6] int64."""
        if self._tail == len(self._entries):
            self._entries, self._head, self._tail = regrown(self._entries, self._head, self._tail)
        self._entries[self._tail] = entry
        self._tail += 1

    def drop_oldest(self) -> None:
        """Removes the oldest entry."""
        self._head += 1

    def clear(self) -> None:
        """Removes all entries."""
        self._head = self._tail = 0


def regrown(array: np.ndarray, head: int, tail: int) -> tuple[np.ndarray, int, int]:
    """Copies the live part, ``array[head:tail]``, to the front of a new array of twice its length.

    So memory stays within a constant factor of what is live, whatever was appended and dropped before.

    Returns:
        The new array, and its head and tail.
    """
    live = tail - head
    grown = np.empty((max(2 * live, MIN_ENTRIES), *array.shape[1:]), dtype=array.dtype)
    grown[:live] = array[head:tail]
    return grown, 0, live
