"""What a sampling law is to a table: fed with what is stored, asked for slices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from touchline_server.errors import InvalidArgumentError
from touchline_server.selectors.draw import Draw, DrawnRows
from touchline_server.selectors.eligible import EligibilityIndex
from touchline_server.selectors.entries import Entry
from touchline_server.selectors.options import NO_OPTIONS, LawOptions, LawSettings


class Selector(ABC):
    """Draws slices of the stored episodes of one table by one law.

    A law without state of its own draws from the eligible episodes, which all laws of a table share, and only defines :meth:`draw`.
    One with state (priorities, what was drawn already) sets :attr:`stateful`; it is then fed every episode that is published or evicted,
    in that order, and on its first use the episodes that are stored already.

    Not thread-safe: the store calls every method under its lock, so none may block or look at the columns.

    Args:
        eligible: the table's eligible episodes by horizon.
        settings: the table's parameters of the laws.
    """

    law: ClassVar[str]
    """The law's name, as in the configuration and in requests."""
    stateful: ClassVar[bool] = False
    """Whether :meth:`append`, :meth:`evict` and :meth:`clear` are called."""
    needs_task: ClassVar[bool] = False
    """Whether the law needs a column ``task`` with an integer in each row."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Fields of the optional provenance that every draw of the law has: see :attr:`Draw.optional`."""

    def __init__(self, eligible: EligibilityIndex, settings: LawSettings) -> None:
        self._eligible = eligible
        self._settings = settings

    def append(self, entry: Entry) -> None:  # noqa: B027  a law without state has nothing to do
        """Adds the newest episode, which is visible from now on."""

    def evict(self, entry: Entry) -> None:  # noqa: B027
        """Removes the oldest episode. Removal is oldest first by whole episodes, whatever the law: the ring's arithmetic rests on it."""

    def clear(self) -> None:  # noqa: B027
        """Removes all episodes."""

    @abstractmethod
    def draw(self, batch_size: int, horizon: int, rng: np.random.Generator, *, batches: int = 1, options: LawOptions = NO_OPTIONS) -> Draw:
        """Draws ``batches`` times ``batch_size`` slices of ``horizon`` + 1 steps with replacement, in one go.

        The numbers are the same as those of ``batches`` draws of ``batch_size`` in a row. There must be an eligible episode.

        Args:
            batch_size: slices in a batch.
            horizon: transitions that follow each start at least: those of a slice, or 1 if slices are padded.
            rng: the random numbers.
            batches: number of batches.
            options: the request's parameters of the law.
        """

    def numbers(self, options: LawOptions) -> int:
        """Returns how many random numbers a slice takes from the generator, whatever is stored."""
        return 1

    def update(self, episode_id: np.ndarray, start: np.ndarray, priorities: np.ndarray) -> int:
        """Sets the priorities of slices that were drawn before.

        Args:
            episode_id: [slices] int64.
            start: [slices] int64: first step of each slice.
            priorities: [transitions, slices] float: finite, at least 0.

        Returns:
            Number of slices whose episodes are still stored: the others are ignored.

        Raises:
            InvalidArgumentError: the law has no priorities.
        """
        raise InvalidArgumentError(f"law: {self.law!r} has no priorities to update")

    def update_drawn(self, drawn: DrawnRows, begin: int, end: int, priorities: np.ndarray) -> int:
        """Sets the priorities of the slices ``begin`` to ``end`` - 1 of a draw, as :meth:`update` does: nothing is looked up.

        Args:
            drawn: slices of a draw of this selector.
            begin: the first slice.
            end: the slice behind the last one.
            priorities: [slices, transitions] float32: finite, at least 0. Not kept.

        Returns:
            Number of slices whose episodes are still stored: the others are ignored.
        """
        raise InvalidArgumentError(f"law: {self.law!r} has no priorities to update")
