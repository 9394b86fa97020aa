"""What a rate limit is to a table: asked before steps are added and batches handed over, told of both."""

from __future__ import annotations

from typing import Protocol


class RateLimiter(Protocol):
    """Holds a table's adds and batches in proportion. Thread-safe; no method blocks.

    Both sides *reserve* before they act, and then report how it ended. What is reserved counts as if it had been added or delivered, so
    that neither concurrent callers nor batches that are made ahead pass the limit. Each reservation ends in exactly one report:

        reserve_insert      → inserted, or cancel_insert (a refused episode, a duplicate, a call that ended)
        reserve_batches     → delivered, or cancel_batches (not ready, a learner that disconnected)

    A batch is *delivered* when its learner has it: the answer to ``Sample`` was made, a frame of a stream was written, a slot of a ring
    was freed. Batches that were only drawn ahead are not.

    A caller that gets nothing waits for the table to change and asks again. In process no other thread may be there to change it, so the
    call fails instead. A limiter notifies the table's subscribers when a report may allow more to waiting callers.
    """

    def reserve_insert(self, steps: int) -> bool:
        """Reserves the steps of one episode; returns whether it may be published now."""
        ...

    def inserted(self, steps: int) -> None:
        """Reports that an episode is published for which ``steps`` were reserved."""
        ...

    def cancel_insert(self, steps: int) -> None:
        """Reports that an episode for which ``steps`` were reserved is not published."""
        ...

    def reserve_batches(self, batches: int, slices: int) -> int:
        """Reserves batches of ``slices`` slices each; returns how many of ``batches`` may be handed over now, 0 for none."""
        ...

    def delivered(self, batches: int, slices: int) -> None:
        """Reports that reserved batches of ``slices`` slices each were delivered."""
        ...

    def cancel_batches(self, batches: int, slices: int) -> None:
        """Reports that reserved batches of ``slices`` slices each will not be delivered."""
        ...

    def explain(self) -> str:
        """Returns what the limit waits for, for errors and logs: ``8.2 slices per step, at most 8; add more steps``."""
        ...
