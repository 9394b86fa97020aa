"""What a rate limit is to a table: asked before steps are added and batches handed over, told of both."""

from __future__ import annotations

from typing import Protocol

from touchline_server.limiters.waiting import Waiter


class RateLimiter(Protocol):
    """Holds a table's adds and batches in proportion. Thread-safe; no method blocks.

    Both sides *reserve* before they act, and then report how it ended. What is reserved counts as if it had been added or delivered, so
    that neither concurrent callers nor batches that are made ahead pass the limit. Each reservation ends in exactly one report:

        reserve_insert      → inserted, or cancel_insert (a refused episode, a duplicate, a call that ended)
        reserve_batches     → delivered, or cancel_batches (not ready, a learner that disconnected)

    A batch is *delivered* when its learner has it: the answer to ``Sample`` was made, a frame of a stream was written, a slot of a ring
    was taken. Batches that were only drawn ahead are not.

    A caller that gets nothing may wait: it queues, subscribes to the table's changes, and then asks again after each of them, with its
    place in the queue, until it leaves the queue. The limiter notifies the table's subscribers when a report allows the first of a queue
    to go on. Only callers that have nothing to do meanwhile queue: a ring whose learner still has batches does not. In process no other
    thread may be there to change anything, so the call fails instead.
    """

    @property
    def active(self) -> bool:
        """Whether there is a limit. Otherwise everything is granted and nothing is counted."""
        ...

    def queue_insert(self, who: str) -> Waiter:
        """Returns the last place in the queue of adds; ``who`` names the actor, for logs and counts."""
        ...

    def queue_batches(self, who: str) -> Waiter:
        """Returns the last place in the queue of learners; ``who`` names the learner, for logs and counts."""
        ...

    def leave(self, waiter: Waiter) -> None:
        """Removes a place from its queue. Does nothing if it is not in it any more."""
        ...

    def reserve_insert(self, steps: int, waiter: Waiter | None = None) -> bool:
        """Reserves the steps of one episode; returns whether it may be published now."""
        ...

    def inserted(self, steps: int) -> None:
        """Reports that an episode is published for which ``steps`` were reserved."""
        ...

    def cancel_insert(self, steps: int) -> None:
        """Reports that an episode for which ``steps`` were reserved is not published."""
        ...

    def reserve_batches(self, batches: int, slices: int, waiter: Waiter | None = None) -> int:
        """Reserves batches of ``slices`` slices each; returns how many of ``batches`` may be handed over now, 0 for none."""
        ...

    def delivered(self, batches: int, slices: int) -> None:
        """Reports that reserved batches of ``slices`` slices each were delivered."""
        ...

    def cancel_batches(self, batches: int, slices: int) -> None:
        """Reports that reserved batches of ``slices`` slices each will not be delivered."""
        ...

    def cleared(self) -> None:
        """Reports that the table was emptied."""
        ...

    def explain_adds(self) -> str:
        """Returns what adds wait for, for errors and logs."""
        ...

    def explain_batches(self) -> str:
        """Returns what batches wait for, for errors and logs."""
        ...
