"""The rate limit that never limits."""

from __future__ import annotations


class Unlimited:
    """Grants everything and counts nothing: the null object of :class:`~touchline_server.limiters.limiter.RateLimiter`."""

    def reserve_insert(self, steps: int) -> bool:
        """Returns True."""
        return True

    def inserted(self, steps: int) -> None:
        """Does nothing."""

    def cancel_insert(self, steps: int) -> None:
        """Does nothing."""

    def reserve_batches(self, batches: int, slices: int) -> int:
        """Returns ``batches``."""
        return batches

    def delivered(self, batches: int, slices: int) -> None:
        """Does nothing."""

    def cancel_batches(self, batches: int, slices: int) -> None:
        """Does nothing."""

    def explain(self) -> str:
        """Returns that there is no limit."""
        return "no rate limit"


UNLIMITED = Unlimited()
"""The one instance that is needed: it has no state."""
