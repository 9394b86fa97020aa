"""Priorities on their way back through the ring that their batch came through: no call, no ids."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from touchline_protos.shm.ring import RingReader
from touchline_protos.shm.ring_returns import ReturnEntries, ReturnGeometry, are_priorities

END_S = 1.0
"""Longest time after the end of a stream in which its server may still take what was sent back before."""


class ReturnCounts(NamedTuple):
    """What happened to the slices whose priorities were sent back through a ring."""

    updated: int
    evicted: int
    dropped: int
    """Slices of batches that the server no longer knew, or that it never took because the stream ended."""
    pending: int


class ReturnQueue:
    """The learner's end of the way back through one ring. Not thread-safe, except for :meth:`close`.

    Args:
        ring: the ring.
        geometry: position and size of the entries.
        owner: what the ring belongs to: only updates of the same owner go through it.
    """

    def __init__(self, ring: RingReader, geometry: ReturnGeometry, owner: object) -> None:
        self.owner = owner
        self._control = ring.control
        self._entries = ReturnEntries(ring.slots, ring.geometry, geometry)
        self._shape = geometry.transitions, geometry.batch_size
        # The server remembers more, as it may publish a whole ring before it looks at what was sent.
        self._reach = 2 * ring.geometry.slots
        self._sent = 0
        self._closed_at: float | None = None

    def put(self, publication: int, priorities: np.ndarray) -> bool:
        """Sends priorities back if that is possible, and returns whether it was: if not, they have to go by a call.

        Args:
            publication: number of the batch's publication.
            priorities: [H, B] floats, of any value; copied. Those that are not all finite and at least 0 are not sent.
        """
        control, entries = self._control, self._entries
        if self._closed_at is not None or control.foreign or control.returns_ended or priorities.shape != self._shape:
            return False
        if self.waiting() >= len(entries) or control.published - publication > self._reach:
            return False
        at = self._sent % len(entries)
        mine = entries.priorities[at]  # no one else looks at it until it is sent
        if priorities.dtype == np.float32:
            mine[...] = priorities
        else:
            with np.errstate(over="ignore"):
                mine[...] = priorities
        if not are_priorities(mine):
            return False
        entries.publications[at][0] = publication
        self._sent += 1
        control.send_return(self._sent)
        return True

    def waiting(self) -> int:
        """Returns the number of updates that the server has not applied."""
        return min(max(self._sent - self._control.returns_taken, 0), len(self._entries))

    def wait(self, ends: float) -> bool:
        """Wakes the server, and waits until it has applied all updates; returns whether it has before ``ends``, by the monotonic clock."""
        while self.waiting() and not self.finished and time.monotonic() < ends:
            self._control.wait_returns(self._control.returns_taken)
        return not self.waiting()

    @property
    def finished(self) -> bool:
        """Whether the server applies no more updates: what waits is lost."""
        return self._control.returns_ended or (self._closed_at is not None and time.monotonic() >= self._closed_at + END_S)

    def counts(self) -> ReturnCounts:
        """Returns what has happened to the slices so far."""
        finished = self.finished  # before the counts, which the server writes first
        _, updated, evicted, refused = self._control.count_returns()
        waiting = self.waiting() * self._shape[1]
        return ReturnCounts(updated, evicted, refused + waiting * finished, waiting * (not finished))

    def close(self) -> None:
        """Ends the way back: the stream has ended, so nothing more can be sent. From any thread."""
        if self._closed_at is None:
            self._closed_at = time.monotonic()


def queue_of(source: Any, owner: object) -> ReturnQueue | None:
    """Returns the source of a batch if priorities can go back to it; None if it is another one, or another owner's."""
    return source if isinstance(source, ReturnQueue) and source.owner is owner else None
