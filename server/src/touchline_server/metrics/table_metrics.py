"""The counts of one table: what came in and went out, who waits for it, and how old what is sampled is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from touchline_protos.types.status import WINDOWS_S, DeliveredStatus, FlowStatus, Transport, WaitCause, WaitStatus
from touchline_server.metrics.actors import Actors
from touchline_server.metrics.learners import Learner
from touchline_server.metrics.waits import ACTOR_CAUSES, LEARNER_CAUSES, WaitSum
from touchline_server.metrics.windows import Window

TRANSPORTS = (Transport.RING, Transport.STREAM, Transport.UNARY, Transport.DEVICE)

MAX_MOMENTS = 4096
"""Moments that are kept for the age of episodes. The older half is thinned when there are more."""


class Stored(NamedTuple):
    """What a table has taken in since it was created."""

    episodes: int
    rows: int
    bytes: int
    rows_evicted: int
    episodes_evicted: int


class Deliveries:
    """Totals of the batches that learners have, of one transport."""

    __slots__ = ("batches", "bytes", "rows", "slices")

    def __init__(self) -> None:
        self.batches = self.slices = self.rows = 0
        self.bytes = 0.0

    def add(self, learner: Learner, number: int) -> None:
        """Adds what a learner has of its table with this number."""
        slices = learner.slices[number]
        self.batches += learner.batches if slices else 0
        self.slices += slices
        self.rows += slices * (learner.horizon + 1)
        self.bytes += learner.bytes[number]


class TableMetrics:
    """Counts of one table. Lives in the event loop.

    Args:
        name: the table's name.
        stored: what it has taken in at this moment.
        next_id: id of the next episode.
        now: the present, by the metrics' clock.
        budget_waits: sum of the waits for the receive budget, for all tables: they come before the table is known.
    """

    def __init__(self, name: str, stored: Stored, next_id: int, now: float, *, budget_waits: WaitSum) -> None:
        self.name = name
        self.actors = Actors(name)
        self.actor_waits = {cause: WaitSum() for cause in ACTOR_CAUSES} | {WaitCause.BUDGET: budget_waits}
        self._learner_waits = dict.fromkeys(LEARNER_CAUSES, 0.0)
        """Waits of learners that have left."""
        self._left = {transport: Deliveries() for transport in TRANSPORTS}
        """Batches of learners that have left."""
        self._began = now
        self._first = stored
        self._windows = [Window(span_s) for span_s in WINDOWS_S]
        self._moments = [now]
        self._next_ids = [next_id]
        """Id of the next episode at each of the moments."""
        self._samples = Window(60.0, marks=60)
        self._sampled: list[float] = [0.0, 0.0, 0.0, 0.0]
        """Sums over looks at what was sampled: looks, mean policy versions, looks at what has an age, mean ages."""

    # Counting

    def leave(self, learner: Learner, now: float) -> None:
        """Keeps the counts of a learner that has disconnected."""
        for number, table in enumerate(learner.tables):
            if table == self.name:
                if learner.transport in self._left:
                    self._left[learner.transport].add(learner, number)
                for cause in LEARNER_CAUSES:
                    self._learner_waits[cause] += learner.wait_s(cause, now)

    def tick(self, now: float, stored: Stored, next_id: int, learners: Sequence[Learner]) -> None:
        """Marks the present. Call it every second."""
        totals = self._totals(now, stored, learners)
        for window in self._windows:
            window.mark(now, totals)
        if next_id != self._next_ids[-1]:
            self._moments.append(now)
            self._next_ids.append(next_id)
            if len(self._moments) > MAX_MOMENTS:
                # The newer half stays exact: an error of the older ones is small in proportion to their age.
                del self._moments[1 : MAX_MOMENTS // 2 : 2]
                del self._next_ids[1 : MAX_MOMENTS // 2 : 2]
        self.actors.tick(now)

    def look(self, now: float, episode_ids: np.ndarray, policy_versions: np.ndarray) -> None:
        """Takes the slices of one draw, [n] int64 each, as an example of what is sampled at present."""
        self._samples.mark(now, self._sampled)
        self._sampled[0] += 1
        self._sampled[1] += float(policy_versions.mean())
        at = np.searchsorted(self._next_ids, episode_ids, side="right")
        known = at[at > 0]
        if len(known):
            moments = np.append(self._moments, now)
            self._sampled[2] += 1
            self._sampled[3] += now - float(moments[known].mean())

    # How it stands

    def flows(self, now: float, stored: Stored, learners: Sequence[Learner]) -> tuple[FlowStatus, ...]:
        """Returns the flows of each window, and since the start."""
        totals = self._totals(now, stored, learners)
        flows = []
        for span_s, window in zip(WINDOWS_S, self._windows, strict=True):
            recent = window.recent(now, totals)
            flows.append(_flow(span_s, recent.span_s, recent.counts))
        return (*flows, _flow(0.0, now - self._began, totals))

    def waits(self, now: float, stored: Stored, learners: Sequence[Learner]) -> tuple[WaitStatus, ...]:
        """Returns the waits of the last minute, by side and cause."""
        totals = self._totals(now, stored, learners)
        _, recent = self._windows[0].recent(now, totals)
        count = len(ACTOR_CAUSES) + len(LEARNER_CAUSES)
        waiting = [self.actor_waits[cause].waiting for cause in ACTOR_CAUSES]
        waiting += [sum(learner.clock.waiting is cause for learner in learners) for cause in LEARNER_CAUSES]
        causes = [*((False, cause) for cause in ACTOR_CAUSES), *((True, cause) for cause in LEARNER_CAUSES)]
        return tuple(
            WaitStatus(learners=side, cause=cause, waited_s=max(waited_s, 0.0), waiting=callers, total_s=total_s)
            for (side, cause), waited_s, callers, total_s in zip(causes, recent[-count:], waiting, totals[-count:], strict=True)
            if total_s or callers
        )

    def age_of(self, episode_id: int, now: float) -> float:
        """Returns the time since an episode was stored; -1 if it was before the start."""
        at = bisect_right(self._next_ids, episode_id)
        if not at:
            return -1.0
        return now - self._moments[at] if at < len(self._moments) else 0.0

    def sampled(self, now: float) -> tuple[float | None, float]:
        """Returns the mean policy version and the mean age of what was sampled in the last minute; None and -1 without any."""
        _, (looks, versions, aged, ages) = self._samples.recent(now, self._sampled)
        return versions / looks if looks else None, ages / aged if aged else -1.0

    def _totals(self, now: float, stored: Stored, learners: Iterable[Learner]) -> list[float]:
        """Returns all that is counted in windows, in one list: stored, delivered by transport, waits by side and cause."""
        sums = {transport: Deliveries() for transport in TRANSPORTS}
        waits = dict(self._learner_waits)
        for transport, left in self._left.items():
            of = sums[transport]
            of.batches, of.slices, of.rows, of.bytes = left.batches, left.slices, left.rows, left.bytes
        for learner in learners:
            for number, table in enumerate(learner.tables):
                if table == self.name:
                    if learner.transport in sums:
                        sums[learner.transport].add(learner, number)
                    for cause in LEARNER_CAUSES:
                        waits[cause] += learner.wait_s(cause, now)
        totals: list[float] = [one - first for one, first in zip(stored, self._first, strict=True)]
        for of in sums.values():
            totals += of.batches, of.slices, of.rows, of.bytes
        totals += [self.actor_waits[cause].total_s(now) for cause in ACTOR_CAUSES]
        totals += [waits[cause] for cause in LEARNER_CAUSES]
        return totals


def _flow(window_s: float, span_s: float, counts: Sequence[float]) -> FlowStatus:
    episodes, rows, size_bytes, rows_evicted, episodes_evicted = map(int, counts[: len(Stored._fields)])
    delivered = []
    for number, transport in enumerate(TRANSPORTS):
        at = len(Stored._fields) + 4 * number
        batches, slices, sampled_rows, sampled_bytes = (round(count) for count in counts[at : at + 4])
        if batches:
            delivered.append(DeliveredStatus(transport, batches, slices, sampled_rows, sampled_bytes))
    return FlowStatus(window_s, span_s, episodes, rows, size_bytes, rows_evicted, episodes_evicted, tuple(delivered))
