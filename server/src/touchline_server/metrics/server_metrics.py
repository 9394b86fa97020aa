"""The metrics of a server: what its parts report to, and what a snapshot is made from."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

from touchline_protos.types.status import MethodStatus, WaitCause
from touchline_server.metrics.actors import Actor, Metadata, Played
from touchline_server.metrics.histogram import Histogram
from touchline_server.metrics.learners import Learner, Learners
from touchline_server.metrics.refusals import Refusals
from touchline_server.metrics.table_metrics import Stored, TableMetrics
from touchline_server.metrics.threads import ThreadTimes
from touchline_server.metrics.waits import WaitSum

MAX_METHODS = 32
"""Methods whose calls are counted: those of the services. Callers can make up others, which are not."""

NOTHING = Stored(0, 0, 0, 0, 0)

THREADS = {
    "touchline-add": "add",
    "touchline-decode": "decode",
    "touchline-sample": "sample",
    "touchline-ring": "ring",
    "touchline-commit": "commit",
    "touchline-table": "table",
    "touchline-http": "http",
}
"""Group of the threads whose names begin like this."""


class Caller(NamedTuple):
    """Who makes a call."""

    address: str
    metadata: Metadata


class Report(NamedTuple):
    """What a table reports at each tick."""

    name: str
    stored: Stored
    next_id: int
    take_draw: Callable[[], Any]
    """Returns the last draw since the tick before, with ``episode_id`` and ``policy_version``, [n] int64 each; None without one."""


class Metrics(Protocol):
    """What happens in a server is reported here. Lives in the event loop, except for what says otherwise."""

    enabled: bool
    """Whether anything is counted, so that what only metrics need can be left out."""

    def stored(self, table: str, caller: Caller, played: Played, *, duplicate: bool) -> None:
        """Reports an episode that is stored, now or earlier. May be called from any thread."""
        ...

    def refused_episode(self, table: str, caller: Caller, actor: str, error: Exception, reason: str) -> None:
        """Reports an episode that was refused."""
        ...

    def refused(self, error: Exception, reason: str, who: str) -> None:
        """Reports a call that was refused, unless its error was reported already."""
        ...

    def waited(self, table: str, actor: str, cause: WaitCause | None, waited_s: float) -> None:
        """Reports that an actor has waited; without a cause, the table has counted it already, by :meth:`waiting`."""
        ...

    @contextmanager
    def waiting(self, table: str, actor: str, cause: WaitCause) -> Iterator[None]:
        """Counts the block as a wait of an actor; without a name, of one that is not known yet: only the table counts it then."""
        ...

    def opened(self, learner: Learner) -> None:
        """Reports a sampling stream."""
        ...

    def closed(self, learner: Learner) -> None:
        """Reports the end of a sampling stream."""
        ...

    def caller(self, key: Hashable, make: Callable[[], Learner]) -> Learner:
        """Returns the callers of Sample at an address."""
        ...

    def ended(self, method: str, duration_s: float, *, failed: bool) -> None:
        """Reports a call that has ended."""
        ...


class NullMetrics:
    """Counts nothing."""

    enabled = False

    def stored(self, table: str, caller: Caller, played: Played, *, duplicate: bool) -> None:
        """See :class:`Metrics`."""

    def refused_episode(self, table: str, caller: Caller, actor: str, error: Exception, reason: str) -> None:
        """See :class:`Metrics`."""

    def refused(self, error: Exception, reason: str, who: str) -> None:
        """See :class:`Metrics`."""

    def waited(self, table: str, actor: str, cause: WaitCause | None, waited_s: float) -> None:
        """See :class:`Metrics`."""

    @contextmanager
    def waiting(self, table: str, actor: str, cause: WaitCause) -> Iterator[None]:
        """See :class:`Metrics`."""
        yield

    def opened(self, learner: Learner) -> None:
        """See :class:`Metrics`."""

    def closed(self, learner: Learner) -> None:
        """See :class:`Metrics`."""

    def caller(self, key: Hashable, make: Callable[[], Learner]) -> Learner:
        """See :class:`Metrics`."""
        return make()

    def ended(self, method: str, duration_s: float, *, failed: bool) -> None:
        """See :class:`Metrics`."""


class ServerMetrics:
    """Counts what happens in a server; see :class:`Metrics`.

    Args:
        budget_waits: sum of the waits for the receive budget.
        clock: monotonic clock, in seconds.
    """

    enabled = True

    def __init__(self, budget_waits: WaitSum, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget_waits = budget_waits
        self._clock = clock
        self._begun = False
        self.tables: dict[str, TableMetrics] = {}
        """Counts of each table, by its name."""
        self.learners = Learners()
        self.refusals = Refusals()
        self.loop_delay = Histogram()
        """How late the event loop wakes."""
        self.threads = ThreadTimes(THREADS)
        self._calls: dict[str, tuple[Histogram, list[int]]] = {}
        """Durations of the calls of each method, and how many failed."""
        self._finished: deque[tuple[str, Caller, Played, bool]] = deque()
        """Episodes that were reported and are not counted yet: another thread's reports."""

    # Reports

    def stored(self, table: str, caller: Caller, played: Played, *, duplicate: bool) -> None:
        """See :class:`Metrics`."""
        self._finished.append((table, caller, played, duplicate))  # one step, so it needs no lock

    def refused_episode(self, table: str, caller: Caller, actor: str, error: Exception, reason: str) -> None:
        """See :class:`Metrics`."""
        of = self._actor(table, actor, caller)
        if of is not None:
            of.refused += 1
        self._count_refusal(error, reason, table, actor or caller.address)

    def refused(self, error: Exception, reason: str, who: str) -> None:
        """See :class:`Metrics`."""
        self._count_refusal(error, reason, None, who)

    def waited(self, table: str, actor: str, cause: WaitCause | None, waited_s: float) -> None:
        """See :class:`Metrics`."""
        of = self.tables.get(table)
        if of is not None:
            if cause is not None:
                of.actor_waits[cause].add(waited_s)
            of.actors.of(actor, self._clock()).waits.add(waited_s)

    @contextmanager
    def waiting(self, table: str, actor: str, cause: WaitCause) -> Iterator[None]:
        """See :class:`Metrics`."""
        of = self.tables.get(table)
        if of is None:
            yield
            return
        own = of.actors.of(actor, self._clock()).waits.counting() if actor else nullcontext()
        with of.actor_waits[cause].counting(), own:
            yield

    def opened(self, learner: Learner) -> None:
        """See :class:`Metrics`."""
        self.learners.open(learner)

    def closed(self, learner: Learner) -> None:
        """See :class:`Metrics`."""
        self.learners.close(learner)

    def caller(self, key: Hashable, make: Callable[[], Learner]) -> Learner:
        """See :class:`Metrics`."""
        learner, dropped = self.learners.caller(key, make)
        learner.seen_at = self._clock()
        if dropped is not None:
            self._keep(dropped)
        return learner

    def ended(self, method: str, duration_s: float, *, failed: bool) -> None:
        """See :class:`Metrics`."""
        known = self._calls.get(method)
        if known is None:
            if len(self._calls) >= MAX_METHODS:
                return
            known = self._calls[method] = (Histogram(), [0])
            known[0].tick(self._clock())
        known[0].observe(duration_s)
        known[1][0] += failed

    # The present

    def tick(self, reports: Iterable[Report]) -> None:
        """Marks the present, from which the last minute is counted. Call it every second, and before a snapshot.

        Args:
            reports: what each table reports; the counts of tables that do not are dropped.
        """
        now = self._clock()
        self.settle(reports := list(reports))
        for learner in self.learners.tick(now):
            self._keep(learner)
        learners = self.learners.all()
        for report in reports:
            table = self.tables[report.name]
            draw = report.take_draw()
            if draw is not None:
                table.look(now, draw.episode_id, draw.policy_version)
            table.tick(now, report.stored, report.next_id, learners)
        for histogram in (self.loop_delay, *(calls for calls, _ in self._calls.values())):
            histogram.tick(now)
        self.threads.tick(now)

    def settle(self, reports: Iterable[Report]) -> None:
        """Counts what other threads have reported, for the tables that there are."""
        now = self._clock()
        names = set()
        for report in reports:
            names.add(report.name)
            if report.name not in self.tables:
                # What a table held at the start was not added since; a table that comes later was empty.
                first, next_id = (NOTHING, 0) if self._begun else (report.stored, report.next_id)
                self.tables[report.name] = table = TableMetrics(report.name, first, next_id, now, budget_waits=self._budget_waits)
                table.tick(now, first, next_id, ())
        self._begun = True
        for gone in self.tables.keys() - names:
            del self.tables[gone]
        self.refusals.keep(names)
        for learner in self.learners.take_closed():
            self._keep(learner)
        for _ in range(len(self._finished)):
            table_name, caller, played, duplicate = self._finished.popleft()
            actor = self._actor(table_name, played.actor, caller)
            if actor is not None:
                if duplicate:
                    actor.duplicates += 1
                else:
                    actor.stored(played, now)

    def methods(self) -> tuple[MethodStatus, ...]:
        """Returns the calls that have ended, by method."""
        now = self._clock()
        return tuple(
            MethodStatus(method=method, failed=failed[0], latency=calls.status(now))
            for method, (calls, failed) in sorted(self._calls.items())
        )

    def _actor(self, table: str, name: str, caller: Caller) -> Actor | None:
        of = self.tables.get(table)
        if of is None:
            return None
        actor = of.actors.of(name, self._clock())
        actor.address, actor.metadata = caller
        return actor

    def _keep(self, learner: Learner) -> None:
        now = self._clock()
        for name in set(learner.tables):
            if name in self.tables:
                self.tables[name].leave(learner, now)

    def _count_refusal(self, error: Exception, reason: str, table: str | None, who: str) -> None:
        # An error passes several places on its way to the caller; the first one knows most.
        if not getattr(error, "_counted", False):
            error._counted = True  # type: ignore[attr-defined]
            self.refusals.count(reason, table, str(error), who)
