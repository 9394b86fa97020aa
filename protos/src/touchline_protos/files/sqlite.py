"""SQLite files with a checksum in each row, for a spool and for a durable store. Each defines its own tables."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

PART_BYTES = 1 << 28
"""Maximum size of a blob in bytes. Larger values are stored in parts, as SQLite's limit, 10^9 bytes, is below that of an episode."""


class FormatError(Exception):
    """The file belongs to another application, or has another version of the tables.

    Args:
        version: version of the tables; None if they are another application's, or if the first page is damaged.
    """

    def __init__(self, version: int | None) -> None:
        super().__init__(version)  # unpickling and copying call the class with these arguments
        self.version = version

    def __str__(self) -> str:
        return "another application's tables" if self.version is None else f"format {self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SqliteFormat:
    """The identity and the tables of a kind of file. Immutable."""

    application_id: int
    """Number of the application, in ``PRAGMA application_id``."""
    version: int
    """Version of the tables in a new file, in ``PRAGMA user_version``."""
    later: tuple[int, ...] = ()
    """Later versions that a file may have as well: the same tables, with content that earlier readers would misunderstand."""
    page_bytes: int
    """Page size of a new file, in bytes."""
    statements: str
    """SQL statements that create the tables."""

    def check(self, connection: sqlite3.Connection) -> bool:
        """Returns whether the file has these tables; False if it is empty.

        Args:
            connection: connection to the file.

        Raises:
            FormatError: the file has another identity or version.
            sqlite3.Error: it is not a database, or damaged.
        """
        application, version = pragma(connection, "application_id"), pragma(connection, "user_version")
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not (application or version or tables):
            return False
        if application != self.application_id:
            raise FormatError(None)
        if version not in (self.version, *self.later):
            raise FormatError(version)
        return True

    def prepare(self, connection: sqlite3.Connection, first: Callable[[], object] = lambda: None) -> None:
        """Creates the tables in an empty file, all or none; only checks the identity of any other.

        Args:
            connection: connection to the file, in autocommit mode: transactions begin and end by statements.
            first: a function that writes the first rows of a new file, in the transaction that creates the tables.

        Raises:
            FormatError: the file has another identity or version.
            sqlite3.Error: it is not a database, is damaged, or cannot be written.
        """
        if self.check(connection):
            return
        # The file is new, or its process was killed before the transaction below.
        connection.execute(f"PRAGMA page_size = {self.page_bytes}")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(
            f"BEGIN; PRAGMA application_id = {self.application_id}; PRAGMA user_version = {self.version}; {self.statements}"
        )
        first()
        connection.execute("COMMIT")
        # Move the identity from the log into the file, which then keeps it even if the log is lost.
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def pragma(connection: sqlite3.Connection, name: str) -> int:
    """Returns the value of an integer ``PRAGMA``."""
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def row_checksum(*values: object) -> int:
    """Returns the CRC-32 of a row's values, in the order of its columns. Part of the file format: it must not change."""
    return zlib.crc32(repr(values).encode())


def parts(data: bytes | memoryview) -> Iterator[memoryview]:
    """Yields ``data`` in consecutive views of up to :data:`PART_BYTES` bytes: a single empty one if there is no data."""
    view = memoryview(data)
    for begin in range(0, max(len(view), 1), PART_BYTES):
        yield view[begin : begin + PART_BYTES]
