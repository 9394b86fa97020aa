"""Queues of ended episodes: what a sender needs of one, and the queue in memory."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, Protocol

from touchline.errors import SpoolError, TouchlineError
from touchline_protos.codec import Episode, EpisodeKey

OverflowPolicy = Literal["block", "drop-oldest", "drop-newest"]
"""Policy of a writer for an ended episode that its queue has no space for."""

MAX_PENDING = 64
"""Default maximum of episodes that wait in memory."""


@dataclass(frozen=True, slots=True)
class QueueTicket:
    """Reference to an episode in a queue."""

    number: int
    """Position in the queue's order: later episodes have higher numbers."""
    key: EpisodeKey
    length: int
    """Number of rows."""
    table: str = ""
    """Table on the server that the episode is for; not known of an episode that cannot be read."""


Peeked = tuple[QueueTicket, Episode | TouchlineError]
"""Ticket of an episode, and the episode or the error that keeps it from being sent."""


@dataclass(frozen=True, slots=True)
class QueueItem:
    """Episode in the form in which a queue stores it."""

    key: EpisodeKey
    length: int
    """Number of rows."""
    size_bytes: int
    content: Episode | bytes
    """Episode, or its encoded message."""


@dataclass(frozen=True, slots=True)
class PutResult:
    """Outcome of putting an episode into a queue."""

    kept: bool
    """Whether the episode is in the queue."""
    dropped: list[QueueTicket] = field(default_factory=list)
    """Episodes dropped from the queue to make space; possible even if the new one was not kept."""
    error: SpoolError | None = None
    """Reason why the episode was not kept, unless there was no space for it."""


class EpisodeQueue(Protocol):
    """Queue of ended episodes, oldest first.

    One thread puts and one thread takes out; other methods are thread-safe. The episode peeked at last, and those before it, are being
    sent: they are never dropped, because the server may be acknowledging them at that moment.
    """

    @property
    def spool_dir(self) -> str:
        """Folder that keeps the episodes beyond this process; empty for a queue in memory."""

    @property
    def size_bytes(self) -> int:
        """Bytes on the disk."""

    @property
    def resumed(self) -> int:
        """Episodes that were in the queue when it was opened."""

    def pack(self, episode: Episode) -> QueueItem:
        """Returns an episode in the queue's own form.

        Raises:
            InvalidEpisodeError: the episode cannot be encoded.
            TooLargeError: the episode would not fit into an empty queue.
        """

    def put(self, item: QueueItem, *, drop_oldest: bool, force: bool = False) -> PutResult:
        """Appends an episode if there is space.

        Args:
            item: packed episode.
            drop_oldest: whether to make space by dropping the oldest episodes that are not being sent. Drops none if that would not
                suffice.
            force: whether to exceed the bounds; only a queue in memory does.
        """

    def peek(self, after: QueueTicket | None = None) -> Peeked | None:
        """Returns the oldest episode without removing it, and marks it as being sent; None if the queue is empty.

        Args:
            after: ticket of an episode peeked at before; returns the next one behind it instead.

        Raises:
            SpoolError: the spool cannot be read.
        """

    def acknowledge(self, ticket: QueueTicket) -> None:
        """Removes an episode that was peeked at and is acknowledged; the oldest first.

        Raises:
            SpoolError: the spool cannot be written; the episode is still there.
        """

    def dead_letter(self, ticket: QueueTicket, error: TouchlineError) -> None:
        """Takes an episode out of the queue that was peeked at and will never be acknowledged; a spool keeps it with the reason.

        Raises:
            SpoolError: the spool cannot be written; the episode is still there.
        """

    def waiting_keys(self) -> list[EpisodeKey]:
        """Returns the keys of all episodes in the queue, oldest first.

        Raises:
            SpoolError: the spool cannot be read.
        """

    def close(self) -> None:
        """Leaves what is in a spool to the next writer. Does nothing for a queue in memory."""


class MemoryQueue:
    """Queue in this process's memory, bounded by number and bytes. See :class:`EpisodeQueue`.

    Args:
        max_pending: maximum number of episodes.
        max_bytes: maximum payload; a single episode above it waits by itself.
        table: table on the server that the episodes are for.
    """

    spool_dir = ""
    size_bytes = 0
    resumed = 0

    def __init__(self, *, max_pending: int, max_bytes: int, table: str = "") -> None:
        self._table = table
        self._max_pending = max_pending
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._episodes: deque[tuple[QueueTicket, Episode, int]] = deque()
        self._bytes = 0
        self._sending = -1
        self._next = 0

    def pack(self, episode: Episode) -> QueueItem:
        """Returns the episode with its size."""
        assert episode.key is not None
        return QueueItem(episode.key, episode.length, episode.size_bytes, episode)

    def put(self, item: QueueItem, *, drop_oldest: bool, force: bool = False) -> PutResult:
        """Appends an episode if there is space."""
        assert isinstance(item.content, Episode)
        with self._lock:
            dropped: list[QueueTicket] = []
            if not force and not self._has_space(item.size_bytes, len(self._episodes), self._bytes):
                # Those being sent are at the front, and stay; the first one behind them is the oldest that may be dropped.
                sending = [size_bytes for ticket, _, size_bytes in self._episodes if ticket.number <= self._sending]
                if not drop_oldest or not self._has_space(item.size_bytes, len(sending), sum(sending)):
                    return PutResult(False)
                while not self._has_space(item.size_bytes, len(self._episodes), self._bytes):
                    ticket, _, size_bytes = self._episodes[len(sending)]
                    del self._episodes[len(sending)]
                    self._bytes -= size_bytes
                    dropped.append(ticket)
            self._episodes.append((QueueTicket(self._next, item.key, item.length, self._table), item.content, item.size_bytes))
            self._next += 1
            self._bytes += item.size_bytes
            return PutResult(True, dropped)

    def peek(self, after: QueueTicket | None = None) -> Peeked | None:
        """Returns the oldest episode without removing it, or the next one behind ``after``."""
        with self._lock:
            for ticket, episode, _ in self._episodes:
                if after is None or ticket.number > after.number:
                    self._sending = ticket.number
                    return ticket, episode
            return None

    def acknowledge(self, ticket: QueueTicket) -> None:
        """Removes the oldest episode."""
        with self._lock:
            assert ticket.number <= self._sending and self._episodes[0][0] == ticket
            self._bytes -= self._episodes.popleft()[2]

    def dead_letter(self, ticket: QueueTicket, error: TouchlineError) -> None:
        """Removes the oldest episode; its sender reports the error."""
        self.acknowledge(ticket)

    def waiting_keys(self) -> list[EpisodeKey]:
        """Returns the keys of all episodes in the queue, oldest first."""
        with self._lock:
            return [ticket.key for ticket, _, _ in self._episodes]

    def close(self) -> None:
        """Does nothing."""

    def _has_space(self, size_bytes: int, episodes: int, held_bytes: int) -> bool:
        return episodes == 0 or (episodes < self._max_pending and held_bytes + size_bytes <= self._max_bytes)
