"""Those that a rate limit holds back: their order, and how long each has waited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from touchline_server.metrics.windows import Window

RETURN_S = 20.0
"""Time within which a caller that was refused asks again if it still waits: longer than a client waits between two attempts."""

MAX_NAMES = 1_000
"""Names of callers kept on each side. Clients choose them."""

RECENT_S = 60.0
"""Length of the recent past."""

LOG_AFTER_S = 30.0
"""Time after which it is logged that a caller is held back."""


@dataclass(eq=False, slots=True)
class Waiter:
    """A place in a queue. Belongs to the limiter that returned it."""

    who: str
    asked: int = 0
    """Steps, or slices of a batch, that it asked for last; 0 before it has asked."""


class Held(NamedTuple):
    """A caller that waits."""

    who: str
    waiting_s: float
    """Seconds since it was first refused without having been granted anything since."""


@dataclass(slots=True)
class _Refused:
    since: float
    asked_at: float


class WaitingSide:
    """The callers on one side of a rate limit, adds or batches, that it holds back. Its limiter's lock protects it."""

    def __init__(self) -> None:
        # Ordered: a dict keeps the order of insertion. The first one goes on first.
        self._queue: dict[Waiter, None] = {}
        self._refused: dict[str, _Refused] = {}
        self._logged = False

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def first(self) -> Waiter | None:
        """The waiter that goes on next; None if there is none."""
        return next(iter(self._queue), None)

    def join(self, who: str) -> Waiter:
        """Returns a new place, the last."""
        waiter = Waiter(who)
        self._queue[waiter] = None
        return waiter

    def leave(self, waiter: Waiter) -> bool:
        """Removes a place; returns whether it was in the queue."""
        return self._queue.pop(waiter, waiter) is None

    def has_turn(self, waiter: Waiter | None) -> bool:
        """Returns whether a caller may be granted something: it is first, or there is no queue."""
        return not self._queue or waiter is self.first

    def refuse(self, waiter: Waiter, asked: int, now: float) -> None:
        """Records what a waiter asked for and was refused."""
        waiter.asked = asked
        refused = self._refused.get(waiter.who)
        if refused is not None and now - refused.asked_at <= RETURN_S:
            refused.asked_at = now
        elif refused is not None or len(self._refused) < MAX_NAMES or self._forget(now):
            self._refused[waiter.who] = _Refused(now, now)

    def grant(self, waiter: Waiter | None) -> None:
        """Records that a waiter was granted something."""
        if waiter is not None:
            waiter.asked = 0
            self._refused.pop(waiter.who, None)

    def held(self, now: float) -> list[Held]:
        """Returns the callers that wait, those that have waited longest first."""
        self._forget(now)
        held = [Held(who, now - refused.since) for who, refused in self._refused.items()]
        return sorted(held, key=lambda one: -one.waiting_s)

    def to_log(self, now: float) -> Held | None:
        """Returns the caller that has waited longest once that is long; None if one was returned already."""
        longest = next(iter(self.held(now)), None)
        if longest is None:
            self._logged = False
        elif longest.waiting_s >= LOG_AFTER_S and not self._logged:
            self._logged = True
            return longest
        return None

    def _forget(self, now: float) -> bool:
        """Removes callers that did not return; returns whether there is space for another."""
        queued = {waiter.who for waiter in self._queue}
        gone = [who for who, refused in self._refused.items() if now - refused.asked_at > RETURN_S and who not in queued]
        for who in gone:
            del self._refused[who]
        return len(self._refused) < MAX_NAMES


class Reports:
    """Running totals of steps and slices, and their growth within the last minute. Its limiter's lock protects it."""

    def __init__(self) -> None:
        self.steps = 0
        """Steps added."""
        self.slices = 0
        """Slices delivered."""
        self._window = Window(RECENT_S)

    def count(self, *, steps: int = 0, slices: int = 0, now: float) -> None:
        """Adds to the totals."""
        if self._window.is_due(now):
            self._window.mark(now, (self.steps, self.slices))
        self.steps += steps
        self.slices += slices

    def recent(self, now: float) -> tuple[int, int]:
        """Returns the steps added and the slices delivered within the last minute."""
        steps, slices = self._window.recent(now, (self.steps, self.slices)).counts
        return int(steps), int(slices)
