"""A rate limit that grants from two allowances and records what it is asked and told."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from touchline_server.limiters.waiting import Waiter


class RecordingLimiter:
    """Grants episodes and batches up to an allowance of each; counts steps and slices by their outcome."""

    def __init__(self, *, episodes: int = 1 << 60, batches: int = 1 << 60) -> None:
        self._lock = threading.Lock()
        self._episodes = episodes
        self._batches = batches
        self.notify: Callable[[], None] = lambda: None
        """What wakes those that wait: the table's."""
        self.steps: Counter[str] = Counter()
        """Steps by ``reserved``, ``inserted`` and ``cancelled``."""
        self.slices: Counter[str] = Counter()
        """Slices by ``reserved``, ``delivered`` and ``cancelled``."""
        self.refused = threading.Event()
        """Set whenever something was refused."""

    def allow(self, *, episodes: int = 0, batches: int = 0) -> None:
        """Adds to the allowances, and wakes those that wait."""
        with self._lock:
            self._episodes += episodes
            self._batches += batches
        self.notify()

    @property
    def open_steps(self) -> int:
        """Steps that are reserved and not reported on."""
        with self._lock:
            return self.steps["reserved"] - self.steps["inserted"] - self.steps["cancelled"]

    @property
    def open_slices(self) -> int:
        """Slices that are reserved and not reported on."""
        with self._lock:
            return self.slices["reserved"] - self.slices["delivered"] - self.slices["cancelled"]

    active = True

    def queue_insert(self, who: str) -> Waiter:
        return Waiter(who)

    def queue_batches(self, who: str) -> Waiter:
        return Waiter(who)

    def leave(self, waiter: Waiter) -> None:
        """Does nothing: all that wait are asked for in any order."""

    def cleared(self) -> None:
        """Does nothing."""

    def reserve_insert(self, steps: int, waiter: Waiter | None = None) -> bool:
        with self._lock:
            if not self._episodes:
                self.refused.set()
                return False
            self._episodes -= 1
            self.steps["reserved"] += steps
            return True

    def inserted(self, steps: int) -> None:
        with self._lock:
            self.steps["inserted"] += steps

    def cancel_insert(self, steps: int) -> None:
        with self._lock:
            self._episodes += 1
            self.steps["cancelled"] += steps

    def reserve_batches(self, batches: int, slices: int, waiter: Waiter | None = None) -> int:
        with self._lock:
            granted = min(batches, self._batches)
            if not granted:
                self.refused.set()
            self._batches -= granted
            self.slices["reserved"] += granted * slices
            return granted

    def delivered(self, batches: int, slices: int) -> None:
        with self._lock:
            self.slices["delivered"] += batches * slices

    def cancel_batches(self, batches: int, slices: int) -> None:
        with self._lock:
            self._batches += batches
            self.slices["cancelled"] += batches * slices

    def explain_adds(self) -> str:
        return "the allowance is used up"

    def explain_batches(self) -> str:
        return "the allowance is used up"
