"""Threads that store and clear: of its own for each table, so that a table whose disk is slow holds up no other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

from touchline_server.tables.registry import TableRegistry
from touchline_server.tables.table import Table


class AddPools:
    """The pools of threads of all tables. Threads start when they are first needed. Lives in the event loop.

    Args:
        tables: the tables.
        workers: number of threads of each.
    """

    def __init__(self, tables: TableRegistry, workers: int) -> None:
        self._tables = tables
        self._workers = workers
        # A dropped table is collected, its pool with it, and the pool's threads then end by themselves.
        self._pools: WeakKeyDictionary[Table, ThreadPoolExecutor] = WeakKeyDictionary()
        self.decoding = ThreadPoolExecutor(workers, thread_name_prefix="touchline-decode")
        """Threads that find out which table a large message is for. They wait for nothing, so no table's messages are behind another's."""

    @property
    def are_several(self) -> bool:
        """Whether there is more than one table."""
        return len(self._tables) > 1

    def of(self, table: Table | None) -> ThreadPoolExecutor:
        """Returns the threads of one table; None is the default table. They may wait for its disk, its rate limit or its readers."""
        table = table if table is not None else self._tables.default
        pool = self._pools.get(table)
        if pool is None:
            pool = self._pools[table] = ThreadPoolExecutor(self._workers, thread_name_prefix=f"touchline-add-{table.name or 'default'}")
        return pool

    def of_tables(self) -> list[ThreadPoolExecutor]:
        """Returns the pools that store and clear, of all tables."""
        return list(self._pools.values())

    def close(self) -> None:
        """Ends the threads; blocks until they have finished their work."""
        for pool in (self.decoding, *self._pools.values()):
            pool.shutdown()
