"""What is between a store and its disk: who commits its episodes, and what the answers to an add are."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from touchline_protos import Counts
from touchline_protos.codec import Episode


@dataclass(frozen=True, slots=True)
class Stored:
    """The answer to an add."""

    episode_id: int
    """-1 for a duplicate whose id is no longer known."""
    first_row: int
    """Where it begins in the ring; -1 for a duplicate."""
    duplicate: bool
    counts: Counts


class CommitFuture(Future[Stored]):
    """The answer to an episode that was submitted."""

    cost_s = 0.0
    """CPU time that storing it took, known once it is answered."""


class Committer(Protocol):
    """What a durable store's episodes go through on their way to the ring."""

    def add(self, episode: Episode) -> Stored:
        """Stores an episode and waits for it."""

    def submit(self, episode: Episode) -> CommitFuture:
        """Stores an episode without waiting for the disk; its arrays stay as they are until the receipt has its answer."""

    def check_writable(self) -> None:
        """Raises StorageFailedError if nothing is taken any more, or in a process that is not the store's."""

    def clear(self, forget: Callable[[], None], figures: dict[str, int]) -> None:
        """Empties the disk, notes the counts ``figures`` there, and calls ``forget`` to empty the ring."""
