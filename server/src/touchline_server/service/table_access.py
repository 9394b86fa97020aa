"""Which tables a call may use: those that exist, as far as its token is not confined to others."""

from __future__ import annotations

from typing import Any

import grpc

from touchline_server.errors import UnknownTableError
from touchline_server.service.access import Access
from touchline_server.tables.registry import TableRegistry, unknown_table
from touchline_server.tables.table import Table

Context = grpc.aio.ServicerContext[Any, Any]


class TableAccess:
    """Finds the tables of calls. Thread-safe.

    Args:
        registry: the tables that exist.
        access: the rules of access; None: every call may use every table.
    """

    def __init__(self, registry: TableRegistry, access: Access | None) -> None:
        self.registry = registry
        """All tables, also those that the call at hand may not use."""
        self._access = access if access is not None and access.confines else None

    def get(self, name: str, context: Context) -> Table:
        """Returns the table that a call names; the empty name is the default table's.

        Raises:
            AccessDeniedError: the call's token is confined to other tables. The error does not say whether this one exists.
            UnknownTableError: there is no table of this name. The text names the tables that the call may use.
        """
        if self._access is None:
            return self.registry.get(name)
        allowed = self._access.check_table(name, context.invocation_metadata() or ())
        try:
            return self.registry.get(name)
        except UnknownTableError:
            raise unknown_table(name, (table.name for table in self.registry if allowed is None or table.name in allowed)) from None

    def check(self, name: str, context: Context) -> None:
        """Raises AccessDeniedError if a call may not use a table of this name, which need not exist."""
        if self._access is not None:
            self._access.check_table(name, context.invocation_metadata() or ())

    def allowed(self, context: Context) -> frozenset[str] | None:
        """Returns the names of the tables that a call may use, which need not exist; None: every table."""
        return None if self._access is None else self._access.tables_of(context.invocation_metadata() or ())

    def visible(self, context: Context) -> list[Table]:
        """Returns the tables that a call may use, sorted by name: the default table first."""
        allowed = self.allowed(context)
        return sorted((table for table in self.registry if allowed is None or table.name in allowed), key=lambda table: table.name)
