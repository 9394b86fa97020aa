"""The snapshot of a server: what its parts do at one moment. Command line, page and metrics show this one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from touchline_protos import PROTOCOL_VERSION
from touchline_protos.types.status import EpisodeSummary, LatencyStatus, PoolStatus, ServerState, ServerStatus, ServingState, TableStatus
from touchline_server.errors import ReplayError
from touchline_server.metrics.server_metrics import ServerMetrics
from touchline_server.metrics.threads import EVENT_LOOP
from touchline_server.service.budgets import Budgets
from touchline_server.service.call_counters import CallCounters
from touchline_server.service.callers import address_of
from touchline_server.service.drain import Drain
from touchline_server.service.ring_pool import RingPool
from touchline_server.service.table_report import EpisodeSummaries, report_of, table_status
from touchline_server.store.memory import resident_bytes
from touchline_server.tables.registry import TableRegistry

TICK_S = 1.0
"""Interval at which the present is marked."""

SHARED_S = 0.4
"""Age up to which a snapshot is given to others as well: however many watch, there are at most two a second."""


class StatusReport:
    """Makes snapshots of a server. Lives in the event loop.

    Args:
        tables: all tables.
        budgets: bounds on the bytes in transit.
        calls: counts of the calls in progress.
        drain: whether the server is stopping.
        rings: the rings in shared memory.
        metrics: the counts of what happens; None if nothing is counted.
        pools: the threads, by the name of their group.
        clock: monotonic clock, in seconds.
    """

    def __init__(
        self,
        tables: TableRegistry,
        budgets: Budgets,
        calls: CallCounters,
        drain: Drain,
        rings: RingPool,
        *,
        metrics: ServerMetrics | None,
        pools: Callable[[], Mapping[str, Sequence[ThreadPoolExecutor]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tables = tables
        self._budgets = budgets
        self._calls = calls
        self._drain = drain
        self._rings = rings
        self._metrics = metrics
        self._pools = pools
        self._clock = clock
        self._started = clock()
        self._episodes = EpisodeSummaries()
        self._last: ServerStatus | None = None
        self._last_state = ServingState.UNSPECIFIED
        self._last_at = 0.0

    def snapshot(self, *, newest_episodes: int = 0, shared: bool = False) -> ServerStatus:
        """Returns what the server does.

        Args:
            newest_episodes: most recent episodes to name for each table.
            shared: whether a snapshot will do that was made for another caller just before.
        """
        now, state = self._clock(), self._state()
        if not shared or self._last is None or now >= self._last_at + SHARED_S or state is not self._last_state:
            self._last, self._last_at, self._last_state = self._make(now, state), now, state
        if not newest_episodes:
            return self._last
        return replace(self._last, tables=tuple(replace(one, newest=self._newest(one, newest_episodes)) for one in self._last.tables))

    def tick(self) -> None:
        """Marks the present, from which the last minute is counted. Call it every second once the tables are restored."""
        if self._metrics is not None:
            self._metrics.tick(report_of(table) for table in self._tables)
            now = self._clock()
            for table in self._tables:
                if table.committer is not None:
                    table.committer.database_journal.syncs.tick(now)

    async def run(self) -> None:
        """Marks the present every second, and how late that is. Runs until it is cancelled."""
        due = self._clock() + TICK_S
        while True:
            await asyncio.sleep(due - self._clock())
            now = self._clock()
            if self._metrics is not None:
                self._metrics.loop_delay.observe(max(now - due, 0.0))
            self.tick()
            due = max(due + TICK_S, now)

    def _make(self, now: float, state: ServingState) -> ServerStatus:
        tables = sorted(self._tables.known(), key=lambda table: table.name)
        metrics = self._metrics
        if metrics is None:
            statuses = tuple(table_status(table, None, (), now) for table in tables)
            return ServerStatus(server=self._server(now, state, statuses), tables=statuses, time_unix_s=time.time())
        if state is not ServingState.RESTORING:
            metrics.settle([report_of(table) for table in self._tables])
            now = self._clock()
        learners = metrics.learners.all()
        statuses = tuple(table_status(table, metrics.tables.get(table.name), learners, now) for table in tables)
        actors = (actor for name in sorted(metrics.tables) for actor in metrics.tables[name].actors.status(now, address_of))
        return ServerStatus(
            server=self._server(now, state, statuses),
            tables=statuses,
            actors=tuple(actors),
            learners=tuple(replace(learner, address=address_of(learner.address)) for learner in metrics.learners.status(now)),
            refusals=metrics.refusals.status(),
            time_unix_s=time.time(),
        )

    def _pool_statuses(self, shares: Mapping[str, float], threads: Mapping[str, int]) -> tuple[PoolStatus, ...]:
        """Returns the threads by what they do; those that the metrics know and that are no pool have no queue."""
        pools = self._pools()
        names = dict.fromkeys((EVENT_LOOP, *pools, *threads))
        return tuple(_pool_status(name, pools.get(name, ()), threads.get(name, 0), shares.get(name, 0.0)) for name in names)

    def _server(self, now: float, state: ServingState, tables: Sequence[TableStatus]) -> ServerState:
        from touchline_server import __version__

        budgets, calls, metrics = self._budgets, self._calls, self._metrics
        shares = metrics.threads.shares(now) if metrics is not None else {}
        return ServerState(
            version=__version__,
            protocol_version=PROTOCOL_VERSION,
            state=state,
            uptime_s=now - self._started,
            memory_bytes=resident_bytes(),
            ring_bytes=self._rings.size_bytes,
            device_bytes=sum(one.size_bytes for one in tables if one.device.startswith("cuda")),
            cpu_share=shares.get("", 0.0),
            pools=self._pool_statuses(shares, metrics.threads.threads if metrics is not None else {}),
            loop_delay=metrics.loop_delay.status(now) if metrics is not None else LatencyStatus(),
            methods=metrics.methods() if metrics is not None else (),
            connections=calls.replay.connections,
            calls=calls.replay.now,
            streams=calls.streams.now,
            receive_bytes=budgets.messages.used + budgets.uploads.used,
            receive_limit_bytes=budgets.messages.total + budgets.uploads.total,
            send_bytes=budgets.sending.used,
            send_limit_bytes=budgets.sending.total,
        )

    def _state(self) -> ServingState:
        if self._drain.begun:
            return ServingState.DRAINING
        return ServingState.SERVING if self._tables.restored else ServingState.RESTORING

    def _newest(self, status: TableStatus, count: int) -> tuple[EpisodeSummary, ...]:
        metrics = self._metrics.tables.get(status.table) if self._metrics is not None else None
        now = self._clock()
        try:
            return self._episodes.newest(
                self._tables.get(status.table), count, lambda episode_id: metrics.age_of(episode_id, now) if metrics is not None else -1.0
            )
        except ReplayError:
            return ()  # dropped, or still being restored


def _pool_status(name: str, pools: Sequence[Any], threads: int, cpu_share: float) -> PoolStatus:
    """Returns how a group of threads does. What is read of a pool has no public name, and has had this one since Python 3.9."""
    if not pools:
        return PoolStatus(name, threads or 1, 0, 0, cpu_share)
    started = sum(len(pool._threads) for pool in pools)
    idle = sum(pool._idle_semaphore._value for pool in pools)
    return PoolStatus(name, started, max(started - idle, 0), sum(pool._work_queue.qsize() for pool in pools), cpu_share)


def confine(status: ServerStatus, tables: Collection[str] | None, *, whole: bool) -> ServerStatus:
    """Returns the part of a snapshot that concerns some tables.

    Args:
        status: the snapshot.
        tables: names of the tables; None: all.
        whole: whether to keep the refusals that concern no table; they may name callers of other tables.
    """
    if tables is None:
        return status
    return replace(
        status,
        tables=tuple(one for one in status.tables if one.table in tables),
        actors=tuple(one for one in status.actors if one.table in tables),
        learners=tuple(
            replace(one, tables=tuple(name for name in one.tables if name in tables))
            for one in status.learners
            if any(name in tables for name in one.tables)
        ),
        refusals=tuple(one for one in status.refusals if (whole if one.table is None else one.table in tables)),
    )
