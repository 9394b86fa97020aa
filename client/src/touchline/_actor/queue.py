"""Ended episodes that wait to be sent: what a queue of them does, and the one that keeps them in memory."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, Protocol

from touchline.errors import SpoolError, TouchlineError
from touchline_protos.codec import Episode, EpisodeKey

OverflowPolicy = Literal["block", "drop-oldest", "drop-newest"]
"""What a writer does with an ended episode for which there is no room."""

MAX_PENDING = 64
"""Episodes that may wait in memory where nothing else was said."""


@dataclass(frozen=True, slots=True)
class QueueTicket:
    """An episode in a queue."""

    number: int
    """Its place: later ones have higher numbers."""
    key: EpisodeKey
    length: int
    """Rows."""


@dataclass(frozen=True, slots=True)
class QueueItem:
    """An episode as a queue takes it."""

    key: EpisodeKey
    length: int
    """Rows."""
    size_bytes: int
    content: Episode | bytes
    """As it is kept: the episode, or its message."""


@dataclass(frozen=True, slots=True)
class PutResult:
    """What became of an episode that was put into a queue."""

    kept: bool
    """It is in the queue."""
    dropped: list[QueueTicket] = field(default_factory=list)
    """Those that left the queue for it, unsent; perhaps in vain."""
    error: SpoolError | None = None
    """Why it is not kept, where that is not want of room."""


class EpisodeQueue(Protocol):
    """A queue of ended episodes, oldest first. One thread puts, one takes; safe for both at once, and for others that look on.

    What was taken last, and all before it, is being sent: it is never dropped, because it may be acknowledged at that very moment.
    """

    @property
    def spool_dir(self) -> str:
        """The folder that keeps the episodes beyond this process; empty where nothing does."""

    @property
    def size_bytes(self) -> int:
        """What it takes on the disk now."""

    @property
    def resumed(self) -> tuple[int, int]:
        """Episodes, and rows in them, that were there when it was opened."""

    def pack(self, episode: Episode) -> QueueItem:
        """Returns the episode as it will be kept.

        Raises:
            InvalidEpisodeError: it cannot be put into a message.
            TooLargeError: it would not fit even if nothing else were there.
        """

    def put(self, item: QueueItem, *, drop_oldest: bool, force: bool = False) -> PutResult:
        """Appends an episode if there is room.

        Args:
            parcel: the episode.
            drop_oldest: make room by dropping the oldest that are not being sent; none, if that would not be enough.
            force: beyond the bounds; only a queue in memory does that.
        """

    def peek(self, after: QueueTicket | None = None) -> tuple[QueueTicket, Episode | TouchlineError] | None:
        """Returns the oldest episode, which stays; or why it cannot be sent. None where there is none.

        Args:
            after: the oldest of those behind this one, which was taken before; to be sent with it.

        Raises:
            SpoolError: reading failed.
        """

    def acknowledge(self, waiting: QueueTicket) -> None:
        """Forgets an episode that was taken: it is acknowledged.

        Raises:
            SpoolError: writing failed; it is still there.
        """

    def dead_letter(self, waiting: QueueTicket, error: TouchlineError) -> None:
        """Takes an episode that was taken out of the queue, because it will never be acknowledged.

        Raises:
            SpoolError: writing failed; it is still in the queue.
        """

    def waiting_keys(self) -> list[EpisodeKey]:
        """Returns the keys of all that wait, oldest first.

        Raises:
            SpoolError: reading failed.
        """

    def close(self) -> None:
        """Lets go of what it holds; what waits in memory is gone."""


class MemoryQueue:
    """Episodes in this process's memory. See :class:`EpisodeQueue`.

    Args:
        max_pending: episodes that fit.
        max_bytes: payload that fits; an episode above it waits alone.
    """

    spool_dir = ""
    size_bytes = 0
    resumed = (0, 0)

    def __init__(self, *, max_pending: int, max_bytes: int) -> None:
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
        """Appends an episode if there is room."""
        assert isinstance(item.content, Episode)
        with self._lock:
            dropped: list[QueueTicket] = []
            if not force and not self._has_room(item.size_bytes, len(self._episodes), self._bytes):
                sizes = [size_bytes for waiting, _, size_bytes in self._episodes if waiting.number <= self._sending]
                if not drop_oldest or not self._has_room(item.size_bytes, len(sizes), sum(sizes)):
                    return PutResult(False)
                while not self._has_room(item.size_bytes, len(self._episodes), self._bytes):
                    waiting, _, size_bytes = self._episodes[len(sizes)]
                    del self._episodes[len(sizes)]
                    self._bytes -= size_bytes
                    dropped.append(waiting)
            self._episodes.append((QueueTicket(self._next, item.key, item.length), item.content, item.size_bytes))
            self._next += 1
            self._bytes += item.size_bytes
            return PutResult(True, dropped)

    def peek(self, after: QueueTicket | None = None) -> tuple[QueueTicket, Episode | TouchlineError] | None:
        """Returns the oldest episode, which stays; or the oldest behind ``after``."""
        with self._lock:
            for waiting, episode, _ in self._episodes:
                if after is None or waiting.number > after.number:
                    self._sending = waiting.number
                    return waiting, episode
            return None

    def acknowledge(self, waiting: QueueTicket) -> None:
        """Forgets an episode that was taken; those go in their order."""
        with self._lock:
            assert waiting.number <= self._sending and self._episodes[0][0] == waiting
            self._bytes -= self._episodes.popleft()[2]

    def dead_letter(self, waiting: QueueTicket, error: TouchlineError) -> None:
        """Forgets an episode that was taken: whoever took it reports it."""
        self.acknowledge(waiting)

    def waiting_keys(self) -> list[EpisodeKey]:
        """Returns the keys of all that wait, oldest first."""
        with self._lock:
            return [waiting.key for waiting, _, _ in self._episodes]

    def close(self) -> None:
        """Does nothing."""

    def _has_room(self, size_bytes: int, episodes: int, held_bytes: int) -> bool:
        return episodes == 0 or (episodes < self._max_pending and held_bytes + size_bytes <= self._max_bytes)
