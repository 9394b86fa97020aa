"""What the service is made of. :mod:`.app` builds it, and the modules with the calls only use it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from touchline_server.config.sections import LimitsConfig
from touchline_server.metrics.server_metrics import Metrics
from touchline_server.service.add_pools import AddPools
from touchline_server.service.budgets import Budgets
from touchline_server.service.call_counters import CallCounters
from touchline_server.service.change_notifier import ChangeNotifier
from touchline_server.service.drain import Drain
from touchline_server.service.ingest import EpisodeIngest
from touchline_server.service.receiver import MessageReaders
from touchline_server.service.ring_pool import RingPool
from touchline_server.service.status_report import StatusReport
from touchline_server.service.table_access import TableAccess
from touchline_server.service.throttle import AddThrottle


@dataclass(frozen=True, slots=True)
class ServiceParts:
    """The parts of one running service."""

    tables: TableAccess
    """The tables that calls may use."""
    limits: LimitsConfig
    """Bounds on messages and requests."""
    budgets: Budgets
    """Bounds on the bytes in transit."""
    readers: MessageReaders
    """Readers that receive messages within the budgets."""
    calls: CallCounters
    """Bounds on the calls in progress."""
    changes: ChangeNotifier
    """Notifier of calls that wait for a table to change."""
    drain: Drain
    """Refusal of new calls and cancellation of endless ones when the server stops."""
    throttle: AddThrottle
    """Throttle of adds while learners wait for batches."""
    ingest: EpisodeIngest
    """Path of received episodes into the store."""
    rings: RingPool
    """Rings in shared memory for learners on this host."""
    add_pools: AddPools
    """Threads that store and clear, for each table."""
    table_pool: ThreadPoolExecutor
    """Thread that creates and drops tables, one at a time."""
    sample_pool: ThreadPoolExecutor
    """Threads that gather batches and read episodes back."""
    metrics: Metrics
    """Counts of what happens in all this."""
    status: StatusReport
    """Snapshots of all this."""

    def close(self) -> None:
        """Ends the threads; blocks until they have finished their work."""
        self.add_pools.close()
        self.table_pool.shutdown()
        self.sample_pool.shutdown()
