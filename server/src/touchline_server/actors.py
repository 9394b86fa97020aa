"""Names of actors, and the numbers that stand for them in the index and in batches."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from touchline_server.errors import InvalidEpisodeError

MAX_ACTOR_CHARS = 128
MAX_ACTORS = 1_000_000
"""Different actor names that a table can tell apart."""


class ActorNames:
    """Numbers from 0 on, in the order in which the names first came. Numbering is for one thread at a time, reading for any."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._numbers: dict[str, int] = {}
        self.names: Mapping[int, str] = MappingProxyType(self._names)
        """Every name so far by its number: a view that grows."""

    def find(self, name: str) -> int | None:
        """Returns a name's number, None where it has none."""
        return self._numbers.get(name)

    def number(self, name: str) -> int:
        """Returns a name's number, a new one where it has none.

        Raises:
            InvalidEpisodeError: the name is too long, or one too many.
        """
        number = self._numbers.get(name)
        if number is None:
            if len(name) > MAX_ACTOR_CHARS:
                raise InvalidEpisodeError(f"actor: a name of {len(name)} characters, expected at most {MAX_ACTOR_CHARS}")
            if len(self._names) == MAX_ACTORS:
                raise InvalidEpisodeError(f"actor: {name!r} is one name too many, expected at most {MAX_ACTORS} different ones")
            number = len(self._names)
            self._names[number] = name
            self._numbers[name] = number
        return number
