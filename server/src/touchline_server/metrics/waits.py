"""How long callers wait, and for what."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from touchline_protos.types.status import WaitCause

ACTOR_CAUSES = (WaitCause.BUDGET, WaitCause.THROTTLE, WaitCause.RATE, WaitCause.STORING)
"""Things that actors wait for."""

LEARNER_CAUSES = (WaitCause.DATA, WaitCause.RATE, WaitCause.SAMPLING)
"""Things that learners wait for."""


class WaitSum:
    """Sums the waits of any number of callers, those in progress too. One thread at a time."""

    __slots__ = ("_begins", "_over_s", "waiting")

    def __init__(self) -> None:
        self._over_s = 0.0
        self._begins = 0.0
        """Sum of the moments at which the waits in progress began."""
        self.waiting = 0
        """Callers that wait now."""

    def begin(self, now: float) -> None:
        """Records that a caller waits."""
        self.waiting += 1
        self._begins += now

    def end(self, began: float, now: float) -> None:
        """Records the end of a wait that began at ``began``."""
        self.waiting -= 1
        # Exact zero without waits: rounding would otherwise grow without bound.
        self._begins = self._begins - began if self.waiting else 0.0
        self._over_s += now - began

    def add(self, waited_s: float) -> None:
        """Adds a wait that is over."""
        self._over_s += waited_s

    def total_s(self, now: float) -> float:
        """Returns the seconds waited so far."""
        return self._over_s + (self.waiting * now - self._begins if self.waiting else 0.0)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts the block as a wait."""
        began = time.monotonic()
        self.begin(began)
        try:
            yield
        finally:
            self.end(began, time.monotonic())


class WaitClock:
    """The waits of one learner, one after another: since when it wants a batch, and what keeps the server from giving it one.

    One thread at a time; any other may read :meth:`total_s`.
    """

    __slots__ = ("_cause", "_since", "_wanted_at", "over_s")

    def __init__(self) -> None:
        self.over_s = dict.fromkeys(LEARNER_CAUSES, 0.0)
        """Seconds of the waits that are over, by cause."""
        self._cause = WaitCause.SAMPLING
        self._wanted_at: float | None = None
        self._since: float | None = None
        """Beginning of the present cause's part of the wait in progress; None without one."""

    @property
    def waiting(self) -> WaitCause | None:
        """Cause of the wait in progress; None without one."""
        return None if self._since is None else self._cause

    def want(self) -> None:
        """Records that the learner has no batch left. A wait that is in progress goes on."""
        if self._since is None:
            self._wanted_at = self._since = time.monotonic()

    def blame(self, cause: WaitCause) -> None:
        """Sets what keeps the server from giving a batch, for this wait and those that begin later."""
        if cause is self._cause:
            return
        since = self._since
        if since is not None:
            now = time.monotonic()
            self.over_s[self._cause] += now - since
            self._since = now
        self._cause = cause

    def end(self) -> float:
        """Ends the wait: a batch is there. Returns how long it was; 0 if there was none."""
        since = self._since
        if since is None:
            return 0.0
        now = time.monotonic()
        self._since = None
        self.over_s[self._cause] += now - since
        assert self._wanted_at is not None
        return now - self._wanted_at

    def total_s(self, cause: WaitCause, now: float) -> float:
        """Returns the seconds waited for this cause so far."""
        since = self._since
        running = now - since if since is not None and cause is self._cause else 0.0
        return self.over_s[cause] + max(running, 0.0)
