"""SQLite files with checksums in their rows: what a spool's and a durable store's have in common. Each says itself what its tables are."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

PART_BYTES = 1 << 28
"""Longest blob: SQLite's own limit of 10^9 bytes is below what an episode may have, so what is longer is kept in parts."""


class FormatError(Exception):
    """A file that is of another application, or of another version of its tables.

    Args:
        version: of the tables; None where they are another application's, or where the first page is damaged.
    """

    def __init__(self, version: int | None) -> None:
        super().__init__(version)  # a copy is made from what is given here
        self.version = version

    def __str__(self) -> str:
        return "another application's tables" if self.version is None else f"format {self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SqliteFormat:
    """What a file holds, and how it says so."""

    application_id: int
    """In ``PRAGMA application_id``."""
    version: int
    """Of the tables, in ``PRAGMA user_version``."""
    page_bytes: int
    """Of a file that is made."""
    statements: str
    """That make the tables."""

    def check(self, connection: sqlite3.Connection) -> bool:
        """Checks what a file says that it is, and returns whether anything was ever written to it.

        Raises:
            FormatError: it is something else.
            sqlite3.Error: SQLite cannot make sense of it.
        """
        application, version = pragma(connection, "application_id"), pragma(connection, "user_version")
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not (application or version or tables):
            return False
        if application != self.application_id:
            raise FormatError(None)
        if version != self.version:
            raise FormatError(version)
        return True

    def prepare(self, connection: sqlite3.Connection, first: Callable[[], object] = lambda: None) -> None:
        """Checks what a file says that it is, and makes the tables, all or none, where it is empty.

        Args:
            connection: whose transactions are begun and ended by statements.
            first: writes the first rows of a file that is made, in the transaction that makes it.

        Raises:
            FormatError: it is something else.
            sqlite3.Error: SQLite cannot make sense of it, or cannot write it.
        """
        if self.check(connection):
            return
        # New, or of a process that was killed while it made one.
        connection.execute(f"PRAGMA page_size = {self.page_bytes}")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(
            f"BEGIN; PRAGMA application_id = {self.application_id}; PRAGMA user_version = {self.version}; {self.statements}"
        )
        first()
        connection.execute("COMMIT")
        # From now on the file says what it is, whatever becomes of the log.
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def pragma(connection: sqlite3.Connection, name: str) -> int:
    """Returns a number that SQLite keeps under a name."""
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def row_checksum(*values: object) -> int:
    """Returns the CRC-32 of a row's values."""
    return zlib.crc32(repr(values).encode())


def parts(data: bytes | memoryview) -> Iterator[memoryview]:
    """Yields views of bytes, none longer than :data:`PART_BYTES`; at least one, empty where they are."""
    view = memoryview(data)
    for begin in range(0, max(len(view), 1), PART_BYTES):
        yield view[begin : begin + PART_BYTES]
