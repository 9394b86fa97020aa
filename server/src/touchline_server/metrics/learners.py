"""Who takes batches, and how long each waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

from touchline_protos.types.status import LATENCY_BOUNDS_S, MAX_NAMED, LatencyStatus, LearnerStatus, Transport, WaitCause
from touchline_server.metrics.actors import Metadata, client_version
from touchline_server.metrics.histogram import Histogram, latency_status
from touchline_server.metrics.waits import LEARNER_CAUSES, WaitClock
from touchline_server.metrics.windows import Window

RECENT_S = 60.0
"""Time after which the callers of Sample at an address that do not call again are forgotten."""

MAX_CALLERS = 1024
"""Addresses of callers of Sample that are kept."""


class Measured(NamedTuple):
    """Waits that a learner measures itself."""

    buckets: Sequence[int]
    """Counts of the waits by their duration, as of a :class:`Histogram`; batches that were ready are in the first."""
    sum_s: float
    """Sum of the waits."""


class Ahead(NamedTuple):
    """What there is ahead of a learner's use."""

    credits: int = 0
    """Batches that it has granted and that were not sent yet; with a ring, free slots."""
    pending_bytes: int = 0
    """Bytes of batches that are made and not taken yet."""
    measured: Measured | None = None
    """Waits as the learner measures them; None if it does not."""


class Learner:
    """One learner's counts. One thread at a time counts; any other may read.

    Args:
        tables: names of the tables that it samples.
        address: address of the learner.
        metadata: metadata of its call.
        batch_size: slices in a batch.
        horizon: transitions in a slice.
    """

    def __init__(self, tables: Sequence[str], *, address: str, metadata: Metadata, batch_size: int, horizon: int) -> None:
        self.tables = tuple(tables)
        self.address = address
        self.metadata = metadata
        self.batch_size = batch_size
        self.horizon = horizon
        self.learner_id = 0
        self.transport = Transport.UNSPECIFIED
        self.ring_refused = ""
        """Why there is no ring."""
        self.closed = False
        """Whether its stream has ended."""
        self.counting = False
        """Whether a thread still counts, which may go on for a moment after the stream has ended."""
        self.batches = 0
        """Batches delivered."""
        self.clock = WaitClock()
        """Waits of a sampling stream."""
        self.waits = Histogram()
        self.ahead: Callable[[], Ahead] = Ahead
        """Returns what there is ahead of its use."""
        self.began = self.seen_at = time.monotonic()
        self.slices = [0] * len(self.tables)
        """Slices delivered, by table."""
        self.bytes = [0.0] * len(self.tables)
        """Bytes of these."""
        self._window = Window(RECENT_S, marks=12)

    def delivered(self, batches: int, split: Sequence[int], size_bytes: int) -> None:
        """Counts batches that the learner has.

        Args:
            batches: number of batches.
            split: slices of each batch, by table.
            size_bytes: bytes of each batch.
        """
        self.batches += batches
        if len(split) == 1:
            self.slices[0] += batches * split[0]
            self.bytes[0] += batches * size_bytes
            return
        total = sum(split)
        for number, slices in enumerate(split):
            self.slices[number] += batches * slices
            self.bytes[number] += batches * size_bytes * slices / total

    def waited_for(self, batches: int) -> None:
        """Ends a wait, if the learner waits: of these batches, the first ended it, and the others were ready."""
        self.waits.observe(self.clock.end())
        if batches > 1:
            self.waits.observe(0.0, batches - 1)

    def waited_s(self, now: float) -> float:
        """Returns the seconds for which it has waited so far."""
        return sum(self.wait_s(cause, now) for cause in LEARNER_CAUSES)

    def wait_s(self, cause: WaitCause, now: float) -> float:
        """Returns the seconds for which it has waited so far, by what kept the server from giving a batch."""
        measured = self.ahead().measured
        if measured is None or cause is WaitCause.DATA:
            return self.clock.total_s(cause, now)
        # The clock says since when no batch is ready, the learner for how long it has missed one: it may still use the last one.
        rate_s = min(self.clock.total_s(WaitCause.RATE, now), measured.sum_s)
        return rate_s if cause is WaitCause.RATE else measured.sum_s - rate_s

    def tick(self, now: float) -> None:
        """Marks the present, from which the last minute is counted."""
        if self._window.is_due(now):
            self._window.mark(now, self._totals(now))

    def recent(self, now: float) -> tuple[float, tuple[float, ...]]:
        """Returns the length of the last minute so far, and what happened in it: batches, seconds waited, waits by their buckets."""
        return self._window.recent(now, self._totals(now))

    def status(self, now: float) -> LearnerStatus:
        """Returns the counts."""
        span_s, (batches, waited_s, *_) = self.recent(now)
        ahead = self.ahead()
        return LearnerStatus(
            learner_id=self.learner_id,
            address=self.address,
            client_version=client_version(self.metadata),
            tables=self.tables,
            transport=self.transport,
            ring_refused=self.ring_refused,
            batch_size=self.batch_size,
            horizon=self.horizon,
            connected_s=now - self.began,
            credits=ahead.credits,
            pending_bytes=ahead.pending_bytes,
            batches=self.batches,
            batches_per_s=batches / span_s if span_s else 0.0,
            wait=self.wait_status(now),
            waits_share=min(waited_s / span_s, 1.0) if span_s else 0.0,
        )

    def wait_status(self, now: float) -> LatencyStatus:
        """Returns how long it waited for a batch."""
        _, (_, _, *recent) = self.recent(now)
        return latency_status(self._buckets(), self.waited_s(now), recent)

    def _buckets(self) -> Sequence[int]:
        measured = self.ahead().measured
        return measured.buckets if measured is not None else self.waits.buckets

    def _totals(self, now: float) -> tuple[float, ...]:
        return self.batches, self.waited_s(now), *self._buckets()


class Learners:
    """The learners that are connected. Lives in the event loop."""

    def __init__(self) -> None:
        self._streams: dict[int, Learner] = {}
        self._callers: dict[Hashable, Learner] = {}
        """Callers of Sample by their address."""
        self._closed: list[Learner] = []
        """Streams that have ended and whose counts were not taken over yet."""
        self._next_id = 0

    def __iter__(self) -> Iterator[Learner]:
        """Iterates over the learners that are connected."""
        return iter((*self._streams.values(), *self._callers.values()))

    def all(self) -> list[Learner]:
        """Returns the learners whose counts were not taken over yet."""
        return [*self, *self._closed]

    def open(self, learner: Learner) -> None:
        """Adds a sampling stream."""
        self._next_id += 1
        learner.learner_id = self._next_id
        self._streams[learner.learner_id] = learner
        learner.tick(time.monotonic())

    def close(self, learner: Learner) -> None:
        """Removes a sampling stream."""
        if self._streams.pop(learner.learner_id, None) is not None:
            learner.closed = True
            self._closed.append(learner)

    def take_closed(self) -> list[Learner]:
        """Returns the streams that have ended and that no thread counts for any more; they are forgotten."""
        ended = [learner for learner in self._closed if not learner.counting]
        self._closed = [learner for learner in self._closed if learner.counting]
        return ended

    def caller(self, key: Hashable, make: Callable[[], Learner]) -> tuple[Learner, Learner | None]:
        """Returns the callers of Sample at an address, and those that had to make way for it.

        Args:
            key: the address and what is sampled.
            make: function that makes them if they are new.
        """
        learner = self._callers.pop(key, None)
        dropped = None
        if learner is None:
            learner = make()
            learner.transport = Transport.UNARY
            learner.tick(time.monotonic())
            if len(self._callers) >= MAX_CALLERS:
                dropped = self._callers.pop(next(iter(self._callers)))
        self._callers[key] = learner
        return learner, dropped

    def tick(self, now: float) -> list[Learner]:
        """Marks the present for all; returns the callers of Sample that have not called for long, which are forgotten."""
        gone = [key for key, learner in self._callers.items() if now - learner.seen_at > RECENT_S]
        forgotten = [self._callers.pop(key) for key in gone]
        for learner in self:
            learner.tick(now)
        return forgotten

    def status(self, now: float) -> Iterator[LearnerStatus]:
        """Yields the learners, those with the most batches first, and then one entry for all others, if there are any."""
        ordered = sorted(self, key=lambda learner: -learner.batches)
        for learner in ordered[:MAX_NAMED]:
            yield learner.status(now)
        others = [learner.status(now) for learner in ordered[MAX_NAMED:]]
        if others:
            yield LearnerStatus(
                address="others",
                tables=tuple(sorted({table for one in others for table in one.tables})),
                credits=sum(one.credits for one in others),
                pending_bytes=sum(one.pending_bytes for one in others),
                batches=sum(one.batches for one in others),
                batches_per_s=sum(one.batches_per_s for one in others),
                wait=latency_status(
                    [sum(counts) for counts in zip(*(one.wait.buckets for one in others), strict=True)],
                    sum(one.wait.sum_s for one in others),
                    [0] * (len(LATENCY_BOUNDS_S) + 1),
                ),
                waits_share=sum(one.waits_share for one in others) / len(others),
                others=len(others),
            )
