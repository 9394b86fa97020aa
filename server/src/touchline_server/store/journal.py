"""The journal step of the write path: makes a plan durable before it is applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from touchline_protos import Counts
from touchline_protos.codec import Episode
from touchline_server.store.inserts import CommitFuture, PlannedInsert, Stored
from touchline_server.store.plan import InsertPlan


class Journal(Protocol):
    """Makes planned inserts durable before they are applied. Called with the write lock held, except for :meth:`check_writable`."""

    may_wait: bool
    """Whether :meth:`write` may wait for a disk."""

    def check_writable(self) -> None:
        """Raises StorageFailedError if nothing can be written any more, or not by this process. Takes no lock; any thread may call it."""

    def write(self, plan: InsertPlan) -> None:
        """Writes a plan's inserts and the counts after them, all or none. A plan that raises here is not applied.

        Raises:
            ReplayError: nothing was written, unless the text says otherwise.
        """

    def undo(self, inserts: Sequence[PlannedInsert], counts: Counts) -> None:
        """Takes back inserts that were written and could not be applied, with their keys. What they evicted stays evicted.

        Args:
            inserts: the last ones of the plan written last.
            counts: the counts without them.
        """

    def clear(self, counts: Counts) -> None:
        """Removes every episode and the schema; keys and counts stay.

        Args:
            counts: the counts afterwards.

        Raises:
            ReplayError: nothing was removed, unless the text says otherwise.
        """


class NullJournal:
    """The journal of a store in memory: makes nothing durable."""

    may_wait = False

    def check_writable(self) -> None:
        """Never refuses."""

    def write(self, plan: InsertPlan) -> None:
        """Writes nothing."""

    def undo(self, inserts: Sequence[PlannedInsert], counts: Counts) -> None:
        """Has nothing to take back."""

    def clear(self, counts: Counts) -> None:
        """Has nothing to remove."""


class Committer(Protocol):
    """Takes episodes along the write path to a journal that may wait. Every method may be called from any thread."""

    def add(self, episode: Episode) -> Stored:
        """Stores an episode and returns once it is as durable as configured. Raises as :meth:`EpisodeStore.add` does."""

    def submit(self, episode: Episode) -> Stored | CommitFuture:
        """Stores an episode without waiting for the disk. If it returns a future, the arrays must not change until that is done."""
