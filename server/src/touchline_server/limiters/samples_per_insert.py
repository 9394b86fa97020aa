"""A fixed ratio of slices delivered to steps added.

The idea is Reverb's ``SampleToInsertRatio`` (Cassirer et al. 2021, Reverb: A Framework For Experience Replay, section 3.3): the difference
between what was inserted, times the ratio, and what was sampled stays within a tolerance. What differs here is written at :class:`Rate` and
:class:`SamplesPerInsert`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from touchline_protos.log_lines import get_logger
from touchline_server.limiters.waiting import Held, Reports, Waiter, WaitingSide

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Rate:
    """What a limit holds to."""

    samples_per_insert: float = 0.0
    """Slices delivered for each step added; 0 for any number."""
    tolerance: float = 0.0
    """Slices by which deliveries may be ahead of the ratio, and behind it."""
    min_steps: int = 0
    """Steps stored before batches are delivered, and before steps count for the ratio."""

    @property
    def limits(self) -> bool:
        """Whether anything is ever held back."""
        return self.samples_per_insert > 0 or self.min_steps > 0


@dataclass(frozen=True, slots=True)
class RateStatus:
    """A limit and how it stands, at one moment."""

    rate: Rate
    steps_added: int
    """Steps added that count for the ratio."""
    slices_delivered: int
    recent_steps_added: int
    """Within the last minute, as is the next."""
    recent_slices_delivered: int
    owed_slices: float
    """Slices that learners are behind the ratio; negative if they are ahead of it."""
    adds_held: list[Held]
    """Actors that wait, those that have waited longest first."""
    batches_held: list[Held]
    """Learners that wait, those that have waited longest first."""
    adds_wait_for: str
    """What actors wait for, in words; empty if none waits."""
    batches_wait_for: str
    """What learners wait for, in words; empty if none waits."""


class SamplesPerInsert:
    """Delivers ``samples_per_insert`` slices for each step added, within a tolerance; holds back the side that is ahead.

    Its state is one number: the slices *owed* to learners, which grows by ``samples_per_insert`` with each step that is added and shrinks
    by one with each slice that is delivered. Adds are granted while that stays at most ``tolerance``, batches while it stays at least
    ``-tolerance``. Until ``min_steps`` are stored and something can be sampled, adds are always granted and batches never, and nothing is
    counted; the same holds again after the table was cleared. A change of the limit keeps what is owed, within the new tolerance.

    Nothing deadlocks: whatever is owed, one side may go on. Adds also are granted while nothing is owed, and batches while something is,
    although the episode or the batch is larger than the tolerance; so the tolerance is exceeded by one of them at most. If a learner has
    stopped although batches are ready for it, and another one has none, those that are ready count as delivered for adds.

    Several callers on one side take turns: while some wait, only the one that has waited longest is granted something, a learner one batch
    at a time. Thread-safe.

    Args:
        rate: the limit.
        name: the table, for logs.
        is_filled: function that returns whether this many steps are stored, and something can be sampled. Called with the limiter's lock
            held, so it must not call the limiter.
        notify: function that wakes those that wait. Called without the lock.
        clock: monotonic clock, in seconds.
    """

    def __init__(
        self,
        rate: Rate,
        *,
        name: str = "",
        is_filled: Callable[[int], bool],
        notify: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._is_filled = is_filled
        self._notify = notify
        self._clock = clock
        self._lock = threading.Lock()
        self._rate = rate
        self._active = rate.limits
        self._filled = False
        self._owed = 0.0
        self._reserved_steps = 0
        self._reserved_slices = 0
        self._reports = Reports()
        self._adds = WaitingSide()
        self._batches = WaitingSide()

    @property
    def active(self) -> bool:
        """Whether there is a limit. Otherwise everything is granted and nothing is counted."""
        return self._active

    @property
    def rate(self) -> Rate:
        """The limit in force."""
        return self._rate

    def change(self, rate: Rate) -> None:
        """Changes the limit, and wakes those that wait. What was counted so far is kept, unless there was no limit before."""
        with self._lock:
            if not self._active:
                self._owed, self._reserved_steps, self._reserved_slices = 0.0, 0, 0
                self._reports = Reports()
            # Steps that more min_steps would ask for are not there yet: then it fills first.
            self._filled = self._filled and self._is_filled(rate.min_steps)
            if not self._filled or not rate.samples_per_insert:
                self._owed = 0.0
            self._owed = min(max(self._owed, -rate.tolerance), rate.tolerance)
            self._rate, self._active = rate, rate.limits
        self._notify()

    def cleared(self) -> None:
        """Reports that the table was emptied: nothing is owed, and it fills first."""
        with self._lock:
            self._owed, self._filled = 0.0, False
        self._notify()

    # Queues

    def queue_insert(self, who: str) -> Waiter:
        """Returns the last place in the queue of adds."""
        with self._lock:
            return self._adds.join(who)

    def queue_batches(self, who: str) -> Waiter:
        """Returns the last place in the queue of learners."""
        with self._lock:
            return self._batches.join(who)

    def leave(self, waiter: Waiter) -> None:
        """Removes a place from its queue."""
        with self._lock:
            wakes = (self._adds.leave(waiter) or self._batches.leave(waiter)) and self._may_wake()
        if wakes:
            self._notify()

    # Adds

    def reserve_insert(self, steps: int, waiter: Waiter | None = None) -> bool:
        """Reserves the steps of one episode; returns whether it may be published now."""
        if not self._active:
            return True
        with self._lock:
            granted = self._adds.has_turn(waiter) and self._can_insert(steps)
            if granted:
                self._reserved_steps += steps
                self._adds.grant(waiter)
            elif waiter is not None:
                self._adds.refuse(waiter, steps, self._clock())
            return granted

    def inserted(self, steps: int) -> None:
        """Reports that an episode is published for which ``steps`` were reserved."""
        if not self._active:
            return
        with self._lock:
            self._reserved_steps = max(self._reserved_steps - steps, 0)
            if self._filled:
                self._owed += steps * self._rate.samples_per_insert
                self._reports.count(steps=steps, now=self._clock())
            wakes = self._may_wake()
        if wakes:
            self._notify()

    def cancel_insert(self, steps: int) -> None:
        """Reports that an episode for which ``steps`` were reserved is not published."""
        if not self._active:
            return
        with self._lock:
            # Not below 0: a limit that was turned on in the meantime did not count the reservation.
            self._reserved_steps = max(self._reserved_steps - steps, 0)
            wakes = self._may_wake()
        if wakes:
            self._notify()

    # Batches

    def reserve_batches(self, batches: int, slices: int, waiter: Waiter | None = None) -> int:
        """Reserves batches of ``slices`` slices each; returns how many of ``batches`` may be handed over now, 0 for none."""
        if not self._active:
            return batches
        wakes = False
        with self._lock:
            granted = self._grantable(batches, slices) if self._batches.has_turn(waiter) else 0
            if granted:
                # Those that wait take turns, one batch each.
                granted = 1 if len(self._batches) > 1 else granted
                self._reserved_slices += granted * slices
                self._batches.grant(waiter)
            elif waiter is not None:
                self._batches.refuse(waiter, slices, self._clock())
            # That a learner waits, or that another one has batches ready, may allow an add: see _can_insert.
            wakes = self._may_wake()
        if wakes:
            self._notify()
        return granted

    def delivered(self, batches: int, slices: int) -> None:
        """Reports that reserved batches of ``slices`` slices each were delivered."""
        if not self._active:
            return
        taken = batches * slices
        with self._lock:
            self._reserved_slices = max(self._reserved_slices - taken, 0)
            if self._filled:
                self._owed -= taken if self._rate.samples_per_insert else 0
                self._reports.count(slices=taken, now=self._clock())
            wakes = self._may_wake()
        if wakes:
            self._notify()

    def cancel_batches(self, batches: int, slices: int) -> None:
        """Reports that reserved batches of ``slices`` slices each will not be delivered."""
        if not self._active:
            return
        with self._lock:
            self._reserved_slices = max(self._reserved_slices - batches * slices, 0)
            wakes = self._may_wake()
        if wakes:
            self._notify()

    # How it stands

    def status(self) -> RateStatus:
        """Returns the limit and how it stands."""
        with self._lock:
            now, reports = self._clock(), self._reports
            recent_steps, recent_slices = reports.recent(now)
            adds, batches = self._adds.held(now), self._batches.held(now)
            return RateStatus(
                rate=self._rate,
                steps_added=reports.steps,
                slices_delivered=reports.slices,
                recent_steps_added=recent_steps,
                recent_slices_delivered=recent_slices,
                owed_slices=self._owed,
                adds_held=adds,
                batches_held=batches,
                adds_wait_for=self.explain_adds() if adds else "",
                batches_wait_for=self.explain_batches() if batches else "",
            )

    def explain_adds(self) -> str:
        """Returns what adds wait for."""
        return f"{self._explain_ratio()}; learners have to take {max(self._owed, 0):.0f} slices before the next steps are due"

    def explain_batches(self) -> str:
        """Returns what batches wait for."""
        rate = self._rate
        if not self._filled:
            return f"rate.min_steps = {rate.min_steps} steps that can be sampled have to be stored first; actors have to add more"
        return f"{self._explain_ratio()}; actors have to add steps before the next batch is due"

    def log_held(self) -> None:
        """Logs, once for each side, that a caller has been held back for long. Call it every few seconds."""
        if not self._active:
            return
        with self._lock:
            now = self._clock()
            add, batch = self._adds.to_log(now), self._batches.to_log(now)
        table = f" of table {self._name!r}" if self._name else ""
        if add is not None:
            logger.warning("the rate limit%s has held back adds of %s for %.0f s: %s", table, add.who, add.waiting_s, self.explain_adds())
        if batch is not None:
            what = batch.who, batch.waiting_s, self.explain_batches()
            logger.warning("the rate limit%s has held back batches for %s for %.0f s: %s", table, *what)

    def _explain_ratio(self) -> str:
        reports, rate = self._reports, self._rate
        return (
            f"{reports.slices} slices were delivered for {reports.steps} steps added, expected {rate.samples_per_insert:g} slices per step "
            f"within {rate.tolerance:g} slices"
        )

    def _can_insert(self, steps: int) -> bool:
        rate = self._rate
        if not rate.samples_per_insert or not self._check_filled():
            return True
        owed = self._owed + self._reserved_steps * rate.samples_per_insert
        if owed + steps * rate.samples_per_insert <= rate.tolerance or owed <= 0:
            return True
        # A learner without a batch cannot make the ones move that have stopped, and what those were given stays reserved.
        return len(self._batches) > 0 and owed - self._reserved_slices <= 0

    def _grantable(self, batches: int, slices: int) -> int:
        """Returns how many batches may be handed over now."""
        if not self._check_filled():
            return 0
        if not self._rate.samples_per_insert:
            return batches
        owed = self._owed - self._reserved_slices
        within = int((owed + self._rate.tolerance) // slices)
        return min(batches, max(within, 1 if owed >= 0 else 0))

    def _check_filled(self) -> bool:
        # Once it is filled it stays so until it is cleared: evictions only replace what is stored.
        if not self._filled and self._is_filled(self._rate.min_steps):
            self._filled = True
        return self._filled

    def _may_wake(self) -> bool:
        """Returns whether the first of a queue would be granted now what it was refused before."""
        add, batch = self._adds.first, self._batches.first
        return (add is not None and bool(add.asked) and self._can_insert(add.asked)) or (
            batch is not None and bool(batch.asked) and self._grantable(1, batch.asked) > 0
        )
