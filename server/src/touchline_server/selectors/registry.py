"""The laws by name, and those of one table."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from touchline_server.errors import InvalidArgumentError
from touchline_server.selectors.eligible import EligibilityIndex
from touchline_server.selectors.entries import Entry, EntryQueue
from touchline_server.selectors.episode import EpisodeSelector
from touchline_server.selectors.fresh_first import FreshFirstSelector
from touchline_server.selectors.options import LawSettings
from touchline_server.selectors.prioritized import PrioritizedSelector
from touchline_server.selectors.recent import RecentSelector
from touchline_server.selectors.selector import Selector
from touchline_server.selectors.step import StepSelector
from touchline_server.selectors.task import TaskSelector

LAWS: Mapping[str, type[Selector]] = MappingProxyType(
    {kind.law: kind for kind in (EpisodeSelector, StepSelector, RecentSelector, PrioritizedSelector, FreshFirstSelector, TaskSelector)}
)
"""Every law by its name. The configuration, requests and adapters know a law by being in here."""


def check_law(law: str) -> str:
    """Returns the name of a law that there is.

    Raises:
        InvalidArgumentError: there is none of this name.
    """
    if law not in LAWS:
        raise InvalidArgumentError(f"law: {law!r}, expected one of {', '.join(LAWS)}")
    return law


class Selectors:
    """The selectors of one table: made on the first use of their law, and fed from then on. Not thread-safe, as a selector.

    Args:
        stored: the queue of all stored episodes. Their owner feeds every change to the selectors, right after it.
        settings: the table's parameters of the laws.
    """

    def __init__(self, stored: EntryQueue, settings: LawSettings) -> None:
        self._stored = stored
        self.settings = settings
        """The table's parameters of the laws."""
        self.eligible = EligibilityIndex(stored)
        """The eligible episodes by horizon, which all laws share."""
        self._by_law: dict[str, Selector] = {}
        self._fed: tuple[Selector, ...] = ()

    def of(self, law: str) -> Selector:
        """Returns the selector of a law in :data:`LAWS`. The first use of one with state is O(episodes)."""
        selector = self._by_law.get(law)
        if selector is None:
            selector = self._by_law[law] = LAWS[law](self.eligible, self.settings)
            if selector.stateful:
                for entry in self._stored.live.tolist():
                    selector.append(tuple(entry))
                self._fed += (selector,)
        return selector

    def find(self, law: str) -> Selector | None:
        """Returns the selector of a law if it was used."""
        return self._by_law.get(law)

    def append(self, entry: Entry) -> None:
        """Adds the newest episode, which ``stored`` has already."""
        self.eligible.append(entry)
        for selector in self._fed:
            selector.append(entry)

    def evict(self, entry: Entry) -> None:
        """Removes the oldest episode, which ``stored`` no longer has."""
        self.eligible.evict(entry)
        for selector in self._fed:
            selector.evict(entry)

    def clear(self) -> None:
        """Removes all episodes; ``stored`` is empty already."""
        self.eligible.clear()
        for selector in self._fed:
            selector.clear()
