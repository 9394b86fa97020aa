"""The tables of a server by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from touchline_server.errors import UnknownTableError
from touchline_server.store.subscriptions import Subscriptions
from touchline_server.tables.table import Table


class TableRegistry:
    """The tables of a server. Thread-safe: tables are looked up without a lock.

    Args:
        default: the table that calls mean unless they name one. Its name is empty.
    """

    def __init__(self, default: Table) -> None:
        self.default = default
        """The table with the empty name."""
        self._tables: dict[str, Table] = {}
        self._subscriptions = Subscriptions()
        self.add(default)

    def __iter__(self) -> Iterator[Table]:
        return iter(tuple(self._tables.values()))

    def get(self, name: str) -> Table:
        """Returns a table by its name; the empty name is the default table's.

        Raises:
            UnknownTableError: there is none of this name. The text names those that there are.
        """
        table = self._tables.get(name)
        if table is None:
            others = "".join(f" or {other!r}" for other in sorted(self._tables) if other)
            raise UnknownTableError(f"table: {name!r} does not exist, expected the empty name of the default table{others}")
        return table

    def add(self, table: Table) -> None:
        """Adds a table.

        Raises:
            ValueError: there is one of this name already.
        """
        if self._tables.setdefault(table.name, table) is not table:
            raise ValueError(f"table: {table.name!r} exists already, expected a new name")
        table.subscriptions.subscribe(self._subscriptions.notify)

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Calls ``listener`` after every change of any table; see :meth:`Subscriptions.subscribe`."""
        return self._subscriptions.subscribe(listener)

    def check_restored(self) -> None:
        """Raises RestoringError until the durable store of every table has been read."""
        for table in self:
            table.check_restored()
