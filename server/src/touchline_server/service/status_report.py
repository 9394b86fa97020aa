"""The snapshot of a server: what its parts do at one moment. Command line, page and metrics show this one."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace

from touchline_protos import PROTOCOL_VERSION
from touchline_protos.types.status import EpisodeSummary, ServerState, ServerStatus, ServingState, TableStatus
from touchline_server.errors import ReplayError
from touchline_server.service.budgets import Budgets
from touchline_server.service.call_counters import CallCounters
from touchline_server.service.drain import Drain
from touchline_server.service.ring_producer import RingPool
from touchline_server.service.table_report import EpisodeSummaries, table_status
from touchline_server.store.memory import resident_bytes
from touchline_server.tables.registry import TableRegistry

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tables = tables
        self._budgets = budgets
        self._calls = calls
        self._drain = drain
        self._rings = rings
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

    def _make(self, now: float, state: ServingState) -> ServerStatus:
        tables = sorted(self._tables.known(), key=lambda table: table.name)
        statuses = tuple(table_status(table) for table in tables)
        return ServerStatus(
            server=self._server(now, state, sum(one.size_bytes for one in statuses if one.device.startswith("cuda"))),
            tables=statuses,
            time_unix_s=time.time(),
        )

    def _server(self, now: float, state: ServingState, device_bytes: int) -> ServerState:
        from touchline_server import __version__

        budgets, calls = self._budgets, self._calls
        return ServerState(
            version=__version__,
            protocol_version=PROTOCOL_VERSION,
            state=state,
            uptime_s=now - self._started,
            memory_bytes=resident_bytes(),
            ring_bytes=self._rings.size_bytes,
            device_bytes=device_bytes,
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
        try:
            return self._episodes.newest(self._tables.get(status.table), count)
        except ReplayError:
            return ()  # dropped, or still being restored


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
