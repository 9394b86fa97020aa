"""Names of actors and clients with stored episodes, and the numbers that stand for them in the index and in batches."""

from __future__ import annotations

import sys

from touchline_server.errors import OverLimitError

MAX_NAME_BYTES = 128 << 20
"""Most memory for the names of one kind: about 150,000 of the longest names, or 350,000 ordinary ones, at a time."""

ENTRY_BYTES = 320
"""Memory of a name in the tables, in addition to its text."""


class NameTable:
    """Names with reference counts: a name is forgotten with the last stored episode that has it.

    Numbers start at 0 and are never reused, so a number never stands for two names. Only one thread at a time may change the table; any
    thread may read it.

    Args:
        what: plural noun for the names, for error texts.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._names: dict[int, str] = {}
        self._numbers: dict[str, int] = {}
        self._episodes: dict[int, int] = {}
        self._next = 0
        self.size_bytes = 0
        """Memory used by the names."""

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, number: int) -> bool:
        return number in self._names

    def name(self, number: int) -> str:
        """Returns the name of a number that is in use."""
        return self._names[number]

    def numbers(self) -> list[int]:
        """Returns the numbers that are in use."""
        return list(self._names)

    def number(self, name: str) -> int:
        """Returns the number of a name that is in use."""
        return self._numbers[name]

    def find(self, name: str) -> int | None:
        """Returns the number of a name; None if no stored episode has it."""
        return self._numbers.get(name)

    def check_memory(self, name: str) -> None:
        """Checks that an episode with this name may be stored.

        Raises:
            OverLimitError: the name is new, and the names of stored episodes use all the memory they may.
        """
        if name not in self._numbers and self.size_bytes + _cost(name) > MAX_NAME_BYTES:
            raise OverLimitError(
                f"{self._what}: the {len(self)} different ones of the stored episodes take {self.size_bytes} of {MAX_NAME_BYTES} bytes, "
                "too much for a new one; send the episode again once others are evicted or cleared"
            )

    def hold(self, name: str) -> int:
        """Adds an episode to a name; returns the name's number. Cannot fail if :meth:`check_memory` passed."""
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
        """Removes an episode from a name. If it was the last one, the name must not be looked up any more."""
        episodes = self._episodes[number] - 1
        if episodes:
            self._episodes[number] = episodes
            return
        del self._episodes[number]
        name = self._names.pop(number)
        del self._numbers[name]
        self.size_bytes -= _cost(name)
        if not self._names:
            # A dictionary keeps its memory when it is emptied.
            self._names, self._numbers, self._episodes = {}, {}, {}


def _cost(name: str) -> int:
    return sys.getsizeof(name) + ENTRY_BYTES
