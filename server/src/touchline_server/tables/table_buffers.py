"""The tables of a buffer in process: each table is a buffer itself."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

from touchline_protos import Counts
from touchline_server.selectors.options import NO_OPTIONS, LawOptions
from touchline_server.tables.registry import TableRegistry
from touchline_server.tables.table import SampleSpec, Table


class TableBuffers:
    """Base of :class:`touchline_server.ReplayBuffer`: a buffer for each table.

    Args:
        table: the table of this buffer.
        registry: all tables.
    """

    def __init__(self, table: Table, registry: TableRegistry) -> None:
        self.table = table
        """The table. The service works on it, past this class."""
        self.registry = registry
        """All tables. The service works on them, past this class."""
        self._buffers: dict[str, Any] = {table.name: self}
        """The buffers made so far, by name; the same object in each of them."""

    @property
    def tables(self) -> Mapping[str, Self]:
        """A buffer for each table by its name; the empty name is the default table's."""
        buffers = {table.name: self._buffer_of(table) for table in self.registry}
        for name in self._buffers.keys() - buffers:
            del self._buffers[name]  # dropped over the wire
        return MappingProxyType(buffers)

    def create_table(self, name: str, **keys: Any) -> Self:
        """Creates a table, and remembers it in ``storage.data_dir``, if there is one. With the same keys again it does nothing.

        Args:
            name: name of lower-case letters, digits, ``-`` and ``_``.
            keys: keys as in ``[tables.NAME]`` of the configuration: ``buffer_size=100_000``; the default table has the others.

        Returns:
            The table's buffer.

        Raises:
            InvalidArgumentError: the name cannot be one or is taken, or a key or a value is wrong; the text names it.
            ReplayError: its folder cannot be used.
        """
        return self._buffer_of(self.registry.create(name, keys))

    def drop_table(self, name: str) -> Counts:
        """Removes a table, its episodes and its folder. A table of the configuration comes back, empty, at the next start.

        Returns:
            The table's counts before.

        Raises:
            UnknownTableError: there is no table of this name.
            InvalidArgumentError: it is the default table.
        """
        counts = self.registry.drop(name)
        self._buffers.pop(name, None)
        return counts

    def _new_buffer(self, table: Table) -> Self:
        """Returns a buffer of another table."""
        raise NotImplementedError

    def spec(
        self,
        *,
        batch_size: int | None = None,
        horizon: int | None = None,
        law: str | None = None,
        options: LawOptions = NO_OPTIONS,
        pad: str | None = None,
    ) -> SampleSpec:
        """Returns what to draw, with the configured values for what is None; see :meth:`Table.spec`."""
        return self.table.spec(batch_size=batch_size, horizon=horizon, law=law, options=options, pad=pad)

    def _buffer_of(self, table: Table) -> Self:
        buffer: Self | None = self._buffers.get(table.name)
        if buffer is None or buffer.table is not table:
            buffer = self._buffers[table.name] = self._new_buffer(table)
            buffer._buffers = self._buffers
        return buffer
