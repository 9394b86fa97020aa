"""A caller's place in a rate limit's queue, taken when it is refused and left when it is granted something."""

from __future__ import annotations

from touchline_server.limiters.limiter import RateLimiter
from touchline_server.limiters.waiting import Waiter


class BatchesPlace:
    """Reserves batches for one learner. One thread at a time.

    Args:
        limiter: the table's rate limit.
        who: name of the learner, for logs and counts.
    """

    def __init__(self, limiter: RateLimiter, who: str) -> None:
        self._limiter = limiter
        self._who = who
        self._waiter: Waiter | None = None

    def reserve(self, batches: int, slices: int, *, waits: bool) -> int:
        """Reserves batches, see :meth:`RateLimiter.reserve_batches`.

        Args:
            batches: number of batches.
            slices: slices of each.
            waits: whether the learner has nothing else to do, so that it queues if it gets nothing. The caller must be subscribed to the
                table's changes, and ask again after each.
        """
        granted = self._limiter.reserve_batches(batches, slices, self._waiter)
        if not granted and waits and self._waiter is None:
            self._waiter = self._limiter.queue_batches(self._who)
            granted = self._limiter.reserve_batches(batches, slices, self._waiter)
        if granted:
            self.leave()
        return granted

    def leave(self) -> None:
        """Leaves the queue, if the learner is in it: it has what it wants, or cannot take it."""
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            self._limiter.leave(waiter)


class InsertPlace:
    """Reserves the steps of one episode after another, of one call. One thread at a time.

    Args:
        limiter: the table's rate limit.
    """

    def __init__(self, limiter: RateLimiter) -> None:
        self._limiter = limiter
        self._waiter: Waiter | None = None

    def reserve(self, steps: int, *, who: str) -> bool:
        """Reserves the steps of an episode, see :meth:`RateLimiter.reserve_insert`, and queues if they are not granted.

        Args:
            steps: steps of the episode.
            who: name of the actor, for logs and counts.
        """
        granted = self._limiter.reserve_insert(steps, self._waiter)
        if not granted and self._waiter is None:
            self._waiter = self._limiter.queue_insert(who)
            granted = self._limiter.reserve_insert(steps, self._waiter)
        if granted:
            self.leave()
        return granted

    def leave(self) -> None:
        """Leaves the queue, if the call is in it."""
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            self._limiter.leave(waiter)
