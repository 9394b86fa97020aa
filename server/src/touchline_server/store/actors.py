"""Names of actors and clients, for as long as an episode of theirs is stored, and the numbers that stand for them in index and batches."""

from __future__ import annotations

import sys

from touchline_server.errors import OverLimitError

MAX_NAME_BYTES = 128 << 20
"""Memory of the names of one kind: some 150,000 of the longest ones that are stored at a time, 350,000 ordinary ones."""

ENTRY_BYTES = 320
"""What a name takes in its tables, beside its own text."""


class NameTable:
    """Counts for each name how many stored episodes have it, and forgets it with the last of them.

    Numbers begin at 0 and are never given out again: who was told a name by its number never takes it for another's. Changes are for one
    thread at a time, reading for any.

    Args:
        what: has such a name, for the text of errors.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._names: dict[int, str] = {}
        self._numbers: dict[str, int] = {}
        self._episodes: dict[int, int] = {}
        self._next = 0
        self.size_bytes = 0
        """Memory that the names take."""

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, number: int) -> bool:
        return number in self._names

    def name(self, number: int) -> str:
        """Returns a number's name; there must be one."""
        return self._names[number]

    def number(self, name: str) -> int:
        """Returns a name's number; there must be one."""
        return self._numbers[name]

    def find(self, name: str) -> int | None:
        """Returns a name's number, None where no stored episode has it."""
        return self._numbers.get(name)

    def check_room(self, name: str) -> None:
        """Returns if an episode of this name may be stored.

        Raises:
            OverLimitError: it is a new one, and the names of stored episodes take what they may.
        """
        if name not in self._numbers and self.size_bytes + _cost(name) > MAX_NAME_BYTES:
            raise OverLimitError(
                f"{self._what}: the {len(self)} different ones of the stored episodes take {self.size_bytes} of {MAX_NAME_BYTES} bytes, no "
                "room for a new one; it may come again once episodes of others are evicted or cleared"
            )

    def hold(self, name: str) -> int:
        """Counts an episode that is stored, and returns its name's number. Does not fail: :meth:`check_room` was asked before."""
        number = self._numbers.get(name)
        if number is None:
            number = self._next
            self._next += 1
            self._names[number] = name
            self._numbers[name] = number
            self.size_bytes += _cost(name)
        self._episodes[number] = self._episodes.get(number, 0) + 1
        return number

    def release(self, number: int) -> None:
        """Counts an episode that is gone. Nobody may ask for the name any more whose last one it was."""
        left = self._episodes[number] - 1
        if left:
            self._episodes[number] = left
            return
        del self._episodes[number]
        name = self._names.pop(number)
        del self._numbers[name]
        self.size_bytes -= _cost(name)
        if not self._names:
            # Dictionaries keep their size when they are emptied.
            self._names, self._numbers, self._episodes = {}, {}, {}


def _cost(name: str) -> int:
    return sys.getsizeof(name) + ENTRY_BYTES
