"""The tables of a server by name: those of its configuration, and those created while it runs."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from touchline_protos import Counts
from touchline_protos.log_lines import get_logger
from touchline_server.config.sections import check_table_name
from touchline_server.config.settings import Config, ConfigError
from touchline_server.errors import InvalidArgumentError, ReplayError, RestoringError, UnknownTableError
from touchline_server.store.subscriptions import Subscriptions
from touchline_server.tables.table import Table

if TYPE_CHECKING:
    from touchline_server.durability.table_list import TableList

logger = get_logger(__name__)

RestoreProgress = Callable[[str, int, int], None]
"""Called with the name of the table that is being restored, the rows read so far, and all its rows."""


class TableRegistry:
    """The tables of a server. Thread-safe: tables are looked up without a lock, and created and dropped one at a time.

    Tables that are created at run time are remembered in ``storage.data_dir``, if there is one.

    Args:
        default: the table that calls mean unless they name one. Its name is empty.
        config: the server's configuration, with the tables that :meth:`restore` opens; by default none.
        accept_eviction: see :class:`Table`; for every further table.
    """

    def __init__(self, default: Table, config: Config | None = None, *, accept_eviction: bool = False) -> None:
        self.default = default
        """The table with the empty name."""
        self._config = config if config is not None else default.config
        self._accept_eviction = accept_eviction
        self._tables: dict[str, Table] = {}
        self._created: dict[str, dict[str, Any]] = {}
        """Keys of the tables created at run time, by name."""
        self._list: TableList | None = None
        self._restored = False
        self._opening: Table | None = None
        """Table whose durable store is being read."""
        self._changing = threading.Lock()
        """Held while a table is created or dropped, and while they are restored."""
        self.members = Subscriptions()
        """Listeners to tables that are created and dropped."""
        self.add(default)

    def __len__(self) -> int:
        return len(self._tables)

    def __iter__(self) -> Iterator[Table]:
        return iter(tuple(self._tables.values()))

    def get(self, name: str) -> Table:
        """Returns a table by its name; the empty name is the default table's.

        Raises:
            UnknownTableError: there is no table of this name. The text names the tables that exist.
        """
        table = self._tables.get(name)
        if table is None:
            raise unknown_table(name, self._tables)
        return table

    def add(self, table: Table) -> None:
        """Adds a table.

        Raises:
            ValueError: there is one of this name already.
        """
        if self._tables.setdefault(table.name, table) is not table:
            raise ValueError(f"table: {table.name!r} exists already, expected a new name")

    @property
    def restored(self) -> bool:
        """Whether the durable store of every table has been read."""
        return self._restored

    def known(self) -> list[Table]:
        """Returns all tables, and the one that is being opened, if there is one."""
        tables, opening = list(self), self._opening
        return [*tables, opening] if opening is not None and opening not in tables else tables

    def is_created(self, name: str) -> bool:
        """Returns whether a table was created at run time."""
        return name in self._created

    # Start and end

    def restore(self, progress: RestoreProgress | None = None) -> None:
        """Opens the default table, those of the configuration, and those created before. Does nothing if they are open.

        Raises:
            ConfigError, ReplayError: as :meth:`Table.restore`; the text names the table. Nothing is open then.
        """
        with self._changing:
            if self._restored:
                return
            try:
                _restore(self.default, progress)
                for name, config in self._configured():
                    table = self._opened(name, config, progress)
                    self.add(table)
                self._restored = True
            except BaseException:
                self._close()
                raise

    def check_restored(self) -> None:
        """Raises RestoringError until the durable store of every table has been read."""
        if not self._restored:
            for table in (*self, *([self._opening] if self._opening is not None else ())):
                table.check_restored()
            raise RestoringError("the tables are being opened; try again when they are")

    def close(self) -> None:
        """Commits adds in progress, and releases the folders of all tables."""
        with self._changing:
            self._close()

    # Tables that come and go

    def create(self, name: str, keys: Mapping[str, Any]) -> Table:
        """Creates a table. Creating it again with the same keys does nothing.

        Args:
            name: name of the table; see :func:`check_table_name`.
            keys: keys as in ``[tables.NAME]`` of the configuration; the default table has the others.

        Returns:
            The table, open and empty.

        Raises:
            InvalidArgumentError: the name cannot be one or is taken, or a key or a value is wrong; the text names it.
            ReplayError: its folder cannot be used.
        """
        self.check_restored()
        try:
            check_table_name(name)
        except ValueError as error:
            raise InvalidArgumentError(f"table: {name!r}, {error}") from None
        with self._changing:
            if name in self._tables:
                if self._created.get(name) == dict(keys):
                    return self._tables[name]
                raise InvalidArgumentError(f"table: {name!r} exists already, expected a new name")
            config = self._config_of(name, keys)
            if self._list is not None and config.durable_dir and self._list.has_folder(name):
                raise InvalidArgumentError(
                    f"table: {name!r} is not open, but {config.durable_dir} exists: put [tables.{name}] into the configuration to serve "
                    "its episodes, or remove the folder"
                )
            # Remembered first: a table that a crash leaves half created is completed, empty, by the next start.
            self._remember({**self._created, name: dict(keys)})
            try:
                table = self._opened(name, config, None)
            except BaseException:
                self._remember({other: kept for other, kept in self._created.items() if other != name})
                self._remove_folder(name)
                raise
            self.add(table)
            logger.info("created table %r: %s", name, dict(keys) or "like the default table")
        self.members.notify()
        return table

    def change(self, name: str, keys: Mapping[str, Any]) -> None:
        """Changes a table's rate limit, and wakes the callers that wait for it.

        A table that was created at run time has it after a restart as well, any other table its configured one.

        Args:
            name: name of the table; empty for the default table.
            keys: ``{"rate": {"samples_per_insert": 4.0}}``, as in ``[tables.NAME]`` of the configuration. The other keys of the limit stay.

        Raises:
            UnknownTableError: there is no table of this name.
            InvalidArgumentError: a key is not one of the rate limit, or a value is wrong; the text names it.
        """
        self.check_restored()
        with self._changing:
            table = self.get(name)
            fixed = [key for key in keys if key != "rate"]
            if fixed or not isinstance(keys.get("rate"), Mapping):
                raise InvalidArgumentError(f"{fixed[0] if fixed else 'rate'}: only keys of rate can be changed while the server runs")
            try:
                config = table.config.with_rate(keys["rate"])
            except ConfigError as error:
                raise InvalidArgumentError(str(error)) from None
            if name in self._created:
                created = self._created[name]
                rate = {**created.get("rate", {}), **keys["rate"]}
                self._remember({**self._created, name: {**created, "rate": rate}})
            table.set_rate(config)
            logger.info("rate limit of table %r: %s", name, table.rate.rate)

    def drop(self, name: str) -> Counts:
        """Removes a table: its memory, and its folder. Streams of it and calls that wait for it end with UnknownTableError.

        Adds that it has accepted are answered first. A table of the configuration comes back, empty, at the next start.

        Returns:
            The table's counts before.

        Raises:
            UnknownTableError: there is no table of this name.
            InvalidArgumentError: it is the default table.
            StorageFailedError: its folder cannot be removed. The table is gone, and comes back with its episodes at the next start.
        """
        self.check_restored()
        with self._changing:
            table = self.get(name)
            if table is self.default:
                raise InvalidArgumentError("table: '' is the default table, which cannot be dropped; clear it")
            counts = table.counts()
            del self._tables[name]
            self.members.notify()
            table.drop()
            # The folder goes before its entry in the list: a crash in between leaves an empty table, and no folder that no table uses.
            self._remove_folder(name)
            if name in self._created:
                self._remember({other: keys for other, keys in self._created.items() if other != name})
            logger.info("dropped table %r: %s", name, counts)
        return counts

    def _configured(self) -> Iterator[tuple[str, Config]]:
        """Yields the name and the configuration of every table that a start opens, except the default one's."""
        data_dir = self._config.storage.data_dir
        if data_dir:
            from touchline_server.durability.table_list import TableList

            self._list = TableList(data_dir, hold=not self.default.config.durable_dir)
            self._created = self._list.read()
            for name in self._list.orphans({*self._config.tables, *self._created}):
                logger.warning("%s holds a table that is not in the configuration: it is not served", Path(data_dir, name))
        for name in self._config.tables:
            yield name, self._config.for_table(name)
        for name, keys in self._created.items():
            if name in self._config.tables:
                logger.info("table %r was created at run time and is in the configuration now, which holds", name)
            else:
                yield name, self._config_of(name, keys)
        self._created = {name: keys for name, keys in self._created.items() if name not in self._config.tables}

    def _config_of(self, name: str, keys: Mapping[str, Any]) -> Config:
        try:
            return self._config.override(tables={name: keys}).for_table(name)
        except ConfigError as error:
            raise InvalidArgumentError(str(error)) from None

    def _opened(self, name: str, config: Config, progress: RestoreProgress | None) -> Table:
        """Returns a new table, restored. Raises what that raises, with the table's name in front."""
        try:
            table = self._opening = Table(name, config, accept_eviction=self._accept_eviction)
            try:
                _restore(table, progress)
            except BaseException:
                table.close()
                raise
            finally:
                self._opening = None
        except (ReplayError, ConfigError) as error:
            raise type(error)(f"table {name!r}: {error}") from error
        return table

    def _remember(self, tables: dict[str, dict[str, Any]]) -> None:
        if self._list is not None:
            self._list.write(tables)
        self._created = tables

    def _remove_folder(self, name: str) -> None:
        if self._list is not None and (folder := self._list.mark_dropped(name)) is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def _close(self) -> None:
        for table in self:
            table.close()
        if self._list is not None:
            self._list.close()


def unknown_table(name: str, known: Iterable[str]) -> UnknownTableError:
    """Returns the error of a call that names no table; it names those that the caller may use."""
    names = ["the empty name of the default table" if known_name == "" else repr(known_name) for known_name in sorted(known)]
    return UnknownTableError(f"table: {name!r} does not exist, expected {' or '.join(names)}")


def _restore(table: Table, progress: RestoreProgress | None) -> None:
    table.restore(None if progress is None else lambda read, total: progress(table.name, read, total))
